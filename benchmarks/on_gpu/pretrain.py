"""The part `pretrain` of `run.sh`: trains the stages of the family that have no weights yet.

Each stage writes OUTPUT/weights/SIZE-STAGE in Hugging Face's layout, in files under 15 MB; copy it
to models/ptjax_models. The second stage starts from the first one's weights, in either folder.
When the time is nearly up, a stage saves its weights (float32) and its optimizer state to
SIZE-STAGE.unfinished, where the next run resumes. `--any_device` trains on a CPU too: the same
command in a loop, with --limit=1800 for example, finishes there what a GPU began.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from record import Record, add_flags  # first: its clock starts when it is imported

# isort: split
import jax
import numpy as np
import ptjax_models
from family import Family, Settings, Stage, read, write
from jax.sharding import Mesh
from ptjax_models import STAGES

from ptjax.backbones.load import load_backbone
from ptjax.backbones.save import save_backbone
from ptjax.data import mixture
from ptjax.data.pipeline import Batches, Shape
from ptjax.data.tasks import Task
from ptjax.methods.model_tuning import ModelTuning
from ptjax.models.config import T5Config
from ptjax.models.prompted import make_apply_fn
from ptjax.models.t5 import init_params
from ptjax.sharding.arrays import put_batch, replicated
from ptjax.sharding.meshes import make_mesh
from ptjax.training import freeze as freezing
from ptjax.training.compile import StepConfig, lower_step
from ptjax.training.loss import Loss
from ptjax.training.optimizer import Adafactor
from ptjax.training.step import TrainState

MODELS = Path(ptjax_models.__file__).parent
SHARD_BYTES = 14 << 20
LOSS_PERIOD = 100
"""Every so many steps, the mean loss is recorded and the clock checked."""
PROGRESS = "progress.npz"
SAVING = 10
"""Seconds reserved for writing the weights."""


def train(
    config: T5Config, params: Any, stage: Stage, unfinished: Path, stop_at: float
) -> tuple[TrainState, dict[int, float]]:
    """Trains from the beginning, or from where `unfinished` ends.

    Args:
        stop_at: `time.monotonic()` after which to stop early; checked every `LOSS_PERIOD` steps.

    Returns:
        (last state, number of steps -> mean loss of the `LOSS_PERIOD` steps before). The last step
        is where training stopped; a loss that is not finite stops it.
    """
    mesh = make_mesh((1, 1), jax.devices()[:1])
    trainable = {"params": params}
    freeze = freezing.make_freeze(trainable, ModelTuning().freeze_rules())
    step_config = StepConfig(stage.optimizer, Loss(per_token=True))
    init, step = step_config.make(make_apply_fn(config), freeze, mesh, small=False)
    start = jax.jit(init, out_shardings=replicated(mesh))
    state = start(trainable, jax.random.key(stage.seed))
    if unfinished.exists():
        state = restore_progress(unfinished, state)
    first = int(state.step)
    run = compile_at_once(step, state, stage.batches.shapes, mesh)
    losses, waiting = {}, []
    for number, batch in zip(range(first, stage.steps), ahead(stage.batches, first), strict=False):
        state, metrics = run[Shape.of(batch)](state, {}, put_batch(batch, mesh))
        waiting.append(metrics["loss"])
        if len(waiting) == LOSS_PERIOD or number == stage.steps - 1:
            losses[number + 1] = round(float(np.mean(jax.device_get(waiting))), 4)
            waiting = []
            if time.monotonic() > stop_at or not math.isfinite(losses[number + 1]):
                break
    return state, losses


def save_progress(folder: Path, state: TrainState) -> None:
    """Writes what of `state` is not weights: its step and the optimizer's state."""
    np.savez(folder / PROGRESS, *jax.device_get(jax.tree.leaves((state.step, state.opt_state))))


def restore_progress(folder: Path, state: TrainState) -> TrainState:
    """A new `state` with what `save_progress` wrote."""
    places = jax.tree.map(lambda x: x.sharding, (state.step, state.opt_state))
    with np.load(folder / PROGRESS) as stored:
        read = jax.tree.unflatten(jax.tree.structure(places), list(stored.values()))
    step, opt_state = jax.device_put(read, places)
    return dataclasses.replace(state, step=step, opt_state=opt_state)


def compile_at_once(
    step: Callable[..., Any], state: TrainState, shapes: Sequence[Shape], mesh: Mesh
) -> dict[Shape, Callable[..., Any]]:
    """The step compiled for every batch shape, each in its own thread.

    One after the other, they would take longer to compile than to train.
    """
    with concurrent.futures.ThreadPoolExecutor(len(shapes)) as pool:
        pending = {
            shape: pool.submit(lower_step(step, state, {}, shape, mesh).compile) for shape in shapes
        }
        return {shape: compiled.result() for shape, compiled in pending.items()}


