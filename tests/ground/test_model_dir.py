"""What lies where in a MODEL_DIR."""

from __future__ import annotations

import doctest

import pytest
from conftest import tune
from etils import epath

from ptjax import model_dir
from ptjax.errors import InputError
from ptjax.model_dir import ModelDir, steps_in
from ptjax.settings import TrainSchedule
from ptjax.trainer.config_file import ConfigFile


def test_a_run_writes_what_the_class_names_and_nothing_else(backbone, task, tmp_path):
    run = ModelDir(tmp_path)
    assert not run.is_run()
    schedule = TrainSchedule(train_steps=4, eval_period=2)
    callbacks = [ConfigFile("A = 1\n")]
    results = tune(tmp_path, task, backbone, schedule=schedule, callbacks=callbacks)
    named = [run.config, run.results, run.metrics, run.checkpoints, run.tensorboard, run.prompts()]
    named += [run.report, run.report_data]
    names = "checkpoints config.gin metrics.jsonl prompts report.html report.json results.json"
    names += " tensorboard"
    assert sorted(path.name for path in named) == names.split()  # for good: runs of before have it
    assert sorted(tmp_path.iterdir()) == sorted(named)  # the lock is gone
    assert run.is_run() and run.read_results() == results
    assert run.config.read_text() == "A = 1\n"
    assert run.checkpoint_steps() == steps_in(run.prompts(), ".safetensors") == [2, 4]
    assert run.best_prompt() in run.prompts().iterdir()
    assert run.members() == []


@pytest.mark.parametrize("path", ["config.gin", "results.json", "prompts"])
def test_any_of_three_things_tells_a_run(tmp_path, path):
    run = ModelDir(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    assert not run.is_run()
    (tmp_path / path).touch()
    assert run.is_run()


def test_members_of_a_bank_are_those_with_a_best_prompt(tmp_path):
    run = ModelDir(tmp_path)
    assert run.members() == []
    for name in ("b", "a"):
        run.best_prompt(name).parent.mkdir(parents=True)
        run.best_prompt(name).touch()
    (run.prompts("c") / "3.safetensors").parent.mkdir()
    (run.prompts("c") / "3.safetensors").touch()
    run.best_prompt().touch()
    assert run.members() == ["a", "b"]


def test_steps_are_names_of_digits_with_the_suffix(tmp_path):
    folder = epath.Path(tmp_path)
    for name in ("10.safetensors", "9.safetensors", "best.safetensors", "7", "8.npy", ".6.tmp"):
        (folder / name).touch()
    assert steps_in(folder, ".safetensors") == [7, 9, 10]
    assert steps_in(folder) == [7]
    assert steps_in(folder / "missing") == []


def test_damaged_results_are_refused_by_name(tmp_path):
    run = ModelDir(tmp_path)
    assert run.read_results() is None
    run.results.write_text("[1]")
    with pytest.raises(
        InputError, match=r"results\.json: the file is truncated or not a JSON object"
    ):
        run.read_results()


def test_examples_in_the_docstrings_run():
    result = doctest.testmod(model_dir)
    assert result.attempted >= 2
    assert result.failed == 0
