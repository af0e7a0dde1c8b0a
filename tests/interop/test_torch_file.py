"""pytorch_model.bin: a file that torch 2.13 wrote, and hostile ones."""

from __future__ import annotations

import collections
import os
import pathlib
import pickle
import struct
import zipfile

import numpy as np
import pytest

from ptjax.errors import InputError
from ptjax.interop import torch_file

TORCH = pathlib.Path(__file__).parents[1] / "fixtures" / "torch_bin"


class Call:
    """Pickles as a call of the global `module.name` with `arguments`."""

    def __init__(self, module, name, *arguments):
        self.module, self.name, self.arguments = module, name, arguments


class Storage:
    def __init__(self, kind, key, count):
        self.kind, self.key, self.count = kind, key, count


class Pickler(pickle._Pickler):
    """Writes what torch's would, and what it never would, without importing any of it."""

    def save(self, obj, *args):
        if isinstance(obj, Call):
            self.write(f"c{obj.module}\n{obj.name}\n".encode())
            super().save(obj.arguments)
            self.write(pickle.REDUCE)
        elif isinstance(obj, Storage):
            self.write(pickle.MARK)
            super().save("storage")
            self.write(f"ctorch\n{obj.kind}\n".encode())
            for part in (obj.key, "cpu", obj.count):
                super().save(part)
            self.write(pickle.TUPLE + pickle.BINPERSID)
        else:
            super().save(obj, *args)


def tensor(offset, shape, strides, *, kind="FloatStorage", key="0", count=6):
    return Call(
        "torch._utils",
        "_rebuild_tensor_v2",
        Storage(kind, key, count),
        offset,
        shape,
        strides,
        False,
        collections.OrderedDict(),
    )


def write(path, value, *, data=None, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("archive/data.pkl", "w") as stream:
            Pickler(stream, protocol=2).dump(value)
        numbers = np.arange(6, dtype="<f4").tobytes() if data is None else data
        archive.writestr("archive/data/0", numbers, compress_type=compression)
    return path


def test_every_kind_of_tensor_that_torch_wrote():
    """float32, bfloat16, float16, a transpose, a view, a Parameter, shared storage, a scalar."""
    expected = np.load(TORCH / "expected.npz")
    arrays = torch_file.open_torch(TORCH / "tensors.bin")
    assert set(arrays) == set(expected)
    for name in expected:
        value = arrays[name].read_all()
        assert value.shape == arrays[name].shape == expected[name].shape
        assert value.dtype.name == arrays[name].dtype
        np.testing.assert_array_equal(value.astype(np.float32), expected[name])
    kinds = [arrays[name].dtype for name in ("float32", "bfloat16", "float16")]
    assert kinds == ["float32", "bfloat16", "float16"]


def test_a_part_of_a_strided_view():
    array = torch_file.open_torch(TORCH / "tensors.bin")["transposed"]
    np.testing.assert_array_equal(
        array.read((slice(1, 3), slice(2, 6))), array.read_all()[1:3, 2:6]
    )


def test_a_file_that_was_cut_after_it_was_opened_is_named(tmp_path):
    file = write(tmp_path / "x.bin", {"a": tensor(0, (6,), (1,))})
    array = torch_file.open_torch(file)["a"]
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(InputError, match=r"x\.bin: the file was changed or truncated while it was"):
        array.read_all()


def test_the_hand_written_pickle_is_read_like_torch_s(tmp_path):
    """So that the refusals below are refusals of what differs."""
    file = write(tmp_path / "x.bin", collections.OrderedDict(a=tensor(1, (2, 2), (1, 2))))
    value = torch_file.open_torch(file)["a"].read_all()
    np.testing.assert_array_equal(value, [[1, 3], [2, 4]])


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("posix", "system"),
        ("os", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_tensor"),
        ("collections", "OrderedDict.__init__"),
        ("collections", "defaultdict"),
        ("numpy", "save"),
    ],
)
def test_any_other_name_is_refused(tmp_path, module, name):
    marker = tmp_path / "marker"
    file = write(tmp_path / "x.bin", {"a": Call(module, name, f"touch {marker}")})
    with pytest.raises(InputError, match=rf"x\.bin: the pickle .* refers to {module}\.{name}"):
        torch_file.open_torch(file)
    assert not marker.exists()


