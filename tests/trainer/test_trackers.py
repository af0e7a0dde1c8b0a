"""Trackers: what is sent, that a run resumes its own, and what a failure does.

What wandb and MLflow make of it is checked with the packages themselves, in tests/trackers.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import At, stopped_by_sigterm, tune
from etils import epath
from plain_members import plain_member, plain_run, rows_of

import ptjax
from ptjax import cli
from ptjax.errors import InputError
from ptjax.settings import TrainSchedule
from ptjax.sharding import processes
from ptjax.trainer.trackers import Tracker, read_settings

SCHEDULE = TrainSchedule(train_steps=8, eval_period=2, log_period=1)


class Noting(Tracker):
    """A tracker whose server is a list. Its package is one that every Python has."""

    package = "json"

    def __init__(self, fails: str = "") -> None:
        super().__init__()
        self.notes: list[tuple[Any, ...]] = []
        self.fails = fails

    def note(self, what: str, *values: Any) -> None:
        self.notes.append((what, *values))
        if what == self.fails:
            raise ConnectionError("no route to host\nat all")

    def open(self, model_dir: epath.Path, settings: dict[str, Any], run_id: str | None) -> str:
        self.note("open", settings, run_id)
        return run_id or "id-7"

    def log(self, step: int, metrics: Any) -> None:
        self.note("log", step, dict(metrics))

    def close(self, error: BaseException | None) -> None:
        self.note("close", error)

    def logged(self) -> list[dict[str, float]]:
        return [{"step": note[1], **note[2]} for note in self.notes if note[0] == "log"]


def run(folder: Path, *callbacks: Any) -> Any:
    """Eight steps; the scores of the four evaluations are 2, 4, 1, 3."""
    evaluate = lambda tree: {"score": float(tree["prompt"][0]) % 5}  # noqa: E731
    return plain_run(folder, [plain_member(folder, evaluate=evaluate)], SCHEDULE, callbacks)


def test_a_tracker_gets_settings_rows_and_the_best_score(tmp_path):
    (tmp_path / "config.gin").write_text("A = 3\nptjax.RunSettings.seed = %A\n")
    tracker = Noting()
    run(tmp_path, tracker)
    settings = {"RunSettings": {"seed": 3}, "model_dir": str(tmp_path), "ptjax": ptjax.__version__}
    assert tracker.notes[0] == ("open", settings, None)
    assert tracker.notes[-1] == ("close", None)
    logged = tracker.logged()
    best = [row.pop("best/score") for row in logged if "best/score" in row]
    assert best == [2, 4, 4, 4]
    assert logged == rows_of(tmp_path)
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"json": "id-7"}


def test_a_resumed_run_continues_its_own_and_a_new_one_does_not(tmp_path):
    first, second, third = Noting(), Noting(), Noting()
    assert stopped_by_sigterm(5, lambda kill: run(tmp_path, first, *kill)) == 143
    assert isinstance(first.notes[-1][1], SystemExit)
    path = tmp_path / "trackers.json"
    path.write_text(json.dumps({"json": "of before", "other": "kept"}))
    run(tmp_path, second)
    assert second.notes[0][2] == "of before"
    assert json.loads(path.read_text()) == {"json": "of before", "other": "kept"}
    best = [row["best/score"] for row in second.logged() if "best/score" in row]
    assert best == [4, 4]  # of the step before the stop
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "trackers.json").write_text('{"json": "of before"}')
    run(tmp_path / "new", third)
    assert third.notes[0][2] is None


def test_a_tracker_that_cannot_start_ends_the_run_before_its_first_step(tmp_path):
    tracker, steps = Noting(fails="open"), []
    with pytest.raises(InputError) as error:
        run(tmp_path, tracker, At(range(9), steps.append))
    assert str(error.value) == "Noting cannot start: no route to host; run without it"
    assert not steps and len(tracker.notes) == 1
    assert not (tmp_path / "trackers.json").exists()


@pytest.mark.parametrize(("fails", "calls"), [("log", 1), ("close", 13)])
def test_a_failure_later_costs_the_tracker_and_not_the_run(tmp_path, caplog, fails, calls):
    caplog.set_level("WARNING", logger="absl")
    tracker = Noting(fails)
    assert run(tmp_path, tracker).progress.step == 8
    assert len(tracker.notes) == 1 + calls
    assert caplog.messages == [
        "Noting failed and is off from here on (no route to host); the run continues, and "
        "metrics.jsonl has every row"
    ]


def test_an_error_of_the_run_reaches_the_tracker(tmp_path):
    def fails(step: int) -> None:
        raise KeyError(step)

    tracker = Noting()
    with pytest.raises(KeyError):
        run(tmp_path, tracker, At({3}, fails))
    assert repr(tracker.notes[-1]) == "('close', KeyError(3))"


def test_only_the_first_process_sends(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "first", lambda: False)
    tracker = Noting()
    tracker.on_start(epath.Path(tmp_path), 0)
    tracker.on_log(1, {"x": 1.0})
    tracker.on_evaluation(1, {"validation/x": 1.0})
    tracker.on_end(1)
    assert not tracker.notes and not [*tmp_path.iterdir()]


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    """Also beside a folder of its name, as wandb makes one; Python takes it for a package."""
    (tmp_path / "no_such_tracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("no_such_tracker")

    class Missing(Noting):
        package = "no_such_tracker"

    with pytest.raises(InputError) as error:
        Missing()
    assert str(error.value) == (
        "Missing needs no_such_tracker; pip install 'ptjax[no_such_tracker]'"
    )


@pytest.fixture
def put(tmp_path, monkeypatch) -> Iterator[Callable[[str, dict[str, str]], None]]:
    """Puts a package, {file: its text}, in place of the installed one until the test ends."""
    aside: dict[str, Any] = {}
    names = set()

    def move(target: dict[str, Any], source: dict[str, Any]) -> None:
        for module in [module for module in source if module.split(".")[0] in names]:
            target[module] = source.pop(module)

    def place(name: str, texts: dict[str, str]) -> None:
        for file, text in texts.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        names.add(name)
        move(aside, sys.modules)

    yield place
    move({}, sys.modules)
    move(sys.modules, aside)


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_making_a_tracker_imports_nothing(tmp_path, put, package):
    """A downloaded config.gin may name one. `on_start` alone imports the package."""
    put(package, {"__init__.py": "raise ConnectionError('imported')"})
    tracker = ptjax.WandbTracker("p") if package == "wandb" else ptjax.MlflowTracker("p")
    with pytest.raises(InputError, match="Tracker cannot start: imported; run without it"):
        tracker.on_start(epath.Path(tmp_path / "run"), 0)


def test_a_local_store_of_mlflow_needs_more_than_its_client(tmp_path, put):
    """ptjax's extra is mlflow-skinny, which raises where MLflow would open its default store."""
    client = "def MlflowClient(uri):\n    import alembic_of_mlflow\n"
    put("mlflow", {"__init__.py": "", "tracking/__init__.py": client})
    with pytest.raises(InputError, match=r"servers alone: .* pip install mlflow \(No module"):
        ptjax.MlflowTracker("p").on_start(epath.Path(tmp_path / "run"), 0)


