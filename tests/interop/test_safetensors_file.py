"""Our reader and writer of safetensors against the safetensors package."""

from __future__ import annotations

import collections
import json
import re

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from ptjax.errors import InputError
from ptjax.interop.safetensors_file import (
    from_header,
    open_safetensors,
    save_safetensors,
    to_header,
)


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "matrix": rng.normal(size=(7, 5)).astype(np.float32),
        "brain": rng.normal(size=(4, 3)).astype(ml_dtypes.bfloat16),
        "half": rng.normal(size=3).astype(np.float16),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 4), np.float32),
    }


def save(path, tensors, metadata):
    layout = {name: (value.shape, value.dtype.name) for name, value in tensors.items()}
    save_safetensors(path, tensors.items(), layout, metadata)


def test_what_the_package_writes_we_read(tmp_path, tensors):
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors", metadata={"a": "b"})
    arrays, metadata = open_safetensors(tmp_path / "x.safetensors")
    assert metadata == {"a": "b"}
    assert set(arrays) == set(tensors)
    for name, value in tensors.items():
        assert (arrays[name].shape, arrays[name].dtype) == (value.shape, value.dtype.name)
        np.testing.assert_array_equal(arrays[name].read_all(), value)


def test_what_we_write_the_package_reads(tmp_path, tensors):
    save(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    read = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert set(read) == set(tensors)
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        np.testing.assert_array_equal(read[name], value)
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    "index",
    [
        (slice(2, 5), slice(1, 3)),
        (slice(None), slice(4, 5)),
        (slice(6, 7), slice(None)),
        (slice(3, 3), slice(None)),
    ],
)
def test_a_part_is_the_part_of_the_whole(tmp_path, tensors, index):
    save(tmp_path / "x.safetensors", tensors, {})
    array = open_safetensors(tmp_path / "x.safetensors")[0]["matrix"]
    np.testing.assert_array_equal(array.read(index), tensors["matrix"][index])


def test_opening_reads_the_header_alone(tmp_path, tensors):
    """Values changed after opening are seen: nothing was in memory."""
    file = tmp_path / "x.safetensors"
    save(file, {"matrix": tensors["matrix"]}, {})
    array = open_safetensors(file)[0]["matrix"]
    data = file.read_bytes()
    file.write_bytes(data[:-140] + np.ones((7, 5), np.float32).tobytes())
    np.testing.assert_array_equal(array.read_all(), np.ones((7, 5)))
    file.write_bytes(data[:-1])
    with pytest.raises(InputError, match=r"x\.safetensors: the file was changed or truncated"):
        array.read_all()


def test_an_interrupted_write_leaves_the_old_file(tmp_path, tensors):
    file = tmp_path / "x.safetensors"
    save(file, tensors, {})
    before = file.read_bytes()

    def interrupted():
        yield "matrix", tensors["matrix"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_safetensors(
            file, interrupted(), {"matrix": ((7, 5), "float32"), "b": ((1,), "float32")}, {}
        )
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.safetensors: the file is missing"):
        open_safetensors(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1, -60])
def test_a_truncated_file_is_named(tmp_path, tensors, keep):
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"x\.safetensors: the file is truncated"):
        open_safetensors(file)


