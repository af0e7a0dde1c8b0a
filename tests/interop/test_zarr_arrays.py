"""The chunks of an array, as tensorstore names them, and what is said where one cannot be read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorstore as ts
from etils import epath

from ptjax.errors import InputError
from ptjax.interop import zarr_arrays
from ptjax.interop.zarr_arrays import ArrayLocation, file_size, kvstore_spec, open_zarrs

ENCODINGS = {
    "zarr 2": ("zarr", {}),
    "zarr 2 in folders": ("zarr", {"dimension_separator": "/"}),
    "zarr 3": ("zarr3", {}),
    "zarr 3 with dots": (
        "zarr3",
        {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}}},
    ),
    "zarr 3 like 2": ("zarr3", {"chunk_key_encoding": {"name": "v2"}}),
    "zarr 3 like 2 in folders": (
        "zarr3",
        {"chunk_key_encoding": {"name": "v2", "configuration": {"separator": "/"}}},
    ),
}
META = (".zarray", "zarr.json")
CASES = [((5, 7), (2, 3)), ((4,), (4,)), ((), ()), ((3, 2, 2), (1, 2, 1))]


def write(folder: epath.Path, value: np.ndarray, chunks: tuple[int, ...], encoding: str) -> None:
    driver, metadata = ENCODINGS[encoding]
    grid = {"name": "regular", "configuration": {"chunk_shape": list(chunks)}}
    metadata = metadata | ({"chunks": list(chunks)} if driver == "zarr" else {"chunk_grid": grid})
    store: Any = {"driver": driver, "kvstore": kvstore_spec(folder), "metadata": metadata}
    how = {"create": True, "dtype": ts.float32, "shape": value.shape}
    ts.open(store, **how).result().write(value).result()


def open_array(folder: epath.Path) -> Any:
    names = ts.KvStore.open(kvstore_spec(folder)).result().list().result()
    keys = {name.decode() for name in names}
    location = ArrayLocation(kvstore_spec(folder), keys, "here", False, file_size(folder))
    return open_zarrs({"a": location})["a"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("shape", "chunks"), CASES)
def test_every_chunk_is_missed_under_the_name_it_had(tmp_path, encoding, shape, chunks):
    folder = epath.Path(tmp_path)
    value = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 1  # 0 is not stored
    write(folder, value, chunks, encoding)
    np.testing.assert_array_equal(open_array(folder).read_all(), value)
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.name not in META]
    assert len(files) == np.prod([-(-n // c) for n, c in zip(shape, chunks, strict=True)])
    for file in files:
        data = file.read_bytes()
        file.unlink()
        name = file.relative_to(tmp_path).as_posix()
        with pytest.raises(InputError, match=f"^here/{name}: a chunk of parameter a is missing"):
            open_array(folder)
        file.write_bytes(data)


def test_a_message_keeps_the_sentence_and_leaves_out_the_spec():
    for tail in ("", " [tensorstore_spec='{}'] [x]", " [source locations='a.cc:3']"):
        error = ValueError(f'Error reading "0.0": it\nends early{tail}')
        assert zarr_arrays.reason_of(error) == "Error reading '0.0': it\\nends early"


def test_where_a_folder_is():
    at_google = kvstore_spec(epath.Path("gs://bucket/some/where"))
    assert at_google == {"driver": "gcs", "bucket": "bucket", "path": "some/where/"}
    assert kvstore_spec(epath.Path("/some/where")) == {"driver": "file", "path": "/some/where/"}


@pytest.mark.parametrize("inside", ["/etc/", "../", "ocdbt.process_0/../../", "/../"])
def test_an_index_that_leads_out_of_the_checkpoint_is_refused(inside):
    with pytest.raises(InputError, match=r"^x: the index names .*, which is outside of"):
        zarr_arrays._need(f"value:{inside}:d/5858be:0:1034", {}, epath.Path("x"))


def test_a_file_must_be_as_long_as_the_last_of_its_values():
    needed: dict[str, int] = {}
    for offset, length in ((0, 10), (30, 5), (10, 20)):
        value = f"value:ocdbt.process_0/:d/58:{offset}:{length}"
        assert zarr_arrays._need(value, needed, epath.Path("x")) == length
    assert needed == {"ocdbt.process_0/d/58": 35}
