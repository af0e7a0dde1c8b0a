"""Compile-time predictions for the programs of the parts `step` and `peft`: `predictions.json`.

    python benchmarks/on_gpu/predictions.py [--data=DIR] [PART...]

Compiles for an H100, without a GPU (extra `plan-gpu`): the scanned rows of `step`, with every remat
policy at T = 512, and the shapes of `peft` at XL. Prints compile seconds and memory, and saves each
program to predictions.json beside this file. Programs that are there already are not compiled
again, unless the version of JAX has changed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FILE = HERE / "predictions.json"
TARGET = "h100x1"
GIB = 2**30
MEMORY_FRACTION = 0.92
"""JAX's share of the GPU's memory. Its default, 0.75, is too little for XL at T = 512."""
CHILD = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "true",  # in one piece, so that it does not fragment
    "XLA_CLIENT_MEM_FRACTION": str(MEMORY_FRACTION),
}
"""The environment of a process that has the GPU to itself."""
PARENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
"""The environment of the process that starts those: it only looks which GPU there is."""
SIZES = ("peak", "argument", "temporary")
SECONDS = ("ideal", "compute", "memory", "links", "memory_most")
"""The fields to keep of a plan's estimate; both ends of a range follow from them."""


def load(kind: str) -> dict[str, dict[str, Any]]:
    """Name of a program -> its prediction for a device of that kind; {} unless it is H100 or H200.

    An H200 is an H100 with faster memory: it runs the same program.
    """
    from ptjax.planning.estimate import step_seconds
    from ptjax.planning.slices import GENERATIONS, parse_slice

    if not FILE.exists() or not kind.startswith(("NVIDIA H100", "NVIDIA H200")):
        return {}
    compiled = parse_slice(TARGET).generation
    device = next((one for one in GENERATIONS.values() if one.device_kind == kind), compiled)
    faster = device.memory_rate / compiled.memory_rate
    programs = json.loads(FILE.read_text())["programs"]
    for program in programs.values():
        seconds = {
            name: taken / (faster if name.startswith("memory") else 1)
            for name, taken in program["seconds"].items()
        }
        if "memory_most" in seconds:  # an H200 differs in one of the two
            seconds["kernels"] = max(seconds["compute"], seconds["memory_most"])
        program |= step_seconds(seconds, seconds.pop("ideal"))
    return programs


def usable_gib(kind: str) -> float:
    """The memory that `CHILD` gives JAX on a device of that kind; infinite if unknown."""
    from ptjax.sharding.devices import GPU_MEMORY

    return GPU_MEMORY.get(kind, float("inf")) * MEMORY_FRACTION


def programs(parts: list[str], data: Path) -> Iterator[dict[str, Any]]:
    """The programs of the parts, as `step_time.Row`s."""
    if "step" in parts:
        import step

        yield from step.programs()
    if "peft" in parts:
        import peft_speed

        yield from peft_speed.programs(data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="step, peft; default: both")
    parser.add_argument(
        "--data", type=Path, default=HERE / "data", help="folder that prepare.py wrote"
    )
    flags = parser.parse_args()
    sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent), str(HERE)]
    import jax
    import step_time

    from ptjax.planning.slices import ENVIRONMENT

    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    if found.get("jax") != jax.__version__:
        found = {"jax": jax.__version__, "target": TARGET, "programs": {}}
    failed = []
    print("| program | compiled in, s | peak, GiB | arguments | temporary |")
    print("|---|--:|--:|--:|--:|")
    for row in programs(flags.parts or ["step", "peft"], flags.data):
        name = step_time.name_of(row)
        if name not in found["programs"]:
            report = step_time.answer(row, ENVIRONMENT, where=TARGET)
            if "error" in report:
                failed.append(name)
                print(f"| {name} | {report['error'][:100]} ||||", flush=True)
                continue
            found["programs"][name] = summary(report)
            FILE.write_text(json.dumps(found, indent=1) + "\n")
        print(cells(name, found["programs"][name]), flush=True)
    return 1 if failed else 0


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """The fields to keep of a plan's report."""
    sizes = {f"{kind}_gib": round(report[f"{kind}_bytes"] / GIB, 2) for kind in SIZES}
    seconds = {
        name: round(report["estimate"][name], 5) for name in SECONDS if name in report["estimate"]
    }
    return {"compile_seconds": round(report["compile_seconds"]), **sizes, "seconds": seconds}


def cells(name: str, program: Mapping[str, Any]) -> str:
    """A row of the table."""
    sizes = " | ".join(f"{program[f'{kind}_gib']:.2f}" for kind in SIZES)
    return f"| {name} | {program['compile_seconds']} | {sizes} |"


if __name__ == "__main__":
    sys.exit(main())
