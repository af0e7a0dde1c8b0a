"""Sweeps: every member is what it would be alone, and stops alone."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import At, stopped_by_sigterm, without_seconds
from t5_ids import T5_IDS

from ptjax.data.batch import make_batch
from ptjax.data.pipeline import Shape, SweepBatches, TrainBatches, make_buckets
from ptjax.data.preprocess import TokenizedExamples, TokenRows
from ptjax.errors import InputError, TrainingError
from ptjax.evaluation.evaluator import Evaluator
from ptjax.interop.prompt_file import load_prompt
from ptjax.methods.initializers import Uniform
from ptjax.methods.model_tuning import ModelTuning
from ptjax.methods.prompt_tuning import PromptTuning
from ptjax.reports.report import Report
from ptjax.settings import Evaluation, TrainSchedule
from ptjax.trainer.sweep import MemberOverrides, sweep
from ptjax.training.loss import Loss
from ptjax.training.optimizer import Adafactor
from ptjax.training.step import init_train_state, make_sweep_step, make_train_step

SIZES = ((12, 6), (20, 4), (8, 3))
LENGTHS = {"inputs": 64, "targets": 4}
tune = functools.partial(conftest.tune, feature_lengths=LENGTHS)


@pytest.fixture(scope="module")
def batches():
    """One batch of four examples for every member, all of different shapes."""
    rng = np.random.default_rng(0)
    made = []
    for inputs, targets in SIZES:
        rows = [rng.integers(2, 64, rng.integers(1, inputs + 1)) for _ in range(4)]
        outs = [rng.integers(2, 64, rng.integers(1, targets + 1)) for _ in range(4)]
        made.append(make_batch(rows, outs, input_length=inputs, target_length=targets, ids=T5_IDS))
    return made


class Fixed:
    """The same batch under every number."""

    def __init__(self, batch) -> None:
        self.held, self.ids = batch, T5_IDS
        inputs, targets = batch["encoder_input_tokens"], batch["decoder_input_tokens"]
        self.shapes = [Shape(*inputs.shape, targets.shape[1])]

    def batch(self, number):
        return self.held


def sweep_inputs(batches, active=(True, True, True), rates=(0.1, 0.2, 0.3)):
    """Batch, `active` and `learning_rate` of a sweep's step."""
    batch = SweepBatches([Fixed(batch) for batch in batches]).batch(0)
    return batch, np.array(active), np.array(rates, np.float32)


def states(tiny, make_optimizer, count=3):
    """(state of each member alone, state of all together)."""
    alone = []
    for seed in range(count):
        prompt = tiny.prompt + 0.1 * jax.random.normal(jax.random.key(seed), tiny.prompt.shape)
        trainable = {"prompt": {"prompt": prompt}}
        optimizer = make_optimizer(jnp.float32(0))
        alone.append(init_train_state(trainable, optimizer, jax.random.key(seed)))
    return alone, jax.tree.map(lambda *x: jnp.stack(x), *alone)


def prompts(state) -> np.ndarray:
    return np.asarray(state.trainable["prompt"]["prompt"])


def test_twenty_steps_of_sgd_equal_those_of_each_member_alone(tiny, batches) -> None:
    apply_fn, frozen = tiny.apply_fn(dropout_rate=0.0), {"params": tiny.params}
    alone, together = states(tiny, optax.sgd)
    rates = (0.001, 0.002, 0.003)
    sweep_step = jax.jit(make_sweep_step(apply_fn, optax.sgd, Loss()))
    inputs = sweep_inputs(batches, rates=rates)
    steps = [jax.jit(make_train_step(apply_fn, optax.sgd(rate), Loss())) for rate in rates]
    first, metrics = sweep_step(together, frozen, *inputs)
    for number, (state, step) in enumerate(zip(alone, steps, strict=True)):
        after, want = step(state, frozen, batches[number])
        moved = prompts(after) - prompts(state)
        got = prompts(first)[number] - prompts(state)
        # One step of SGD is the gradient; the difference of two prompts keeps 5 digits of it.
        np.testing.assert_allclose(got, moved, rtol=0, atol=1e-5 * max(np.abs(moved).max(), 0.1))
        np.testing.assert_allclose(metrics["loss"][number], want["loss"], rtol=1e-5)
    for _ in range(20):
        together, _ = sweep_step(together, frozen, *inputs)
        alone = [s(a, frozen, b)[0] for s, a, b in zip(steps, alone, batches, strict=True)]
    for number, state in enumerate(alone):
        np.testing.assert_allclose(prompts(together)[number], prompts(state), rtol=0, atol=1e-5)
        assert np.abs(prompts(state) - prompts(states(tiny, optax.sgd)[0][number])).max() > 1e-3


