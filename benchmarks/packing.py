"""Real examples a second on SST-2's and IMDb's own lengths: four ways to make batches, one run.

    python benchmarks/packing.py --data_dir=DIR [--output=FILE.json]

The prompt tuning step (P = 100, 32 examples, T5 1.1 small of random weights) on batches that are
padded to 512 (what google-research/prompt-tuning does), padded to the longest example of the batch
(what PEFT does; rounded up to a multiple of 16, since JAX compiles every length), in ptjax's length
buckets, and packed; each with a prompt that sees its input and with one that does not.

A step takes the time of its shape, whatever tokens are in it. So every shape that an epoch has is
timed on one real batch, all shapes in turn for several rounds, and an epoch takes the sum over its
batches. One that is rarer than one in 50 is taken at the time of the next larger one. Other work on
the machine slows all shapes: believe the ratios, each the median over the rounds. Memory is what
XLA plans for the largest step beside its arguments (`compiled.memory_analysis()`).
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import statistics
import sys
import time
from typing import Any

import jax
import machine
import numpy as np
from prompt_step import make_step, t5_1_1
from real_batches import bucket, epoch, load_examples, make_task, pack, pad_to, pad_to_longest

from ptjax.data.batch import Batch, count_examples
from ptjax.models.config import T5Config
from ptjax.models.t5 import init_params

RARE = 0.02
Shape = tuple[int, int, int, bool]
"""Rows, T, L, packed."""


@dataclasses.dataclass
class Epoch:
    """How often each shape comes, one batch of each, and what the encoder runs over."""

    counts: collections.Counter[Shape]
    batches: dict[Shape, Batch]
    examples: int
    positions: int
    """Encoder positions, the prompt's included."""
    used: int
    """Those of them that hold a token or a prompt's place."""


def shape_of(batch: Batch) -> Shape:
    rows, inputs = batch["encoder_input_tokens"].shape
    return rows, inputs, batch["decoder_input_tokens"].shape[1], "encoder_segment_ids" in batch


def survey(plan: Any, prompt: int, attends_to_input: bool) -> Epoch:
    """Goes through an epoch."""
    found = Epoch(collections.Counter(), {}, 0, 0, 0)
    for batch in epoch(plan):
        shape = rows, inputs, _, packed = shape_of(batch)
        found.counts[shape] += 1
        found.batches.setdefault(shape, batch)
        examples = count_examples(batch)
        # A prompt that sees no input runs once a step; a packed one has its places in the rows.
        own = (examples if attends_to_input else 1) * prompt
        placed = packed and attends_to_input
        found.positions += rows * inputs + (0 if placed else own)
        found.used += own + int((batch["encoder_input_tokens"] > 0).sum())
        found.examples += examples
    join_rare(found)
    return found


def join_rare(found: Epoch) -> None:
    """Counts a rare shape as the next larger one, so that it need not be compiled."""
    limit = RARE * sum(found.counts.values())
    for shape in sorted(found.counts)[:-1]:
        larger = min(other for other in found.counts if other > shape)
        if found.counts[shape] < limit and larger[0] == shape[0]:
            found.counts[larger] += found.counts.pop(shape)
            del found.batches[shape]


class Steps:
    """The compiled step of every shape, and the seconds that it took in each round."""

    def __init__(self, made: tuple[Any, Any, Any], batches: dict[Shape, Batch]) -> None:
        self.step, self.state, self.frozen = made
        self.batches = {shape: jax.device_put(batch) for shape, batch in batches.items()}
        self.compiled, self.bytes = {}, {}
        for shape, batch in self.batches.items():
            self.compiled[shape] = self.step.lower(self.state, self.frozen, batch).compile()
            self.bytes[shape] = self.compiled[shape].memory_analysis().temp_size_in_bytes
            print(f"compiled {shape}", file=sys.stderr)
        self.seconds: dict[Shape, list[float]] = {shape: [] for shape in batches}

    def run(self, shape: Shape, repeats: int) -> float:
        """Seconds of a step."""
        began = time.perf_counter()
        for _ in range(repeats):
            self.state, metrics = self.compiled[shape](self.state, self.frozen, self.batches[shape])
        jax.block_until_ready((self.state, metrics))
        return (time.perf_counter() - began) / repeats

    def turn(self, shape: Shape, least: float) -> None:
        """Times a shape for at least about `least` seconds; its first turn warms up."""
        seconds = self.run(shape, 1)
        if seconds < least or not self.seconds[shape]:
            seconds = self.run(shape, max(1, round(least / seconds)))
        self.seconds[shape].append(seconds)
        print(f"{shape}: {seconds:.2f} s", file=sys.stderr)


