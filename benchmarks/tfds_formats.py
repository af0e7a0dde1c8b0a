"""Reading a TFDS data set as tfrecord and as array_record.

    python benchmarks/tfds_formats.py --examples=67349 --rounds=3

Writes a data set of the shape of SST-2 (a sentence, a label, a number) in both formats to a
temporary folder, and reads it in turns: decoded, as a task does; the serialized records in order;
the same in random order. The examples must be equal. Prints records a second, medians of the
rounds, and the ratio of the times of tfrecord to array_record: below 1 tfrecord is faster.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource

from ptjax.data.tfds_source import read_tfds
from ptjax.data.tfrecord import RecordSource, frame

FORMATS = ("array_record", "tfrecord")
WORDS = ("film", "a", "of", "the", "lovely", "dull", "surprising", "performance", "never", "plot")
NUM_SHARDS = 4


class Sentences(tfds.core.GeneratorBasedBuilder):
    """`examples` sentences of 1 to 30 words."""

    VERSION = tfds.core.Version("1.0.0")
    examples = 0

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "sentence": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["negative", "positive"]),
            "idx": np.int32,
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator[Any]]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        draw = random.Random(0)
        for i in range(self.examples):
            words = draw.choices(WORDS, k=draw.randint(1, 30))
            yield i, {"sentence": " ".join(words), "label": i % 2, "idx": i}


def write(folder: Path, examples: int) -> None:
    """The data set in `folder/array_record` and in `folder/tfrecord`."""
    Sentences.examples = examples
    builder = Sentences(data_dir=str(folder / "array_record"), file_format="array_record")
    shards = tfds.download.DownloadConfig(num_shards=NUM_SHARDS)
    builder.download_and_prepare(download_config=shards)
    source = Path(builder.data_path)
    target = folder / "tfrecord" / source.relative_to(folder / "array_record")
    target.mkdir(parents=True)
    for file in source.iterdir():
        name = file.name.replace("array_record", "tfrecord")
        if name != file.name:
            records = ArrayRecordDataSource([str(file)])
            (target / name).write_bytes(b"".join(map(frame, records)))
        else:
            text = file.read_text().replace('"array_record"', '"tfrecord"')
            (target / name).write_text(text)


def instructions(folder: Path, file_format: str) -> list[Any]:
    builder = tfds.builder("sentences", data_dir=str(folder / file_format))
    return builder.info.splits["train"].file_instructions


def open_records(folder: Path, file_format: str) -> Any:
    source = {"array_record": ArrayRecordDataSource, "tfrecord": RecordSource}[file_format]
    return source(instructions(folder, file_format))


def decoded(folder: Path, file_format: str) -> list[Any]:
    records = read_tfds("tfds:sentences", split="train", data_dir=str(folder / file_format))
    return [record.fields for record in records]


def in_order(folder: Path, file_format: str) -> list[bytes]:
    with open_records(folder, file_format) as records:
        return list(records)


def at_random(folder: Path, file_format: str) -> list[bytes]:
    with open_records(folder, file_format) as records:
        order = random.Random(0).sample(range(len(records)), len(records))
        return [records[i] for i in order]


def measure(read: Callable[[Path, str], list[Any]], folder: Path, rounds: int) -> dict[str, float]:
    """Seconds by format; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in FORMATS}
    for _ in range(rounds + 1):
        results = []
        for name in FORMATS:
            began = time.perf_counter()
            results.append(read(folder, name))
            seconds[name].append(time.perf_counter() - began)
        assert results[0] == results[1]
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=67_349, help="default: SST-2's %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    flags = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), flags.examples)
        print(
            "| | array_record, records/s | tfrecord, records/s | tfrecord's time / array_record's |"
        )
        print("|---|--:|--:|--:|")
        for read in (decoded, in_order, at_random):
            seconds = measure(read, Path(name), flags.rounds)
            rates = " | ".join(f"{flags.examples / seconds[name]:,.0f}" for name in FORMATS)
            ratio = seconds["tfrecord"] / seconds["array_record"]
            print(f"| {read.__name__.replace('_', ' ')} | {rates} | {ratio:.2f} |", flush=True)
            results[read.__name__] = seconds
    if flags.output:
        flags.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