def test_adafactor_of_a_member_is_that_of_the_prompt_alone() -> None:
    """Up to a few roundings of 2e-7: XLA of jax 0.10.0 adds the columns up in another order."""
    rng = np.random.default_rng(1)
    rates, length = (0.1, 0.2, 0.3), 130  # 130 x 130 is factored
    start = rng.normal(size=(3, length, length)).astype(np.float32)
    gradients = rng.normal(size=(5, 3, length, length)).astype(np.float32)
    settings = Adafactor(weight_decay=1e-3)

    def update(rate, state, prompt, gradient):
        updates, state = settings.make(1.0, rate).update(gradient, state, prompt)
        return optax.apply_updates(prompt, updates), state

    one, many = jax.jit(update), jax.jit(jax.vmap(update))
    init = settings.make(1.0, jnp.float32(0)).init
    bank, bank_state = jnp.asarray(start), jax.vmap(init)(jnp.asarray(start))
    members = [(jnp.asarray(prompt), init(jnp.asarray(prompt))) for prompt in start]
    for step in range(5):
        bank, bank_state = many(jnp.asarray(rates, jnp.float32), bank_state, bank, gradients[step])
        members = [
            one(jnp.float32(rate), state, prompt, gradients[step, k])
            for k, (rate, (prompt, state)) in enumerate(zip(rates, members, strict=True))
        ]
    for number, (prompt, state) in enumerate(members):
        np.testing.assert_allclose(bank[number], prompt, rtol=0, atol=2e-6)
        own = jax.tree.map(operator.itemgetter(number), bank_state)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), own, state)
    assert np.abs(np.asarray(bank) - start).max() > 0.1


def test_a_stopped_member_stays_bit_by_bit(tiny, batches) -> None:
    def make_optimizer(rate):
        return Adafactor().make(1.0, rate)

    _, state = states(tiny, make_optimizer)
    step = jax.jit(make_sweep_step(tiny.apply_fn(), make_optimizer, Loss()))
    inputs = sweep_inputs(batches, active=(True, False, True))
    after, _ = step(state, {"params": tiny.params}, *inputs)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(jax.device_get(a[1]), jax.device_get(b[1])),
        (after.trainable, after.opt_state, after.step),
        (state.trainable, state.opt_state, state.step),
    )
    for number in (0, 2):
        assert np.abs(prompts(after)[number] - prompts(state)[number]).max() > 1e-3


def test_batches_above_each_other(batches) -> None:
    bank = SweepBatches([Fixed(batch) for batch in batches])
    assert bank.shapes == [Shape(4, 20, 6, members=3)]
    made = bank.batch(0)
    for number, batch in enumerate(batches):
        for name, array in batch.items():
            own = tuple(map(slice, array.shape))
            np.testing.assert_array_equal(made[name][number][own], array)
            made[name][number][own] = 0
    assert not any(array.any() for array in made.values())


def test_every_shape_that_comes_is_announced() -> None:
    rng = np.random.default_rng(0)
    parts = []
    for seed, most in enumerate((30, 90, 200)):
        lengths = rng.integers(2, most, 40)
        rows = TokenRows(np.ones(lengths.sum(), np.int32), np.r_[0, np.cumsum(lengths)], 0)
        targets = TokenRows(np.ones(40, np.int32), np.arange(41), 0)
        source = TokenizedExamples(rows, targets)
        buckets = make_buckets(source, smallest=16)
        parts.append(TrainBatches(source, buckets=buckets, batch_size=4, seed=seed, ids=T5_IDS))
    bank = SweepBatches(parts)
    seen = {Shape.of(bank.batch(number)) for number in range(60)}
    assert seen <= set(bank.shapes)
    assert len(seen) > 1

    class Uneven(Fixed):
        """Batches of many shapes."""

        def __init__(self, sizes):
            self.sizes, self.ids = sizes, T5_IDS
            self.shapes = [Shape(4, n, 3) for n in sizes]

        def batch(self, number):
            rows = [np.ones(n, int) for n in (1, 2, 2, self.sizes[number % len(self.sizes)])]
            length = self.sizes[number % len(self.sizes)]
            return make_batch(rows, [[1]] * 4, input_length=length, target_length=3, ids=T5_IDS)

    # Too many combinations to compile: all come in the largest.
    many = SweepBatches([Uneven(range(5, 12)), Uneven(range(7, 20))])
    assert many.shapes == [Shape(4, 19, 3, members=2)]
    assert {Shape.of(many.batch(n)) for n in range(9)} == set(many.shapes)


