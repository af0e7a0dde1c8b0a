"""`python -m ptjax.convert`: tfrecord to array_record, read back by TFDS's own reader."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest

from ptjax import files
from ptjax.data import tfds_convert, tfds_source, tfrecord

pytestmark = pytest.mark.usefixtures("own_process")
FIXTURE = Path(__file__).parents[1] / "fixtures" / "tfds"
NAME = "all_features/small/1.2.3"
EXPECTED = json.loads((FIXTURE / "as_tensorflow_reads_it.json").read_text())


def read(folder: Path, split: str) -> list[dict]:
    source = f"tfds:all_features/small:1.2.3@{split}"
    return [
        record.fields for record in tfds_source.read_tfds(source, split="x", data_dir=str(folder))
    ]


@pytest.fixture
def copy(tmp_path) -> Path:
    shutil.copytree(FIXTURE / "all_features", tmp_path / "all_features")
    return tmp_path / NAME


@pytest.fixture
def fails(call, tmp_path):
    """The error line of a conversion that leaves nothing at its target."""

    def run(source: object, *flags: str, to: object = tmp_path / "new", code: int = 2) -> str:
        before = sorted(tmp_path.rglob("*"))
        got, out, err = call("convert", f"--from={source}", f"--to={to}", *flags)
        assert (got, out) == (code, ""), err
        assert sorted(tmp_path.rglob("*")) == before
        errors = [line for line in err.splitlines() if line.startswith(("error: ", "failed: "))]
        assert len(errors) == 1, err
        return errors[0]

    return run


def test_tfds_reads_the_same_from_array_record(call, tmp_path):
    code, out, err = call("convert", f"--from={FIXTURE / NAME}", f"--to={tmp_path / NAME}")
    assert (code, out) == (
        0,
        f"{tmp_path / NAME}: array_record, 9 examples (train 7, test 2)\n",
    ), err
    assert err == "train: 7 of 7 examples\ntest: 2 of 2 examples\n"
    assert read(tmp_path, "train") == EXPECTED["train"]  # through tfds.data_source
    assert read(tmp_path, "test+train[2:4]") == EXPECTED["test"] + EXPECTED["train"][2:4]
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(tmp_path / NAME)
    assert builder.info.file_format is not None
    assert builder.info.file_format.value == "array_record"
    assert builder.info.features is not None
    assert builder.info.features["label"].names == ["negative", "positive"]
    rows = builder.as_data_source("train")
    assert [row["text"].decode() for row in rows] == [row["text"] for row in EXPECTED["train"]]
    names = {path.name for path in (tmp_path / NAME).iterdir()}
    assert names == {
        *("dataset_info.json", "features.json", "label.labels.txt"),
        *(
            f"all_features-{s}.array_record-0000{i}-of-00002"
            for s in ("train", "test")
            for i in (0, 1)
        ),
    }
    assert "tensorflow" not in sys.modules


def test_a_run_sees_the_same_data_before_and_after(tmp_path):
    tfds_convert.convert_to_array_record(FIXTURE / NAME, tmp_path / NAME)
    before, after = (
        tfds_source.read_tfds("tfds:all_features/small", split="train", data_dir=str(folder))
        for folder in (FIXTURE, tmp_path)
    )
    assert before.digest == after.digest


def test_one_split(call, tmp_path):
    target = tmp_path / NAME
    code, out, err = call("convert", f"--from={FIXTURE / NAME}", f"--to={target}", "--split=test")
    assert (code, out) == (0, f"{target}: array_record, 2 examples (test 2)\n"), err
    assert read(tmp_path, "all") == EXPECTED["test"]
    info = json.loads((target / "dataset_info.json").read_text())
    assert [split["name"] for split in info["splits"]] == ["test"]
    assert not [*target.glob("*train*")]


def test_a_folder_that_ends_otherwise_is_warned_of(call, tmp_path):
    code, _, err = call("convert", f"--from={FIXTURE / NAME}", f"--to={tmp_path / 'new'}")
    assert code == 0
    assert err.startswith("warning: by name, ptjax and TFDS find the data set in DATA_DIR/all_fea")


def test_sequences_that_another_writer_left_out(copy, tmp_path):
    """Without them TFDS's reader of array_record fails."""
    from tensorflow_datasets.proto import tf_example_pb2

    path = copy / "all_features-test.tfrecord-00000-of-00002"
    record = tfrecord.RecordFile(path, 1)
    example = tf_example_pb2.Example.FromString(record.read(0))
    record.close()
    for name in ("texts", "answers/text", "answers/start"):
        del example.features.feature[name]
    path.write_bytes(tfrecord.frame(example.SerializeToString()))
    tfds_convert.convert_to_array_record(copy, tmp_path / "new" / NAME, ["test"])
    row = EXPECTED["test"][0] | {"texts": [], "answers": {"start": [], "text": []}}
    assert read(tmp_path / "new", "test[:1]") == [row]


