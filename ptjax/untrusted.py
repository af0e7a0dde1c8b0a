"""Formats that strangers wrote: bounded in depth and size before anything is built.

JSON, msgpack, .npy, zip, and what gzip, xz and bzip2 inflate.
Checkpoints, prompts, tokenizers and data come from strangers. Every reader goes through here, so
that a file that is nested a thousand times, or claims more than it holds, is a `ValueError` with a
reason, never a `RecursionError`, a hang or a full memory. Callers put the file's name in front;
`read_object` does that itself.
"""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from ptjax.errors import InputError

MAX_DEPTH = 100
"""Levels of nesting; real configs, indices and parameter trees have fewer than 20."""
MAX_JSON_BYTES = 1 << 28
"""Of one JSON file; the largest tokenizer.json of a T5 has 17 MB."""
MAX_RATIO = 200
MIN_INFLATED = 1 << 26
"""Bytes that any compressed file may hold, however small it is."""
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def parse_json(
    text: str | bytes, *, strict: bool = False, constant: Callable[[str], Any] | None = None
) -> Any:
    """`json.loads` for a text of a stranger.

    Args:
        constant: what NaN and Infinity become, by their names; None is Python's floats.
        strict: what Python reads and JSON forbids is an error too, as for Rust's serde: a name
            twice in an object, NaN and Infinity, numbers out of range, halves of surrogate pairs.
            `-0` is a float then, and no size.

    Raises:
        ValueError: no JSON, no UTF-8, or nested deeper than `MAX_DEPTH`.
    """
    if isinstance(text, bytes):
        text = text.decode()
    if _json_depth(text) > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    return json.loads(text, **_STRICT) if strict else json.loads(text, parse_constant=constant)


def read_json(path: epath.Path) -> Any:
    """The JSON of a whole file.

    Raises:
        ValueError: as `parse_json`, or the file has more than `MAX_JSON_BYTES`.
        OSError: it cannot be read.
    """
    if (size := path.stat().length) > MAX_JSON_BYTES:
        raise ValueError(f"{size:,} bytes of JSON, more than {MAX_JSON_BYTES:,}")
    return parse_json(path.read_bytes())


def read_object(path: epath.Path) -> dict[str, Any]:
    """Reads a file that must hold a JSON object, such as a config.

    Raises:
        InputError: where `read_json` raises ValueError, or the JSON is not an object.
        OSError: it cannot be read.
    """
    try:
        content = read_json(path)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except ValueError as error:
        raise InputError(
            f"{path}: the file is truncated or no JSON object ({error}); copy it again"
        ) from error
    return content


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
        raise ValueError(str(error).split("\n")[0] or type(error).__name__) from error
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
        raise ValueError(str(error).split("\n")[0] or type(error).__name__) from error


def _json_depth(text: str) -> int:
    """How deep the brackets outside of strings go."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return 0
    marks = np.frombuffer(_STRING.sub("", text).encode("utf-8", "surrogatepass"), np.uint8)
    opened = (marks == ord("[")) | (marks == ord("{"))
    closed = (marks == ord("]")) | (marks == ord("}"))
    steps = opened.astype(np.int8) - closed.astype(np.int8)
    return int(np.cumsum(steps, dtype=np.int64).max(initial=0))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for name, value in pairs:
        if name in unique:
            raise ValueError(f"the name {name!r} stands there twice")
        _encodable(name)
        unique[name] = _encodable(value)
    return unique


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        value.encode()  # UnicodeEncodeError, a ValueError, for half of a surrogate pair
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:20]} is out of range")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_STRICT: dict[str, Any] = {
    "object_pairs_hook": _unique,
    "parse_constant": _no_constant,
    "parse_float": _finite,
    "parse_int": lambda text: -0.0 if text == "-0" else int(text),
}


def _children(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return list(node.values())
    return list(node) if isinstance(node, list | tuple) else []