def test_sweeps_name_every_combination() -> None:
    members = sweep(seeds=(0, 2), learning_rates=(0.3, 1))
    assert list(members) == ["seed0_rate0.3", "seed0_rate1", "seed2_rate0.3", "seed2_rate1"]
    assert members["seed2_rate0.3"] == MemberOverrides(seed=2, learning_rate=0.3)
    for bad, said in (
        ({}, r"sweep has nothing to combine; set seeds"),
        ({"seeds": (1, 1)}, r"sweep\.seeds has a value twice \(\[1, 1\]\)"),
    ):
        with pytest.raises(InputError, match=said):
            sweep(**bad)


BANK = {
    "a": MemberOverrides(seed=3),
    "b": MemberOverrides(seed=4, learning_rate=0.1),
    "c": MemberOverrides(seed=5),
}


def test_a_bank_end_to_end(backbone, task, tmp_path) -> None:
    results = tune(tmp_path / "whole", task, backbone, members=BANK, pack=True)
    assert list(results["members"]) == ["a", "b", "c"]
    values = [found["value"] for found in results["members"].values()]
    assert results["average"] == pytest.approx(np.mean(values))
    assert results["members"][results["best"]["member"]]["value"] == results["best"]["value"]
    files = [load_prompt(tmp_path / f"whole/prompts/{n}/best.safetensors").prompt for n in BANK]
    evaluation = Evaluation(batch_size=16)
    evaluator = Evaluator(task, backbone, backbone.tokenizer, LENGTHS, evaluation)
    assert results["ensemble"] == evaluator.ensemble(files, "test")["ensemble"]
    assert set(results["ensemble"]) == {"majority_vote", "mean_likelihood"}
    assert results == json.loads((tmp_path / "whole" / "results.json").read_text())
    report = Report.read(tmp_path / "whole")
    assert report.members[0].name == results["best"]["member"]
    accuracies = {m.name: m.statistics["accuracy"] for m in report.members if m.statistics}
    assert accuracies == {name: found["value"] for name, found in results["members"].items()}
    assert "3 members" in (tmp_path / "whole" / "report.html").read_text()
    for name, found in results["members"].items():
        file = load_prompt(tmp_path / "whole" / "prompts" / name / "best.safetensors")
        assert file.metadata["seed"] == found["seed"] == BANK[name].seed
        assert file.metadata["step"] == found["step"]

    rows = losses(tmp_path / "whole")
    for name, rate in (("a", 0.05), ("b", 0.1)):
        # The run alone: the same prompt, data and dropout, but for Adafactor's growing rounding.
        optimizer = Adafactor(learning_rate=rate, learning_rate_scale="embedding_rms")
        seed = BANK[name].seed
        tune(tmp_path / name, task, backbone, pack=True, seed=seed, optimizer=optimizer)
        for one, other in zip(rows, losses(tmp_path / name), strict=True):
            assert one[f"train/loss/{name}"] == pytest.approx(other["train/loss"], rel=0.003)
            rates = (
                row["train/learning_rate" + end] for row, end in ((one, f"/{name}"), (other, ""))
            )
            assert next(rates) == next(rates)

    def again(callbacks):
        how = {"pack": True, "callbacks": callbacks}
        return tune(tmp_path / "stopped", task, backbone, members=BANK, **how)

    assert stopped_by_sigterm(7, again) == 143
    again([])
    assert bank_outcome(tmp_path / "stopped") == bank_outcome(tmp_path / "whole")


def losses(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "train/loss" in row]


def bank_outcome(directory):
    found = {}
    for member in sorted(p.name for p in (directory / "prompts").iterdir()):
        found[member] = {p.name: p.read_bytes() for p in (directory / "prompts" / member).iterdir()}
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
    results = json.loads((directory / "results.json").read_text())
    return found, kept, without_seconds(results)