def ahead(batches: Batches, first: int, workers: int = 4) -> Iterator[dict[str, np.ndarray]]:
    """Batches from number `first` on, made in background threads."""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(batches.batch, first + i) for i in range(4 * workers)]
        number = first + len(waiting)
        try:
            while True:
                yield waiting.pop(0).result()
                waiting.append(pool.submit(batches.batch, number))
                number += 1
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def find_weights(name: str, weights: Path) -> Path | None:
    """The folder with a stage's weights, in `weights` or in the package; None if there is none."""
    folders = [weights / name, MODELS / name]
    return next((folder for folder in folders if folder.exists()), None)


def run_stage(
    family: Family, size: str, name: str, weights: Path, record: Record
) -> dict[str, Any]:
    """Trains a stage until it is done or the time is up, and writes its weights.

    Raises:
        TimeoutError: the time is up; the weights so far are in SIZE-STAGE.unfinished.
        FloatingPointError: the loss is not finite; nothing is written.
    """
    stage, config = family.stages[name], family.sizes[size]
    done, unfinished = weights / f"{size}-{name}", weights / f"{size}-{name}.unfinished"
    before, source = {}, None
    if unfinished.exists():
        source = unfinished
        before = json.loads((unfinished / "losses.json").read_text())
    elif earlier := list(STAGES)[: list(STAGES).index(name)]:
        source = find_weights(f"{size}-{earlier[-1]}", weights)
    if source is None:
        params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(stage.seed))
    else:
        params = load_backbone(source, dtype="float32", dropout_rate=0.0).variables["params"]
    began = time.monotonic()
    state, losses = train(config, params, stage, unfinished, record.deadline - SAVING)
    params, steps = state.trainable["params"], max(losses)
    found = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "from_step": max(map(int, before), default=0),
        "steps": steps,
        "of": stage.steps,
        "seconds": time.monotonic() - began,
        "loss": losses[steps],
    }
    if not math.isfinite(losses[steps]):
        raise FloatingPointError(f"the loss of step {steps} is {losses[steps]}")
    target = done if steps == stage.steps else unfinished
    partial = weights / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    precision = {"dtype": "bfloat16" if target is done else "float32"}
    save_backbone(
        partial,
        config,
        params,
        tokenizer=family.tokenizer,
        max_shard_bytes=SHARD_BYTES,
        **precision,
    )
    if target is unfinished:
        save_progress(partial, state)
    (partial / "losses.json").write_text(json.dumps(before | losses) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    if target is done:
        shutil.rmtree(unfinished, ignore_errors=True)
        return found
    raise TimeoutError(f"step {steps} of {stage.steps}; the same command goes on from there")


def write_toy(folder: Path) -> None:
    """Writes a family of one tiny size and two stages of four steps, for a rehearsal."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"The {a} mill was {b}." for a in ("old", "new") for b in ("good", "bad", "sold")]
    rows = [json.dumps({"text": line, "label": str(i % 2)}) for i, line in enumerate(lines * 40)]
    (folder / "text.jsonl").write_text("\n".join(rows) + "\n")
    text = mixture.TextFiles({"text.jsonl": "text"}, data_dir=str(folder))
    task = Task(
        name="even",
        splits={"train": "text.jsonl"},
        data_dir=str(folder),
        inputs="{text}",
        label="label",
        verbalizer={"0": "yes", "1": "no"},
    )
    phrasings = [("even: {text}", None), ("odd: {text}", {"0": "no", "1": "yes"})]
    tasks = mixture.TaskComponent(
        0.5, task, phrasings, batch_size=8, input_length=32, buckets=[(32, 4)]
    )
    objectives = {
        "span": mixture.SpanCorruption(0.5, batch_size=8, input_length=32),
        "lm": mixture.PrefixLM(0.5, batch_size=8, input_length=16, target_length=8),
    }
    optimizer = Adafactor(learning_rate=0.01, multiply_by_parameter_scale=True)
    stages = {
        name: Settings([objective, tasks], optimizer, steps=4, seed=seed)
        for seed, (name, objective) in enumerate(objectives.items())
    }
    sizes = {"toy": T5Config(8192, 16, 2, 1, 1, 8, 32, dropout_rate=0.0, logits_via_embedding=True)}
    write(folder, text, stages, sizes, tokens=100_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_flags(parser)
    parser.add_argument("--any_device", action="store_true", help="train on a CPU too")
    parser.add_argument("--sizes", help="comma-separated; default: all, the smallest first")
    flags = parser.parse_args()
    weights = flags.output / "weights"
    folder = flags.data / "family"
    if flags.rehearse:
        folder = flags.output / "rehearsal_family"
        write_toy(folder)
    if not (folder / "family.json").exists():
        sys.exit(f"{folder}: no family.json; make it with benchmarks/on_gpu/prepare.py")
    with Record.open("pretrain", flags, any_device=flags.any_device) as record:
        family = read(folder)
        for size in flags.sizes.split(",") if flags.sizes else family.sizes:
            for name in family.stages:
                if find_weights(f"{size}-{name}", weights) is None:
                    find = functools.partial(run_stage, family, size, name, weights, record)
                    record.measure(f"{size} {name}", find, needs=4 if flags.rehearse else 45)


if __name__ == "__main__":
    main()
