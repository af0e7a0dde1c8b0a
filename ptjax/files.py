"""Writes files atomically, and reads JSON from untrusted files.

Depth and size of JSON are checked before it is parsed: a file that is nested a thousand times
raises a `ValueError` with a reason, not a `RecursionError` or a `MemoryError`. Callers add the
file's name to the message; `read_object` adds it already. `untrusted` does the same for other
formats.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from typing import IO, Any

from etils import epath

from ptjax.errors import InputError

PathLike = str | os.PathLike[str]
JsonObject = dict[str, Any]
"""A parsed JSON object: strings, numbers, booleans, None, and lists and objects of them."""
Metadata = Mapping[str, Any]
"""A read-only JSON object: a prompt's header, `config.json`, `results.json`."""

_LEFTOVER = re.compile(r"\.(.+\.)?[0-9a-f]{32}\.tmp")
"""Names of temporary files; in earlier versions they began with the target's name."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
IN_MEMORY = 1 << 24
"""The size in bytes up to which a remote file is buffered in memory before it is uploaded; a larger
one is buffered in a temporary file."""
MAX_DEPTH = 100
"""Allowed levels of nesting; real configs, indices and parameter trees have fewer than 20."""
MAX_JSON_BYTES = 1 << 28
"""Allowed size of a JSON file; the largest tokenizer.json of a T5 has 17 MB."""
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


@contextlib.contextmanager
def written_whole(path: PathLike) -> Iterator[IO[bytes]]:
    """A context manager: opens `path` for an atomic write, and yields the binary stream.

    Readers see the old file or the complete new one. If the context ends with an exception, the old
    file stays. Missing folders are created.

    A local file is written under a temporary name, synced and renamed, so it survives a power
    failure once the context has ended. On gs:// a rename would be a copy, and closing a partly
    written object would publish it, so everything is buffered and then uploaded.
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
    # Not derived from the target's name, which may have the longest length allowed already.
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: PathLike, data: bytes) -> None:
    """Writes a file atomically; see `written_whole`."""
    with written_whole(path) as stream:
        stream.write(data)


@contextlib.contextmanager
def folder_written_whole(path: PathLike) -> Iterator[pathlib.Path]:
    """A new local folder: readers see no folder or the complete one.

    Yields an empty folder beside it, which is synced and renamed in the end. After an error nothing
    of it is left.

    Raises:
        OSError: the folder cannot be made, or something else has its name by now.
    """
    target = pathlib.Path(path).expanduser().absolute()
    _make_folder(epath.Path(target.parent))
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for entry in [*temporary.rglob("*"), temporary]:
            _sync(entry)
        temporary.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: PathLike) -> None:
    """Removes the temporary files of killed processes from a local folder, not its subfolders.

    Does nothing for a gs:// folder, where `written_whole` makes no temporary files.
    """
    target = epath.Path(folder)
    if "://" in os.fspath(target) or not target.is_dir():
        return
    for path in target.iterdir():
        if _LEFTOVER.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def full_reason(error: BaseException | None) -> str | None:
    """Returns the system's message for a full disk or quota if that caused an error, else None."""
    while error is not None:
        for number in _FULL:
            words = os.strerror(number)
            # Errors of tensorstore, and of Orbax around it, have no errno.
            if (isinstance(error, OSError) and error.errno == number) or words in str(error):
                return words
        error = error.__cause__ or error.__context__
    return None


def parse_json(
    text: str | bytes, *, strict: bool = False, constant: Callable[[str], object] | None = None
) -> Any:
    """Parses untrusted text as `json.loads` does, after a check of its depth.

    Args:
        strict: reject what Python accepts and Rust's serde rejects: duplicate names in an object,
            NaN and Infinity, numbers out of range, lone surrogates. `-0` becomes a float, as in
            serde, so that it is not accepted as a size.
        constant: called with the name NaN, Infinity or -Infinity; returns the value for it. None
            means Python's floats. Not used if `strict`.

    Raises:
        ValueError: not JSON, not UTF-8, or nested deeper than `MAX_DEPTH`.
    """
    if isinstance(text, bytes):
        text = text.decode()
    if _json_depth(text) > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    return json.loads(text, **_STRICT) if strict else json.loads(text, parse_constant=constant)


def read_json(path: epath.Path) -> Any:
    """Parses an untrusted JSON file.

    Raises:
        ValueError: as `parse_json`, or the file is larger than `MAX_JSON_BYTES`.
        OSError: the file cannot be read.
    """
    if (size := path.stat().length) > MAX_JSON_BYTES:
        raise ValueError(f"{size:,} bytes of JSON, more than {MAX_JSON_BYTES:,}")
    return parse_json(path.read_bytes())


def read_object(path: epath.Path) -> JsonObject:
    """Reads a file that must hold a JSON object, such as a config.

    Raises:
        InputError: the file is not JSON, is too large, or holds something other than an object.
        OSError: the file cannot be read.
    """
    try:
        content = read_json(path)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except ValueError as error:
        raise InputError(
            f"{path}: the file is truncated or not a JSON object ({error}); copy it again"
        ) from error
    return content


def _make_folder(folder: epath.Path) -> None:
    """Creates a folder and its parents, and syncs each new name to the disk."""
    new = []
    while not folder.exists():
        new.append(folder)
        folder = folder.parent
    for path in reversed(new):
        path.mkdir(exist_ok=True)
        _sync(path.parent)


def _sync(path: PathLike) -> None:
    """Writes a file, or the names in a folder, to the disk; some file systems cannot."""
    with contextlib.suppress(OSError):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _json_depth(text: str) -> int:
    """Depth of the nested brackets outside of strings."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return 0
    import numpy as np  # imported late: few texts need it

    marks = np.frombuffer(_STRING.sub("", text).encode("utf-8", "surrogatepass"), np.uint8)
    opened = (marks == ord("[")) | (marks == ord("{"))
    closed = (marks == ord("]")) | (marks == ord("}"))
    steps = opened.astype(np.int8) - closed.astype(np.int8)
    return int(np.cumsum(steps, dtype=np.int64).max(initial=0))


def _unique(pairs: list[tuple[str, object]]) -> JsonObject:
    unique: JsonObject = {}
    for name, value in pairs:
        if name in unique:
            raise ValueError(f"duplicate name {name!r}")
        _encodable(name)
        unique[name] = _encodable(value)
    return unique


def _encodable(value: object) -> object:
    if isinstance(value, str):
        value.encode()  # raises UnicodeEncodeError, a ValueError, for a lone surrogate
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:20]} is out of range")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_STRICT: JsonObject = {
    "object_pairs_hook": _unique,
    "parse_constant": _no_constant,
    "parse_float": _finite,
    "parse_int": lambda text: -0.0 if text == "-0" else int(text),
}


def gin_configs() -> epath.Path:
    """The folder of ptjax's own gin files: in the installed package, or at the top of a clone."""
    package = epath.Path(os.fspath(resources.files("ptjax")))  # type: ignore[arg-type]
    inside = package / "gin_configs"
    return inside if inside.exists() else package.parent / "gin_configs"
