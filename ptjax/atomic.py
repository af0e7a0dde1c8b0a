"""Files that are whole or absent."""

from __future__ import annotations

import os
import uuid

from etils import epath


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes `data` so that no reader ever sees a part of it.

    A local file is written under a temporary name and renamed; an object store makes an object
    visible when its upload is complete.
    """
    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if "://" in os.fspath(target):
        target.write_bytes(data)
        return
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        temporary.write_bytes(data)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
