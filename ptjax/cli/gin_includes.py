"""Which gin files were read: a file that several others include is read once."""

from __future__ import annotations

import os
import re
from typing import IO

_REMOTE = re.compile(r"\w+://")


class ReadFiles:
    """The gin files that were read, by path; all spellings of a path are one."""

    def __init__(self) -> None:
        self._streams: dict[str, IO[str]] = {}

    def __contains__(self, path: str) -> bool:
        """Whether a file was read to its end. One that is still open includes itself."""
        stream = self._streams.get(_spelled(path))
        return stream is not None and stream.closed

    def add(self, path: str, stream: IO[str]) -> None:
        """Records that a file is read from a stream, which is closed at its end."""
        self._streams[_spelled(path)] = stream

    def remove(self, path: str) -> None:
        """Has a file read again, if it was read."""
        self._streams.pop(_spelled(path), None)


def is_remote(path: str) -> bool:
    """Whether a path names a place outside of this machine's file system, such as gs://bucket/x."""
    return _REMOTE.match(path) is not None


def _spelled(path: str) -> str:
    return path if is_remote(path) else os.path.realpath(path)
