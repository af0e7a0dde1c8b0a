"""Labels and splits as strangers bring them: odd white space, odd cases, too few records."""

from __future__ import annotations

import logging

import pytest

from ptjax.data.preprocess import check_labels
from ptjax.data.tasks import Task
from ptjax.data.tokenizer import load_tokenizer
from ptjax.errors import listing

HOW = {"inputs": "{body}", "label": "kind"}


def rows(*labels: object, start: int = 0) -> list[dict[str, object]]:
    return [{"body": f"text {i}", "kind": label} for i, label in enumerate(labels, start)]


@pytest.fixture
def warnings(caplog):
    """The warnings so far."""
    return lambda: [x.getMessage() for x in caplog.records if x.levelno == logging.WARNING]


def test_white_space_in_a_label_is_one_space_which_every_vocabulary_writes():
    task = Task.from_records(rows("log in  problem", "a\nb", " c\td "), **HOW)
    assert task.labels is not None
    assert sorted(task.labels) == ["a b", "c d", "log in problem"]
    check_labels(task.labels, load_tokenizer("package:nano"), 16)
    assert [x.targets for x in task.load("train")] == ["log in problem", "a b", "c d"]


def test_labels_that_only_case_tells_apart_are_a_warning(warnings):
    Task.from_records(rows("Yes", "no", "yes"), **HOW)
    assert warnings() == [
        "kind: labels that only their case tells apart: 'Yes', 'yes'; if they mean the same, give "
        "a verbalizer"
    ]


def test_a_validation_split_that_selects_by_chance_is_a_warning(warnings):
    train = rows(*"ab" * 6)
    Task.from_records(train, rows(*"ab" * 4, start=20), **HOW)
    assert warnings() == []
    Task.from_records(train, 0.1, **HOW)
    absent, few = warnings()
    assert absent.startswith("kind: validation has no record of '")
    assert few.startswith("kind: validation has only 1 records; accuracies on them differ by up ")


def test_long_names_in_a_list_are_cut_and_paths_are_not():
    path = "/" + 299 * "p"
    assert listing(["x" * 2000, "y"]) == f"{'x' * 80}..., y" and listing([path]) == path


def test_long_labels_are_cut_in_messages(caplog):
    caplog.set_level(logging.INFO, logger="absl")
    Task.from_records(rows("x" * 90, "y"), **HOW)
    assert [record.getMessage() for record in caplog.records] == [
        f"kind: 2 labels from the data: {'x' * 80}..., y",
        f"kind, split train: 2 records: {'x' * 80}... (1), y (1)",
    ]
