"""A run started from Python is as good as one of the command: its files, Ctrl-C, what it shows."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import At, make_settings, outcome

import ptjax
from ptjax.data.tasks import Task
from ptjax.trainer.config_file import ConfigFile

pytestmark = pytest.mark.usefixtures("own_process")
SETTINGS = make_settings()


@pytest.fixture
def in_memory(task) -> Task:
    """The same task, of records in memory."""
    records = {
        split: [dict(example.fields) for example in task.load(split)] for split in task.splits
    }
    return ptjax.Task.from_records(records, inputs=task.inputs, label="label", name="words")


def test_every_command_works_on_a_run_from_python(call, backbone, task):
    run = ptjax.tune(backbone, task, "run", SETTINGS)
    text = Path("run/config.gin").read_text()
    code, out, err = call("evaluate", "--model_dir=run")
    assert code == 0 and json.loads(out)["value"] == run.results["value"], err
    code, out, err = call("infer", "--model_dir=run", "a lovely film")
    assert code == 0 and json.loads(out)["inputs"] == "text: a lovely film", err
    code, out, err = call("inspect", "run")
    assert code == 0 and f"{run.results['value']:.4g}" in out, err
    code, _, err = call("export", "--model_dir=run", "--to=npy", "--output=prompt.npy")
    assert code == 0 and Path("prompt.npy").exists(), err
    before = outcome(Path("run"))
    code, out, err = call("train", "--gin_file=run/config.gin")
    assert code == 0 and "the run has finished, at step 12" in err, err
    assert outcome(Path("run")) == before and Path("run/config.gin").read_text() == text
    flags = ["--gin_file=run/config.gin", "--gin.TRAIN_STEPS=14"]
    code, _, err = call("train", *flags)
    assert code == 0 and "resuming from step 12 of run" in err, err


def test_records_in_memory_are_in_no_file_and_every_command_says_so_or_works(
    call, backbone, in_memory
):
    run = ptjax.tune(backbone, in_memory, "run", SETTINGS, steps=3)
    assert run.finished and run.results["task"] == "words"
    code, out, err = call("infer", "--model_dir=run", "a lovely film")
    assert code == 0 and json.loads(out)["inputs"] == "text: a lovely film", err
    for command, flag in (("evaluate", "--model_dir=run"), ("train", "--gin_file=run/config.gin")):
        code, out, err = call(command, flag)
        assert (code, out) == (2, "") and err.splitlines()[-1].startswith(
            "error: task words: split 'test': the records of task words were given in Python"
            if command == "evaluate"
            else "error: task words: split "
        ), err
        assert "are in no file; evaluate there, or write them to files" in err


class Own(ptjax.PromptTuning):
    """A method that no gin file names."""


def test_a_method_of_ones_own_is_told_by_train_and_the_prompt_is_used(call, backbone, task):
    ptjax.tune(backbone, task, "run", make_settings(method=Own(4)), steps=3)
    code, out, err = call("infer", "--model_dir=run", "a lovely film")
    assert code == 0 and json.loads(out)["inputs"] == "text: a lovely film", err
    assert call("evaluate", "--model_dir=run")[0] == 0
    code, _, err = call("train", "--gin_file=run/config.gin")
    assert code == 2 and err == (
        "error: run/config.gin: the run was started from Python, and ptjax.RunSettings.method was "
        f"an object of the class {__name__}.Own, which no gin file can say; call ptjax.tune "
        "there, or set it in another gin file\n"
    )


def test_a_backbone_of_ones_own_is_told_by_the_commands(call, backbone, task):
    import dataclasses

    made = dataclasses.replace(backbone, arguments={})
    ptjax.tune(made, task, "run", SETTINGS, steps=3)
    code, out, err = call("infer", "--model_dir=run", "a lovely film")
    assert (code, out) == (2, "") and err == (
        "error: run/config.gin: the run was started from Python, and ptjax.tune.backbone was a "
        "backbone that load_backbone did not load, which no gin file can say; use it there, or "
        "give the backbone with --backbone=PATH\n"
    )
    flags = ["--model_dir=run", f"--backbone={backbone.name}", "a lovely film"]
    assert call("infer", *flags)[0] == 0


def test_a_commands_own_config_file_stays(backbone, task):
    ptjax.tune(backbone, task, "run", SETTINGS, steps=1, callbacks=[ConfigFile("# its own\n")])
    assert Path("run/config.gin").read_text() == "# its own\n"


def ctrl_c(step: int) -> At:
    return At({step}, lambda step: os.kill(os.getpid(), signal.SIGINT))


@pytest.fixture
def interactive(monkeypatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)


@pytest.mark.usefixtures("interactive")
def test_an_interrupted_cell_returns_the_best_so_far_and_the_same_call_resumes(
    backbone, task, caplog
):
    def tune(folder: str, **how: Any) -> ptjax.Run:
        return ptjax.tune(backbone, task, folder, SETTINGS, **how)

    whole = tune("whole")
    caplog.set_level("INFO", logger="absl")
    early = tune("run", callbacks=[ctrl_c(2)])
    assert early.results == {"finished": False, "trained_steps": 2} and early.prompt is None
    assert "interrupted at step 2 of 12 and saved in run; no evaluation yet" in caplog.text
    stopped = tune("run", callbacks=[ctrl_c(7)])
    rows = [json.loads(row) for row in Path("run/metrics.jsonl").read_text().splitlines()]
    scores = {r["step"]: r["validation/accuracy"] for r in rows if "validation/accuracy" in r}
    best = max(scores, key=lambda step: scores[step])
    assert sorted(scores) == [3, 6]
    assert stopped.results == {
        "finished": False,
        "trained_steps": 7,
        "task": "words",
        "split": "validation",
        "metric": "accuracy",
        "value": scores[best],
        "metrics": {"accuracy": scores[best]},
        "step": best,
    }
    assert not stopped.finished and stopped.prompt is not None
    assert stopped.prompt.metadata["step"] == best
    assert f"the best so far is step {best} (accuracy {scores[best]:.3f} on validation)" in (
        caplog.text
    )
    assert not Path("run/results.json").exists()
    finished = tune("run")
    assert finished.finished and outcome(Path("run")) == outcome(Path("whole"))
    assert whole.results["value"] == finished.results["value"]


@pytest.mark.usefixtures("interactive")
def test_an_interrupted_sweep_returns_the_best_member(backbone, task):
    members = ptjax.sweep(seeds=[1, 2])
    run = ptjax.tune(backbone, task, "run", SETTINGS, members=members, callbacks=[ctrl_c(4)])
    results = run.results
    assert not run.finished and list(results["members"]) == ["seed1", "seed2"]
    values = {name: scores["value"] for name, scores in results["members"].items()}
    assert results["best"]["value"] == max(values.values()) == values[results["best"]["member"]]
    assert all(s["metrics"] == {"accuracy": s["value"]} for s in results["members"].values())
    assert run.prompt is not None


@pytest.mark.usefixtures("interactive")
def test_ctrl_c_while_the_run_is_scored_returns_the_best_so_far(backbone, task, monkeypatch):
    from ptjax.trainer import tune as module

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "_score_best", interrupted)
        run = ptjax.tune(backbone, task, "run", SETTINGS, steps=3)
    assert not run.finished and run.results["trained_steps"] == 3 and "value" in run.results
    assert ptjax.tune(backbone, task, "run", SETTINGS, steps=3).finished


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_script_ends_with_the_exit_code_of_the_signal(backbone, task, number, code):
    kill = At({1}, lambda step: os.kill(os.getpid(), number))
    if number == signal.SIGTERM:
        sys.ps1 = ">>> "  # SIGTERM ends a notebook's kernel too
    try:
        with pytest.raises(SystemExit) as stopped:
            ptjax.tune(backbone, task, "run", SETTINGS, callbacks=[kill])
    finally:
        if number == signal.SIGTERM:
            del sys.ps1
    assert stopped.value.code == code
