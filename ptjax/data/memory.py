"""Records that Python code gives: lists, generators, DataFrames, `datasets`, or paths of files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from absl import logging

from ptjax.data.plain import plain, plain_rows
from ptjax.data.sources import Record, Records, read_records
from ptjax.data.tfds_source import is_tfds, read_tfds
from ptjax.errors import InputError, listing

_IN_MEMORY = "in memory: "
_VALIDATION = ("validation", "valid", "val", "dev")


class RecordsInMemory:
    """The records of a split that are in no file. Equal if their content is.

    `fingerprint` is "sha256:..." over the fields of all records, in order.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = list(records)
        digest = hashlib.sha256()
        for record in self.records:
            digest.update(json.dumps(record.fields, sort_keys=True).encode() + b"\n")
        self.fingerprint = f"sha256:{digest.hexdigest()}"

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RecordsInMemory) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"<{len(self)} records in memory>"


@dataclass(frozen=True)
class Table:
    """What was given for a split.

    Attributes:
        path: the file, glob or TFDS data set that they were read from; None for other sources.
        class_names: column -> the names of its classes, which its records give by number.
    """

    records: list[Record]
    path: str | None = None
    class_names: Mapping[str, list[str]] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """The names of the fields of all records, in order."""
        return list(dict.fromkeys(name for record in self.records for name in record.fields))


def name_splits(train: object, validation: object, test: object) -> dict[str, object]:
    """Split -> what was given for it. A dict of splits, as of `datasets`, gives all of them.

    Raises:
        InputError: a split is given twice, or the dict has no 'train'.
    """
    splits = {"train": train, "validation": validation, "test": test}
    if isinstance(train, Mapping):
        if "train" not in train:
            raise InputError(
                f"train is a dict of {listing(map(str, train))}; give a list of records, each a "
                "dict of column to value, or a dict of splits with the key 'train'"
            )
        names = {"train": "train", "test": "test"} | dict.fromkeys(_VALIDATION, "validation")
        for key, source in train.items():
            split = names.get(str(key))
            if split is not None and splits[split] is not None and split != "train":
                raise InputError(f"{split} is given twice, also as {key!r} of train; drop one")
            if split is not None:
                splits[split] = source
    return {split: source for split, source in splits.items() if source is not None}


def read_table(
    source: object, split: str, reading: Mapping[str, Any], *, skip: bool = False
) -> Table:
    """Reads what was given for a split, once, into memory.

    Args:
        source: an iterable of dicts, a pandas DataFrame, a `datasets.Dataset`, or the path, glob
            or TFDS name of files. Other libraries are recognised by their methods.
        reading: format, columns, quoting and encoding of files; see `read_records`.
        skip: leave out malformed records of files, with a warning.

    Raises:
        InputError: nothing in it, or something other than records.
    """
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        if is_tfds(path):
            return Table(list(read_tfds(path, split=split)), path)
        records = read_records(path, on_bad_record="skip" if skip else "error", **reading)
        if bad := records.bad.count:
            logging.warning("%s: left out %d records: %s", split, bad, records.bad.first)
        return Table(list(records), path)
    if reading:
        raise InputError(f"{next(iter(reading))} applies to files, and {split} is not one; drop it")
    rows = rows_of(source, split)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise InputError(
                f"{split}:{number}: a {type(row).__name__}, not a record; each must be a dict of "
                "column to value"
            )
    if not rows:
        raise InputError(f"{split} is empty: it has no records")
    records = [Record(row, split, number) for number, row in enumerate(plain_rows(rows, split), 1)]
    return Table(records, None, _class_names(source))


def rows_of(source: Any, split: str) -> list[Any]:
    """Returns the rows of a table, such as a DataFrame, or the items of an iterable.

    Raises:
        InputError: it is neither, or two of its columns have the same name.
    """
    if hasattr(source, "to_pylist"):  # pyarrow
        return source.to_pylist()
    if hasattr(source, "to_dicts"):  # polars
        return source.to_dicts()
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # pandas
        columns = list(source.columns)
        repeated = [name for name in dict.fromkeys(columns) if columns.count(name) > 1]
        if repeated:  # pandas would keep the last alone
            raise InputError(f"{split} has several columns {repeated[0]!r}; rename one")
        return source.to_dict("records")
    if isinstance(source, Mapping | bytes) or not isinstance(source, Iterable):
        raise InputError(
            f"{split} is a {type(source).__name__}; give a list of dicts, a generator, a "
            "DataFrame, a datasets.Dataset or a path"
        )
    return list(source)


def _class_names(source: object) -> dict[str, list[str]]:
    """The names of the classes of each `ClassLabel` column of `datasets`, also in lists."""
    features = getattr(source, "features", None)
    names = {}
    for column, feature in features.items() if isinstance(features, Mapping) else ():
        inner = feature[0] if isinstance(feature, list) and feature else feature
        inner = getattr(inner, "feature", inner)
        if isinstance(of_classes := getattr(inner, "names", None), list):
            names[column] = plain(of_classes)
    return names


def as_records(source: RecordsInMemory) -> Records:
    """The records as a split reads them."""
    return Records(list(source), digest=source.fingerprint)


def in_memory(records: RecordsInMemory) -> str:
    """What a config.gin has as the source of a split in place of records that are in no file."""
    return f"{_IN_MEMORY}{len(records)} records"


def was_in_memory(source: object) -> bool:
    """Whether a source is in no file: it is records, or what `in_memory` wrote in their place."""
    return isinstance(source, RecordsInMemory) or str(source).startswith(_IN_MEMORY)


def not_in_a_file(name: str) -> InputError:
    """The error if the records of the task `name` were in the memory of another process."""
    return InputError(
        f"the records of task {name} were given in Python (Task.from_records) and are in no file; "
        "evaluate there, or write them to files and name a --gin_file with a task that reads them"
    )