@pytest.mark.slow
def test_members_stop_alone_and_the_bank_shrinks(
    backbone,
    task,
    tmp_path,
    monkeypatch,
    caplog,
) -> None:
    """Scores are dictated: a gains to the end, b and c stop after two, d after three."""
    gains = {"a": 9, "b": 0, "c": 0, "d": 1}
    bank = {name: MemberOverrides(seed=seed) for seed, name in enumerate(gains)}
    dictated: list[float] = []
    last, score = {"a": 12, "b": 6, "c": 6, "d": 8}, Evaluator.__call__

    def begin_evaluation(step, names):
        running = [name for name in names if step <= last[name]]
        dictated[:] = [min(step // 2 - 1, gains[name]) / 10 for name in running]

    def dictate(self, variables, split, rewording=None):
        return {"accuracy": dictated.pop(0)} if dictated else score(self, variables, split)

    monkeypatch.setattr(Evaluator, "__call__", dictate)
    schedule = TrainSchedule(train_steps=12, eval_period=2, log_period=2, patience=2, keep=6)

    def dictating(*names):
        return At(range(2, 13, 2), lambda step: begin_evaluation(step, names))

    def run(directory, callbacks=()):
        how = {"pack": True, "schedule": schedule, "callbacks": [dictating(*bank), *callbacks]}
        return tune(tmp_path / directory, task, backbone, members=bank, **how)

    with caplog.at_level("INFO", logger="absl"):
        results = run("whole")
    shrunk = [r.getMessage() for r in caplog.records if "the sweep shrinks" in r.getMessage()]
    assert [line.split(":")[0] for line in shrunk] == [
        "2 of 4 members still train",
        "1 of 2 members still train",
    ]
    compiled = [r.getMessage() for r in caplog.records if "compiled the step" in r.getMessage()]
    assert [line.split(": ")[1].split("x")[0] for line in compiled] == ["4", "2", "1"]
    steps = {name: found["step"] for name, found in results["members"].items()}
    assert steps["a"] == 12 and steps["b"] == steps["c"] == 2 and steps["d"] == 4
    for name in "bcd":
        exports = [int(p.stem) for p in (tmp_path / "whole/prompts" / name).glob("[0-9]*")]
        assert max(exports) == (6 if name != "d" else 8)

    # What is left goes on with its own data.
    alone = {"pack": True, "schedule": schedule, "callbacks": [dictating("a")]}
    tune(tmp_path / "a", task, backbone, **alone, seed=0)
    for one, other in zip(losses(tmp_path / "whole"), losses(tmp_path / "a"), strict=True):
        assert one["train/loss/a"] == pytest.approx(other["train/loss"], rel=0.003)

    # Stopped when two members have left the bank, and gone on.
    assert stopped_by_sigterm(9, lambda callbacks: run("stopped", callbacks)) == 143
    run("stopped")
    assert bank_outcome(tmp_path / "stopped") == bank_outcome(tmp_path / "whole")


def test_a_member_whose_loss_is_not_finite_leaves_the_others_alone(
    backbone,
    task,
    tmp_path,
    caplog,
) -> None:
    bank = {"good": MemberOverrides(seed=3), "wild": MemberOverrides(learning_rate=float("inf"))}
    with caplog.at_level("WARNING", logger="absl"):
        results = tune(tmp_path / "one", task, backbone, members=bank)
    assert results["failed"] == ["wild"]
    assert "wild: " in caplog.text and "The other members continue" in caplog.text
    assert results["members"]["good"]["value"] == results["best"]["value"]
    with pytest.raises(TrainingError, match="wild"):
        # Of two, like the sweep above, whose compiled step is taken again.
        wild = {"good": bank["wild"], "wild": bank["wild"]}
        tune(tmp_path / "all", task, backbone, members=wild)


def test_several_tasks_in_one_bank(backbone, task, tmp_path) -> None:
    other = dataclasses.replace(task, name="others", inputs="read this: {text}")
    bank = sweep(tasks=(task, other))
    results = tune(tmp_path, task, backbone, members=bank)
    assert {n: found["task"] for n, found in results["members"].items()} == {
        "words": "words",
        "others": "others",
    }
    files = {name: load_prompt(tmp_path / f"prompts/{name}/best.safetensors") for name in bank}
    assert files["others"].metadata["task"]["inputs"] == "read this: {text}"


def test_what_a_bank_cannot_be(backbone, task, tmp_path) -> None:
    class Narrow:
        def __call__(self, key, length, context):
            return Uniform()(key, length, context)[:, :5]

    for bank, method, what in (
        (
            {"x": MemberOverrides(initializer=Narrow())},
            PromptTuning,
            "initial prompt of x has shape",
        ),
        ({"../x": MemberOverrides()}, PromptTuning, "'../x'"),
        ({"x": MemberOverrides()}, ModelTuning, "ModelTuning does not support sweeps"),
    ):
        with pytest.raises(InputError, match=what):
            tune(tmp_path, task, backbone, members=bank, method=method())
    tune(tmp_path, task, backbone, members={"x": MemberOverrides()})
    with pytest.raises(
        InputError, match=r"MemberOverrides\.seed \(of tune\.members\['x'\]\) = None, now 9"
    ):
        tune(tmp_path, task, backbone, members={"x": MemberOverrides(seed=9)})