def test_settings_are_read_without_gin(tmp_path, own_process):
    flags = ["--gin_file=quickstart.gin", "--gin.ptjax.tune.callbacks=[@ptjax.WandbTracker()]"]
    flags += ["--gin.WandbTracker.project='secret'"]
    cli.load_gin(cli.parse(cli.make_parser("x", ""), flags))
    path = epath.Path(tmp_path) / "config.gin"
    path.write_text(cli.config_text())
    settings = read_settings(path)
    assert settings["PromptTuning"] == {"attends_to_input": True, "length": 20}
    assert settings["Adafactor"]["learning_rate_scale"] == "embedding_rms"
    assert settings["Evaluation"]["examples"] is None
    assert settings["RunSettings"]["method"] == "@ptjax.PromptTuning()"
    assert settings["Task"]["splits"]["test"] == "test.jsonl"  # on a line of its own
    assert settings["name/HardPrompt"] == {"text": "imdb sentiment:"}
    assert "secret" not in str(settings) and "callbacks" not in settings["tune"]
    assert read_settings(path / "none") == {}


MINE = """
import pathlib
import ptjax

class Mine(ptjax.Callback):
    def on_start(self, model_dir, step):
        pathlib.Path("seen").write_text((model_dir / "config.gin").read_text())
"""


@pytest.mark.slow
def test_gin_files_name_callbacks(call, backbone, own_process, monkeypatch):
    Path("mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    code, _, err = call(
        "train",
        "--gin_file=quickstart.gin",
        f"--gin.INITIAL_CHECKPOINT_PATH='{backbone.name}'",
        "--gin.TRAIN_STEPS=1",
        "--gin.EVAL_EXAMPLES=2",
        "--gin.PROMPT_LENGTH=2",
        "--gin.Evaluation.hard_prompts={}",
        "--gin_bindings=import mine",
        "--gin.ptjax.tune.callbacks=[@mine.Mine()]",
    )
    sys.modules.pop("mine", None)
    assert code == 0, err
    assert "ptjax.tune.callbacks = [@mine.Mine()]" in Path("seen").read_text()


def test_a_run_from_python_sends_its_settings(tmp_path, backbone, task):
    tracker = Noting(fails="open")
    with pytest.raises(InputError, match="cannot start"):
        tune(tmp_path, task, backbone, callbacks=[tracker], length=4)
    settings = tracker.notes[0][1]
    assert settings["PromptTuning"]["length"] == 4
    assert settings["TrainSchedule"]["train_steps"] == 12
    assert "callbacks" not in settings["tune"]
