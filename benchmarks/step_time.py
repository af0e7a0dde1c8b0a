"""Time, memory and model-FLOPs utilisation of a step on the accelerators of this machine.

    python benchmarks/step_time.py [--sizes=xl,xxl] [--inputs=512,64] [--output=FILE.json]

T5 1.1 with random bfloat16 weights, and with int8 kernels, on all devices as data x 1; for every
size, length and dtype the first remat policy with which the step compiles and runs. Beside what is
measured stands what `ptjax.plan` says of such devices beforehand. Every row is a process of its
own, so that its peak is its own, and so is every plan. Utilisation is useful FLOPs (nothing counted
twice) over the published peak. `--sizes=small --batch=2` runs on a CPU.
`on_gpu/step.py` measures selected rows within a time limit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from prompt_step import SIZES, first_state, t5_1_1

from ptjax.methods.prompt_tuning import PromptTuning
from ptjax.planning import compiler
from ptjax.planning.slices import ENVIRONMENT, GENERATIONS, Slice, parse_slice
from ptjax.planning.workload import AbstractStep, ParallelConfig, StepSpec, abstract_step
from ptjax.sharding.arrays import put_batch
from ptjax.sharding.attention import choose_attention
from ptjax.sharding.meshes import make_mesh
from ptjax.training.compile import StepConfig
from ptjax.training.loss import Loss
from ptjax.training.optimizer import Adafactor

REMATS = ("none", "dots", "full")
PACKED = 3
"""The examples of a packed row."""

Row = dict[str, Any]
"""Settings of a measurement, and later its results, as JSON.

"size", "inputs" (T), "batch" (rows), "dtype", "quantize", "remat", "steps" (of a turn), "turns".
Optional: "targets" (L), "prompt" (P), "pack", "sees_input", "dropout", "scan" (layers; default:
yes), "attention" (default: as `load_backbone`), "options" (of XLA's compiler), "profile" (whether
to list the slowest kernels).
"""


def name_of(row: Row) -> str:
    """The program of a row in words."""
    words = [
        row["size"],
        f"{row['batch']}x{row['inputs']}+{row.get('targets', 16)}",
        row["quantize"] or row["dtype"],
        f"remat {row['remat']}",
        "packed" if row.get("pack") else "",
        "" if row.get("sees_input", True) else "unseeing",
        f"dropout {row['dropout']}" if row.get("dropout") else "",
        "" if row.get("scan", True) else "unrolled",
        f"{row['attention']} attention" if row.get("attention") else "",
    ]
    return ", ".join(filter(None, words))


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


def wanted(row: Row, devices: int, kind: str) -> tuple[StepSpec, ParallelConfig]:
    """The step of a row on that many devices of a kind (JAX's name)."""
    config = t5_1_1(row["size"], dtype=row["dtype"], dropout_rate=row.get("dropout", 0.0))
    attends_to_input, pack = row.get("sees_input", True), row.get("pack", False)
    method = PromptTuning(row.get("prompt", 100), attends_to_input=attends_to_input)
    step_config = StepConfig(Adafactor(), Loss())
    attention = choose_attention(row.get("attention", "auto"), kind)
    kept = {"remat": row["remat"], "quantize": row["quantize"], "attention": attention}
    parallel = ParallelConfig(f"{devices}x1", scan_layers=row.get("scan", True), **kept)
    sizes = {"batch_size": row["batch"], "inputs": row["inputs"], "targets": row.get("targets", 16)}
    packed = {"pack": pack, "row_length": row["inputs"] if pack else None}
    return StepSpec(config, step_config, method, **sizes, **packed), parallel


def measure(row: Row) -> Row:
    """One row, in this process."""
    devices = jax.devices()
    spec, parallel = wanted(row, len(devices), devices[0].device_kind)
    abstract = abstract_step(spec, parallel, make_mesh((len(devices), 1)))
    started = time.perf_counter()
    step = abstract.lower().compile(compiler_options=row.get("options"))
    found: Row = {"compile_seconds": time.perf_counter() - started}
    run = make_turn(abstract, spec, step, row["steps"])
    run()  # warms up
    found["seconds"] = statistics.median(run() for _ in range(row["turns"])) / row["steps"]
    if row.get("profile"):
        found["kernels"] = profile(run, row["steps"])
    found["peak_bytes"] = (devices[0].memory_stats() or {}).get("peak_bytes_in_use")
    memory = step.memory_analysis()
    found["compiled_peak_bytes"] = memory and memory.peak_memory_in_bytes
    return row | found | {"device": devices[0].device_kind, "devices": len(devices)}


def make_turn(
    abstract: AbstractStep, spec: StepSpec, step: Callable[..., Any], steps: int
) -> Callable[[], float]:
    """A function that runs `steps` steps on random arrays and returns the seconds they took."""
    frozen = random_arrays(abstract.frozen)
    state = first_state(abstract, random_arrays(abstract.state.trainable, seed=1))
    rng = np.random.default_rng(0)
    arrays = {
        name: np.ones(shape, dtype)
        if "weights" in name
        else rng.integers(2, spec.config.vocab_size, shape).astype(dtype)
        for name, (shape, dtype) in abstract.shape.arrays().items()
    }
    for name, array in arrays.items():
        if name == "encoder_lengths":
            array[:] = abstract.shape.inputs
        elif name.endswith("segment_ids"):  # packed: examples of the same length
            array[:] = 1 + np.arange(array.shape[-1]) * PACKED // array.shape[-1]
    batch = put_batch(arrays, abstract.mesh)
    jax.block_until_ready((frozen, state, batch))

    def turn() -> float:
        nonlocal state
        started = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, frozen, batch)
        loss = float(metrics["loss"])  # waits for all steps
        seconds = time.perf_counter() - started
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        return seconds

    return turn


