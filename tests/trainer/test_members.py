"""The members of a run, how far they have got, and the row of metrics that they share."""

from __future__ import annotations

import json
import time
from typing import Any

import jax
import numpy as np
import pytest
from plain_members import plain_member, plain_state, several

from ptjax.errors import TrainingError
from ptjax.trainer.failures import Failures
from ptjax.trainer.members import Member, Members
from ptjax.trainer.metrics_log import MetricsLog
from ptjax.trainer.progress import MemberProgress, RunProgress
from ptjax.trainer.train_metrics import TrainMetrics


def test_progress_is_saved_under_the_names_that_every_version_reads():
    progress = RunProgress.at_start(2)
    progress.step, progress.member_ids = 7, [1]
    progress.members[0] = MemberProgress(best_value=0.5, best_step=3, stopped=True, best_before=2)
    saved = json.loads(json.dumps(progress.to_json()))
    new = {"best_value": None, "best_step": None, "without_gain": 0, "stopped": False}
    new |= {"failed": False, "loss_sum": 0.0, "norm_sum": 0.0, "best_before": None}
    old = new | {"best_value": 0.5, "best_step": 3, "stopped": True, "best_before": 2}
    assert saved == {
        "standings": [old, new], "held": [1], "step": 7, "steps_summed": 0, "seconds": 0.0,
    }  # fmt: skip
    assert RunProgress.from_json(saved) == progress


def test_who_trains_is_known_with_its_place(tmp_path):
    progress = RunProgress.at_start(4)
    assert progress.running == [(0, 0), (1, 1), (2, 2), (3, 3)]
    progress.member_ids = [3, 1]
    progress.members[0].stopped = progress.members[1].stopped = True
    assert progress.running == [(0, 3)]


def test_an_ordinary_run_has_one_member_without_a_name_and_no_axis_for_it(tmp_path):
    members, state = Members([plain_member(tmp_path)]), plain_state()
    assert not members.is_sweep and members.sweep_inputs() == ()
    assert members.batches() is members[0].batches
    assert members.trainable(state, 0) is state.trainable
    assert members.merge({0: {"loss": 2.0}}) == {"loss": 2.0}
    assert members.reduce(state, [0]) is state and members.shrink(state) is state


def test_a_sweep_of_one_is_a_sweep(tmp_path):
    members = several(tmp_path, "a")
    assert members.is_sweep and members.batches().shapes[0].members == 1
    active, rates = members.sweep_inputs()
    assert active.tolist() == [True] and rates.tolist() == [0.5] and rates.dtype == np.float32


def test_the_inputs_of_a_step_are_those_of_the_members_in_the_state(tmp_path):
    rates = {"a": 0.0, "b": 10.0, "c": 20.0}
    members = Members([plain_member(tmp_path, name, rate=rate) for name, rate in rates.items()])
    progress = members.progress
    progress.step, progress.member_ids = 4, [0, 2]
    progress.members[0].stopped = True
    active, learning_rates = members.sweep_inputs()
    assert active.tolist() == [False, True] and active.dtype == bool
    assert learning_rates.tolist() == [4.0, 24.0]
    assert [shape.members for shape in members.batches().shapes] == [2]
    # Place 1 of the state is member 2.
    [(member_id, trainable)] = members.running(plain_state(2))
    assert member_id == 2 and trainable["prompt"].tolist() == [100.0, 100.0]


@pytest.mark.parametrize(
    ("running", "left"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]),
        ([0, 1, 2, 4, 7], [0, 1, 2, 3, 4, 5, 6, 7]),  # more than half still train
        ([1, 2, 5, 7], [1, 2, 5, 7]),
        ([2, 5, 7], [0, 2, 5, 7]),  # one that has stopped fills the fourth place
        ([6], [6]),
        ([], [0, 1, 2, 3, 4, 5, 6, 7]),  # the run is over
    ],
)
def test_a_sweep_shrinks_to_half_of_its_places_as_often_as_it_can(tmp_path, running, left, caplog):
    caplog.set_level("INFO", logger="absl")
    members = several(tmp_path, *"abcdefgh")
    for member_id, member in enumerate(members.progress.members):
        member.stopped = member_id not in running
    state = members.shrink(plain_state(8))
    assert members.progress.member_ids == left
    # Member i begins with 100 i; its key, its step and its prompt move together.
    assert state.trainable["prompt"][:, 0].tolist() == [100.0 * i for i in left]
    assert state.step.shape == (len(left),)
    keys = jax.random.key_data(plain_state(8).key)[np.array(left)]
    assert (jax.random.key_data(state.key) == keys).all()
    said = [f"{len(running)} of 8 members still train: the sweep shrinks to {len(left)} places"]
    assert caplog.messages == (said if len(left) < 8 else [])
    # Again: nothing is left to drop.
    assert members.shrink(state) is state


