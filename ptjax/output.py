"""Writes results to a path of the user's, checked before any work, in one atomic write."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import TypedDict

from etils import epath

from ptjax import files
from ptjax.errors import InputError
from ptjax.files import JsonObject, Metadata, PathLike

_DESCRIPTORS = {"-": 1, "/dev/stdout": 1, "/dev/stderr": 2}


class Writing(TypedDict, total=False):
    """The optional arguments of functions that write results for records.

    Attributes:
        output: the path of the JSON lines, written atomically; None writes no file.
        force: whether an existing file may be overwritten; default: False.
        prefix: prepended to the names of the fields that are added to each record; default: "".
    """

    output: PathLike | None
    force: bool
    prefix: str


def check(path: PathLike, *, force: bool, inputs: Iterable[PathLike] = ()) -> None:
    """Raises InputError if the path in --output cannot or must not be written.

    The path may not be a folder, an input or, without `force`, an existing file. Commands call this
    before any other work.

    Args:
        path: the value of --output, or of the argument `output` of a function.
        force: whether an existing file may be overwritten.
        inputs: the local files that are read; a folder means all files in it.
    """
    path = os.fspath(path)
    if _descriptor(path) is not None:
        return
    target = epath.Path(path).expanduser()
    if "://" in path:
        if target.exists() and not force:
            raise _exists(path)
        return
    real = os.path.realpath(target)
    for source in inputs:
        if _is_in(real, source):
            raise InputError(f"--output={path}: this is the input {source}; name another file")
    if os.path.isdir(real) or path.endswith("/"):
        raise InputError(f"--output={path}: it is a directory; name a file")
    if os.path.isfile(real) and not force:
        raise _exists(path)
    check_place(path)


def check_place(path: PathLike, flag: str = "--output") -> None:
    """Raises InputError if a local file or folder cannot be created at `path`.

    Reasons are a name in the path that is too long, a parent that is a file, and missing
    permissions.

    Args:
        path: of another file system, such as gs://, nothing is checked.
        flag: the flag that set `path`, for messages.
    """
    if "://" in (path := os.fspath(path)):
        return
    real = os.path.realpath(epath.Path(path).expanduser())
    folder = real
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if folder != real and not os.path.isdir(folder):
        raise InputError(f"{flag}={path}: {folder} is a file, not a folder; name another")
    longest = os.pathconf(folder, "PC_NAME_MAX")
    if long := next((x for x in real.split(os.sep) if len(os.fsencode(x)) > longest), None):
        raise InputError(
            f"{flag}={path}: a name of {len(os.fsencode(long))} bytes is longer than the "
            f"{longest} that {folder} allows; choose a shorter one"
        )
    # A new file, written beside the old one, replaces it.
    places = [os.path.dirname(real), real] if os.path.isfile(real) else [folder]
    for place in places:
        if not os.access(place, os.W_OK):
            raise InputError(f"{flag}={path}: cannot write to {place}; name another path")


def _is_in(real: str, source: PathLike) -> bool:
    """Whether an existing file is the input `source`, or in the folder `source`."""
    if not (os.path.exists(source) and os.path.exists(real)):
        return False
    inside = os.path.isfile(real) and real.startswith(os.path.realpath(source) + os.sep)
    return inside or os.path.samefile(source, real)


def _exists(path: PathLike) -> InputError:
    return InputError(f"{os.fspath(path)} already exists; overwrite it with --force (force=True)")


@contextlib.contextmanager
def target(path: str) -> Iterator[str]:
    """A context manager: yields the path of the file to write the output for `path` to.

    `path` is the value of --output. The yielded path is `path` with links resolved, if that is a
    regular or new file. For anything else (a device, a fifo, /dev/stdout) it is a temporary file,
    which is copied to `path` when the context ends.

    Raises:
        OSError: the reader of a pipe has closed it.
    """
    real = path if "://" in path else os.path.realpath(epath.Path(path).expanduser())
    descriptor = _descriptor(path)
    if descriptor is None and ("://" in path or not os.path.exists(real) or _is_plain(real)):
        yield real
        return
    with tempfile.TemporaryDirectory() as folder:
        temporary = os.path.join(folder, "output")
        yield temporary
        data = epath.Path(temporary).read_bytes()
    sys.stdout.flush()
    try:
        with open(real if descriptor is None else os.dup(descriptor), "wb") as stream:
            stream.write(data)
    except BrokenPipeError:
        raise OSError(f"--output={path}: its reader has closed it") from None


def write(path: PathLike, text: str) -> None:
    """Writes `text` to `path`, the value of --output: atomically if it is a regular file."""
    with target(os.fspath(path)) as real:
        files.write_bytes(real, text.encode())


def json_lines(rows: Iterable[Metadata]) -> str:
    """Encodes each row as a line of JSON, see `as_json`."""
    return "".join(as_json(row, ensure_ascii=False) + "\n" for row in rows)


def prefixed(fields: Metadata, prefix: str) -> JsonObject:
    """Returns `fields` with `prefix` prepended to their names."""
    return {f"{prefix}{name}": value for name, value in fields.items()}


def _is_plain(path: str) -> bool:
    return stat.S_ISREG(os.stat(path).st_mode)


def is_stream(path: str) -> bool:
    """Whether `path` names an open file of this process, such as /dev/stdout or "-"."""
    return _descriptor(path) is not None


def _descriptor(path: str) -> int | None:
    """The file descriptor of a PATH such as /dev/stdout or /dev/fd/3; None for other paths."""
    if match := re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", path):
        return int(match[1])
    return _DESCRIPTORS.get(path)


def as_json(value: object, *, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """Encodes a value as valid JSON: numbers that are not finite become null."""
    finite = _finite(value)
    return json.dumps(finite, allow_nan=False, indent=indent, ensure_ascii=ensure_ascii)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def check_fields(fields: Metadata, added: Metadata, location: str) -> None:
    """Raises InputError if the output would replace a field of a record.

    A field that already has the new value is allowed.

    Args:
        fields: the record's fields.
        added: the new fields. A value of None means that the value is not known yet; then the
            record must not have the field at all.
        location: the record's file and line, for the message.
    """
    for name, value in added.items():
        if name in fields and (value is None or fields[name] != value):
            raise InputError(
                f"{location}: the record has a field '{name}', which the output would replace; "
                "--prefix=TEXT (prefix=) adds a prefix to the names of the new fields"
            )