def measure(
    flags: argparse.Namespace, config: T5Config, params: Any, attends_to_input: bool
) -> list[dict[str, Any]]:
    """A row of results for every task and plan."""
    plans = {
        f"padded to {flags.length}": pad_to(flags.length),
        "longest of the batch": pad_to_longest(16),
        "length buckets": bucket,
        "packed": pack,
    }
    epochs = {}
    for task in flags.tasks.split(","):
        source = load_examples(make_task(task, flags.data_dir), flags.tokenizer, flags.length)
        for name, make in plans.items():
            plan = make(source, flags.batch, flags.prompt if attends_to_input else 0)
            epochs[task, name] = survey(plan, flags.prompt, attends_to_input)
    batches = {shape: batch for found in epochs.values() for shape, batch in found.batches.items()}

    shape = flags.prompt, config.emb_dim
    prompt = np.random.default_rng(0).uniform(-0.5, 0.5, shape).astype(np.float32)
    steps = Steps(make_step(config, params, prompt, attends_to_input), batches)
    for turn in range(flags.rounds):
        for shape in np.random.default_rng(turn).permutation(len(batches)):
            steps.turn(list(batches)[shape], flags.seconds)
    return [
        row(task, name, found, steps, epochs[task, next(iter(plans))], attends_to_input)
        for (task, name), found in epochs.items()
    ]


def row(
    task: str, name: str, found: Epoch, steps: Steps, first: Epoch, attends_to_input: bool
) -> dict[str, Any]:
    """One plan's figures; `first` is what it is compared with."""
    rates, others = (
        [
            one.examples / sum(n * steps.seconds[shape][turn] for shape, n in one.counts.items())
            for turn in range(len(steps.seconds[next(iter(one.counts))]))
        ]
        for one in (found, first)
    )
    return {
        "task": task,
        "sees_input": attends_to_input,
        "batches": name,
        "shapes": len(found.counts),
        "padding": 1 - found.used / found.positions,
        "positions_per_example": found.positions / found.examples,
        "examples_per_second": statistics.median(rates),
        "ratio": statistics.median(a / b for a, b in zip(rates, others, strict=True)),
        "temporary_bytes": max(steps.bytes[shape] for shape in found.counts),
        "seconds_by_shape": {str(shape): steps.seconds[shape] for shape in found.counts},
    }


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as a Markdown table."""
    print("| | sees_input | batches | shapes | padding | positions / example | examples/s | ratio "
          "| GB |\n|---|---|---|--:|--:|--:|--:|--:|--:|")  # fmt: skip
    for one in rows:
        print(
            f"| {one['task']} | {one['sees_input']} | {one['batches']} | {one['shapes']} "
            f"| {one['padding']:.0%} | {one['positions_per_example']:.0f} "
            f"| {one['examples_per_second']:.1f} | {one['ratio']:.1f} "
            f"| {one['temporary_bytes'] / 1e9:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, type=os.path.abspath)
    parser.add_argument("--tasks", default="sst2,imdb")
    parser.add_argument("--tokenizer", default="package:nano")
    parser.add_argument("--size", default="small", help="of T5 1.1")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--length", type=int, default=512, help="inputs are cut or padded to it")
    parser.add_argument("--batch", type=int, default=32, help="examples of a step")
    parser.add_argument("--prompt", type=int, default=100, help="P, rows of the prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="least time of a turn")
    parser.add_argument("--output", help="a JSON file to write")
    flags = parser.parse_args()
    machine.show()
    where = machine.describe() | {"load": machine.load()}
    config = t5_1_1(flags.size, dtype=flags.dtype)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    params = jax.tree.map(lambda x: x.astype(flags.dtype), params)
    rows = [
        row
        for attends_to_input in (True, False)
        for row in measure(flags, config, params, attends_to_input)
    ]
    show(rows)
    if flags.output:
        where |= {"device": jax.devices()[0].device_kind}
        text = json.dumps({"machine": where, "settings": vars(flags), "rows": rows}, indent=2)
        with open(flags.output, "w", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
