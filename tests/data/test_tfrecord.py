"""TFDS data sets as tfrecord: one that TensorFlow wrote, read without it; damaged files."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shutil
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ptjax.data import tfds_source, tfrecord
from ptjax.data.tasks import Task
from ptjax.errors import InputError

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tfds"
VERSION = "all_features/small/1.2.3"
EXPECTED = json.loads((FIXTURE / "as_tensorflow_reads_it.json").read_text())
ALL = EXPECTED["train"] + EXPECTED["test"]


@dataclass(frozen=True)
class Part:
    """An instruction, as TFDS's."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def shard(split: str, number: int, folder: Path = FIXTURE) -> Path:
    return folder / VERSION / f"all_features-{split}.tfrecord-{number:05}-of-00002"


def read(source: str, folder: Path = FIXTURE) -> list[dict]:
    records = tfds_source.read_tfds(source, split="train", data_dir=str(folder))
    return [record.fields for record in records]


@pytest.fixture
def copy(tmp_path) -> Path:
    shutil.copytree(FIXTURE / "all_features", tmp_path / "all_features")
    return tmp_path


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    """Changes dataset_info.json."""
    path = folder / VERSION / "dataset_info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def fails(folder: Path, source: str = "tfds:all_features@train") -> str:
    with pytest.raises(InputError) as raised:
        read(source, folder)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def open_records(folder: Path) -> list[str]:
    """The TFRecord files of a folder that this process has open.

    Not those of others: what failed in another test keeps its files until its traceback goes.
    """
    paths = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    return [path for path in paths if ".tfrecord" in path and Path(path).is_relative_to(folder)]


def records_of(path: Path, count: int) -> list[bytes]:
    with tfrecord.RecordSource([Part(str(path), 0, count, count)]) as source:
        return list(source)


def test_every_feature_is_what_tensorflow_reads():
    assert read("tfds:all_features/small:1.2.3@train") == EXPECTED["train"]
    assert read("tfds:all_features@test") == EXPECTED["test"]
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[1:5]+test", EXPECTED["train"][1:5] + EXPECTED["test"]),
        ("train[-2:]", EXPECTED["train"][-2:]),
        ("train[50%:]", EXPECTED["train"][4:]),
        ("train[1shard]", EXPECTED["train"][4:]),
        ("all", ALL),
    ],
)
def test_slices(split, expected):
    assert read(f"tfds:all_features@{split}") == expected


def test_a_task_reads_it(copy):
    shard("train", 1, copy).unlink()  # not read: the slice ends before it
    task = Task(
        name="any",
        data_dir=str(copy),
        splits={"train": "tfds:all_features@train[:3]"},
        inputs="{text}",
        label="label",
        verbalizer={"0": "negative", "1": "positive"},
    )
    examples = task.load("train")
    assert [e.fields for e in examples] == EXPECTED["train"][:3]
    assert examples.digest.startswith("all_features/small/1.2.3 sha256:")


@pytest.mark.parametrize("most", [1, 2, 16])
def test_random_access(monkeypatch, copy, most):
    monkeypatch.setattr(tfrecord, "_MOST_OPEN", most)
    parts = [
        Part(str(shard("train", 0, copy)), 1, 2, 4),
        Part(str(shard("train", 1, copy)), 0, 3, 3),
        Part(str(shard("test", 1, copy)), 0, 1, 1),
    ]
    first, second = records_of(shard("train", 0, copy), 4), records_of(shard("train", 1, copy), 3)
    expected = first[1:3] + second + records_of(shard("test", 1, copy), 1)
    with tfrecord.RecordSource(parts) as source:
        assert len(source) == 6
        order = [5, 4, 3, 2, 1, 0, *random.Random(0).choices(range(6), k=50)]
        assert [source[i] for i in order] == [expected[i] for i in order]
        assert len(open_records(copy)) == min(most, 3)
        assert source.place(1).endswith("train.tfrecord-00000-of-00002: record 3 of 4")
        for outside in (6, -1):
            with pytest.raises(IndexError):
                source[outside]
    assert open_records(copy) == []
    assert list(tfrecord.RecordSource([])) == []


def test_only_what_is_needed_is_read(copy):
    """The index ends at the record that was read: what is cut off behind it does no harm."""
    path = shard("train", 0, copy)
    path.write_bytes(path.read_bytes()[:-1])
    assert read("tfds:all_features@train[:3]", copy) == EXPECTED["train"][:3]
    assert "record 4 of 4" in fails(copy)


def test_frame_writes_what_tensorflow_writes():
    for split, counts in (("train", (4, 3)), ("test", (1, 1))):
        for number, count in enumerate(counts):
            path = shard(split, number)
            framed = b"".join(map(tfrecord.frame, records_of(path, count)))
            assert framed == path.read_bytes()


def test_any_flipped_bit_and_any_cut_is_one_line(tmp_path):
    framed = [tfrecord.frame(data) for data in (b"first", b"", b"third record")]
    whole = b"".join(framed)
    path = tmp_path / "x.tfrecord"
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(
            InputError, match=r"record [123] of 3, at byte \d+, is damaged"
        ) as error:
            records_of(path, 3)
        ends = (len(framed[0]), len(framed[0]) + len(framed[1]))
        damaged = 1 + sum(position >= end for end in ends)
        assert f"record {damaged} of 3" in str(error.value)
        path.write_bytes(whole[:position])
        with pytest.raises(InputError, match=r"(is cut off.*|is missing); copy the file again"):
            records_of(path, 3)


