"""The numbers that a run reports of itself: losses, norms, rates, sizes, baselines."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import WORDS, tune
from etils import epath

from ptjax.backbones.describe import describe_checkpoint
from ptjax.data.hard_prompt import HardPrompt
from ptjax.data.packing import make_template
from ptjax.evaluation.evaluator import Evaluator
from ptjax.interop.prompt_file import load_prompt
from ptjax.methods.base import InitContext
from ptjax.methods.initializers import Uniform
from ptjax.settings import Evaluation, TrainSchedule
from ptjax.trainer.display import Display
from ptjax.trainer.tune import Run
from ptjax.training.optimizer import Adafactor, embedding_rms

STILL = Adafactor(learning_rate=0.0, weight_decay=0.0)


def rows_of(model_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (model_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def every_step(backbone, task, tmp_path_factory) -> tuple[Path, float]:
    """Four steps, each logged, with the best prompt at the first; how many seconds they took."""
    directory = tmp_path_factory.mktemp("every_step")
    started = time.perf_counter()
    schedule = TrainSchedule(train_steps=4, eval_period=1, log_period=1, keep=2)
    tune(directory, task, backbone, schedule=schedule, optimizer=STILL)
    return directory, time.perf_counter() - started


def test_a_logged_loss_and_norm_are_means_over_the_steps_since_the_last_one(
    every_step, backbone, task, tmp_path
):
    schedule = TrainSchedule(train_steps=4, eval_period=4, log_period=2)
    tune(tmp_path, task, backbone, schedule=schedule, optimizer=STILL)
    for name in ("train/loss", "train/gradient_norm"):
        single = [row[name] for row in rows_of(every_step[0]) if name in row]
        paired = [row[name] for row in rows_of(tmp_path) if name in row]
        assert len(single) == 4 and min(single) > 0
        # Sums of two float64 numbers: only the order of rounding differs.
        np.testing.assert_allclose(paired, np.reshape(single, (2, 2)).mean(axis=1), rtol=1e-12)


def test_examples_per_second_are_those_of_the_steps(every_step):
    directory, seconds = every_step
    rates = [r["time/examples_per_second"] for r in rows_of(directory) if "train/loss" in r]
    assert len(rates) == 4
    # Eight examples a step: what the rates say the steps took fits into the time of the run.
    assert 0 < sum(8 / rate for rate in rates) < seconds


def test_only_the_best_and_the_last_exports_stay(every_step):
    # Nothing moves, so the first evaluation is the best; the others are the last `keep` = 2.
    kept = {path.stem for path in (every_step[0] / "prompts").iterdir()}
    assert kept == {"best", "1", "3", "4"}


def test_the_results_of_an_ordinary_run_are_those_of_one_prompt(every_step):
    found = json.loads((every_step[0] / "results.json").read_text())
    assert "ensemble" not in found and "members" not in found
    assert (found["step"], found["trained_steps"]) == (1, 4)


def test_a_prompt_starts_from_a_stream_of_its_own(backbone, task, tmp_path):
    schedule = TrainSchedule(train_steps=1, eval_period=1)
    tune(
        tmp_path, task, backbone, schedule=schedule, optimizer=STILL, initializer=Uniform(), seed=5
    )
    made = load_prompt(tmp_path / "prompts" / "1.safetensors").prompt
    embedding = backbone.variables["params"]["token_embedder"]["embedding"]
    context = InitContext(embedding, backbone.tokenizer, (), list)
    seed = jax.random.key(5)  # drives dropout, through the train state
    for key, equal in ((jax.random.fold_in(seed, 1), True), (seed, False)):
        drawn = np.asarray(Uniform()(key, 4, context))
        assert np.array_equal(made, drawn) == equal


@pytest.mark.parametrize(("share", "warned"), [(0.09, False), (0.11, True)])
def test_a_learning_rate_far_above_the_embedding_is_warned_of(
    backbone, task, tmp_path, caplog, share, warned
):
    rms = embedding_rms(backbone.variables["params"]["token_embedder"]["embedding"])
    rate = Adafactor(learning_rate=share * rms, learning_rate_scale="absolute")
    with caplog.at_level("INFO", logger="absl"):
        tune(tmp_path, task, backbone, optimizer=rate, dry_run=True)
    said = [m for m in caplog.messages if "may move a prompt entry by 11% of the embed" in m]
    assert bool(said) == warned
    flags = "--gin.LEARNING_RATE_SCALE=\"'embedding_rms'\" --gin.LEARNING_RATE=0.03"
    assert all(f"set {flags} (" in message for message in said)


def test_the_size_of_a_checkpoint_is_that_of_what_trains(backbone, task, tmp_path, caplog):
    # Adafactor keeps one float32 for each entry of a prompt this narrow, as the prompt does.
    with caplog.at_level("INFO", logger="absl"):
        tune(tmp_path, task, backbone, length=1000, dry_run=True)
    [said] = [m for m in caplog.messages if m.startswith("optimizer state")]
    state, checkpoint = map(float, re.findall(r"([\d.]+) MB", said))
    assert state == pytest.approx(1000 * 16 * 4 / 1e6, abs=0.005)  # printed to 0.01
    assert checkpoint == pytest.approx(2 * 1000 * 16 * 4 / 1e6, abs=0.005)


def test_inspect_counts_the_bytes_of_a_checkpoint(every_step):
    described = describe_checkpoint(epath.Path(every_step[0]) / "checkpoints" / "4")
    # The prompt [4, 16] and Adafactor's accumulator of it are most of it.
    assert 2 * 4 * 16 * 4 < described["bytes"] < 4 * 4 * 16 * 4


@pytest.fixture(scope="module")
def unbalanced(task, tmp_path_factory) -> Any:
    """Three of four training sentences are negative, three of four test sentences positive."""
    directory = tmp_path_factory.mktemp("unbalanced")
    order = {"train": "nnnp", "validation": "np", "test": "pppn"}
    for split, kinds in order.items():
        labels = [{"n": "negative", "p": "positive"}[kind] for kind in kinds * 4]
        rows = [{"text": WORDS[label][i % 4], "label": label} for i, label in enumerate(labels)]
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return dataclasses.replace(task, data_dir=str(directory))


def test_the_majority_is_the_training_splits(backbone, unbalanced, tmp_path):
    schedule = TrainSchedule(train_steps=1, eval_period=1)
    assert tune(tmp_path, unbalanced, backbone, schedule=schedule)["majority"] == 0.25


def test_the_shots_in_context_follow_the_seed(backbone, task, tmp_path, monkeypatch):
    hard, train = HardPrompt("Good or bad?", shots=3), task.load("train")
    read, evaluate = [], Evaluator.__call__

    def listening(self, variables, split, rewording=None):
        if rewording is not None:
            read.append(rewording("x"))
        return evaluate(self, variables, split, rewording)

    monkeypatch.setattr(Evaluator, "__call__", listening)
    compared = Evaluation(batch_size=16, hard_prompts={"asked": hard})
    once = TrainSchedule(train_steps=1, eval_period=1)
    for seed in (1, 2):
        how = {"evaluation": compared, "schedule": once, "seed": seed}
        tune(tmp_path / str(seed), task, backbone, **how)
    assert read == [hard.rewording(train, seed)("x") for seed in (1, 2)]
    assert read[0] != read[1]


def test_a_line_shows_the_mean_of_a_bank_and_no_member(tmp_path, caplog):
    display = Display(4)
    with caplog.at_level("INFO", logger="absl"):
        display.on_start(epath.Path(tmp_path), 0)
        display.on_log(1, {"train/loss": 2.0, "train/loss/a": 1.0, "train/loss/b": 3.0})
        display.on_end(1)
    assert [m for m in caplog.messages if m.startswith("step ")] == ["step 1/4  loss 2"]


def test_a_long_row_costs_more_than_short_ones_of_as_many_positions():
    needs, targets = np.full(8, 1024), np.full(8, 4)
    short, long = (make_template(needs, targets, row_length=length) for length in (1024, 8192))
    assert short.shape.rows * short.shape.inputs == long.shape.rows * long.shape.inputs
    assert short.shape.rows * short.shape.targets == long.shape.rows * long.shape.targets
    # Attention over T positions adds T / 4096 to the cost of each.
    assert long.cost - short.cost == 8192 * (8192 - 1024) / 4096


def test_the_prompt_of_a_run_is_shared_with_what_the_run_knew(every_step, tmp_path):
    """By whatever way it is reached."""
    directory = epath.Path(every_step[0])
    results = json.loads((directory / "results.json").read_text())
    assert results["examples"] == {"train": 48, "validation": 16, "test": 16}
    prompt = Run(directory, results).prompt
    assert prompt is not None
    prompt.save(tmp_path / "a" / "words")
    load_prompt(directory).save(tmp_path / "b" / "words")
    cards = {(tmp_path / folder / "words" / "README.md").read_text() for folder in "ab"}
    assert len(cards) == 1
    card = cards.pop()
    assert "- Examples: 48 in `train`, 16 in `validation`, 16 in `test`" in card
    assert "- Method: `PromptTuning`, 4 rows" in card and "- Steps: 4\n" in card
    assert f"| before training, accuracy | {results['before']:.4g} |" in card
    assert str(tmp_path.parent) not in card
