"""The loop end to end on a tiny random backbone: files, resume, selection, signals, failures."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import conftest
import jax
import numpy as np
import pytest
from conftest import outcome, stopped_by_sigterm

from ptjax import files
from ptjax.backbones.load import Backbone, load_backbone
from ptjax.data.hard_prompt import HardPrompt
from ptjax.data.tasks import Task
from ptjax.errors import InputError, TrainingError
from ptjax.evaluation.evaluator import Evaluator
from ptjax.interop.prompt_file import load_prompt
from ptjax.methods.model_tuning import ModelTuning
from ptjax.planning.flops import count_flops
from ptjax.planning.workload import ParallelConfig, StepSpec, abstract_step
from ptjax.settings import Evaluation, TrainSchedule
from ptjax.sharding.arrays import replicated
from ptjax.sharding.meshes import make_mesh
from ptjax.trainer.callbacks import Callback
from ptjax.trainer.checkpoints import Checkpoints
from ptjax.training.optimizer import Adafactor
from ptjax.trees import flatten_paths

# Batches of two shapes.
LONG = {"feature_lengths": {"inputs": 64, "targets": 4}}
tune = functools.partial(conftest.tune, **LONG)


@pytest.fixture(scope="module")
def whole(
    backbone: Backbone, task: Task, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """One uninterrupted run."""
    directory = tmp_path_factory.mktemp("whole")
    before = {k: np.asarray(v) for k, v in flatten_paths(backbone.variables).items()}
    tune(directory, task, backbone)
    for path, array in flatten_paths(backbone.variables).items():
        np.testing.assert_array_equal(np.asarray(array), before[path], err_msg=path)
    return directory, outcome(directory)


def test_a_run_leaves_what_the_documentation_lists(whole, backbone, task):
    directory, made = whole
    names = {p.name for p in directory.iterdir()}
    assert {"checkpoints", "metrics.jsonl", "prompts", "results.json", "tensorboard"} <= names
    results = made["results"]
    assert results["split"] == "test" and results["selected_on"] == "validation"
    assert results["trainable_parameters"] == 4 * 16
    assert results["majority"] == 0.5
    best = load_prompt(directory / "prompts" / "best.safetensors")
    assert best.prompt.shape == (4, 16)
    assert best.metadata["backbone_fingerprint"] == backbone.fingerprint_v1
    assert best.metadata["backbone_fingerprint_v2"] == backbone.fingerprint
    assert best.metadata["step"] == results["step"]
    assert best.metadata["task"]["inputs"] == task.inputs
    steps = [row["step"] for row in made["metrics"]]
    assert steps == [2, 3, 4, 6, 6, 8, 9, 10, 12, 12]
    costs = json.loads((directory / "results.json").read_text())["costs"]
    assert costs["checkpoint_bytes"] - costs["optimizer_bytes"] == 4 * 16 * 4
    assert costs["export_bytes"] == (directory / "prompts" / "best.safetensors").stat().st_size
    weights = sum(x.nbytes for x in jax.tree.leaves(backbone.variables))
    assert weights < costs["step_bytes"] < 20 * weights
    assert costs["examples_per_second"] > 0
    spec = StepSpec.from_settings(backbone.config, conftest.make_settings(**LONG))
    spec = dataclasses.replace(spec, inputs=48, targets=2)  # the larger of the two buckets
    step = abstract_step(
        spec, ParallelConfig("1x1", scan_layers=False), make_mesh((1, 1), jax.devices()[:1])
    )
    flops = count_flops(step.step, step.state, step.frozen, *step.inputs())
    assert costs["flops_per_step"] == flops > 1e6
    # The prompt as exported is what was scored.
    kept = {int(n.split(".")[0]) for n in made["prompts"] if n[0].isdigit()}
    assert kept == {results["step"], 9, 12}


def test_best_is_the_export_with_the_highest_validation_metric(whole):
    _, made = whole
    values = {
        row["step"]: row["validation/accuracy"]
        for row in made["metrics"]
        if "validation/accuracy" in row
    }
    first_highest = max(values, key=lambda step: (values[step], -step))
    assert made["results"]["step"] == first_highest
    assert made["prompts"]["best.safetensors"] == made["prompts"][f"{first_highest}.safetensors"]


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("write_bytes", 5),
        pytest.param("write_bytes", 9, marks=pytest.mark.slow),
        ("save", 1),
        pytest.param("save", 3, marks=pytest.mark.slow),
        ("evaluate", 2),
    ],
)
def test_killed_and_started_again_equals_never_killed(
    whole, backbone, task, tmp_path, monkeypatch, where, count
):
    """Dies before the count-th write, checkpoint or evaluation; every kind of gap between files."""
    calls = 0

    def dies(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == count:
                raise KeyError("killed")
            return function(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        if where == "write_bytes":
            patch.setattr(files, where, dies(files.write_bytes))
        elif where == "save":
            patch.setattr(Checkpoints, where, dies(Checkpoints.save))
        else:
            patch.setattr(Evaluator, "__call__", dies(Evaluator.__call__))
        with pytest.raises(KeyError, match="killed"):
            tune(tmp_path, task, backbone)
    tune(tmp_path, task, backbone)
    assert outcome(tmp_path) == whole[1]


def test_sigterm_saves_at_the_end_of_the_step(whole, backbone, task, tmp_path):
    assert (
        stopped_by_sigterm(4, lambda callbacks: tune(tmp_path, task, backbone, callbacks=callbacks))
        == 143
    )
    assert not (tmp_path / "results.json").exists()
    steps = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert not steps.isdisjoint({"4", "5"})
    tune(tmp_path, task, backbone)
    made, expected = outcome(tmp_path), dict(whole[1])
    assert made == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"length": 5}, r"PromptTuning\.length = 4, now 5"),
        ({"seed": 4}, r"RunSettings\.seed = 3, now 4"),
        ({"batch_size": 16}, r"Batching\.batch_size = 8, now 16"),
        (
            {"feature_lengths": {"inputs": 32, "targets": 4}},
            r"feature_lengths\['inputs'\] = 64, now 32",
        ),
    ],
)
def test_a_model_dir_of_another_run_is_refused(whole, backbone, task, changes, named):
    with pytest.raises(InputError, match=named):
        tune(whole[0], task, backbone, **changes)
    assert outcome(whole[0]) == whole[1]


def test_another_task_or_backbone_is_refused(whole, backbone, task):
    with pytest.raises(InputError, match=r"with Task.inputs = 'text: {text}', now '{text}';"):
        tune(whole[0], dataclasses.replace(task, inputs="{text}"), backbone)
    with pytest.raises(InputError, match="the backbone's fingerprint"):
        tune(whole[0], task, dataclasses.replace(backbone, fingerprint="sha256:other"))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_prompt(
    backbone, task, tmp_path
):
    def rate(step):
        return jax.numpy.where(step < 7, 0.05, np.inf)

    with pytest.raises(TrainingError, match="not finite"):
        tune(tmp_path, task, backbone, optimizer=Adafactor(learning_rate=rate))
    best = load_prompt(tmp_path / "prompts" / "best.safetensors")
    assert np.isfinite(best.prompt).all()
    assert best.metadata["step"] <= 6


def test_an_update_that_is_not_finite_is_never_exported(backbone, task, tmp_path):
    def rate(step):  # the loss of step 9 is finite still, and step 9 is evaluated
        return jax.numpy.where(step < 8, 0.05, np.inf)

    with pytest.raises(TrainingError, match="prompt/prompt after the update of a step near 9"):
        tune(tmp_path, task, backbone, optimizer=Adafactor(learning_rate=rate))
    kept = {path.name for path in (tmp_path / "prompts").iterdir()}
    assert kept == {"3.safetensors", "6.safetensors", "best.safetensors"}


def test_a_model_dir_that_cannot_be_is_bad_input(backbone, task, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"MODEL_DIR = .*file: it cannot be written to \(Not a"):
        tune(tmp_path / "file", task, backbone)


def test_patience_stops_early(backbone, task, tmp_path):
    # A learning rate of 0 never gains after the first evaluation.
    schedule = TrainSchedule(train_steps=30, eval_period=2, log_period=2, patience=2)
    results = tune(
        tmp_path, task, backbone, schedule=schedule, optimizer=Adafactor(0.0, weight_decay=0.0)
    )
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 6
    assert results["step"] == 2
    assert results["value"] == results["before"]


def test_nothing_is_compiled_after_the_first_steps(backbone, task, tmp_path):
    """All batch shapes are compiled before step 1, and evaluation compiles in its first round."""
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, duration, **kw: compiled.append(name) if "backend_compile" in name else None
    )
    counts = {}

    class Counting(Callback):
        def on_step(self, step):
            counts[step, "before"] = len(compiled)

        def on_evaluation(self, step, metrics):
            counts[step, "after"] = len(compiled)

    tune(tmp_path, task, backbone, callbacks=[Counting()])
    assert counts[3, "before"] > 0
    assert counts[6, "before"] == counts[3, "after"]
    assert counts[12, "after"] == counts[6, "after"]


def test_model_tuning_trains_everything_and_is_scored_from_its_file(backbone, task, tmp_path):
    optimizer = Adafactor(learning_rate=1e-3, multiply_by_parameter_scale=True)
    results = tune(tmp_path, task, backbone, method=ModelTuning(), optimizer=optimizer)
    assert results["frozen_parameters"] == 0
    tuned = load_backbone(tmp_path / "models" / "best", dtype="float32")
    before = flatten_paths(backbone.variables["params"])
    moved = {
        path: bool((np.asarray(array) != np.asarray(before[path])).any())
        for path, array in flatten_paths(tuned.variables["params"]).items()
    }
    assert all(moved.values()), [path for path, did in moved.items() if not did]


def test_hard_prompts_are_scored_beside_the_tuned_one(backbone, task, tmp_path):
    hard = HardPrompt("Is it good or bad? {inputs} It is", shots=2)
    compared = Evaluation(batch_size=16, hard_prompts={"asked": hard, "plain": HardPrompt("x")})
    once = TrainSchedule(train_steps=1, eval_period=1)
    results = tune(tmp_path, task, backbone, schedule=once, evaluation=compared)
    assert list(results["hard_prompts"]) == ["asked", "plain"]
    train = task.load("train")
    rewording = hard.rewording(train, 3)
    lengths = {"inputs": 64, "targets": 4}
    evaluator = Evaluator(task, backbone, backbone.tokenizer, lengths, compared)
    scored = evaluator(backbone.variables, "test", rewording)
    assert results["hard_prompts"]["asked"] == scored[evaluator.metric]
    text = rewording("text: x")
    assert text.endswith("Is it good or bad? text: x It is")
    assert sum(text.count(word) for word in ("positive", "negative")) == 2


def test_what_evaluation_leaves_out_or_cuts_is_said(backbone, task, tmp_path, caplog):
    records = [{"text": "great " * 80, "label": "positive"}, {"text": "dull", "label": "so so"}]
    for split in ("train", "validation"):
        text = Path(task.data_dir, f"{split}.jsonl").read_text()
        text += "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{split}.jsonl").write_text(text)
    splits = {"train": "train.jsonl", "validation": "validation.jsonl"}
    noisy = dataclasses.replace(task, data_dir=str(tmp_path), splits=splits, on_bad_record="skip")
    hard = HardPrompt("Good or bad?", shots=4)
    with caplog.at_level("INFO", logger="absl"):
        compared = Evaluation(batch_size=16, hard_prompts={"asked": hard})
        once = TrainSchedule(train_steps=1, eval_period=1)
        tune(tmp_path / "run", noisy, backbone, schedule=once, evaluation=compared)
    said = [record.getMessage() for record in caplog.records]
    assert "words, split validation: 17 examples" in said
    assert any(f"left out 1 of 18 records; the first: {tmp_path}/validation" in s for s in said)
    assert any(
        re.match(r"\d+ of 17 inputs are longer than 64 tokens and were cut", s) for s in said
    )


def test_a_model_dir_in_the_home_folder(backbone, task, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    tune(Path("~/run"), task, backbone, schedule=TrainSchedule(train_steps=1, eval_period=1))
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert (tmp_path / "home" / "run" / "checkpoints" / "1").exists()


def test_several_metrics_select_by_their_mean(backbone, task, tmp_path):
    several = dataclasses.replace(task, metrics=("f1", "accuracy"))
    tune(tmp_path, several, backbone, schedule=TrainSchedule(train_steps=2, eval_period=1))
    results = json.loads((tmp_path / "results.json").read_text())
    metrics = results["metrics"]
    assert results["metric"] == "mean" and results["value"] == metrics["mean"]
    assert metrics["mean"] == (metrics["f1"] + metrics["accuracy"]) / 2
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    means = [row["validation/mean"] for row in rows if "validation/mean" in row]
    assert results["step"] == 1 + means.index(max(means))


def test_case_5_3_dry_run_writes_nothing(backbone, task, tmp_path):
    assert tune(tmp_path / "new", task, backbone, dry_run=True) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("attends", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_packed_rows_in_microbatches_on_two_devices(backbone, task, tmp_path, attends):
    """The same examples a batch, however the rows are cut: the same losses."""
    settings = {"pack": True, "attends_to_input": attends}
    still = dataclasses.replace(backbone.config, dropout_rate=0.0)
    alone = dataclasses.replace(backbone, config=still)
    mesh = make_mesh(devices=jax.devices()[:2])
    where = jax.device_put(backbone.variables, replicated(mesh))
    spread = dataclasses.replace(alone, variables=where, mesh=mesh)
    tune(tmp_path / "one", task, alone, **settings)
    tune(tmp_path / "two", task, spread, microbatches=2, **settings)
    one, two = (
        [json.loads(x) for x in (tmp_path / d / "metrics.jsonl").read_text().splitlines()]
        for d in ("one", "two")
    )
    losses = [[row["train/loss"] for row in rows if "train/loss" in row] for rows in (one, two)]
    # Sums in another order, and Adafactor makes rounding grow over the twelve steps.
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-2)
    np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=1e-4)
