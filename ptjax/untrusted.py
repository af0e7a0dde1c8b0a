"""Reads untrusted binary formats: depth and size are checked before anything is built.

The formats are msgpack, .npy, zip, gzip, xz and bzip2; `files` does the same for JSON. Checkpoints,
prompts, tokenizers and data may be malicious, so every reader of them uses this module. A file that
is nested a thousand times, or that claims more bytes than it holds, raises a `ValueError` with a
reason, not a `RecursionError` or a `MemoryError`. Callers add the file's name to the message.
"""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import io
import lzma
import struct
import zipfile
import zlib
from typing import Any

import numpy as np

from ptjax.errors import one_line
from ptjax.files import MAX_DEPTH

MAX_RATIO = 200
"""The largest allowed ratio of inflated to compressed bytes, above `MIN_INFLATED`."""
MIN_INFLATED = 1 << 26
"""The number of bytes to which any compressed file may inflate, whatever its size."""


def unpack_msgpack(data: bytes) -> Any:
    """Parses a tree in Flax's msgpack: dicts, lists, numbers, strings and numpy arrays.

    Arrays are views of `data`: Flax rejects an array that claims more bytes than there are.

    Raises:
        ValueError: not msgpack, truncated, or nested deeper than `MAX_DEPTH`.
    """
    from flax import serialization  # imported late: most formats do not need it

    try:
        tree = serialization.msgpack_restore(data)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    except Exception as error:  # any of msgpack's dozen types means a damaged file
        raise ValueError(one_line(error)) from error
    level = [tree]
    for _ in range(MAX_DEPTH + 1):
        level = [x for node in level for x in _children(node)]
        if not level:
            return tree
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def pack_msgpack(tree: Any) -> bytes:
    """Writes a tree as Flax's msgpack; `unpack_msgpack` is the inverse."""
    from flax import serialization  # imported late: most formats do not need it

    return serialization.msgpack_serialize(tree)


@dataclasses.dataclass(frozen=True)
class Member:
    """An uncompressed member of a zip: `size` bytes from byte `offset` of the file.

    `crc32` is its checksum; None if the writer omitted it (an option of `torch.save`, which then
    writes 0).
    """

    name: str
    offset: int
    size: int
    crc32: int | None

    def check(self, crc32: int) -> None:
        """Raises ValueError if the data that was read does not match the checksum in the zip.

        Without a checksum in the zip, any data is accepted.

        Args:
            crc32: the checksum computed from the data that was read.
        """
        if self.crc32 not in (None, crc32):
            raise ValueError(f"{self.name} is damaged: its checksum (CRC-32) does not match")


def find_member(archive: zipfile.ZipFile, name: str, file_size: int) -> Member:
    """Locates an uncompressed member of a zip by its local header; reads none of its data.

    The offset is computed from the local header, since the zip's central directory does not give
    it.

    Args:
        name: the member's name.
        file_size: the size of the whole file in bytes, within which the member must end.

    Raises:
        ValueError: the member is missing, compressed, or extends beyond the file.
    """
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise ValueError(f"{name} is missing from the file; copy it again") from None
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, which torch never does")
    stream = archive.fp
    assert stream is not None
    stream.seek(info.header_offset)
    # The data follows the local header, whose last two fields have variable lengths.
    signature, name_length, extra_length = struct.unpack("<4s22xHH", stream.read(30))
    if signature != b"PK\x03\x04":
        raise ValueError(f"the entry of {name} is damaged")
    offset = info.header_offset + 30 + name_length + extra_length
    if offset + info.file_size > file_size:
        raise ValueError(f"{name} points outside of the file; refused")
    return Member(name, offset, info.file_size, info.CRC or None)


def read_member(archive: zipfile.ZipFile, name: str, file_size: int, limit: int) -> bytes:
    """Reads an uncompressed member of a zip, and verifies its checksum.

    Args:
        name, file_size: as for `find_member`.
        limit: the largest allowed size of the member in bytes.

    Raises:
        ValueError: as `find_member`, or the member is too large, or its checksum is wrong.
    """
    member = find_member(archive, name, file_size)
    if member.size > limit:
        raise ValueError(f"{name} has {member.size:,} bytes, more than {limit:,}")
    assert archive.fp is not None
    archive.fp.seek(member.offset)
    data = archive.fp.read(member.size)
    member.check(zlib.crc32(data))
    return data


def inflate(data: bytes, suffix: str) -> bytes:
    """Decompresses the content of a .gz, .xz or .bz2 file.

    Args:
        data: the compressed content.
        suffix: ".gz", ".xz" or ".bz2".

    Raises:
        ValueError: the data inflates to more than 64 MiB and more than 200 times its size. Text
            compresses to a tenth, repetitive text to a hundredth, a bomb to a thousandth.
        OSError, EOFError, zlib.error, lzma.LZMAError: the data is damaged or has another format.
    """
    opened = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}[suffix]
    limit = max(MAX_RATIO * len(data), MIN_INFLATED)
    pieces, total = [], 0
    with opened(io.BytesIO(data)) as stream:
        while piece := stream.read(1 << 22):
            pieces.append(piece)
            total += len(piece)
            if total > limit:
                raise ValueError(
                    f"{len(data):,} bytes inflate to more than {limit:,}; if that is intended, "
                    "unpack the file first"
                )
    return b"".join(pieces)


def read_numpy(data: bytes) -> np.ndarray:
    """Parses the content of a .npy file.

    Raises:
        ValueError: the data is truncated or not a .npy file, holds Python objects (a pickle), or
            its header claims more bytes than there are.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = read_header(stream)
        claimed, held = dtype.itemsize, len(data) - stream.tell()
        for size in shape:
            claimed *= int(size)
        if claimed > held and not dtype.hasobject:
            raise ValueError(f"the header claims {claimed:,} bytes, the file holds {held:,}")
        return np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # any of numpy's types means a damaged file
        raise ValueError(one_line(error)) from error


def _children(node: object) -> list[object]:
    if isinstance(node, dict):
        return list(node.values())
    return list(node) if isinstance(node, list | tuple) else []