def test_a_length_beyond_the_file_takes_no_memory(tmp_path):
    path = tmp_path / "x.tfrecord"
    for length, size in ((1 << 40, 0), ((1 << 64) - 1, 0), (5, 4), (1 << 31, 1 << 32)):
        header = length.to_bytes(8, "little")
        path.write_bytes(header + tfrecord.frame(header)[-4:])
        with path.open("r+b") as stream:
            stream.truncate(12 + size + 4)  # sparse
        tracemalloc.start()
        with pytest.raises(InputError, match=r"record 1 of 1.* bytes, of which [\d,]+ are left"):
            records_of(path, 1)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


@pytest.mark.parametrize(("name", "compress"), [("gzip", gzip.compress), ("zlib", zlib.compress)])
def test_compressed_files_are_named(copy, name, compress):
    path = shard("train", 0, copy)
    path.write_bytes(compress(path.read_bytes()))
    assert fails(copy) == (
        f"{path}: compressed with {name}, which no reader of TFDS expects; decompress it and keep "
        "its name"
    )


def test_files_and_dataset_info_that_do_not_fit_are_one_line(copy):
    path = shard("train", 0, copy)
    whole = path.read_bytes()
    path.write_bytes(whole + tfrecord.frame(b"more"))
    assert fails(copy).startswith(f"{path}: it has more than the 4 records that dataset_info.json")
    first, second, *_ = (tfrecord.frame(record) for record in records_of(shard("train", 0), 4))
    path.write_bytes(first + second)
    assert f"{path}: record 3 of 4, at byte {len(first + second):,}, is missing" in fails(copy)
    path.unlink()
    assert fails(copy) == f"{path}: the file is missing; copy all files again"
    path.mkdir()
    assert fails(copy).startswith(f"{path}: cannot be read (Is a directory)")


def replace_second(folder: Path, data: bytes) -> Path:
    """Replaces record 2 of the first file."""
    path = shard("train", 0, folder)
    records = records_of(path, 4)
    records[1] = data
    path.write_bytes(b"".join(map(tfrecord.frame, records)))
    return path


@pytest.mark.parametrize(
    ("data", "problem"),
    [(b"not a proto", "DecodeError: "), (b"", r"ValueError: the feature [\w/]+ is missing")],
)
def test_a_record_that_is_another_example_is_one_line(copy, data, problem):
    path = replace_second(copy, data)
    message = fails(copy).removeprefix(
        f"{path}: record 2 of 4 is not an example with the features "
    )
    assert re.match(rf"of features.json \({problem}", message)


def first_example():
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(records_of(shard("train", 0), 4)[0])


FIXED_SHAPE = {
    *("text", "label", "bytes", "bool", "matrix", "two_texts"),
    *("int32", "int64", "uint8", "uint64", "float16", "float32", "float64"),
    *("nested/a", "nested/b/c", "translation/de", "translation/en"),
}


@pytest.mark.parametrize("absent", [True, False])
def test_writers_that_leave_out_empty_sequences(copy, absent):
    example = first_example()
    held = example.features.feature
    for name in set(held) - FIXED_SHAPE:
        if absent:
            del held[name]
        else:
            held[name].Clear()
    replace_second(copy, example.SerializeToString())
    assert read("tfds:all_features@train[1:2]", copy) == EXPECTED["without_sequences"]


@pytest.mark.parametrize("name", [*sorted(FIXED_SHAPE), "ragged/ragged_row_lengths_0"])
def test_features_that_must_be_there(copy, name):
    example = first_example()
    del example.features.feature[name]
    replace_second(copy, example.SerializeToString())
    assert f"(ValueError: the feature {name} is missing)" in fails(copy)


def test_formats_that_nobody_here_reads_are_named(copy):
    edit(copy, lambda info: info.update(fileFormat="riegeli"))
    assert fails(copy) == (
        f"{copy / VERSION}: prepared as riegeli; ptjax reads tfrecord, array_record and parquet. "
        "Convert it, where TensorFlow is installed, with `tfds convert_format "
        f"--dataset_version_dir={copy / VERSION} --out_file_format=array_record "
        "--out_dir=NEW_FOLDER`"
    )
    edit(copy, lambda info: info.update(alternativeFileFormats=["tfrecord"]))
    assert read("tfds:all_features@train", copy) == EXPECTED["train"]


def test_dataset_info_of_older_releases_names_no_format(copy):
    edit(copy, lambda info: info.pop("fileFormat"))
    assert read("tfds:all_features@train", copy) == EXPECTED["train"]


def test_dataset_info_cannot_name_files_outside_of_its_folder(copy):
    template = "../../../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    edit(copy, lambda info: info["splits"][0].update(filepathTemplate=template))
    for path in (copy / VERSION).glob("*-train.*"):
        shutil.copy(path, copy)
    assert "names a file outside of it" in fails(copy)
    template = "{SPLIT}/{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    edit(copy, lambda info: info["splits"][0].update(filepathTemplate=template))
    (copy / VERSION / "train").mkdir()
    for path in (copy / VERSION).glob("*-train.*"):
        path.rename(path.parent / "train" / path.name)
    assert read("tfds:all_features@train", copy) == EXPECTED["train"]
