"""A bank of N prompts beside N runs one after the other: time and memory of a step.

    python benchmarks/banks.py [--members=1,4,16] [--output=FILE.json]

Prompt tuning of T5 1.1 small with random float32 weights, P = 100, Adafactor, dropout 0.1, every
member with its own batch. One process holds the step of a single prompt and the banks' steps; they
take turns, so believe the ratios: N single steps to one step of the bank, the medians of the turns.
The memory is what XLA plans for a step (temporary buffers) and what the state and the batch take.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import machine
import numpy as np
from prompt_step import t5_1_1

from ptjax.data.pipeline import Shape
from ptjax.models.prompted import make_apply_fn
from ptjax.models.t5 import init_params
from ptjax.training import freeze as freezing
from ptjax.training.loss import Loss
from ptjax.training.optimizer import Adafactor
from ptjax.training.step import TrainState, init_train_state, make_sweep_step, make_train_step

CONFIG = t5_1_1("small")
FREEZE = {"params": True, "prompt": False}


def make_optimizer(rate: Any = None) -> Any:
    return freezing.freeze_updates(Adafactor().make(1.0, rate), FREEZE)


def make_batch(shape: Shape) -> dict[str, np.ndarray]:
    """Random tokens in every place."""
    rng = np.random.default_rng(0)
    batch = {}
    for name, (size, dtype) in shape.arrays().items():
        tokens = name.endswith("tokens")
        batch[name] = rng.integers(3, 32000, size, dtype) if tokens else np.ones(size, dtype)
    batch["encoder_lengths"][:] = shape.inputs
    return batch


def start(flags: argparse.Namespace, attends_to_input: bool, members: int | None) -> dict[str, Any]:
    """A compiled step of one prompt or of a bank, its first state and its batch."""
    apply_fn = make_apply_fn(CONFIG, attends_to_input)

    def init(key: jax.Array) -> TrainState:
        prompt = jax.random.uniform(key, (flags.prompt, CONFIG.emb_dim), minval=-0.5, maxval=0.5)
        return init_train_state({"prompt": {"prompt": prompt}}, make_optimizer(), key)

    key = jax.random.key(0)
    if members is None:
        state = jax.jit(init)(key)
        step: Callable[..., Any] = make_train_step(apply_fn, make_optimizer(), Loss())
    else:
        state = jax.jit(jax.vmap(init))(jax.random.split(key, members))
        step = make_sweep_step(apply_fn, make_optimizer, Loss())
    shape = Shape(flags.batch, flags.inputs, flags.targets, members=members)
    batch = jax.device_put(make_batch(shape))
    inputs: tuple[Any, ...] = (batch,)
    if members is not None:  # all of them train, at one learning rate
        inputs += np.ones(members, bool), np.ones(members, np.float32)
    compiled = jax.jit(step, donate_argnums=0).lower(state, flags.frozen, *inputs).compile()
    memory = compiled.memory_analysis()
    return {
        "step": compiled,
        "state": state,
        "inputs": inputs,
        "seconds": [],
        "bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes,
    }


def turn(side: dict[str, Any], frozen: Any) -> None:
    """One timed step."""
    began = time.perf_counter()
    side["state"], _ = jax.block_until_ready(side["step"](side["state"], frozen, *side["inputs"]))
    side["seconds"].append(time.perf_counter() - began)


def compare(flags: argparse.Namespace, attends_to_input: bool, members: int) -> dict[str, Any]:
    """N single steps against one step of a bank of N, in turn."""
    single, bank = start(flags, attends_to_input, None), start(flags, attends_to_input, members)
    for side in (single, bank):
        turn(side, flags.frozen)
        side["seconds"].clear()
    for _ in range(flags.rounds):
        turn(bank, flags.frozen)
        for _ in range(min(members, 4)):
            turn(single, flags.frozen)
    one, many = (statistics.median(side["seconds"]) for side in (single, bank))
    return {
        "sees_input": attends_to_input,
        "members": members,
        "seconds_alone": members * one,
        "seconds_bank": many,
        "ratio": members * one / many,
        "bytes_alone": single["bytes"],
        "bytes_bank": bank["bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", default="1,4,16", help="sizes of the bank")
    parser.add_argument("--batch", type=int, default=8, help="examples of a member")
    parser.add_argument("--inputs", type=int, default=32, help="T, input tokens")
    parser.add_argument("--targets", type=int, default=8, help="L, target tokens")
    parser.add_argument("--prompt", type=int, default=100, help="P, rows of a prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", help="a JSON file to write")
    flags = parser.parse_args()
    params = jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0))
    flags.frozen = {"params": params}
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    print(jax.devices()[0].device_kind)
    machine.show()
    print(f"backbone {size / 1e9:.2f} GB, held once; batch {flags.batch}, T {flags.inputs}\n")
    print("| sees_input | N | N runs, s/step | bank, s/step | ratio | one run, GB | bank, GB |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    results = []
    for attends_to_input in (True, False):
        for members in map(int, flags.members.split(",")):
            found = compare(flags, attends_to_input, members)
            results.append(found)
            print(
                f"| {attends_to_input} | {members} | {found['seconds_alone']:.2f} | "
                f"{found['seconds_bank']:.2f} | {found['ratio']:.2f} | "
                f"{found['bytes_alone'] / 1e9:.2f} | {found['bytes_bank'] / 1e9:.2f} |",
                flush=True,
            )
    if flags.output:
        settings = {k: v for k, v in vars(flags).items() if k != "frozen"}
        text = json.dumps({"settings": settings, "results": results}, indent=2)
        Path(flags.output).write_text(text + "\n")


if __name__ == "__main__":
    main()