def test_a_sweep_shrinks_from_what_is_left_of_it(tmp_path):
    members = several(tmp_path, *"abcd")
    stopped = members.progress.members
    stopped[0].stopped = stopped[2].stopped = True
    state = members.shrink(plain_state(4))
    stopped[1].stopped = True
    state = members.shrink(state)
    assert members.progress.member_ids == [3]
    assert state.trainable["prompt"].tolist() == [[300.0, 300.0]]


def test_an_export_says_its_step_and_the_value_that_selects(tmp_path):
    members = Members([plain_member(tmp_path, "a", lambda tree: {"score": 1.0})])
    members.progress.step = 6
    members.export(0, {"prompt": np.ones(2)}, 0.25)
    made = json.loads((tmp_path / "exports" / "a" / "6.json").read_text())
    assert made == {"prompt": [1.0, 1.0], "step": 6, "metric": "score", "value": 0.25}


def test_a_row_has_the_means_and_each_members_own(tmp_path):
    members = several(tmp_path, "a", "b", "c")
    row = members.merge({0: {"loss": 1.0, "only": 5.0}, 2: {"loss": 3.0}})
    assert row == {"loss": 2.0, "only": 5.0, "loss/a": 1.0, "only/a": 5.0, "loss/c": 3.0}


def test_a_member_needs_neither_an_evaluation_nor_a_name(tmp_path):
    made = plain_member(tmp_path)
    bare = Member(made.batches, made.exports, made.rate_at)
    assert (bare.evaluate, bare.metric, bare.name) == (None, None, "")