def test_bytes_that_no_tensor_claims_are_an_error(tmp_path, tensors):
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(tensors, file)
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(InputError, match="4 bytes after the last tensor"):
        open_safetensors(file)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}, "tensor t is I64"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "entry of tensor t is damaged"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, "entry of tensor t is damaged"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}, "entry of tensor t is damaged"),
        ({"dtype": "F32", "shape": [2]}, "entry of tensor t is damaged"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "the file is truncated"),
        ([], "entry of tensor t is damaged"),
        (
            {"dtype": "F32", "shape": [1 << 62], "data_offsets": [0, 1 << 64]},
            r"tensor t is damaged \(18446744073709551616 is not a size\)",
        ),
        (
            {"dtype": "F32", "shape": [1 << 61], "data_offsets": [0, 1 << 63]},
            r"tensor t is damaged \(the shape \[2305843009213693952\] is too large\)",
        ),
        (
            {"dtype": "F32", "shape": [0, 1 << 61], "data_offsets": [0, 0]},
            r"tensor t is damaged \(the shape \[0, 2305843009213693952\] is too large\)",
        ),
    ],
)
def test_a_header_that_lies(tmp_path, entry, message):
    header = json.dumps({"t": entry}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(InputError, match=message):
        open_safetensors(file)


def test_the_largest_array_that_numpy_makes_may_be_empty(tmp_path):
    shape = [0, (1 << 61) - 1]
    header = {"t": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    arrays, _ = open_safetensors(write(tmp_path / "x.safetensors", header, b""))
    assert arrays["t"].read_all().shape == np.empty(shape, np.float32).shape
    with pytest.raises(ValueError, match="array is too big"):
        np.empty([0, 1 << 61], np.float32)


def test_metadata_that_is_no_object(tmp_path):
    header = b'{"__metadata__": ["pt"]}'
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match="the metadata of the header is damaged"):
        open_safetensors(file)


def test_any_json_fits_into_a_header():
    metadata = {"step": 3, "value": 0.1, "none": None, "task": {"text": "→ 3"}, "number": "3"}
    header = to_header(metadata)
    assert all(isinstance(text, str) for text in header.values())
    assert from_header(header) == metadata
    assert from_header({"format": "pt"}) == {"format": "pt"}


@pytest.mark.parametrize("header", [b"[1, 2]", b"not json"])
def test_no_safetensors_file(tmp_path, header):
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match="this is not a safetensors file"):
        open_safetensors(file)


# What the format forbids


def entry(start=0, stop=8, **fields):
    return {"dtype": "F32", "shape": [2], "data_offsets": [start, stop], **fields}


def write(path, header, data=bytes(8), length=None):
    """A file with this header (bytes as they are, anything else as JSON)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def refusal_of(read, file):
    try:
        read(file)
    except Exception as error:  # the reference's is a class of its own
        return error
    return None


def reference(file):
    """The reader in Rust, by the Python package."""
    with safetensors.safe_open(file, framework="numpy") as opened:
        return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118


FORBIDDEN = {
    "a hole": ({"a": entry(), "b": entry(12, 20)}, bytes(20)),
    "a hole in front": ({"a": entry(4, 12)}, bytes(12)),
    "an overlap": ({"a": entry(), "b": entry(4, 12)}, bytes(12)),
    "the same bytes twice": ({"a": entry(), "b": entry()}, bytes(8)),
    "an empty tensor inside of another": ({"a": entry(), "b": entry(4, 4, shape=[0])}, bytes(8)),
    "a bool for a size": ({"a": entry(shape=[2, True])}, bytes(8)),
    "a float for a size": ({"a": entry(shape=[2.0])}, bytes(8)),
    "a float for an offset": ({"a": entry(0.0, 8)}, bytes(8)),
    "a text for a size": ({"a": entry(shape=["2"])}, bytes(8)),
    "minus zero": (json.dumps({"a": entry()}).encode().replace(b"[0,", b"[-0,"), bytes(8)),
    "no shape": ({"a": entry(shape=None)}, bytes(8)),
    "three offsets": ({"a": entry(data_offsets=[0, 8, 8])}, bytes(8)),
    "a size beyond 64 bits": ({"a": entry(shape=[1 << 64, 0])}, bytes(8)),
    "a shape that overflows": ({"a": entry(shape=[1 << 62, 1 << 62])}, bytes(8)),
    "an empty axis beside one that overflows": (
        {"a": entry(0, 0, shape=[1 << 62, 4, 0]), "b": entry()},
        bytes(8),
    ),
    "metadata that is no text": ({"__metadata__": {"a": 1}, "a": entry()}, bytes(8)),
    "a field twice": (
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b"8" * 8,
    ),
    "NaN": (b'{"a":{"x":NaN,"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "half a surrogate": (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "a byte after the header": (json.dumps({"a": entry()}).encode() + b"\0", bytes(8)),
    "no UTF-8": (b'{"\xff":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "a list": (b"[]", b""),
    "deep nesting": (b'{"a":' + b"[" * 200 + b"]" * 200 + b"}", b""),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_case_5_7_what_the_reference_refuses_is_refused(tmp_path, what):
    file = write(tmp_path / "x.safetensors", *FORBIDDEN[what])
    assert refusal_of(reference, file) is not None
    with pytest.raises(InputError, match=r"x\.safetensors: "):
        open_safetensors(file)


def test_case_5_7_two_tensors_of_one_name(tmp_path):
    """The reference takes the last one, the format's description forbids it."""
    one = b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    with pytest.raises(InputError, match="duplicate name 'a'"):
        open_safetensors(write(tmp_path / "x.safetensors", b"{" + one + b"," + one + b"}"))
    with pytest.raises(InputError, match="does not begin with a brace"):
        open_safetensors(write(tmp_path / "x.safetensors", b" {" + one + b"}"))


