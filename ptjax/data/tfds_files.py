"""The files of a prepared TFDS data set, where TFDS's own readers would need TensorFlow."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ptjax.data.tfrecord import RecordSource
from ptjax.errors import InputError, one_line

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder

T = TypeVar("T")
_READ_BY_TFDS = {"array_record", "parquet"}
_KINDS = {"i": "int64_list", "u": "int64_list", "b": "int64_list", "f": "float_list"}
"""Kinds of numpy dtypes -> the lists of an example that hold them; others are bytes."""


def reads_tfrecord(builder: DatasetBuilder) -> bool:
    """Whether a data set is to be read from TFRecord files; False leaves it to TFDS.

    Raises:
        InputError: it is prepared in formats that neither reads.
    """
    formats = formats_of(builder) if builder.is_prepared() else set()
    if not formats or formats & _READ_BY_TFDS:
        return False
    if "tfrecord" in formats:
        return True
    folder = os.fspath(builder.data_path)
    raise InputError(
        f"{folder}: prepared as {', '.join(sorted(formats))}; ptjax reads tfrecord, array_record "
        "and parquet. Convert it, where TensorFlow is installed, with `tfds convert_format "
        f"--dataset_version_dir={folder} --out_file_format=array_record --out_dir=NEW_FOLDER`"
    )


def formats_of(builder: DatasetBuilder) -> set[str]:
    """The formats in which a data set is prepared, such as {'tfrecord'}."""
    return {format.value for format in builder.info.available_file_formats()}


def open_records(builder: DatasetBuilder, split: str) -> RecordSource:
    """The serialized examples of a split or slice in TFRecord files, in TFDS's order.

    Args:
        split: in TFDS's syntax, such as 'train[:10%]+test'.

    Raises:
        InputError: dataset_info.json names files outside of the data set's folder.
        ValueError: the split does not exist; with the names of those that do.
    """
    from tensorflow_datasets.core.file_adapters import FileFormat

    info = builder.info
    if info.file_format != FileFormat.TFRECORD:  # where it has several
        info.set_file_format(FileFormat.TFRECORD, override=True, override_if_initialized=True)
    instructions = info.splits[split].file_instructions
    for instruction in instructions:
        check_inside(instruction.filename, builder.data_path)
    return RecordSource(instructions)


def check_inside(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """InputError if a file that dataset_info.json names is not in its folder."""
    inside = os.path.normpath(os.fspath(folder)) + os.sep
    if not os.path.normpath(os.fspath(path)).startswith(inside):
        raise InputError(f"{folder}: dataset_info.json names a file outside of it, {path}; refused")


def read_records(builder: DatasetBuilder, split: str, decode: Callable[[bytes], T]) -> Iterator[T]:
    """The examples of a split in TFRecord files.

    TFDS's decoder without TensorFlow needs every feature in every example. TFDS's own writers do
    that. Others leave out sequences that are empty, which TensorFlow accepts: they are added.

    Args:
        decode: of a serialized example, such as `features.deserialize_example_np`.

    Raises:
        InputError: a file is damaged, or a record is not an example with these features.
        ValueError: see `open_records`.
    """
    complete = _make_complete(builder.info.features)
    with open_records(builder, split) as records:
        for index, record in enumerate(records):
            try:
                decoded = decode(complete(record))
            except MemoryError:
                raise
            except Exception as error:  # protobuf's, numpy's and TFDS's own
                raise InputError(
                    f"{records.place(index)} is not an example with the features of features.json "
                    f"({type(error).__name__}: {one_line(error)}); prepare the data set again"
                ) from error
            yield decoded


def _make_complete(features: Any) -> Callable[[bytes], bytes]:
    """A function that adds absent sequences to a serialized example.

    It raises a ValueError for other features that are missing.
    """
    from tensorflow_datasets.core.utils import flatten_nest_dict
    from tensorflow_datasets.proto import tf_example_pb2

    example_type: Any = vars(tf_example_pb2)["Example"]
    specs = flatten_nest_dict(features.get_serialized_info())
    groups = [(_entries(name, spec), None in spec.shape) for name, spec in specs.items()]

    def complete(record: bytes) -> bytes:
        example = example_type.FromString(record)
        held, changed = example.features.feature, False
        for entries, may_be_empty in groups:
            lacking = [k for k in entries if k not in held or not held[k].WhichOneof("kind")]
            if not lacking:
                continue
            if not may_be_empty or len(lacking) < len(entries):
                raise ValueError(f"the feature {lacking[0]} is missing")
            for key in lacking:
                getattr(held[key], entries[key]).SetInParent()
            changed = True
        return example.SerializeToString() if changed else record

    return complete


def _entries(name: str, spec: Any) -> dict[str, str]:
    """The names that a feature has in an example, with the kind of list of each."""
    kind = _KINDS.get(np.dtype(spec.np_dtype).kind, "bytes_list")
    if spec.sequence_rank < 2:
        return {name: kind}
    lengths = (f"{name}/ragged_row_lengths_{i}" for i in range(spec.sequence_rank - 1))
    return {f"{name}/ragged_flat_values": kind} | dict.fromkeys(lengths, "int64_list")
