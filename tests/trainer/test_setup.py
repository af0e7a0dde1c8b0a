"""The members of a run before its first step: which of them share what was read."""

from __future__ import annotations

import dataclasses

from conftest import make_settings
from etils import epath
from frozen import assert_frozen

from ptjax.data.tasks import Task
from ptjax.trainer.setup import set_up_members
from ptjax.trainer.sweep import MemberOverrides


def loaded(backbone, task: Task, tmp_path, *others: Task) -> list[int]:
    """For every member, the number of its task's data: the run's task, then `others`."""
    members = {str(i): MemberOverrides(task=other) for i, other in enumerate((None, *others))}
    setups = set_up_members(backbone, task, epath.Path(tmp_path), make_settings(), members)
    data = list(dict.fromkeys(setup.data for setup in setups))
    assert len({setup.data.evaluator for setup in setups}) == len(data)
    return [data.index(setup.data) for setup in setups]


def test_members_of_equal_tasks_share_data_and_evaluator(backbone, task, tmp_path) -> None:
    equal = dataclasses.replace(task)
    assert equal is not task
    other = dataclasses.replace(task, inputs="read: {text}")
    again = dataclasses.replace(other, splits=dict(task.splits))
    assert loaded(backbone, task, tmp_path, equal, other, again) == [0, 0, 1, 1]


def test_tasks_that_differ_in_the_order_of_their_labels_share_nothing(
    backbone, task, tmp_path
) -> None:
    """Equal as dicts, but the rows of a prompt and the label of F1 follow the order."""
    turned = dataclasses.replace(task, verbalizer=dict(reversed(task.verbalizer.items())))
    assert turned == task and turned.labels != task.labels
    assert loaded(backbone, task, tmp_path, turned) == [0, 1]


def test_settings_and_values_do_not_change_after_they_were_made() -> None:
    """Except how far a run has got, what of it is shown, and whether a signal came."""
    assert_frozen("ptjax.trainer", "MemberProgress", "RunProgress", "ShownProgress", "Stop")
