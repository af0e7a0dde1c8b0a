"""Time, memory and model-FLOPs utilisation of a step on the accelerators of this machine.

    python benchmarks/step_time.py [--sizes=xl,xxl] [--inputs=512,64] [--output=FILE.json]

T5 1.1 with random bfloat16 weights, and with int8 kernels, on all devices as data x 1; for every
size, length and dtype the first remat policy with which the step compiles and runs. Beside what is
measured stands what `ptjax.plan` says of such devices beforehand. Every row is a process of its
own, so that its peak is its own, and so is every plan. Utilisation is useful FLOPs (nothing counted
twice) over the published peak. Has not run on a GPU or TPU yet; `--sizes=small --batch=2` runs on a
CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from prompt_step import SIZES, t5_1_1

from ptjax import compiling, planning
from ptjax.planning import Layout, Workload
from ptjax.scale import sharding
from ptjax.scale.compiled import Recipe
from ptjax.scale.slices import ENVIRONMENT, GENERATIONS, parse_slice
from ptjax.training.loss import Loss
from ptjax.training.optimizer import Adafactor
from ptjax.training.step import TrainState

REMATS = ("none", "dots", "full")


def random_arrays(shapes: Any, seed: int = 0) -> Any:
    """Arrays of these shapes and shardings, made where they lie."""
    leaves, tree = jax.tree.flatten(shapes)

    def fill(leaf: Any, key: jax.Array) -> jax.Array:
        if leaf.dtype == np.int8:
            return jax.random.randint(key, leaf.shape, -127, 128, np.int8)
        return (0.02 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)

    keys = jax.random.split(jax.random.key(seed), len(leaves))
    made = [
        jax.jit(fill, static_argnums=0, out_shardings=leaf.sharding)(
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), key
        )
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, made)


def wanted(row: dict[str, Any], devices: int) -> tuple[Workload, Layout]:
    config = t5_1_1(row["size"], dtype=row["dtype"], dropout_rate=0.0)
    recipe = Recipe("prompt_tuning", Adafactor(), Loss())
    layout = Layout(f"{devices}x1", remat=row["remat"], quantize=row["quantize"])
    return Workload(config, recipe, row["batch"], row["inputs"]), layout


def measure(row: dict[str, Any]) -> dict[str, Any]:
    """One row, in this process."""
    devices = jax.devices()
    workload, layout = wanted(row, len(devices))
    mesh = sharding.make_mesh((len(devices), 1))
    placed = planning.place(workload, layout, mesh)
    started = time.perf_counter()
    step = placed.lower().compile()
    compile_seconds = time.perf_counter() - started
    frozen = random_arrays(placed.frozen)
    # As `init_train_state` makes it: all zeros, but for what trains.
    shapes = placed.state.step, placed.state.opt_state
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    count, opt_state = jax.device_put(zeros, sharding.replicated(mesh))
    trainable = random_arrays(placed.state.trainable, seed=1)
    state = TrainState(count, trainable, opt_state, sharding.replicate_key(jax.random.key(0), mesh))
    rng = np.random.default_rng(0)
    arrays = {
        name: np.ones(shape, dtype)
        if "weights" in name
        else rng.integers(2, workload.config.vocab_size, shape).astype(dtype)
        for name, (shape, dtype) in placed.shape.arrays().items()
    }
    arrays["encoder_lengths"][:] = placed.shape.inputs
    batch = sharding.put_batch(arrays, mesh)
    seconds = []
    for turn in range(row["turns"] + 1):
        started = time.perf_counter()
        for _ in range(row["steps"]):
            state, metrics = step(state, frozen, batch)
        loss = float(metrics["loss"])
        if turn:  # the first one warms up
            seconds.append((time.perf_counter() - started) / row["steps"])
    assert np.isfinite(loss), loss
    found = {
        "seconds": statistics.median(seconds),
        "compile_seconds": compile_seconds,
        "loss": loss,
    }
    found["peak_bytes"] = (devices[0].memory_stats() or {}).get("peak_bytes_in_use")
    found["compiled_peak_bytes"] = step.memory_analysis().peak_memory_in_bytes
    return row | found | {"device": devices[0].device_kind, "devices": len(devices)}


def plan(row: dict[str, Any]) -> dict[str, Any]:
    """What `ptjax.plan` says of a measured row; {} of devices that it does not know."""
    for name, one in GENERATIONS.items():
        if one.device_kind == row["device"]:
            count = row["devices"] // one.devices * one.cores
            where = parse_slice(f"{name}-{count}" if one.topology else f"{name}x{count}")
            workload, layout = wanted(row, row["devices"])
            return compiling.compile_ahead(workload, layout, where, exact=True, timed=True)
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="xl,xxl", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--inputs", default="512,64", help="T")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=5, help="of a turn")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--output", help="a JSON file of this machine; its rows stay")
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.row:
        print(json.dumps(plan(flags.row) if "seconds" in flags.row else measure(flags.row)))
        return
    rows = []
    if flags.output and os.path.exists(flags.output):
        with open(flags.output, encoding="utf-8") as file:
            rows = json.load(file)
    print("| T5 1.1 | T | kernels | remat | s a step | plan | examples/s | peak GiB | plan | MFU |")
    print("|---|--:|---|---|--:|--:|--:|--:|--:|--:|")
    for size in flags.sizes.split(","):
        for inputs in map(int, flags.inputs.split(",")):
            for quantize in (None, "int8"):
                settings = {"size": size, "inputs": inputs, "quantize": quantize}
                settings |= {name: getattr(flags, name) for name in ("batch", "dtype")}
                settings |= {name: getattr(flags, name) for name in ("steps", "turns")}
                done = [row for row in rows if settings.items() <= row.items()]
                row = done[0] if done else first_that_runs(settings)
                if not done and row["remat"]:
                    rows.append(row)
                    if flags.output:
                        with open(flags.output, "w", encoding="utf-8") as file:
                            json.dump(rows, file, indent=2)
                show(row)


def first_that_runs(settings: dict[str, Any]) -> dict[str, Any]:
    """The row with the remat policy that keeps most and still runs."""
    for remat in REMATS:
        if row := answer(settings | {"remat": remat}):
            return row | {"planned": answer(row, ENVIRONMENT)}
    return settings | {"remat": None}


def answer(row: dict[str, Any], environment: Mapping[str, str] = MappingProxyType({})) -> Any:
    """What a process of its own makes of the row; None if it fails, and it says why."""
    text = json.dumps(row)
    done = subprocess.run(
        [sys.executable, __file__, f"--row={text}"],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    print(f"{text} ended with {done.returncode}", file=sys.stderr)
    return None


def show(row: dict[str, Any]) -> None:
    cells = [
        row["size"],
        row["inputs"],
        row["quantize"] or row["dtype"],
        row["remat"] or "none fits",
    ]
    if "seconds" in row:
        peak = row["peak_bytes"] or row["compiled_peak_bytes"]
        planned, rate = row["planned"] or {}, f"{row['batch'] / row['seconds']:.1f}"
        seconds = planned.get("estimate", {})
        expected = " - ".join(f"{seconds[x]:.3f}" for x in ("low", "high") if seconds.get(x))
        expected_peak = planned.get("peak_bytes", float("nan")) / 2**30
        cells += [f"{row['seconds']:.3f}", expected, rate, f"{peak / 2**30:.2f}"]
        if planned:
            cells += [f"{expected_peak:.2f}", f"{seconds['ideal'] / row['seconds']:.0%}"]
    cells += [""] * (10 - len(cells))
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
