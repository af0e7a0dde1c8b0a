"""Train states to save."""

from __future__ import annotations

import jax
import jax.numpy as jnp

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
