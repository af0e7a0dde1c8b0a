"""Converts a TFDS data set from tfrecord to array_record, without TensorFlow."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging
from etils import epath

from ptjax import files
from ptjax.data import tfds_files
from ptjax.errors import InputError, listing, near, needs, one_line
from ptjax.files import PathLike

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder

INFO = "dataset_info.json"
_FORMAT_KEYS = ("fileFormat", "file_format", "alternativeFileFormats", "alternative_file_formats")
_PERIOD = 10
"""Seconds between two lines of progress."""


def convert_to_array_record(
    source: PathLike, target: PathLike, splits: Sequence[str] | None = None
) -> dict[str, int]:
    """Writes a TFDS data set of TFRecord files as array_record.

    The examples, their order and their division into files are the same, and so are features.json
    and the other files of metadata. `tfds.builder_from_directory(target)` reads the result.

    Args:
        source: the folder of one version, such as DATA_DIR/glue/sst2/2.0.0.
        target: a local folder that does not exist yet; it appears once it is complete.
        splits: which to convert; None for all.

    Returns:
        split -> number of examples.

    Raises:
        InputError: `source` is not a data set in tfrecord, lacks a split, or has a damaged file;
            `target` exists.
        OSError: `target` cannot be written.
    """
    if "://" in os.fspath(target):
        raise InputError(f"{target}: array_record is written to a local folder; copy it from there")
    place = Path(target).expanduser().absolute()
    if os.path.lexists(place):
        raise InputError(f"{target} already exists; name a new folder")
    folder = epath.Path(source).expanduser()
    builder = _open(folder)
    if not tfds_files.reads_tfrecord(builder):
        formats = " and ".join(sorted(tfds_files.formats_of(builder)))
        raise InputError(
            f"{folder}: it is in {formats}, which ptjax and TFDS read; use it as it is"
        )
    if not f"{place}/".endswith(f"/{builder.info.full_name}/"):
        logging.warning(
            "by name, ptjax and TFDS find the data set in DATA_DIR/%s only; %s does not end so",
            builder.info.full_name,
            target,
        )
    chosen = _choose(folder, list(builder.info.splits), splits)
    with files.folder_written_whole(place) as temporary:
        counts = {split: _write_split(builder, split, temporary) for split in chosen}
        _write_metadata(builder, temporary, chosen)
        _open(epath.Path(temporary))
    return counts


def _open(folder: epath.Path) -> DatasetBuilder:
    with needs("tfds", "the conversion of TFDS data sets"):
        import tensorflow_datasets as tfds

    if not (folder / INFO).exists():
        below = [*folder.glob(f"*/{INFO}"), *folder.glob(f"*/*/{INFO}")] if folder.is_dir() else []
        versions = listing(sorted(os.fspath(path.parent) for path in below))
        raise InputError(
            f"{folder} has no {INFO}; name the folder of one version, such as "
            + (versions or "DATA_DIR/glue/sst2/2.0.0")
        )
    files.read_object(folder / INFO)
    try:
        builder = tfds.builder_from_directory(folder)
        _ = builder.info.features
    except Exception as error:  # TFDS's, protobuf's and JSON's own
        raise InputError(
            f"{folder}: TFDS cannot open it ({type(error).__name__}: {one_line(error)}); copy all "
            "of the data set's files again"
        ) from error
    return builder


def _choose(
    folder: epath.Path, available: Sequence[str], splits: Sequence[str] | None
) -> list[str]:
    for split in splits or []:
        if any(mark in split for mark in "[+"):
            raise InputError(f"{split}: only whole splits are converted; there are {available}")
        if split not in available:
            raise InputError(f"{folder}: no split '{split}'{near(split, available)}")
    return [split for split in available if splits is None or split in splits]


def _write_split(builder: DatasetBuilder, split: str, folder: Path) -> int:
    info: Any = builder.info.splits[split]
    template = info.filename_template.replace(
        data_dir=epath.Path(folder), filetype_suffix="array_record"
    )
    records = _shown(tfds_files.read_records(builder, split, bytes), split, info.num_examples)
    for number, length in enumerate(info.shard_lengths):
        path = template.sharded_filepath(shard_index=number, num_shards=info.num_shards)
        tfds_files.check_inside(path, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_file(path, itertools.islice(records, length), length)
    next(records, None)  # the last line of progress
    return info.num_examples


def _write_file(path: epath.Path, records: Iterable[bytes], count: int) -> None:
    from tensorflow_datasets.core.file_adapters import ArrayRecordFileAdapter

    try:
        ArrayRecordFileAdapter.write_examples(path, enumerate(records))
        written = ArrayRecordFileAdapter.num_examples(path)
    except RuntimeError as error:  # riegeli's, such as a full disk
        raise OSError(f"{path}: cannot be written ({one_line(error)})") from error
    if written != count:
        raise OSError(f"{path}: {written} of {count} records were written; try again")


def _shown(records: Iterator[bytes], split: str, count: int) -> Iterator[bytes]:
    """The same records; reports progress."""
    next_line = time.monotonic() + _PERIOD
    for number, record in enumerate(records):
        if time.monotonic() >= next_line:
            logging.info("%s: %s of %s examples", split, f"{number:,}", f"{count:,}")
            next_line += _PERIOD
        yield record
    logging.info("%s: %s of %s examples", split, f"{count:,}", f"{count:,}")


def _write_metadata(builder: DatasetBuilder, folder: Path, splits: Sequence[str]) -> None:
    """Copies all files except records, and changes the format in dataset_info.json."""
    from tensorflow_datasets.core import file_adapters

    source = epath.Path(builder.data_path)
    shards = {path.name for split in builder.info.splits.values() for path in split.filepaths}
    for path in source.iterdir():
        is_record = path.name in shards or file_adapters.is_example_file(path.name)
        if path.is_file() and path.name != INFO and not is_record:
            files.write_bytes(folder / path.name, path.read_bytes())
    info: dict[str, Any] = files.read_object(source / INFO)
    for key in _FORMAT_KEYS:
        info.pop(key, None)
    info["fileFormat"] = "array_record"
    info["splits"] = [split for split in info["splits"] if split["name"] in splits]
    files.write_bytes(folder / INFO, (json.dumps(info, indent=2, sort_keys=True) + "\n").encode())
