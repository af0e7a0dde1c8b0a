"""What a checkpoint holds, and that it comes back as it was."""

from __future__ import annotations

import collections
import dataclasses
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from train_states import state_of

from ptjax.errors import InputError
from ptjax.trainer import checkpoints
from ptjax.trainer.checkpoints import Checkpoints
from ptjax.trainer.identity import make_identity
from ptjax.training.step import TrainState


def tune(task: str) -> None:
    """Of whose calls the identities are."""


def test_state_and_progress_come_back(tmp_path):
    state, checkpoints = state_of(8), Checkpoints(epath.Path(tmp_path))
    identity = make_identity(tune, {"task": "a"}, {})
    checkpoints.save(4, state, {"step": 4, "best_value": None}, identity)
    checkpoints.wait()
    found = checkpoints.restore(lambda progress: state)
    assert found is not None
    restored, progress = found
    assert (checkpoints.latest, progress) == (4, {"step": 4, "best_value": None})
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        if jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)
        np.testing.assert_array_equal(ours, theirs)
    checkpoints.check_identity(identity)
    with pytest.raises(InputError, match=r"tune\.task = 'a', now 'b'"):
        checkpoints.check_identity(make_identity(tune, {"task": "b"}, {}))
    checkpoints.close()


def test_under_4_megabytes_at_xxl(tmp_path):
    """P = 100, D = 4096: the prompt and Adafactor's state of it, and nothing of the backbone."""
    checkpoints = Checkpoints(epath.Path(tmp_path))
    checkpoints.save(1, state_of(4096), {"step": 1}, {})
    checkpoints.close()
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert 0.9 * 2 * 100 * 4096 * 4 < size < 4e6  # compressed, as far as noise can be


IDENTITY = make_identity(tune, {"task": "a", "seed": 3}, {})


def save_two(directory: Path) -> tuple[TrainState, TrainState]:
    """Checkpoints of step 2 and 4 of one run: prompts [100, 2] that differ."""
    older, newer = (dataclasses.replace(state_of(2), step=jnp.int32(step)) for step in (2, 4))
    checkpoints = Checkpoints(epath.Path(directory))
    for step, state in ((2, older), (4, newer)):
        progress = {"step": step, "best_value": step / 8, "standings": [{"best_step": step}]}
        checkpoints.save(step, state, progress, IDENTITY)
    checkpoints.close()
    return older, newer


def content(state: TrainState) -> list[np.ndarray]:
    data = dataclasses.replace(state, key=jax.random.key_data(state.key))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(data)]


def reopen(directory: Path, like: TrainState):
    """(state, progress) as a new start finds them."""
    checkpoints = Checkpoints(epath.Path(directory))
    try:
        checkpoints.check_identity(IDENTITY)
        return checkpoints.restore(lambda progress: like)
    finally:
        checkpoints.close()


def mutations(data: bytes, rng: random.Random) -> Iterator[bytes | None]:
    """Removed, emptied, cut, and with one bit flipped."""
    place = rng.randrange(len(data))
    flipped = data[place] ^ 1 << rng.randrange(8)
    yield from (None, b"", data[: len(data) // 2])
    yield data[:place] + bytes([flipped]) + data[place + 1 :]


def write(path: Path, data: bytes | None) -> None:
    path.unlink() if data is None else path.write_bytes(data)


@pytest.mark.slow
# Orbax leaves coroutines behind when a read fails that its own metadata led astray.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_case_5_4_no_damaged_file_loads_another_state(tmp_path, caplog):
    """Every file of the newest checkpoint: what was saved comes back, or the one before, said."""
    older, newer = map(content, save_two(tmp_path / "run"))
    like, rng, outcomes = state_of(2), random.Random(0), collections.Counter()
    for file in sorted((tmp_path / "run" / "4").rglob("*")):
        if not file.is_file():
            continue
        for data in mutations(file.read_bytes(), rng):
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
            shutil.copytree(tmp_path / "run", tmp_path / "copy")
            write(tmp_path / "copy" / file.relative_to(tmp_path / "run"), data)
            caplog.clear()
            restored = reopen(tmp_path / "copy", like)
            assert restored is not None
            state, progress = restored
            step = progress["step"]
            wanted = newer if step == 4 else older
            assert progress["standings"] == [{"best_step": step}], (file, data)
            for one, other in zip(content(state), wanted, strict=True):
                np.testing.assert_array_equal(one, other, err_msg=str(file))
            said = [record for record in caplog.records if "is damaged" in record.getMessage()]
            assert len(said) == (step == 2), file
            assert (tmp_path / "copy" / "4").exists() == (step == 4)
            outcomes[step] += 1
    assert min(outcomes[2], outcomes[4]) > 10, outcomes


def test_case_5_4_a_changed_number_in_the_json_is_noticed(tmp_path):
    """Which no parser can tell from another run's."""
    save_two(tmp_path)
    for file in ("progress", "identity"):
        path = tmp_path / "4" / file / "data.json"
        path.write_text(path.read_text().replace("3", "5").replace("0.5", "0.6"))
    restored = reopen(tmp_path, state_of(2))
    assert restored is not None and restored[1]["step"] == 2


def test_case_5_4_when_none_is_whole_it_says_so_and_removes_nothing(tmp_path):
    save_two(tmp_path)
    (tmp_path / "2" / "state" / "manifest.ocdbt").write_bytes(b"")
    (tmp_path / "4" / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(
        InputError, match=r"every checkpoint is damaged \(step 4: .* holds no arrays; step 2: "
    ) as none:
        reopen(tmp_path, state_of(2))
    assert len(str(none.value).splitlines()) == 1
    assert {"2", "4"} <= {path.name for path in tmp_path.iterdir()}


def test_a_checkpoint_of_an_older_version_has_no_checksums_and_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SUMS", "unknown")
    _, newer = save_two(tmp_path)
    monkeypatch.undo()
    like = state_of(2)
    reopened = Checkpoints(epath.Path(tmp_path))
    restored = reopened.restore(lambda progress: like)
    reopened.close()
    assert restored is not None and restored[1]["step"] == 4
    for one, other in zip(content(restored[0]), content(newer), strict=True):
        np.testing.assert_array_equal(one, other)
