"""The trackers with the real wandb and MLflow, offline; `make trackers` runs this, outside CI."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import At, stopped_by_sigterm
from plain_members import plain_member, plain_run

import ptjax
from ptjax.settings import TrainSchedule

pytestmark = pytest.mark.trackers
SCHEDULE = TrainSchedule(train_steps=8, eval_period=2, log_period=1)
LOSSES = {step: step + 1.0 for step in range(1, 9)}
CONFIG = "ptjax.RunSettings.seed = 3\nptjax.TrainSchedule.train_steps = {}\n"


def run(folder: Path, *callbacks: Any, steps: int = 8) -> Any:
    """The loss of step i is i + 1; the scores of the four evaluations are 2, 4, 1, 3."""
    folder.mkdir(exist_ok=True)
    (folder / "config.gin").write_text(CONFIG.format(steps))
    evaluate = lambda tree: {"score": float(tree["prompt"][0]) % 5}  # noqa: E731
    schedule = dataclasses.replace(SCHEDULE, train_steps=steps)
    return plain_run(folder, [plain_member(folder, evaluate=evaluate)], schedule, callbacks)


def stop(folder: Path, step: int, tracker: Any) -> None:
    """A run that is stopped in a step between two evaluations; it resumes from a checkpoint."""
    assert stopped_by_sigterm(step, lambda kill: run(folder, tracker, *kill)) == 143


def crash(folder: Path, step: int, tracker: Any) -> None:
    """A run that fails in a step; it resumes from the last evaluation, some steps earlier."""

    def fail(step: int) -> None:
        raise KeyError(step)

    with pytest.raises(KeyError):
        run(folder, tracker, At({step}, fail))


@pytest.fixture
def client(tmp_path) -> Iterator[Any]:
    """An MLflow client of a new database; `store` is its URI."""
    from mlflow.tracking import MlflowClient

    client: Any = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    client.store = f"sqlite:///{tmp_path}/mlflow.db"
    yield client


@pytest.mark.parametrize(
    ("interrupt", "status"), [(stop, "KILLED"), (crash, "FAILED")], ids=["stopped", "crashed"]
)
def test_mlflow_continues_its_run(tmp_path, client, interrupt, status):
    folder = tmp_path / "tickets"
    interrupt(folder, 5, ptjax.MlflowTracker("mine", client.store))
    [found] = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert (found.info.run_name, found.info.status) == ("tickets", status)
    run(folder, ptjax.MlflowTracker("mine", client.store))
    run(folder, ptjax.MlflowTracker("mine", client.store), steps=10)  # a longer one
    [found] = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["RunSettings.seed"] == "3"
    assert found.data.params["TrainSchedule.train_steps"] == "8"
    assert found.data.tags["TrainSchedule.train_steps"] == "10"
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [
        *LOSSES.items(),
        (9, 10.0),
        (10, 11.0),
    ]
    scores = client.get_metric_history(found.info.run_id, "validation/score")
    assert [(point.step, point.value) for point in scores] == [
        (2, 2),
        (4, 4),
        (6, 1),
        (8, 3),
        (10, 0),
    ]
    assert found.data.metrics["best/score"] == 4


def test_mlflow_takes_many_settings_long_values_and_odd_names(tmp_path, client):
    tracker = ptjax.MlflowTracker("mine", client.store)
    settings = {"Task": {f"name_{i}": "x" * 9000 for i in range(250)}}
    run_id = tracker.open(tmp_path, settings, None)  # type: ignore[arg-type]
    tracker.log(1, {"validation/score/a=1,b": 2.0})
    tracker.close(None)
    found = client.get_run(run_id)
    assert len(found.data.params) == 250
    assert found.data.metrics == {"validation/score/a_1_b": 2.0}


def test_mlflow_that_cannot_be_reached_ends_the_run_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ptjax.InputError, match="MlflowTracker cannot start: API request"):
        run(tmp_path / "run", ptjax.MlflowTracker("mine", "http://127.0.0.1:9"))


def records_of(data: bytes) -> Iterator[bytes]:
    """The records of a file in the format of LevelDB's log, behind a header of 7 bytes."""
    place, parts = 7, b""
    while place < len(data):
        left = 32768 - place % 32768
        if left < 7:  # the end of a block
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def history_of(folder: Path) -> dict[int, dict[str, Any]]:
    """The rows, by step, in wandb's file of an offline run."""
    from wandb.proto import wandb_internal_pb2

    [file] = folder.glob("run-*.wandb")
    rows = {}
    for data in records_of(file.read_bytes()):
        record: Any = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {x.key or "/".join(x.nested_key): json.loads(x.value_json) for x in items}
            rows[row["_step"]] = row
    return rows


def test_wandb_continues_its_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "tickets"
    stop(folder, 5, ptjax.WandbTracker("mine", tags=["x"]))
    run(folder, ptjax.WandbTracker("mine"), steps=10)
    first, second = sorted((folder / "wandb").glob("offline-run-*"))
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2]  # one id
    rows = history_of(first) | history_of(second)
    assert {step: row["train/loss"] for step, row in rows.items()} == {
        **LOSSES,
        9: 10.0,
        10: 11.0,
    }
    assert [rows[step]["best/score"] for step in (2, 4, 6, 8)] == [2, 4, 4, 4]


def test_wandb_uses_the_run_of_the_caller_and_leaves_it_open(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    import wandb

    own = wandb.init(project="mine", dir=str(tmp_path))
    run(tmp_path / "run", ptjax.WandbTracker())
    assert wandb.run is own and own.config["RunSettings"] == {"seed": 3}
    assert own.summary["best/score"] == 4
    own.finish()
    assert not (tmp_path / "run" / "trackers.json").exists()