def test_a_pickle_that_python_itself_would_run(tmp_path):
    marker = tmp_path / "marker"

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    file = tmp_path / "x.bin"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": Attack()}, protocol=2))
    with pytest.raises(InputError, match=r"refers to posix\.system, which is not allowed"):
        torch_file.open_torch(file)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (tensor(0, (7,), (1,)), "reaches outside of its storage"),
        (tensor(3, (2, 2), (2, 1), count=6), "reaches outside of its storage"),
        (tensor(0, (1 << 40,), (0,)), "expands the 6 numbers of its storage to .* bytes"),
        (
            tensor(0, (1 << 20, 17), (0, 0)),
            "expands the 6 numbers of its storage to 71,303,168 bytes",
        ),
        (tensor(-1, (2,), (1,)), "sizes .* strides"),
        (tensor(0, (2,), (-1,)), "sizes .* strides"),
        (tensor(0, (2, 2), (1,)), "sizes .* strides"),
        (tensor(0, (7,), (1,), count=7), "too few for 7 numbers of float32"),
        (tensor(0, (2,), (1,), count=-1), "too few"),
        (tensor(0, (2,), (1,), key="1"), r"archive/data/1 is missing"),
        (tensor(0, (2,), (1,), key="../../data/0"), "is missing from the file"),
        (tensor(0, (2,), (1,), kind="LongStorage"), r"refers to torch\.LongStorage"),
        ("text", "this is not a state dict"),
        ({"a": "text"}, "this is not a state dict"),
        ({3: tensor(0, (2,), (1,))}, "this is not a state dict"),
        (Call("torch._utils", "_rebuild_tensor_v2"), r"the pickle in the file is damaged"),
    ],
)
def test_what_is_no_tensor_inside_of_its_storage(tmp_path, bad, message):
    value = bad if not isinstance(bad, Call) or not bad.arguments else {"a": bad}
    with pytest.raises(InputError, match=message):
        torch_file.open_torch(write(tmp_path / "x.bin", value))


def test_a_storage_that_points_outside_of_the_file(tmp_path):
    """The zip's directory says 24 bytes; the member's own header is moved to the file's end."""
    file = write(tmp_path / "x.bin", {"a": tensor(0, (6,), (1,))})
    data = bytearray(file.read_bytes())
    local = data.index(b"PK\x03\x04", 1)
    data[local + 28 : local + 30] = struct.pack("<H", 60_000)
    file.write_bytes(data)
    with pytest.raises(InputError, match="archive/data/0 points outside of the file"):
        torch_file.open_torch(file)


def test_a_compressed_member(tmp_path):
    file = write(tmp_path / "x.bin", {"a": tensor(0, (6,), (1,))}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="is compressed"):
        torch_file.open_torch(file)


@pytest.mark.parametrize("keep", [0, 1, 100, 2000, -1, -30])
def test_a_truncated_file_is_named(tmp_path, keep):
    file = tmp_path / "x.bin"
    file.write_bytes((TORCH / "tensors.bin").read_bytes()[:keep])
    with pytest.raises(InputError, match=r"x\.bin: .*(truncated|damaged)"):
        torch_file.open_torch(file)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (6, 200),  # the version that a reader needs
        (46, 0xFF),  # the first byte of a name, which is UTF-8
    ],
)
def test_a_damaged_directory_is_named(tmp_path, place, value):
    file = tmp_path / "x.bin"
    data = bytearray((TORCH / "tensors.bin").read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 9] |= 8  # says that names are UTF-8
    data[entry + place] = value
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"x\.bin: the file is truncated or damaged"):
        torch_file.open_torch(file)


def test_a_damaged_pickle_is_named(tmp_path):
    file = tmp_path / "x.bin"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00X\x05")
    with pytest.raises(InputError, match=r"x\.bin: the pickle in the file is damaged"):
        torch_file.open_torch(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("word/document.xml", b"")
    with pytest.raises(InputError, match=r"torch\.save did not write this file"):
        torch_file.open_torch(file)


def test_torch_s_older_format_and_a_big_endian_file_are_refused_by_name(tmp_path):
    file = tmp_path / "x.bin"
    file.write_bytes(bytes.fromhex("80028a0a6cfc9c46f9206aa85019 2e".replace(" ", "")))
    with pytest.raises(InputError, match=r"old \(before 1\.6\)"):
        torch_file.open_torch(file)
    write(file, {"a": tensor(0, (6,), (1,))})
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/byteorder", b"big")
    with pytest.raises(InputError, match="big-endian"):
        torch_file.open_torch(file)
    with pytest.raises(InputError, match=r"gone\.bin: the file is missing"):
        torch_file.open_torch(tmp_path / "gone.bin")
