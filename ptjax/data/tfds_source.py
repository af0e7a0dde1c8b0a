"""Reads records from TFDS data sets, without TensorFlow."""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import Any

from etils import epath

from ptjax.data import tfds_files
from ptjax.data.plain import plain_rows
from ptjax.data.sources import Record, Records, non_empty
from ptjax.errors import InputError, gin_flag, needs

_TFDS_SOURCE = re.compile(r"tfds:(?P<name>[^@]+)(?:@(?P<split>.+))?")
_VERSION = r"(?:\d+|\*)(?:\.(?:\d+|\*)){2}"
_NAME = re.compile(rf"(?:[\w-]+:)?[A-Za-z]\w*(?:/[\w+.-]+)?(?::{_VERSION})?(?:/\w+=.+)?")
"""TFDS's syntax: [COMMUNITY:]DATASET[/CONFIG][:VERSION][/SETTING=VALUE,...]."""
_DATA_SET = re.compile(r"(?:[\w-]+:(?!\d|\*))?(\w+)")
_MOST_NAMED = 8


def is_tfds(source: str | os.PathLike[str]) -> bool:
    """Whether `source` names a TFDS data set ('tfds:NAME[/CONFIG][:VERSION][@SPLIT]')."""
    return os.fspath(source).startswith("tfds:")


def read_tfds(source: str, *, split: str, data_dir: str | None = None) -> Records:
    """Reads a split of a TFDS data set, without TensorFlow.

    The data set must be prepared as tfrecord, array_record or parquet, or TFDS must be able to
    prepare it without TensorFlow. The records, and their order, are the same in each format.
    Strings are decoded; class labels stay integers.

    Args:
        source: 'tfds:NAME[/CONFIG][:VERSION][@SPLIT]', such as 'tfds:glue/sst2:2.0.0@train[:90%]'.
        split: the TFDS split if `source` does not name one.
        data_dir: TFDS's folder of prepared data sets; None is TFDS's default.

    Raises:
        InputError: `source` is malformed, the split is empty, TFDS does not have the data set or
            needs TensorFlow to prepare it, or its files are in another format or damaged.
    """
    match = _TFDS_SOURCE.fullmatch(source)
    if match is None or not _NAME.fullmatch(match["name"]):
        raise InputError(
            f"{source}: write tfds:NAME[/CONFIG][:VERSION][@SPLIT], such as "
            "tfds:glue/sst2:2.0.0@train; a version has three numbers, and 2.*.* is the newest 2"
        )
    with needs("tfds", source):
        import tensorflow_datasets as tfds  # slow to import, and few tasks need it
        from tensorflow_datasets.core import constants

    name, split = match["name"], match["split"] or split
    file = f"tfds:{name}@{split}"
    try:
        builder: Any = tfds.builder(name, data_dir=data_dir or None)
        rows: Any
        if tfds_files.reads_tfrecord(builder):
            decode = builder.info.features.deserialize_example_np
            rows = tfds_files.read_records(builder, split, decode)
        else:
            rows = tfds.data_source(name, split=split, data_dir=data_dir or None)
        fields = plain_rows(rows, file)
    except (KeyboardInterrupt, MemoryError, InputError):
        raise
    except Exception as error:  # TFDS's own exceptions, and those of its download libraries
        # Without the names of all its data sets.
        reason = " ".join(str(error).partition("Available datasets")[0].split())[:300].rstrip(".")
        folder = epath.Path(data_dir or constants.DATA_DIR).expanduser()
        build = f"tfds build {name} --file_format=array_record --data_dir={folder}"
        raise InputError(
            f"{file}: TFDS cannot provide it ({type(error).__name__}: {reason}); "
            f"{_prepared(folder, name)}. Check name, version and split; prepare it, where "
            f"TensorFlow is installed, with `{build}`; or name the folder that has it with "
            f"{gin_flag('DATA_DIR', 'PATH')}"
        ) from error
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    digest = f"{builder.info.full_name} sha256:{digest}"  # TFDS keeps no hash of a split
    records = [Record(f, file, i) for i, f in enumerate(fields, 1)]
    return non_empty(Records(records, digest=digest), file)


def _prepared(folder: epath.Path, name: str) -> str:
    """The versions of a data set in TFDS's folder, for a message."""
    data_set = _DATA_SET.findall(name)[0]
    try:
        levels = [*folder.glob(f"{data_set}/*.*.*"), *folder.glob(f"{data_set}/*/*.*.*")]
    except OSError:
        levels = []
    paths = sorted(os.fspath(path.relative_to(folder)) for path in levels if path.is_dir())
    versions = [":".join(path.rsplit("/", 1)) for path in paths]
    more = f" and {len(versions) - _MOST_NAMED} more" if len(versions) > _MOST_NAMED else ""
    return f"{folder} has {', '.join(versions[:_MOST_NAMED]) or f'no {data_set}'}{more}"
