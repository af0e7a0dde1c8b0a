"""Writes a TFDS data set as tfrecord with TensorFlow, and what TensorFlow reads from it.

    python tests/oracles/write_tfds.py

writes `tests/fixtures/tfds`. It needs an environment of its own with `pip install tensorflow-cpu
tensorflow-datasets array_record`; the tests that read the files do not. The same data set is
written as array_record too, outside of the repository, and must read the same.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import tempfile
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

OUT = pathlib.Path(__file__).parents[1] / "fixtures" / "tfds"
TEXTS = ("plain", "", "été\n\x00 end\x00", "\U0001f600")
f = tfds.features


class AllFeatures(tfds.core.GeneratorBasedBuilder):
    """Every feature that a text data set may have."""

    VERSION = tfds.core.Version("1.2.3")
    BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="small"),)

    def _info(self) -> tfds.core.DatasetInfo:
        question = {"question": f.Text(), "answers": f.Sequence(f.Text())}
        features = {
            "text": f.Text(),
            "label": f.ClassLabel(names=["negative", "positive"]),
            "bytes": f.Tensor(shape=(), dtype=tf.string),
            "int32": np.int32,
            "int64": np.int64,
            "uint8": np.uint8,
            "uint64": np.uint64,
            "bool": np.bool_,
            "float16": f.Scalar(np.float16),
            "float32": np.float32,
            "float64": np.float64,
            "matrix": f.Tensor(shape=(2, 3), dtype=np.float32),
            "vector": f.Tensor(shape=(None,), dtype=np.int64),
            "rows": f.Tensor(shape=(None, 2), dtype=np.int32),
            "flags": f.Sequence(np.bool_),
            "texts": f.Sequence(f.Text()),
            "two_texts": f.Sequence(f.Text(), length=2),
            "labels": f.Sequence(f.ClassLabel(num_classes=3)),
            "answers": f.Sequence({"text": f.Text(), "start": np.int32}),
            "ragged": f.Sequence(f.Sequence(np.int32)),
            "ragged_texts": f.Sequence(f.Sequence(f.Sequence(f.Text()))),
            "paragraphs": f.Sequence({"title": f.Text(), "questions": f.Sequence(question)}),
            "nested": {"a": f.Text(), "b": {"c": np.float32}},
            "translation": f.Translation(languages=["de", "en"]),
            "translations": f.TranslationVariableLanguages(languages=["de", "en", "fr"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=f.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples(7), "test": self._generate_examples(2)}

    def _generate_examples(self, count: int) -> Any:
        for i in range(count):
            yield i, example(i)


def example(i: int) -> dict[str, Any]:
    """Sequences are empty in every third example."""

    def sequence(*items: Any) -> list[Any]:
        return [] if i % 3 == 1 else [*items]

    questions = [{"question": "?", "answers": ["1", "2"]}, {"question": "", "answers": []}]
    return {
        "text": TEXTS[i % len(TEXTS)],
        "label": i % 2,
        "bytes": b"x\x00" * i,
        "int32": -i,
        "int64": -(2**63) + i,
        "uint8": 255 - i,
        "uint64": 2**62 + i,
        "bool": i % 2 == 0,
        "float16": 0.1 * i,
        "float32": 0.1 * i,
        "float64": 0.1 * i,
        "matrix": np.arange(6, dtype=np.float32).reshape(2, 3) + i,
        "vector": np.arange(i, dtype=np.int64),
        "rows": np.full((i % 3, 2), i, np.int32),
        "flags": sequence(True, False),
        "texts": sequence("a", "é", ""),
        "two_texts": ["x", "y"],
        "labels": sequence(0, 2),
        "answers": sequence({"text": "t", "start": 1}, {"text": "", "start": -1}),
        "ragged": sequence([1], [], [2, 3]),
        "ragged_texts": sequence([["a"], []], [], [["b", "c"]]),
        "paragraphs": sequence({"title": "T", "questions": questions}),
        "nested": {"a": "n", "b": {"c": 1.5}},
        "translation": {"de": "ja", "en": "yes"},
        "translations": {"de": ["ja"], "en": ["yes", "yeah"]},
    }


def plain(value: Any) -> Any:
    """TensorFlow's values as JSON."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, tf.RaggedTensor):
        return plain(value.to_list())
    return plain(value.tolist()) if hasattr(value, "tolist") else value


def without_sequences(builder: tfds.core.DatasetBuilder) -> Any:
    """The first example, decoded without its features of variable length.

    Writers other than TFDS's leave out sequences that are empty.
    """
    path = builder.info.splits["train"].filepaths[0]
    example = tf.train.Example.FromString(next(iter(tf.data.TFRecordDataset(str(path)))).numpy())
    specs = tfds.core.utils.flatten_nest_dict(builder.info.features.get_serialized_info())
    for name in [*example.features.feature]:
        if None in specs[name.partition("/ragged_")[0]].shape:
            del example.features.feature[name]
    return builder.info.features.deserialize_example(example.SerializeToString())


def prepare(folder: str, file_format: str) -> tfds.core.DatasetBuilder:
    builder = AllFeatures(config="small", data_dir=folder, file_format=file_format)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
    return builder


def main() -> None:
    in_order = tfds.ReadConfig(interleave_cycle_length=1)
    with tempfile.TemporaryDirectory() as temporary:
        builder = prepare(f"{temporary}/tfrecord", "tfrecord")
        other = prepare(f"{temporary}/array_record", "array_record")
        read = {}
        for split in ("train", "test"):
            rows = builder.as_dataset(split=split, read_config=in_order)
            read[split] = [plain(row) for row in tfds.as_numpy(rows)]
            assert read[split] == [plain(row) for row in other.as_data_source(split)]
        read["without_sequences"] = [plain(tfds.as_numpy(without_sequences(builder)))]
        shutil.rmtree(OUT / "all_features", ignore_errors=True)
        shutil.copytree(f"{temporary}/tfrecord/all_features", OUT / "all_features")
    text = json.dumps(read, ensure_ascii=False, indent=1, sort_keys=True)
    (OUT / "as_tensorflow_reads_it.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
