"""TFDS data sets: one is prepared here as array_record, and read without TensorFlow."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
from tensorflow_datasets.core import constants

from ptjax.data import tfds_source
from ptjax.errors import InputError


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A TFDS data set of five and two examples, written as array_record."""
    import tensorflow_datasets as tfds

    class TinyReviews(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            features = {
                "sentence": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["negative", "positive"]),
                "answers": {"text": tfds.features.Sequence(tfds.features.Text())},
                "score": np.float32,
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(5), "validation": self._generate_examples(2)}

        def _generate_examples(self, count):
            for i in range(count):
                yield (
                    i,
                    {
                        "sentence": f"été {i}",
                        "label": i % 2,
                        "answers": {"text": ["a", "é"]},
                        "score": 0.5,
                    },
                )

    folder = tmp_path_factory.mktemp("tfds")
    TinyReviews(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return str(folder)


def test_tfds_data_sets_without_tensorflow(tfds_dir):
    source = "tfds:tiny_reviews:1.2.0"
    assert tfds_source.is_tfds(source)
    assert not tfds_source.is_tfds("data/train.jsonl")
    records = tfds_source.read_tfds(source, split="train", data_dir=tfds_dir)
    assert sorted(record.fields["sentence"] for record in records) == [f"été {i}" for i in range(5)]
    fields = records[0].fields
    assert fields["answers"] == {"text": ["a", "é"]}
    assert fields["score"] == 0.5
    assert type(fields["label"]) is int
    assert records[4].where == "tfds:tiny_reviews:1.2.0@train:5"
    half = tfds_source.read_tfds("tfds:tiny_reviews@train[:3]", split="test", data_dir=tfds_dir)
    assert len(half) == 3
    # Which version it is, and what is in it: three rows are others than five.
    assert records.digest.startswith("tiny_reviews/1.2.0 sha256:")
    assert half.digest.startswith("tiny_reviews/1.2.0 sha256:") and half.digest != records.digest
    again = tfds_source.read_tfds("tfds:tiny_reviews", split="train", data_dir=tfds_dir)
    assert again.digest == records.digest
    assert "tensorflow" not in sys.modules


def _refused(source: str, data_dir: str | None) -> str:
    with pytest.raises(InputError) as raised:
        tfds_source.read_tfds(source, split="train", data_dir=data_dir)
    return str(raised.value)


def test_what_tfds_does_not_have(tfds_dir):
    assert re.fullmatch(
        rf"tfds:tiny_reviews@nope: TFDS cannot read it from {tfds_dir}/tiny_reviews \(.*nope.*\); "
        "check the split, or prepare it as array_record with `tfds build tiny_reviews "
        rf"--file_format=array_record --data_dir={tfds_dir}`",
        _refused("tfds:tiny_reviews@nope", tfds_dir),
    )
    with pytest.raises(InputError, match="write tfds:NAME"):
        tfds_source.read_tfds("tfds:", split="train")


def test_a_data_set_that_is_not_prepared_is_told_where_and_how_it_would_be(tfds_dir, tmp_path):
    assert _refused("tfds:tiny_reviews:9.9.9@train", tfds_dir) == (
        f"tfds:tiny_reviews:9.9.9@train: no prepared data set in {tfds_dir}: it has no "
        "tiny_reviews/9.9.9, only 1.2.0; prepare it, where TensorFlow is installed, with "
        f"`tfds build tiny_reviews:9.9.9 --file_format=array_record --data_dir={tfds_dir}`, or "
        "name the folder that has it with --gin.DATA_DIR=\"'PATH'\""
    )
    gone = tmp_path / "gone"
    assert _refused("tfds:glue/sst2:2.0.0", str(gone)) == (
        f"tfds:glue/sst2:2.0.0@train: no prepared data set in {gone}: it has no glue/sst2; prepare "
        "it, where TensorFlow is installed, with `tfds build glue/sst2:2.0.0 "
        f"--file_format=array_record --data_dir={gone}`, or name the folder that has it with "
        "--gin.DATA_DIR=\"'PATH'\""
    )


def test_an_unknown_data_set_is_said_without_the_list_of_all_others():
    said = _refused("tfds:nonsense", None)
    assert f"no prepared data set in {constants.DATA_DIR}: it has no nonsense; " in said
    assert len(said) < 450
