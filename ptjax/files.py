"""Atomic writes, and JSON from untrusted files.

JSON is bounded in depth and size before anything is built, so that a file that is nested a thousand
times is a `ValueError` with a reason, never a `RecursionError` or a full memory. Callers put the
file's name in front; `read_object` does that itself. `untrusted` does the same for other formats.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

from etils import epath

from ptjax.errors import InputError

PathLike = str | os.PathLike[str]
JsonObject = dict[str, Any]
"""What a JSON object holds: texts, numbers, booleans, None, and lists and objects of them."""
Metadata = Mapping[str, Any]
"""The same, read only: what a prompt's header, `config.json` or `results.json` says."""

_LEFTOVER = re.compile(r"\.(.+\.)?[0-9a-f]{32}\.tmp")
"""Names of temporary files; those of earlier versions begin with the target's name."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
IN_MEMORY = 1 << 24
"""Bytes of a remote file that wait in memory; what is more waits in a temporary file."""
MAX_DEPTH = 100
"""Levels of nesting; real configs, indices and parameter trees have fewer than 20."""
MAX_JSON_BYTES = 1 << 28
"""Of one JSON file; the largest tokenizer.json of a T5 has 17 MB."""
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A stream into `path`; a reader finds the old file or the whole new one, never a part.

    A local file is written under another name and renamed, and when this returns it outlasts a
    loss of power: file and folder are synced. Renaming an object on gs:// would be a
    copy, and leaving a half-written one closes it; so it is sent when everything is there.
    """
    target = epath.Path(path)
    if "://" in os.fspath(target):
        with tempfile.SpooledTemporaryFile(IN_MEMORY) as waiting:
            yield waiting
            waiting.seek(0)
            with target.open("wb") as stream:
                shutil.copyfileobj(waiting, stream)
        return
    target = target.expanduser()
    _make_folder(target.parent)
    # Without the target's name: together with a suffix it could exceed the file system's limit.
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
        _sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a whole file at once; see `written_whole`."""
    with written_whole(path) as stream:
        stream.write(data)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Removes what a killed process left of `written_whole` in a local folder, not below it."""
    target = epath.Path(folder)
    if "://" in os.fspath(target) or not target.is_dir():
        return
    for path in target.iterdir():
        if _LEFTOVER.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def full_reason(error: BaseException | None) -> str | None:
    """The system's words, if an error or what caused it says that a disk or quota is full."""
    while error is not None:
        for number in _FULL:
            words = os.strerror(number)
            # tensorstore's errors, and Orbax's around them, have no number.
            if (isinstance(error, OSError) and error.errno == number) or words in str(error):
                return words
        error = error.__cause__ or error.__context__
    return None


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


def read_object(path: epath.Path) -> JsonObject:
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


def _make_folder(folder: epath.Path) -> None:
    """With its parents; those that are new are synced into theirs."""
    new = []
    while not folder.exists():
        new.append(folder)
        folder = folder.parent
    for path in reversed(new):
        path.mkdir(exist_ok=True)
        _sync_folder(path.parent)


def _sync_folder(folder: epath.Path) -> None:
    """Makes names in a folder last; some file systems, and Windows, know no such thing."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _json_depth(text: str) -> int:
    """How deep the brackets outside of strings go."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return 0
    import numpy as np  # not at the top: few texts come this far

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
