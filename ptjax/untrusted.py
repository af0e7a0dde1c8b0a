"""Untrusted binary formats: bounded in depth and size before anything is built.

msgpack, .npy, zip, and what gzip, xz and bzip2 inflate; `files` does the same for JSON.
Checkpoints, prompts, tokenizers and data come from strangers. Every reader goes through here, so
that a file that is nested a thousand times, or claims more than it holds, is a `ValueError` with a
reason, never a `RecursionError`, a hang or a full memory. Callers put the file's name in front.
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
MIN_INFLATED = 1 << 26
"""Bytes that any compressed file may hold, however small it is."""


def unpack_msgpack(data: bytes) -> Any:
    """The tree in a msgpack of flax: dicts, lists, numbers, texts, and numpy arrays.

    Arrays are views of `data`: what one claims beyond its bytes is an error of flax.

    Raises:
        ValueError: no msgpack, truncated, or nested deeper than `MAX_DEPTH`.
    """
    from flax import serialization  # not at the top: the readers of JSON have no use for it

    try:
        tree = serialization.msgpack_restore(data)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    except Exception as error:  # msgpack has a dozen of them, and all mean a damaged file
        raise ValueError(one_line(error)) from error
    level = [tree]
    for _ in range(MAX_DEPTH + 1):
        level = [x for node in level for x in _children(node)]
        if not level:
            return tree
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


@dataclasses.dataclass(frozen=True)
class Member:
    """An uncompressed member of a zip: `size` bytes from byte `offset` of the file.

    `crc32` is its checksum, None where the writer left it out: `torch.save` can be told to, and
    writes 0.
    """

    name: str
    offset: int
    size: int
    crc32: int | None

    def check(self, crc32: int) -> None:
        """ValueError unless this is the checksum of its bytes, if it has one."""
        if self.crc32 not in (None, crc32):
            raise ValueError(f"{self.name} is damaged, its checksum (CRC-32) is another")


def find_member(archive: zipfile.ZipFile, name: str, file_size: int) -> Member:
    """Where a member lies, by its own header and not by the directory alone.

    Args:
        file_size: of the whole file; a member ends inside of it.

    Raises:
        ValueError: it is missing, compressed (so nothing inflates), or reaches outside of the file.
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
    # After the local header, of which the names vary.
    signature, name_length, extra_length = struct.unpack("<4s22xHH", stream.read(30))
    if signature != b"PK\x03\x04":
        raise ValueError(f"the entry of {name} is damaged")
    offset = info.header_offset + 30 + name_length + extra_length
    if offset + info.file_size > file_size:
        raise ValueError(f"{name} points outside of the file; refused")
    return Member(name, offset, info.file_size, info.CRC or None)


def read_member(archive: zipfile.ZipFile, name: str, file_size: int, limit: int) -> bytes:
    """A whole member, checked; see `find_member`.

    Raises:
        ValueError: as there, or it has more than `limit` bytes, or its checksum is wrong.
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
    """What a whole .gz, .xz or .bz2 file holds.

    Raises:
        ValueError: over 64 MiB that are more than 200 times the file. Text shrinks to a tenth, to a
            hundredth where lines repeat; a file made to fill the memory goes to a thousandth.
        OSError, EOFError, zlib.error, lzma.LZMAError: it is damaged, or of another kind.
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
                    f"{len(data):,} bytes that hold more than {limit:,}; if that is meant, unpack "
                    "it first"
                )
    return b"".join(pieces)


def read_numpy(data: bytes) -> np.ndarray:
    """The array of a .npy file; never a pickle.

    Raises:
        ValueError: truncated, no .npy, or its header claims more than the file holds.
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
    except Exception as error:  # numpy has many, and all mean a damaged file
        raise ValueError(one_line(error)) from error


def _children(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return list(node.values())
    return list(node) if isinstance(node, list | tuple) else []
