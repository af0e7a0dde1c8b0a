"""The weights of examples by label."""

from __future__ import annotations

import numpy as np
import pytest

from ptjax.data.class_weights import example_weights
from ptjax.data.tasks import Task
from ptjax.errors import InputError

ROWS = [{"x": f"t{i}", "y": y} for i, y in enumerate([0, 0, 0, 0, 0, 0, 1, 1])]
WORDS = {0: "usual", 1: "rare", 2: "never"}


@pytest.fixture
def task() -> Task:
    return Task.from_records(ROWS, inputs="{x}", label="y", verbalizer=WORDS)


@pytest.mark.parametrize(
    ("given", "usual", "rare"),
    [
        ("balanced", 8 / (2 * 6), 8 / (2 * 2)),  # of the labels that occur
        ({"rare": 5.0}, 1, 5),
        ({1: 5.0, "0": 0.5}, 0.5, 5),
        ({"never": 2}, 1, 1),
    ],
)
def test_by_text_by_value_or_balanced(task, given, usual, rare) -> None:
    weights = example_weights(given, task, task.load("train"))
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights, np.float32([usual] * 6 + [rare] * 2))


def test_labels_that_are_others_values() -> None:
    task = Task.from_records(ROWS, inputs="{x}", label="y", verbalizer={0: "1", 1: "0"})
    weights = example_weights({"1": 3.0}, task, task.load("train"))
    np.testing.assert_array_equal(weights, [3] * 6 + [1] * 2)  # a text comes before a value


def test_a_label_that_the_task_lacks_and_open_targets(task) -> None:
    with pytest.raises(InputError, match=r"class_weights has 'rar', .*; did you mean rare\?"):
        example_weights({"rar": 2.0}, task, task.load("train"))
    open_task = Task.from_records(ROWS, inputs="{x}", targets="{y}")
    with pytest.raises(InputError, match=r"task records: Loss\.class_weights needs a closed set"):
        example_weights("balanced", open_task, open_task.load("train"))
