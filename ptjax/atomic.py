"""Files that are whole or absent."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from typing import IO

from etils import epath

IN_MEMORY = 1 << 24
"""Bytes of a remote file that wait in memory; what is more waits in a temporary file."""


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A stream into `path`; a reader finds the old file or the whole new one, never a part.

    A local file is written under another name and renamed. Renaming an object on gs:// would be a
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
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a whole file at once; see `written_whole`."""
    with written_whole(path) as stream:
        stream.write(data)
