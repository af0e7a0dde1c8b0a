"""TFDS data sets: one is prepared here as array_record, and read without TensorFlow."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest

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


@pytest.mark.parametrize(
    "source",
    [
        "tfds:tiny_reviews@nope",
        "tfds:tiny_reviews:9.9.9@train",
        "tfds:tiny_reviews/no_such_config",
        "tfds:tiny_reviews:2.*.*",
    ],
)
def test_what_tfds_does_not_have_is_said_with_what_it_has(tfds_dir, source):
    message = rf"TFDS cannot provide it.*{tfds_dir} has tiny_reviews:1\.2\.0\. Check name, version"
    with pytest.raises(InputError, match=message):
        tfds_source.read_tfds(source, split="train", data_dir=tfds_dir)


def test_names_as_tfds_has_them(tfds_dir):
    for name in ("tiny_reviews:1.*.*", "TinyReviews", "tiny_reviews:*.*.*@train[:50%]+validation"):
        assert tfds_source.read_tfds(f"tfds:{name}", split="train", data_dir=tfds_dir)
    for name in ("", "a:1", "a/b:latest", "/a/b", "a/b/1.0.0", "a b", "a:1.0.0:train", "a:b:c:d"):
        with pytest.raises(InputError, match=r"write tfds:NAME.*a version has three numbers"):
            tfds_source.read_tfds(f"tfds:{name}", split="train", data_dir=tfds_dir)
    # A name of a community reaches TFDS whole, which knows that there is no such community.
    for name in ("nobody:set", "nobody:set/config:1.0.0@test"):
        with pytest.raises(InputError, match=r"Namespace nobody not found.* has no set\. Check"):
            tfds_source.read_tfds(f"tfds:{name}", split="train", data_dir=tfds_dir)


@pytest.mark.parametrize("file", ["dataset_info.json", "*array_record*"])
def test_a_damaged_data_set_is_one_line(tfds_dir, tmp_path, file):
    shutil.copytree(f"{tfds_dir}/tiny_reviews", tmp_path / "tiny_reviews")
    for path in tmp_path.glob(f"tiny_reviews/*/{file}"):
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="tfds:tiny_reviews@train: TFDS cannot provide it"):
        tfds_source.read_tfds("tfds:tiny_reviews", split="train", data_dir=str(tmp_path))


def test_an_unknown_data_set_is_said_without_the_list_of_all_others(tfds_dir):
    message = rf"Dataset nonsense not found\); {tfds_dir} has no nonsense\. Check name"
    with pytest.raises(InputError, match=message) as raised:
        tfds_source.read_tfds("tfds:nonsense", split="train", data_dir=tfds_dir)
    assert len(str(raised.value)) < 450 + 2 * len(tfds_dir)


def test_a_data_set_that_is_not_there_is_told_where_and_how_it_would_be(tmp_path):
    gone = tmp_path / "gone"
    with pytest.raises(InputError) as raised:
        tfds_source.read_tfds("tfds:glue/sst2:2.0.0", split="train", data_dir=str(gone))
    assert str(raised.value).endswith(
        f"; {gone} has no glue. Check name, version and split; prepare it, where TensorFlow is "
        "installed, with `tfds build glue/sst2:2.0.0 --file_format=array_record "
        f"--data_dir={gone}`; or name the folder that has it with --gin.DATA_DIR=\"'PATH'\""
    )
