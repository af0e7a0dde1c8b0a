"""`Task.from_records` reads what pandas and `datasets` themselves make."""

from __future__ import annotations

import logging

import pytest

from ptjax.data.tasks import Task
from ptjax.errors import InputError

pytestmark = pytest.mark.oracle


def targets(task: Task, split: str = "train") -> list[str]:
    return [example.targets for example in task.load(split)]


@pytest.fixture
def frame():
    import pandas

    return pandas.DataFrame(
        {
            "body": ["a", "b", "c", "d"],
            "kind": pandas.Categorical(["p", "q", "p", "q"]),
            "number": [1, 2, 1, 2],
            "truth": [True, False, True, False],
            "day": pandas.to_datetime(["2024-05-01", "2024-05-02", "2024-05-03", None]),
        },
        index=[7, 7, 1, 0],
    )


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("kind", ["p", "q", "p", "q"]),
        ("number", ["1", "2", "1", "2"]),
        ("truth", ["true", "false", "true", "false"]),
    ],
)
def test_columns_of_a_data_frame(frame, label, expected):
    task = Task.from_records(frame, inputs="{body}", label=label)
    assert targets(task) == expected
    assert task.load("train")[0].fields == {
        "body": "a",
        "kind": "p",
        "number": 1,
        "truth": True,
        "day": "2024-05-01 00:00:00",
    }
    assert Task.from_records(frame.copy(), inputs="{body}", label=label) == task


def test_missing_values_of_pandas(frame):
    import pandas

    for column, missing in (("day", pandas.NaT), ("kind", None), ("body", float("nan"))):
        rows = frame.assign(number=pandas.array([1, 2, 1, 2], dtype="Int64"))
        rows.iloc[1, list(rows).index(column)] = missing
        lost = r"[12] of 4 records of train cannot be used; the first, train:2: the field '%s' is n"
        with pytest.raises(InputError, match=lost % column):
            Task.from_records(rows, inputs="{body} {day}", label="kind")
    gaps = frame.assign(number=[1, None, 1, 2])
    task = Task.from_records(gaps, inputs="{body}", label="number", on_bad_record="skip")
    assert targets(task) == ["1", "1", "2"] and task.labels == ("1", "2")


def test_a_column_that_occurs_twice(frame):
    import pandas

    twice = pandas.concat([frame, frame[["kind"]]], axis=1)
    with pytest.raises(InputError, match="train has several columns 'kind'; rename one"):
        Task.from_records(twice, inputs="{body}", label="kind")


@pytest.fixture
def splits():
    import datasets

    names = datasets.ClassLabel(names=["pos", "neg"])
    features = datasets.Features(
        {"body": datasets.Value("string"), "label": names, "tags": datasets.Sequence(names)}
    )

    def split(*labels):
        columns = {"body": list("abc"), "label": labels, "tags": [[0], [1, 0], []]}
        return datasets.Dataset.from_dict(columns, features=features)

    parts = {"train": split(0, 1, 0), "validation": split(1, 1, 0), "test": split(-1, -1, -1)}
    return datasets.DatasetDict(parts)


def test_class_labels_are_their_names(splits, caplog):
    caplog.set_level(logging.WARNING, logger="absl")
    task = Task.from_records(splits, inputs="{body}", label="label")
    assert task.verbalizer == {"pos": "pos", "neg": "neg"}  # in the order of the feature
    assert targets(task) == ["pos", "neg", "pos"]
    assert targets(task, "validation") == ["neg", "neg", "pos"]
    assert list(task.splits) == ["train", "validation"]  # GLUE's tests are without labels, -1
    assert "label: test is left out, none of its records has a label" in caplog.messages
    train = splits["train"]
    for words in ({0: "good", 1: "bad"}, {"pos": "good", "neg": "bad"}):
        task = Task.from_records(train, inputs="{body}", label="label", verbalizer=words)
        assert targets(task) == ["good", "bad", "good"]
    task = Task.from_records(train, inputs="{body}", label="tags")
    assert targets(task) == ["pos", "neg, pos", "none"]
    task = Task.from_records(train, inputs="{body}", targets="{label}")
    assert targets(task) == ["pos", "neg", "pos"]


def test_formats_and_streams_of_datasets(splits):
    task = Task.from_records(splits["train"], inputs="{body}", label="label")
    for source in (splits["train"].with_format("numpy"), splits["train"].to_iterable_dataset()):
        assert Task.from_records(source, inputs="{body}", label="label") == task