def profile(run: Callable[[], float], steps: int, most: int = 12) -> dict[str, float]:
    """The slowest kernels of a step: name -> milliseconds, after "all", their total."""
    from jax.profiler import ProfileData

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = list(ProfileData.from_file(str(file)).planes)
        devices = [plane for plane in planes if "/device:" in plane.name]
        milliseconds: dict[str, float] = {}
        for plane in devices[:1] or planes:  # a CPU's kernels are on the host's plane
            for line in plane.lines:
                if devices and not line.name.startswith("Stream"):
                    continue  # the same time again, by module and by operation
                for event in line.events:
                    spent = event.duration_ns / 1e6 / steps
                    milliseconds[event.name] = milliseconds.get(event.name, 0.0) + spent
    slowest = sorted(milliseconds.items(), key=lambda item: -item[1])[:most]
    kernels = [("all", sum(milliseconds.values())), *slowest]
    return {name[:80]: round(spent, 3) for name, spent in kernels}


def slice_of(kind: str, devices: int) -> Slice | None:
    """The slice of such devices in `ptjax.plan`; None if it does not know them."""
    for name, one in GENERATIONS.items():
        if one.device_kind == kind:
            count = devices // one.devices * one.cores
            return parse_slice(f"{name}-{count}" if one.topology else f"{name}x{count}")
    return None


def plan(row: Row, where: Slice) -> dict[str, Any]:
    """The prediction of `ptjax.plan` for the row; the devices need not be present."""
    spec, parallel = wanted(row, len(where.devices()), where.generation.device_kind)
    return compiler.compile_ahead(spec, parallel, where, exact=True)


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
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.row:
        print(json.dumps(answer_here(flags.row, flags.plan)))
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
                if not done and "error" not in row:
                    where = slice_of(row["device"], row["devices"])
                    row["planned"] = where and answer(row, ENVIRONMENT, where=where.name)
                    rows.append(row)
                    if flags.output:
                        with open(flags.output, "w", encoding="utf-8") as file:
                            json.dump(rows, file, indent=2)
                show(row)


def answer_here(row: Row, where: str | None) -> Row:
    """Measures the row, or plans it for the slice `where`; an exception becomes "error"."""
    try:
        return plan(row, parse_slice(where)) if where else measure(row)
    except Exception as error:  # usually out of memory; another policy may fit
        return row | {"error": f"{type(error).__name__}: {error}"[:500]}


def first_that_runs(
    settings: Row,
    remats: Sequence[str] = REMATS,
    environment: Mapping[str, str] = MappingProxyType({}),
    deadline: float = float("inf"),
) -> Row:
    """The row with the remat policy that keeps most and still runs.

    Args:
        deadline: `time.monotonic()` after which no other policy is tried.

    Returns:
        The row, with an "error" if no policy runs, or with the policies that failed before this one
        under "refused": policy -> error.
    """
    refused: dict[str, str] = {}
    for remat in remats:
        if time.monotonic() > deadline:
            break
        row = answer(settings | {"remat": remat}, environment, deadline=deadline)
        if "error" not in row:
            return row | ({"refused": refused} if refused else {})
        refused[remat] = row["error"]
    told = "; ".join(f"remat {remat}: {error}" for remat, error in refused.items())
    return settings | {"remat": None, "error": told or "no remat policy fits"}


def answer(
    row: Row,
    environment: Mapping[str, str] = MappingProxyType({}),
    *,
    where: str | None = None,
    deadline: float = float("inf"),
) -> Row:
    """Measures or plans the row in a new process; if that fails, the row has an "error"."""
    command = [sys.executable, __file__, f"--row={json.dumps(row)}"]
    seconds = None if deadline == float("inf") else max(deadline - time.monotonic(), 1.0)
    try:
        done = subprocess.run(
            command + ([f"--plan={where}"] if where else []),
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return row | {"error": f"stopped after {seconds:.0f} s"}
    if done.returncode:
        return row | {"error": f"ended with {done.returncode}"}
    found = json.loads(done.stdout.splitlines()[-1])
    if "error" in found:
        print(f"{json.dumps(row)}: {found['error']}", file=sys.stderr)
    return found


def show(row: Row) -> None:
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
        if seconds:
            cells += [f"{expected_peak:.2f}", f"{seconds['ideal'] / row['seconds']:.0%}"]
    cells += [""] * (10 - len(cells))
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
