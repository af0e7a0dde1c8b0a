"""Reads and writes safetensors files, local or gs://, with one tensor in memory at a time.

The layout is 8 bytes of header length (little-endian), a JSON header, then the tensors end to end.
The safetensors package handles local files only and writes from a dict in memory; tests compare
this module with it in both directions.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from ptjax import files
from ptjax.errors import InputError
from ptjax.files import JsonObject, Metadata, written_whole
from ptjax.interop import bytes_on_disk
from ptjax.interop.lazy_array import Index, LazyArray, ReadParts, one_by_one

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_MAX_HEADER = 100_000_000  # the reference reader's
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def open_safetensors(
    path: str | os.PathLike[str],
) -> tuple[dict[str, LazyArray], dict[str, str]]:
    """Opens a safetensors file; the data stays there until it is read.

    Returns:
        (the arrays by name, the metadata of the header).

    Raises:
        InputError: the file is missing, truncated or not a safetensors file, or a tensor is not
            floating point.
    """
    path = epath.Path(path)
    header, begin = _read_header(path)
    metadata = _metadata(header.pop("__metadata__", None), path)
    end = path.stat().length - begin
    entries = [(*_entry(name, entry, path), name) for name, entry in header.items()]
    position = 0
    for start, stop, _, _, name in sorted(entries, key=lambda entry: entry[:2]):
        # The format allows neither gaps nor overlaps.
        if start != position:
            raise InputError(
                f"{path}: tensor {name} begins at byte {start:,} of the data, but the one before it"
                f" ends at {position:,}; the file is damaged, copy it again"
            )
        position = stop
    if position > end:
        raise InputError(
            f"{path}: the file is truncated, {end:,} bytes of data where the last tensor ends at "
            f"{position:,}; copy it again"
        )
    if position < end:
        raise InputError(f"{path}: {end - position:,} bytes after the last tensor; copy it again")
    arrays = {
        name: LazyArray(
            shape, dtype, _reader(path, begin + start, shape, dtype), f"{path} ({name})"
        )
        for start, _, shape, dtype, name in entries
    }
    return arrays, metadata


def _metadata(metadata: object, path: epath.Path) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise InputError(f"{path}: the metadata of the header is damaged, it must be strings")
    return metadata


def _entry(name: str, entry: Any, path: epath.Path) -> tuple[int, int, tuple[int, ...], str]:
    """(first byte, end, shape, dtype) of a tensor, checked for consistency."""
    try:
        kind, shape, (start, stop) = (entry[key] for key in ("dtype", "shape", "data_offsets"))
        for number in (start, stop, *shape):
            if type(number) is not int or not 0 <= number < 1 << 64:  # True is an int in Python
                raise ValueError(f"{number!r} is not a size")
        if kind not in _DTYPES:
            raise InputError(f"{path}: tensor {name} is {kind}, not floating point")
        itemsize = bytes_on_disk.numpy_dtype(_DTYPES[kind]).itemsize
        if stop - start != math.prod(shape) * itemsize:
            raise ValueError(f"its {stop - start:,} bytes do not fit its shape {shape}")
        # An axis of size 0 hides how large the others are, which no array could have.
        if math.prod(size or 1 for size in shape) * itemsize >= 1 << 63:
            raise ValueError(f"the shape {shape} is too large")
    except InputError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise InputError(f"{path}: the entry of tensor {name} is damaged ({reason})") from error
    return start, stop, tuple(shape), _DTYPES[kind]


def save_safetensors(
    path: str | os.PathLike[str],
    arrays: Iterable[tuple[str, np.ndarray]],
    layout: Mapping[str, tuple[tuple[int, ...], str]],
    metadata: Mapping[str, str],
) -> None:
    """Writes one safetensors file atomically.

    Args:
        arrays: (name, array) pairs in the order of `layout`; consumed one at a time, so that a
            generator needs memory for one tensor only.
        layout: maps the name of each array to its (shape, dtype name).
        metadata: strings for the header, by name.

    Raises:
        ValueError: `arrays` differ from `layout`.
    """
    with written_whole(epath.Path(path)) as stream:
        stream.write(header_bytes(layout, metadata))
        for (name, array), (expected, (shape, dtype)) in zip(arrays, layout.items(), strict=True):
            if (name, array.shape, array.dtype.name) != (expected, tuple(shape), dtype):
                raise ValueError(f"{name} {array.shape} {array.dtype} is not {expected} {shape}")
            stream.write(np.ascontiguousarray(array).tobytes())


def to_header(metadata: Metadata) -> dict[str, str]:
    """Encodes JSON values as the strings of a header: {"step": 3} -> {"step": "3"}."""
    return {key: json.dumps(value, ensure_ascii=False) for key, value in metadata.items()}


def from_header(header: Mapping[str, str]) -> JsonObject:
    """Decodes the strings of a header: inverse of `to_header`. Text that is not JSON is kept."""
    metadata = {}
    for key, text in header.items():
        try:
            metadata[key] = files.parse_json(text)
        except (TypeError, ValueError):
            metadata[key] = text
    return metadata


def header_bytes(
    layout: Mapping[str, tuple[tuple[int, ...], str]], metadata: Mapping[str, str]
) -> bytes:
    """Makes everything in a safetensors file before its data: the length and the JSON header.

    Args:
        layout, metadata: as for `save_safetensors`.
    """
    header: JsonObject = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (shape, dtype) in layout.items():
        end = offset + nbytes(shape, dtype)
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def nbytes(shape: tuple[int, ...], dtype: str) -> int:
    """The size in bytes of an array of this shape and dtype name."""
    return int(np.prod(shape, dtype=np.int64)) * bytes_on_disk.numpy_dtype(dtype).itemsize


def _read_header(path: epath.Path) -> tuple[JsonObject, int]:
    """(the header, the offset of the data)."""
    if not path.exists():
        raise InputError(f"{path}: the file is missing")
    size = path.stat().length
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise InputError(f"{path}: the file is truncated or not a safetensors file")
        if length > _MAX_HEADER:
            raise InputError(
                f"{path}: a header of {length:,} bytes; a safetensors file has at most "
                f"{_MAX_HEADER:,}"
            )
        text = stream.read(length)
        try:
            if not text.startswith(b"{"):
                raise ValueError("its header does not begin with a brace")
            header = files.parse_json(text, strict=True)
        except ValueError as error:
            raise InputError(f"{path}: this is not a safetensors file ({error})") from error
    return header, 8 + length


def _reader(path: epath.Path, offset: int, shape: tuple[int, ...], dtype: str) -> ReadParts:
    def read(index: Index) -> np.ndarray:
        try:
            return bytes_on_disk.read_part(path, offset, shape, dtype, index)
        except (OSError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: the file was changed or truncated while it was read ({error})"
            ) from error

    return one_by_one(read)