# The row of a run


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """What `time.perf_counter` says."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def metrics(loss: Any, norm: Any) -> dict[str, Any]:
    return {"loss": np.float32(loss), "gradient_norm": np.float32(norm)}


def test_a_row_averages_the_steps_since_the_last_one_and_measures_their_speed(tmp_path, clock):
    members = Members([plain_member(tmp_path)])
    measured = TrainMetrics(members, Failures(members, lambda: None))
    for loss in (1.0, 2.0, 6.0):
        measured.add(metrics(loss, 2 * loss), 8)
        members.progress.step += 1
    clock[0] += 4.0
    assert measured.take_row() == {
        "train/loss": 3.0,
        "train/gradient_norm": 6.0,
        "train/learning_rate": 2.5,  # of the third update, whose number is 2
        "time/examples_per_second": 6.0,
    }
    measured.add(metrics(7.0, 1.0), 8)
    members.progress.step += 1
    clock[0] += 2.0
    row = measured.take_row()
    assert (row["train/loss"], row["train/gradient_norm"]) == (7.0, 1.0)
    assert (row["train/learning_rate"], row["time/examples_per_second"]) == (3.5, 4.0)


def test_the_time_of_an_evaluation_is_not_that_of_the_steps(tmp_path, clock):
    members = Members([plain_member(tmp_path)])
    measured = TrainMetrics(members, Failures(members, lambda: None))
    measured.add(metrics(1.0, 1.0), 8)
    clock[0] += 100.0
    measured.restart_clock()
    measured.add(metrics(1.0, 1.0), 6)
    clock[0] += 2.0
    assert measured.take_row()["time/examples_per_second"] == 3.0


def test_the_metrics_of_the_running_step_are_not_waited_for(tmp_path):
    members = Members([plain_member(tmp_path)])
    measured = TrainMetrics(members, Failures(members, lambda: None))
    [progress] = members.progress.members
    sums = []
    for loss in (1.0, 2.0):
        measured.add(metrics(loss, 10 * loss), 1)
        sums.append((progress.loss_sum, members.progress.steps_summed))
    assert sums == [(0.0, 0), (1.0, 1)]
    for _ in range(2):  # what was added is added once
        measured.flush()
        assert (progress.loss_sum, progress.norm_sum) == (3.0, 30.0)
        assert members.progress.steps_summed == 2


def test_a_row_of_a_sweep_has_only_members_that_train(tmp_path, clock):
    members = several(tmp_path, "a", "b", "c")
    measured = TrainMetrics(members, Failures(members, lambda: None))
    members.progress.member_ids = [2, 0]
    members.progress.members[0].stopped = True
    members.progress.step = 2
    clock[0] += 1.0
    measured.add(metrics([5.0, 7.0], [50.0, 70.0]), 3)
    row = measured.take_row()
    assert row == {
        "train/loss": 5.0, "train/gradient_norm": 50.0, "train/learning_rate": 1.5,
        "train/loss/c": 5.0, "train/gradient_norm/c": 50.0, "train/learning_rate/c": 1.5,
        "time/examples_per_second": row["time/examples_per_second"],
    }  # fmt: skip
    assert members.progress.members[0].loss_sum == 0.0


@pytest.mark.parametrize(("loss", "norm"), [(np.nan, 1.0), (1.0, np.inf)])
def test_a_loss_or_a_norm_that_is_not_finite_stops_a_member(tmp_path, caplog, loss, norm):
    members = several(tmp_path, "a", "b")
    measured = TrainMetrics(members, Failures(members, lambda: None))
    measured.add(metrics([loss, 4.0], [norm, 5.0]), 2)
    measured.flush()
    [said] = caplog.messages
    assert said.startswith(f"a: the loss ({loss}, gradient norm {norm}) of a step near 0 is not")
    first, second = members.progress.members
    assert first.failed and (first.loss_sum, first.norm_sum) == (0.0, 0.0)
    assert (second.loss_sum, second.norm_sum) == (4.0, 5.0)


@pytest.mark.parametrize(("step", "advice"), [(1, "check the initial"), (2, "smaller learning")])
def test_the_first_loss_is_not_the_learning_rates_fault(tmp_path, step, advice):
    """It was computed before any update."""
    members = Members([plain_member(tmp_path)])
    measured = TrainMetrics(members, Failures(members, lambda: None))
    measured.add(metrics(np.nan, 1.0), 2)
    members.progress.step = step
    with pytest.raises(TrainingError, match=advice):
        measured.flush()


# metrics.jsonl


def read(folder: Any) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def started(folder: Any, step: int) -> MetricsLog:
    log = MetricsLog()
    log.on_start(folder, step)
    return log


def test_a_new_run_starts_an_empty_file_and_a_resumed_one_goes_on(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 9, "of": "another"}\n')
    log = started(tmp_path, 0)
    assert not (tmp_path / "metrics.jsonl").exists()
    log.on_log(2, {"train/loss": 1.0})
    log.on_evaluation(2, {"validation/accuracy": 0.5})
    log.on_log(4, {"train/loss": 2.0})
    rows = [
        {"step": 2, "train/loss": 1.0},
        {"step": 2, "validation/accuracy": 0.5},
        {"step": 4, "train/loss": 2.0},
    ]
    assert read(tmp_path) == rows
    # What is ahead of the checkpoint stays in the file until the run writes it again.
    again = started(tmp_path, 2)
    assert read(tmp_path) == rows
    again.on_log(4, {"train/loss": 3.0})
    assert read(tmp_path) == [*rows[:2], {"step": 4, "train/loss": 3.0}]


def test_damaged_lines_are_dropped_at_once_and_counted(tmp_path, caplog):
    lines = ['{"step": 1}', '{"step": "2"}', '{"step": 3', "[]", '{"step": 4}', '{"step": 5}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    started(tmp_path, 4)
    assert read(tmp_path) == [{"step": 1}, {"step": 4}]
    assert caplog.messages == [f"{tmp_path / 'metrics.jsonl'}: dropped 3 damaged line(s)"]


def test_a_run_can_resume_without_its_metrics(tmp_path, caplog):
    log = started(tmp_path, 3)
    log.on_log(4, {"loss": 1.0})
    assert read(tmp_path) == [{"step": 4, "loss": 1.0}] and not caplog.messages
