"""Records out of TFDS data sets, without TensorFlow."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
from typing import Any

from etils import epath

from ptjax.data.sources import Record, Records, non_empty
from ptjax.errors import InputError, gin_flag, listing

_TFDS_SOURCE = re.compile(r"tfds:(?P<name>[^:@]+)(?::(?P<version>[^:@]+))?(?:@(?P<split>.+))?")


def is_tfds(source: str | os.PathLike[str]) -> bool:
    """Whether `source` names a TFDS data set ('tfds:NAME[:VERSION][@SPLIT]')."""
    return os.fspath(source).startswith("tfds:")


def read_tfds(source: str, *, split: str, data_dir: str | None = None) -> Records:
    """Reads a split of a TFDS data set through `tfds.data_source`, without TensorFlow.

    The data set must be prepared in the array_record format, or be one that TFDS can prepare
    here. Strings are decoded; class labels stay integers.

    Args:
        source: 'tfds:NAME[:VERSION][@SPLIT]', for example 'tfds:glue/sst2:2.0.0@train[:90%]'.
        split: the TFDS split where `source` names none.
        data_dir: TFDS's folder of prepared data sets; None is TFDS's default.

    Raises:
        InputError: TFDS does not have it, or cannot give it without TensorFlow.
    """
    match = _TFDS_SOURCE.fullmatch(source)
    if match is None:
        raise InputError(f"{source}: write tfds:NAME, tfds:NAME:VERSION or tfds:NAME@SPLIT")
    import tensorflow_datasets as tfds  # slow to import, and few tasks need it
    from tensorflow_datasets.core import constants

    name = _named(match)
    split = match["split"] or split
    file = f"tfds:{name}@{split}"
    try:
        rows: Any = tfds.data_source(name, split=split, data_dir=data_dir or None)
        fields = [_plain(row) for row in rows]
    except (
        ArithmeticError, AssertionError, ImportError, LookupError, NotImplementedError, OSError,
        RuntimeError, ValueError,
    ) as error:  # fmt: skip
        folder = epath.Path(data_dir or constants.DATA_DIR).expanduser()
        raise InputError(f"{file}: {_why_not(match, folder, error)}") from error
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    digest = f"{rows.dataset_info.full_name} sha256:{digest}"  # TFDS keeps no hash of a split
    records = [Record(f, file, i) for i, f in enumerate(fields, 1)]
    return non_empty(Records(records, digest=digest), file)


def _named(match: re.Match[str]) -> str:
    return ":".join(filter(None, (match["name"], match["version"])))


def _why_not(match: re.Match[str], folder: epath.Path, error: Exception) -> str:
    """What a data set lacks in `folder`, and the command that prepares it there.

    TFDS itself says "Dataset glue not found" of a folder that is not there.
    """
    name, place = _named(match), folder / match["name"]
    command = f"`tfds build {name} --file_format=array_record --data_dir={folder}`"
    present = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
    versions = [x for x in present if re.fullmatch(r"\d+\.\d+\.\d+", x)]
    if any(fnmatch.fnmatch(version, match["version"] or "*") for version in versions):
        # Without the names of all its data sets.
        reason = " ".join(str(error).partition("Available datasets")[0].split())[:300]
        return (
            f"TFDS cannot read it from {place} ({type(error).__name__}: {reason}); check the "
            f"split, or prepare it as array_record with {command}"
        )
    there = f", only {listing(present)}" if present else ""
    return (
        f"no prepared data set in {folder}: it has no {match['name']}"
        + (f"/{match['version'] or 'VERSION'}{there}" if there else "")
        + f"; prepare it, where TensorFlow is installed, with {command}, or name the folder that "
        f"has it with {gin_flag('DATA_DIR', 'PATH')}"
    )


def _plain(value: Any) -> Any:
    """TFDS values as JSON has them: numpy scalars and arrays, bytes, nested features."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return value