def test_case_5_7_a_header_over_100_megabytes(tmp_path):
    """As long as it says (the file has a hole instead of blocks on the disk)."""
    file = write(tmp_path / "x.safetensors", {"a": entry()}, length=100_000_001)
    with file.open("r+b") as stream:
        stream.truncate(100_000_001 + 16)
    assert refusal_of(reference, file) is not None
    with pytest.raises(InputError, match="a header of 100,000,001 bytes"):
        open_safetensors(file)


def test_case_5_7_mutated_headers_are_refused_where_the_reference_refuses(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "a": entry(),
        "b": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [8, 20]},
        "c": {"dtype": "F64", "shape": [], "data_offsets": [20, 28]},
    }
    text = json.dumps(header).encode()
    numbers = [match.span() for match in re.finditer(rb"\d+(?=[,\]])", text)]
    others = (b"0", b"1", b"2", b"3", b"6", b"8", b"20", b"28", b"true", b"8.0", b"-0", b'"8"')
    rng = np.random.default_rng(0)
    outcomes = collections.Counter()
    for number in range(400):
        mutated = bytearray(text)
        if number % 2:  # one byte
            where, byte = int(rng.integers(len(text))), rng.choice(list(b'0189-.,:[]{}"eE tn\\'))
            mutated[where : where + int(rng.integers(2))] = bytes([byte])
        else:  # a size or an offset, or two of them
            for index in sorted(set(rng.integers(len(numbers), size=2).tolist()), reverse=True):
                mutated[slice(*numbers[index])] = others[int(rng.integers(len(others)))]
        file = write(tmp_path / "x.safetensors", bytes(mutated), bytes(28))
        theirs, ours = refusal_of(reference, file), refusal_of(open_safetensors, file)
        assert ours is None or isinstance(ours, InputError), mutated
        assert ours is not None or theirs is None, (mutated, theirs)
        outcomes[theirs is None, ours is None] += 1
        if ours is None:
            shapes = {name: list(x.shape) for name, x in open_safetensors(file)[0].items()}
            assert shapes == reference(file)
    assert outcomes[False, False] > 200 and outcomes[True, True] > 10


@pytest.mark.parametrize("length", range(1, 9))
def test_the_data_begins_at_a_multiple_of_8(tmp_path, length):
    """Whatever the header's length: others map the tensors where they lie, the format says."""
    name, array = "x" * length, np.arange(3, dtype=np.float32)
    layout = {name: (array.shape, "float32")}
    save_safetensors(tmp_path / "f.safetensors", [(name, array)], layout, {})
    data = (tmp_path / "f.safetensors").read_bytes()
    assert (len(data) - array.nbytes) % 8 == 0
    assert data.endswith(array.tobytes())
