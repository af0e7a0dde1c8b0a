"""What a checkpoint holds, and that it comes back as it was."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from ptjax.checkpoint import Checkpoints
from ptjax.errors import InputError
from ptjax.training.optimizer import Adafactor
from ptjax.training.step import TrainState, init_train_state


def state_of(width: int) -> TrainState:
    """A prompt [100, D] of which no byte compresses away, as after some steps."""
    noise = jax.random.normal(jax.random.key(1), (100, width), jnp.float32)
    trainable = {"prompt": {"prompt": noise}}
    state = init_train_state(trainable, Adafactor().make(), jax.random.key(0))
    filled = jax.tree.map(
        lambda x: noise if x.shape == noise.shape else x, (state.trainable, state.opt_state)
    )
    return TrainState(state.step, *filled, state.key)


def test_state_and_progress_come_back(tmp_path):
    state, checkpoints = state_of(8), Checkpoints(epath.Path(tmp_path))
    checkpoints.save(4, state, {"step": 4, "best_value": None}, {"task": "a"})
    checkpoints.wait()
    restored, progress = checkpoints.restore(lambda progress: state) or (None, None)
    assert (checkpoints.latest, progress) == (4, {"step": 4, "best_value": None})
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        if jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)
        np.testing.assert_array_equal(ours, theirs)
    checkpoints.check_identity({"task": "a"})
    with pytest.raises(InputError, match="task = 'a', not 'b'"):
        checkpoints.check_identity({"task": "b"})
    checkpoints.close()


def test_under_4_megabytes_at_xxl(tmp_path):
    """P = 100, D = 4096: the prompt and Adafactor's state of it, and nothing of the backbone."""
    checkpoints = Checkpoints(epath.Path(tmp_path))
    checkpoints.save(1, state_of(4096), {"step": 1}, {})
    checkpoints.close()
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert 0.9 * 2 * 100 * 4096 * 4 < size < 4e6  # compressed, as far as noise can be
