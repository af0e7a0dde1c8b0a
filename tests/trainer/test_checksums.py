"""Checksums of checkpoints, and how a checkpoint's problems are said."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from plain_members import plain_state

from ptjax.errors import InputError
from ptjax.trainer import checksums
from ptjax.trainer.checkpoints import Checkpoints
from ptjax.trainer.checksums import find_damage, hash_json, sum_arrays
from ptjax.training.step import TrainState


def sums_of(array: np.ndarray) -> list[int]:
    """The two sums of one array, in a state."""
    state = plain_state()
    alone = dataclasses.replace(state, trainable={"prompt": jnp.asarray(array)})
    return sum_arrays(alone)[1]


@pytest.mark.parametrize("shape", [(6,), (2, 3), (3, 2), (1, 2, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.int8, jnp.bfloat16])
def test_two_entries_that_changed_places_are_noticed(shape, dtype):
    entries = np.arange(1, 7)
    whole = sums_of(entries.reshape(shape).astype(dtype))
    for one, other in itertools.combinations(range(6), 2):
        changed = entries.copy()
        changed[[one, other]] = changed[[other, one]]
        swapped = sums_of(changed.reshape(shape).astype(dtype))
        assert swapped[0] == whole[0] and swapped[1] != whole[1], (one, other)


def test_each_bit_counts():
    array = np.linspace(0.5, 2.0, 6, dtype=np.float32).reshape(2, 3)
    whole = sums_of(array)
    for place, bit in itertools.product(range(6), (0, 8, 16, 23, 31)):
        bits = array.view(np.uint32).copy().reshape(-1)
        bits[place] ^= np.uint32(1 << bit)
        changed = sums_of(bits.view(np.float32).reshape(2, 3))
        assert changed[0] != whole[0] and changed[1] != whole[1]


def test_the_sums_are_those_of_the_bits_and_their_odd_factors():
    """Older checkpoints hold them, so they must stay as they are."""
    array = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
    factors = [(i * 2_654_435_761) % (1 << 32) | 1 for i in range(6)]
    assert sums_of(array) == [21, sum(map(int.__mul__, range(1, 7), factors)) % (1 << 32)]


def test_a_random_key_counts_too():
    state = plain_state()
    other = dataclasses.replace(state, key=jax.random.key(1))
    assert [a == b for a, b in zip(sum_arrays(state), sum_arrays(other), strict=True)] == [
        True, True, False,
    ]  # fmt: skip


def test_the_json_is_hashed_with_the_sums_of_the_arrays():
    whole = hash_json({"a": 1, "b": 2}, {"c": 3}, [[1, 2]])
    assert whole == hash_json({"b": 2, "a": 1}, {"c": 3}, [[1, 2]])
    others = [
        hash_json({"a": 1, "b": 3}, {"c": 3}, [[1, 2]]),
        hash_json({"a": 1, "b": 2}, {"c": 4}, [[1, 2]]),
        hash_json({"a": 1, "b": 2}, {"c": 3}, [[1, 3]]),
    ]
    assert len({whole, *others}) == 4 and len(whole) == 64


# A checkpoint on the disk


def save(directory: Path, *steps: int) -> TrainState:
    state, checkpoints = plain_state(), Checkpoints(epath.Path(directory))
    for step in steps:
        checkpoints.save(step, state, {"step": step}, {"settings": {}})
    checkpoints.close()
    return state


def biggest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=os.path.getsize)


def test_damage_of_the_arrays_is_found_before_orbax_reads_them(tmp_path, monkeypatch):
    save(tmp_path, 1)
    folder = epath.Path(tmp_path / "1" / "state")
    assert find_damage(folder, remote=False) == ""
    [manifest] = tmp_path.glob("1/state/manifest.ocdbt")
    data = manifest.read_bytes()
    manifest.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    said = find_damage(folder, remote=False)
    assert said and len(said.splitlines()) == 1
    manifest.unlink()
    assert find_damage(folder, remote=False) == f"{folder} holds no arrays"


def test_only_so_much_is_read_twice(tmp_path, monkeypatch):
    """Of two damaged arrays the first is read, whose size is the limit."""
    save(tmp_path, 1)
    monkeypatch.setattr(checksums, "READ_TWICE", 0)
    assert find_damage(epath.Path(tmp_path / "1" / "state"), remote=False) == ""


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_metadata_that_cannot_be_read_are_damage(tmp_path, text):
    save(tmp_path, 1)
    (tmp_path / "1" / "state" / "_METADATA").write_text(text, "latin-1")
    assert find_damage(epath.Path(tmp_path / "1" / "state"), remote=False)
    (tmp_path / "1" / "state" / "_METADATA").unlink()
    assert "_METADATA" in find_damage(epath.Path(tmp_path / "1" / "state"), remote=False)


def test_arrays_that_are_not_in_ocdbt_are_left_to_orbax(tmp_path):
    (tmp_path / "_METADATA").write_text('{"use_ocdbt": false}')
    assert find_damage(epath.Path(tmp_path), remote=False) == ""


def test_without_a_checkpoint_there_is_nothing_and_nothing_is_made(tmp_path):
    checkpoints = Checkpoints(epath.Path(tmp_path / "new"), clean=False)
    assert checkpoints.latest is None and checkpoints.steps == []
    assert checkpoints.newest_progress() is None
    assert checkpoints.restore(lambda progress: plain_state()) is None
    checkpoints.check_identity({})
    checkpoints.check_steps(1)
    checkpoints.close()
    assert list(tmp_path.iterdir()) == []
    empty = Checkpoints(epath.Path(tmp_path / "empty"))
    assert empty.latest is None and empty.newest_progress() is None
    assert empty.restore(lambda progress: plain_state()) is None
    empty.close()


def test_the_newest_two_stay_and_a_shorter_run_is_refused(tmp_path):
    save(tmp_path / "checkpoints", 2, 4, 1006)
    checkpoints = Checkpoints(epath.Path(tmp_path / "checkpoints"))
    assert (checkpoints.latest, checkpoints.steps) == (1006, [1006, 4])
    assert checkpoints.newest_progress() == {"step": 1006}
    checkpoints.check_steps(1006)
    with pytest.raises(InputError) as refused:
        checkpoints.check_steps(1005)
    assert str(refused.value) == (
        f"TRAIN_STEPS = 1_005, but {tmp_path} holds a checkpoint of step 1_006; set "
        "--gin.TRAIN_STEPS=1006 or more, or choose another MODEL_DIR"
    )
    checkpoints.close()


def test_a_folder_that_lost_a_part_is_a_damaged_checkpoint_and_goes(tmp_path, caplog):
    """Orbax does not count it, and would not remove it."""
    state = save(tmp_path / "checkpoints", 2, 4)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    (tmp_path / "checkpoints" / "4").mkdir()
    checkpoints = Checkpoints(epath.Path(tmp_path / "checkpoints"))
    assert checkpoints.steps == [4, 2]
    found = checkpoints.restore(lambda progress: state)
    checkpoints.close()
    assert found is not None and found[1] == {"step": 2}
    [said] = [line for line in caplog.messages if "is damaged" in line]
    assert said.startswith(f"{tmp_path}: the checkpoint of step 4 is damaged (")
    assert said.endswith("); going back to step 2")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2"]


def test_json_and_arrays_that_differ_from_what_was_saved_are_each_named(tmp_path, caplog):
    state = save(tmp_path, 2, 4)
    path = tmp_path / "4" / "progress" / "data.json"
    path.write_text(path.read_text().replace('"step": 4', '"step": 5'))
    checkpoints = Checkpoints(epath.Path(tmp_path))
    assert checkpoints.newest_progress() == {"step": 2}
    # The arrays of another run: whole, and not those of this one.
    other = Checkpoints(epath.Path(tmp_path / "other"))
    other.save(2, dataclasses.replace(state, step=jnp.int32(9)), {"step": 2}, {"settings": {}})
    other.close()
    shutil.rmtree(tmp_path / "2" / "state")
    (tmp_path / "other" / "2" / "state").rename(tmp_path / "2" / "state")
    with pytest.raises(InputError) as refused:
        checkpoints.restore(lambda progress: state)
    checkpoints.close()
    assert str(refused.value) == (
        f"{tmp_path}: every checkpoint is damaged (step 4: its JSON differs from what was saved; "
        "step 2: its arrays differ from those that were saved); restore the folder from a copy, "
        "or remove it to start from step 0"
    )


def test_a_lack_of_memory_is_not_damage(tmp_path):
    save(tmp_path, 2)
    checkpoints = Checkpoints(epath.Path(tmp_path))

    def like(progress: dict) -> TrainState:
        raise MemoryError

    with pytest.raises(MemoryError):
        checkpoints.restore(like)
    checkpoints.close()
    assert (tmp_path / "2").exists()


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"MODEL_DIR = .*/file: it cannot be written to \(Not a"):
        Checkpoints(epath.Path(tmp_path / "file" / "checkpoints"))
