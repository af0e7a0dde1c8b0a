"""Weights under the parameters' own names, and arrays that stay in their file."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from frozen import assert_frozen

from ptjax.errors import InputError
from ptjax.interop import lazy_array
from ptjax.interop.own_names import has_own_names, load_own_names, save_own_names

PARAMS = {
    "encoder/layer/kernel": np.arange(12, dtype=np.float32).reshape(3, 4) / 3,
    "embedding": jnp.ones((2, 5)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_own_names_come_back(tmp_path, dtype):
    folder = epath.Path(tmp_path)
    save_own_names(folder, PARAMS, dtype)
    assert has_own_names(folder)
    arrays = load_own_names(folder)
    assert sorted(arrays) == sorted(PARAMS)
    for name, value in PARAMS.items():
        expected = np.asarray(value).astype(jnp.dtype(dtype))
        assert (arrays[name].shape, arrays[name].dtype) == (value.shape, dtype)
        np.testing.assert_array_equal(arrays[name].read_all(), expected)
        assert name in arrays[name].where and "model.safetensors" in arrays[name].where


def test_the_names_of_others_are_not_own(tmp_path):
    folder, file = epath.Path(tmp_path), tmp_path / "model.safetensors"
    for metadata in (None, {"format": "pt"}):
        safetensors.numpy.save_file({"a": np.ones(3, np.float32)}, file, metadata=metadata)
        assert not has_own_names(folder)


def test_own_names_do_not_stand_beside_another_models_config(tmp_path):
    """The folder would be read as Hugging Face's."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds the config\.json of another model; name"):
        save_own_names(epath.Path(tmp_path), PARAMS, "float32")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def counted(value: np.ndarray) -> tuple[lazy_array.LazyArray, list[int]]:
    """An array, and how many parts were asked for at a time."""
    asked: list[int] = []

    def read_parts(indices):
        asked.append(len(indices))
        return [value[index] for index in indices]

    return lazy_array.LazyArray(value.shape, value.dtype.name, read_parts, "a file"), asked


def test_a_cast_array_casts_what_is_read_of_it():
    value = np.arange(12, dtype=np.float32).reshape(3, 4) / 3
    array, asked = counted(value)
    cast = lazy_array.cast(array, "bfloat16")
    assert (cast.shape, cast.dtype, cast.where) == ((3, 4), "bfloat16", "a file")
    assert asked == []  # nothing is read before
    parts = cast.read_parts([(slice(0, 2), slice(1, 3)), (slice(2, 3), slice(0, 4))])
    assert asked == [2]  # together, since they may share a chunk
    for part, expected in zip(parts, (value[:2, 1:3], value[2:]), strict=True):
        assert part.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(part, expected.astype(ml_dtypes.bfloat16))
    assert array.dtype == "float32" and array.read_all().dtype == np.float32
    # To the dtype that it has, nothing is copied.
    assert np.shares_memory(lazy_array.cast(array, "float32").read_all(), value)


def test_what_was_read_is_frozen():
    assert_frozen("ptjax.interop", "_CheckedMember")  # which remembers that it was checked