def test_what_cannot_be_converted_is_one_line(fails, copy, tmp_path):
    (tmp_path / "there").mkdir()
    assert "already exists; name a new folder" in fails(copy, to=tmp_path / "there")
    assert "already exists" in fails(copy, to=copy)
    assert "is a file, not a folder" in fails(copy, to=copy / "features.json" / "new")
    assert "is written to a local folder" in fails(copy, to="gs://bucket/new")
    assert f"name the folder of one version, such as {copy}" in fails(copy.parents[1])
    assert "has no dataset_info.json" in fails(tmp_path / "gone")
    assert "no split 'trian'; did you mean train?" in fails(copy, "--split=test,trian")
    assert "only whole splits are converted" in fails(copy, "--split=train[:3]")
    assert "unknown flag --gin.X" in fails(copy, "--gin.X=1")


def test_a_damaged_file_leaves_nothing(fails, copy):
    path = copy / "all_features-test.tfrecord-00001-of-00002"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert f"{path}: record 1 of 1, at byte 0, is cut off" in fails(copy)
    path.unlink()
    assert f"{path}: the file is missing" in fails(copy)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_damaged_metadata_leaves_nothing(fails, copy, name):
    path = copy / name
    path.write_bytes(path.read_bytes()[:-20])
    assert f"error: {copy}" in fails(copy)


def test_other_formats(fails, copy):
    info = json.loads((copy / "dataset_info.json").read_text())
    for name in ("array_record", "riegeli"):
        (copy / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": name}))
        advice = {"array_record": "use it as it is", "riegeli": "`tfds convert_format"}[name]
        assert advice in fails(copy)


def test_names_cannot_lead_out_of_the_folder(fails, copy):
    info = json.loads((copy / "dataset_info.json").read_text())
    for split in info["splits"]:
        split["filepathTemplate"] = "../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    (copy / "dataset_info.json").write_text(json.dumps(info))
    for path in copy.glob("*.tfrecord*"):
        path.rename(copy.parent / path.name)
    assert "names a file outside of it" in fails(copy)


def test_a_full_disk_leaves_nothing(fails, copy):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, limits[1]))  # an array_record is larger
    try:
        assert "File too large" in fails(copy, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_progress_of_long_conversions(monkeypatch, call, tmp_path):
    monkeypatch.setattr(tfds_convert, "_PERIOD", 0)
    _, _, err = call("convert", f"--from={FIXTURE / NAME}", f"--to={tmp_path / NAME}")
    assert err.splitlines()[:2] == ["train: 0 of 7 examples", "train: 1 of 7 examples"]


def test_a_folder_appears_whole(tmp_path):
    target = tmp_path / "a" / "b"
    with pytest.raises(KeyboardInterrupt), files.folder_written_whole(target) as folder:
        (folder / "x").write_text("half")
        raise KeyboardInterrupt
    assert [*target.parent.iterdir()] == []
    with files.folder_written_whole(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("whole")
        assert not target.exists()
    assert (target / "sub" / "x").read_text() == "whole"
    assert [*target.parent.iterdir()] == [target]
    with pytest.raises(OSError), files.folder_written_whole(target) as folder:
        (folder / "y").write_text("another")
    assert [*target.parent.iterdir()] == [target] and [*target.iterdir()] == [target / "sub"]
