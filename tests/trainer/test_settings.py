"""`RunSettings` is the paper; what does not fit is refused; what a run tells and leaves."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gin
import pytest
from conftest import make_settings

import ptjax
from ptjax import cli
from ptjax.errors import InputError
from ptjax.settings import RunSettings
from ptjax.trainer.callbacks import Callback
from ptjax.trainer.identity import describe


def test_the_defaults_are_the_papers_recipe_and_its_gin_files(own_process):
    """Lester et al. 2021, appendix A; runs/prompt_tune.gin writes them down for the reader."""
    settings = ptjax.RunSettings()
    assert settings.method == ptjax.PromptTuning(length=100)
    assert (settings.optimizer.learning_rate, settings.optimizer.weight_decay) == (0.3, 1e-5)
    assert not settings.optimizer.multiply_by_parameter_scale
    assert settings.schedule.train_steps == 30_000 and settings.batching.batch_size == 32
    flags = ["--gin_file=tasks/sentiment.gin", "--gin_file=runs/prompt_tune.gin"]
    flags += ["--gin.MODEL_DIR='m'", "--gin.INITIAL_CHECKPOINT_PATH='ptjax-nano'"]
    cli.load_gin(cli.parse(cli.make_parser("x", ""), flags))
    assert cli.settings("ptjax.tune", "settings")["settings"] == dataclasses.replace(
        settings, batching=ptjax.Batching(feature_lengths=settings.batching.lengths)
    )


def test_every_default_of_the_settings_is_written_once():
    """`tune` has none of its own, and what a part leaves out is that part's default."""
    parameters = inspect.signature(ptjax.tune).parameters
    assert len(parameters) <= 8
    assert {p.default for p in parameters.values()} <= {inspect.Parameter.empty, None, (), False}
    for field in dataclasses.fields(RunSettings):
        default = field.default
        assert default == 0 or default == type(default)(), field.name


def test_public_functions_take_few_arguments():
    functions = [getattr(ptjax, name) for name in ptjax.__all__]
    counts = {f: len(inspect.signature(f).parameters) for f in functions if inspect.isfunction(f)}
    assert len(counts) > 10 and max(counts.values()) <= 12


def test_public_names_are_what_they_say_also_beside_modules_of_the_same_name():
    import ptjax.evaluate  # commands
    import ptjax.infer
    import ptjax.plan
    import ptjax.pretrain
    import ptjax.trainer.sweep  # a room

    for name in ("pretrain", "sweep", "infer", "evaluate", "plan"):
        assert inspect.isfunction(getattr(ptjax, name))
    assert set(ptjax.__all__) <= set(dir(ptjax))
    assert all(getattr(ptjax, name) is not None for name in ptjax.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'tunes'"):
        ptjax.tunes  # noqa: B018


def test_a_flag_needs_no_import_and_no_prefix():
    """Also in a process in which no gin file has named ptjax before."""
    code = """
from ptjax import cli
flags = ["--gin.ptjax.RunSettings.seed=3", "--gin.TrainSchedule.keep=4"]
cli.load_gin(cli.parse(cli.make_parser("x", ""), flags))
print(cli.settings("ptjax.RunSettings", "seed"), cli.settings("ptjax.TrainSchedule", "keep"))
print(cli.config_text())
"""
    environment = os.environ | {"PYTHONPATH": str(Path(ptjax.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    first, *config = done.stdout.splitlines()
    assert first == "{'seed': 3} {'keep': 4}"
    assert {"import ptjax", "ptjax.RunSettings.seed = 3", "ptjax.TrainSchedule.keep = 4"} <= {
        *config
    }


def test_preprocessors_are_printed_back(own_process):
    cli.load_gin(cli.parse(cli.make_parser("x", ""), ["--gin_file=tasks/imdb.gin",
                                                      "--gin.DATA_DIR='d'"]))  # fmt: skip
    text = cli.config_text()
    assert "import ptjax\n" in text and text.count("import") == 2
    assert "ptjax.Task.preprocess = @ptjax.preprocessors.without_line_breaks" in text
    gin.clear_config()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ptjax.Batching(batch_size=8, microbatches=3), "must be divisible by MICROBATCHES"),
        (lambda: ptjax.Batching(feature_lengths={"input": 3}), "TASK_FEATURE_LENGTHS has 'input'"),
        (lambda: ptjax.Batching(row_length=0), "Batching.row_length must be >= 1, got 0"),
        (lambda: ptjax.PromptTuning(length=0), "PROMPT_LENGTH must be >= 1, got 0"),
        (lambda: ptjax.RunSettings(seed=-1), "RANDOM_SEED must be >= 0, got -1"),
        (lambda: ptjax.TrainSchedule(keep=0), "TrainSchedule.keep must be >= 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused_where_it_is_made(make, said):
    with pytest.raises(InputError) as refused:
        make()
    assert said in str(refused.value)


class Heard(Callback):
    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.metrics: list[Mapping[str, float]] = []

    def on_start(self, model_dir: Any, step: int) -> None:
        assert (model_dir / "run.lock").exists()
        self.events.append(("start", step))

    def on_step(self, step: int) -> None:
        self.events.append(("step", step))

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.events.append(("log", step))
        self.metrics.append(metrics)

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self.events.append(("evaluation", step))
        self.metrics.append(metrics)

    def on_end(self, step: int) -> None:
        self.events.append(("end", step))


def test_a_run_tells_its_callbacks_and_results_are_a_row_of_a_study(backbone, task, tmp_path):
    settings = make_settings(
        schedule=ptjax.TrainSchedule(train_steps=9, eval_period=2, log_period=1)
    )
    heard = Heard()

    class EnoughError(Exception):
        pass

    class Fails(Callback):
        def on_step(self, step: int) -> None:
            if step == 3:
                raise EnoughError

    with pytest.raises(EnoughError):
        ptjax.tune(backbone, task, tmp_path, settings, steps=4, callbacks=[heard, Fails()])
    assert heard.events == [
        ("start", 0), ("step", 1), ("log", 1), ("step", 2), ("log", 2), ("evaluation", 2),
        ("step", 3), ("end", 3),
    ]  # fmt: skip
    again = Heard()
    run = ptjax.tune(backbone, task, tmp_path, settings, steps=4, callbacks=[again])
    assert again.events == [
        ("start", 2), ("step", 3), ("log", 3), ("step", 4), ("log", 4), ("evaluation", 4),
        ("end", 4),
    ]  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-3:] == [
        {"step": step, **metrics} for step, metrics in zip((3, 4, 4), again.metrics, strict=True)
    ]
    results = run.results
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["schedule"]["train_steps"] == 4
    assert results["settings"] == describe(
        dataclasses.replace(
            settings, schedule=dataclasses.replace(settings.schedule, train_steps=4)
        ),
        whole=True,
    )
    assert (results["backbone"], results["fingerprint"]) == (backbone.name, backbone.fingerprint)
    assert results["versions"]["ptjax"] == ptjax.__version__
    assert 0 < results["seconds"] < 600
    assert run.prompt is not None and run.prompt.metadata["step"] == results["step"]
    # A finished run is not told anew.
    once_more = Heard()
    same = ptjax.tune(backbone, task, tmp_path, settings, steps=4, callbacks=[once_more])
    assert same.results == results and once_more.events == []
