"""Files that are whole or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from typing import IO

from etils import epath

_LEFTOVER = re.compile(r"\.(.+\.)?[0-9a-f]{32}\.tmp")
"""Names of temporary files; those of earlier versions begin with the target's name."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
IN_MEMORY = 1 << 24
"""Bytes of a remote file that wait in memory; what is more waits in a temporary file."""


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


def one_line(error: BaseException) -> str:
    """An error's first line, printable and not too long."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return "".join(c if c.isprintable() else "?" for c in line)


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
