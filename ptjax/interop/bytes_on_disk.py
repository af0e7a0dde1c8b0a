"""Reads parts of arrays from larger files, and computes checksums of parts of files."""

from __future__ import annotations

import os
import zlib

import ml_dtypes
import numpy as np
from etils import epath

from ptjax.interop.lazy_array import Index

_PIECE = 1 << 22


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype with this name ("bfloat16" too), little-endian as in every file read here."""
    if name == "bfloat16":
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name).newbyteorder("<")


def read_part(
    file: epath.Path,
    offset: int,
    shape: tuple[int, ...],
    dtype: str,
    index: Index,
    strides: tuple[int, ...] | None = None,
) -> np.ndarray:
    """Reads the part `index` of an uncompressed array that begins at byte `offset` of `file`.

    A local file is memory-mapped, so only the pages of that part are read; of a gs:// object only
    the byte range of that part is fetched.

    Args:
        shape: the shape of the whole array.
        dtype: the name of its dtype, as for `numpy_dtype`.
        index: one slice per axis, with steps >= 1.
        strides: the array's strides in elements; None means C order.

    Returns:
        a copy of the part, in `dtype`.

    Raises:
        ValueError: the part extends past the end of the file.
    """
    kind = numpy_dtype(dtype)
    if strides is None:
        strides = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
    bounds = [part.indices(size) for part, size in zip(index, shape, strict=True)]
    wanted = tuple(len(range(*bound)) for bound in bounds)
    if 0 in wanted:
        return np.empty(wanted, kind)
    first = sum(start * stride for (start, *_), stride in zip(bounds, strides, strict=True))
    strides = tuple(step * stride for (*_, step), stride in zip(bounds, strides, strict=True))
    span = 1 + sum((size - 1) * stride for size, stride in zip(wanted, strides, strict=True))
    begin, length = offset + first * kind.itemsize, span * kind.itemsize
    if "://" in os.fspath(file):
        with file.open("rb") as stream:
            stream.seek(begin)
            buffer: bytes | np.ndarray = stream.read(length)
    else:
        buffer = np.memmap(file.expanduser(), np.uint8, "r", begin, (length,))
    in_bytes = tuple(stride * kind.itemsize for stride in strides)
    return np.array(np.ndarray(wanted, kind, buffer, strides=in_bytes))


def crc32(file: epath.Path, offset: int, length: int) -> int:
    """Computes the CRC-32 of `length` bytes of `file` from byte `offset`, read piece by piece."""
    value = 0
    with file.expanduser().open("rb") as stream:
        stream.seek(offset)
        while length and (piece := stream.read(min(length, _PIECE))):
            value = zlib.crc32(piece, value)
            length -= len(piece)
    return value
