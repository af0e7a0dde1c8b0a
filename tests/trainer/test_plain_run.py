"""The training loop around a step of one addition: when it logs, evaluates, saves and stops."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import jax
import pytest
from conftest import At, stopped_by_sigterm
from plain_members import plain_member, plain_run, rows_of

from ptjax.backbones.damage import NotFiniteError
from ptjax.errors import TrainingError
from ptjax.settings import TrainSchedule
from ptjax.trainer import lock, loop


def said(caplog, start: str) -> list[str]:
    return [line for line in caplog.messages if line.startswith(start)]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def grows(tree: Any) -> dict[str, float]:
    return {"score": float(tree["prompt"][0])}


def stays(tree: Any) -> dict[str, float]:
    return {"score": 7.0}


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def test_a_run_logs_evaluates_and_saves_when_each_is_due_and_at_its_end(tmp_path, caplog):
    caplog.set_level("INFO", logger="absl")
    schedule = TrainSchedule(train_steps=5, eval_period=2, log_period=3)
    member = plain_member(tmp_path, evaluate=grows)
    run = plain_run(tmp_path, [member], schedule)
    # The losses are 2, 3, 4 and 5, 6; the rate is that of the row's last step.
    assert without_times(rows_of(tmp_path)) == [
        {"step": 2, "validation/score": 2.0},
        {"step": 3, "train/loss": 3.0, "train/gradient_norm": 30.0, "train/learning_rate": 2.5},
        {"step": 4, "validation/score": 4.0},
        {"step": 5, "train/loss": 5.5, "train/gradient_norm": 55.0, "train/learning_rate": 4.5},
        {"step": 5, "validation/score": 5.0},
    ]
    assert names(tmp_path / "checkpoints") == {"4", "5"}
    # The best, the two newest, and what the second newest checkpoint refers to.
    assert names(tmp_path / "exports") == {"4.json", "5.json", "best.json"}
    best = json.loads((tmp_path / "exports" / "best.json").read_text())
    assert best == {"prompt": [5.0, 5.0], "step": 5, "metric": "score", "value": 5.0}
    assert run.progress.members[0].best_step == 5
    assert len(said(caplog, "compiled the step")) == 1


def test_members_that_have_stopped_leave_and_the_rest_goes_on_with_its_own(tmp_path, caplog):
    """Only the score of d grows; its prompt starts at 300 and gains one a step."""
    caplog.set_level("INFO", logger="absl")
    members = [
        plain_member(
            tmp_path, name, lambda tree: {"score": max(float(tree["prompt"][0]), 300.0)}, rate
        )
        for name, rate in zip("abcd", (0.1, 0.2, 0.3, 0.4), strict=True)
    ]
    schedule = TrainSchedule(train_steps=4, eval_period=1, log_period=4, patience=1)
    run = plain_run(tmp_path, members, schedule)
    assert said(caplog, "1 of 4") == ["1 of 4 members still train: the sweep shrinks to 1 places"]
    shapes = [line.split(": ")[1].split("x")[0] for line in said(caplog, "compiled the step")]
    assert shapes == ["4", "1"]
    assert run.progress.member_ids == [3]
    best = json.loads((tmp_path / "exports" / "d" / "best.json").read_text())
    assert best["prompt"] == [304.0, 304.0]
    assert [m.best_step for m in run.progress.members] == [1, 1, 1, 4]
    [row] = [row for row in rows_of(tmp_path) if "train/loss" in row]
    assert row["train/learning_rate/d"] == pytest.approx(3.4) == row["train/learning_rate"]
    assert "train/loss/a" not in row


def test_a_run_ends_when_no_member_trains_any_more(tmp_path, caplog):
    caplog.set_level("INFO", logger="absl")
    member = plain_member(tmp_path, evaluate=stays)
    schedule = TrainSchedule(train_steps=9, eval_period=1, log_period=9, patience=3)
    run = plain_run(tmp_path, [member], schedule)
    assert run.progress.step == 4 and not run.progress.running
    assert names(tmp_path / "checkpoints") == {"3", "4"}


def test_stopped_before_the_first_evaluation_it_goes_on_from_there(tmp_path, caplog):
    """There is a checkpoint, and no best export yet."""
    caplog.set_level("INFO", logger="absl")
    schedule = TrainSchedule(train_steps=4, eval_period=3, log_period=2)

    def start(folder: Path, callbacks: Any = ()) -> loop.TrainingLoop:
        return plain_run(folder, [plain_member(folder)], schedule, callbacks)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    start(whole)
    assert stopped_by_sigterm(1, lambda callbacks: start(parts, callbacks)) == 143
    assert "signal 15: saving at the end of this step" in caplog.messages
    assert "saved at step 1; the same command or call resumes" in caplog.messages
    assert names(parts / "checkpoints") == {"1"} and not (parts / "exports").exists()
    before = json.loads((parts / "checkpoints" / "1" / "progress" / "data.json").read_text())
    run = start(parts)
    assert f"resuming from step 1 of {parts}" in caplog.messages
    assert 0 < before["seconds"] < run.progress.seconds
    assert without_times(rows_of(parts)) == without_times(rows_of(whole))
    for path in (whole / "exports").iterdir():
        assert (parts / "exports" / path.name).read_bytes() == path.read_bytes()


def test_a_sweep_that_has_shrunk_resumes_with_the_members_that_are_left(tmp_path):
    """Member a is at its best at once, so the checkpoint of step 3 holds only b."""
    schedule = TrainSchedule(train_steps=5, eval_period=1, log_period=1, patience=1, keep=1)

    def start(folder: Path, callbacks: Any = ()) -> loop.TrainingLoop:
        members = [plain_member(folder, "a", stays), plain_member(folder, "b", grows)]
        return plain_run(folder, members, schedule, callbacks)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    start(whole)
    assert stopped_by_sigterm(3, lambda callbacks: start(parts, callbacks)) == 143
    run = start(parts)
    assert run.progress.member_ids == [1] and run.progress.members[0].best_step == 1
    assert without_times(rows_of(parts)) == without_times(rows_of(whole))
    for name in "ab":
        kept = {path.name: path.read_bytes() for path in (whole / "exports" / name).iterdir()}
        again = {path.name: path.read_bytes() for path in (parts / "exports" / name).iterdir()}
        assert again == kept


def test_a_member_whose_score_is_not_finite_stops_and_the_others_train(tmp_path, caplog):
    def breaks(tree: Any) -> dict[str, float]:
        if tree["prompt"][0] == 2:
            raise NotFiniteError("a score is not finite")
        return stays(tree)

    members = [plain_member(tmp_path, "a", breaks), plain_member(tmp_path, "b", grows)]
    schedule = TrainSchedule(train_steps=3, eval_period=1, log_period=1)
    run = plain_run(tmp_path, members, schedule)
    [problem] = said(caplog, "a: ")
    assert problem == (
        "a: a score on the validation split of a step near 2 is not finite; the prompt of step 1 "
        "is kept. A smaller learning rate usually helps. The other members continue"
    )
    first, second = run.progress.members
    assert (first.failed, first.stopped, first.best_step) == (True, True, 1)
    assert (second.failed, second.stopped, second.best_step) == (False, False, 3)
    assert names(tmp_path / "exports" / "a") == {"1.json", "best.json"}


def test_a_run_whose_lock_was_replaced_writes_nothing_more(tmp_path, monkeypatch):
    """Not the row that is due at the same step, nor an export or a checkpoint."""

    def replace(step: int) -> None:
        monkeypatch.setattr(lock, "HEARTBEAT", 0.0)
        (tmp_path / "run.lock").write_text("another's")

    schedule = TrainSchedule(train_steps=4, eval_period=2, log_period=1)
    with pytest.raises(TrainingError, match=r"run\.lock was removed or replaced while this run"):
        plain_run(tmp_path, [plain_member(tmp_path)], schedule, [At({2}, replace)])
    assert [row["step"] for row in rows_of(tmp_path)] == [1]
    assert not (tmp_path / "exports").exists()
    assert (tmp_path / "run.lock").read_text() == "another's"


@pytest.mark.parametrize(
    ("stats", "lines"),
    [
        ({"peak_bytes_in_use": 1_500_000_000}, ["peak memory of a device: 1.50 GB"]),
        ({"peak_bytes_in_use": 0}, []),
        (None, []),  # as on a CPU
    ],
)
def test_the_peak_memory_is_told_where_it_is_measured(monkeypatch, caplog, stats, lines):
    caplog.set_level("INFO", logger="absl")
    device = types.SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    loop.report_memory()
    assert said(caplog, "peak memory") == lines
