"""JSON, msgpack and zip that others wrote: bounded in depth and size before anything is built.

Files of checkpoints, prompts and tokenizers come from strangers. Every reader of these formats goes
through here, so that a file that is nested a thousand times, or that claims more than it holds, is
a `ValueError` with a reason, never a `RecursionError`, a hang or a full memory. Callers put the
file's name in front.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from typing import Any

import numpy as np
from etils import epath

MAX_DEPTH = 100
"""Levels of nesting; real configs, indices and parameter trees have fewer than 20."""
MAX_JSON_BYTES = 1 << 28
"""Of one JSON file; the largest tokenizer.json of a T5 has 17 MB."""
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def parse_json(text: str | bytes, *, strict: bool = False) -> Any:
    """`json.loads` for a text of a stranger.

    Args:
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
    return json.loads(text, **_STRICT) if strict else json.loads(text)


def read_json(path: epath.Path) -> Any:
    """The JSON of a whole file.

    Raises:
        ValueError: as `parse_json`, or the file has more than `MAX_JSON_BYTES`.
        OSError: it cannot be read.
    """
    if (size := path.stat().length) > MAX_JSON_BYTES:
        raise ValueError(f"{size:,} bytes of JSON, more than {MAX_JSON_BYTES:,}")
    return parse_json(path.read_bytes())


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


def read_member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """A whole member of a zip, its checksum checked.

    Raises:
        ValueError: it inflates to more than `limit` bytes, whatever the zip's directory claims.
        KeyError, zipfile.BadZipFile, EOFError, OSError: it is missing or damaged.
    """
    if (size := archive.getinfo(name).file_size) > limit:
        raise ValueError(f"{name} has {size:,} bytes, more than {limit:,}")
    with archive.open(name) as stream:
        return stream.read()  # at most the size that the directory claims


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
