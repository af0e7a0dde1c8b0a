"""The part `step` of `run.sh`: the prompt tuning step of T5 1.1 XL and XXL.

Time, examples a second, peak memory and model-FLOPs utilisation of the step that `ptjax.train`
compiles, without dropout, next to the predictions of `ptjax.plan` (`predictions.json`). B = 32,
P = 100, L = 16, random weights, layers scanned. `benchmarks/step_time.py` measures each row in its
own process, with the first remat policy that runs of those whose predicted peak fits.

The first rows are compiled as for the predictions: matrix products by cuBLAS, not Triton, which may
take minutes to tune. Later rows profile the kernels, let XLA choose, and unroll the layers.
"""

from __future__ import annotations

import argparse
import os
import time

STARTED = time.monotonic()

import predictions  # noqa: E402
import record  # noqa: E402
from predictions import GIB  # noqa: E402

CUBLAS = {"xla_gpu_enable_triton_gemm": False}
COMMON = {"batch": 32, "dtype": "bfloat16", "quantize": None, "steps": 5, "turns": 4}
LONGEST = 100
"""Seconds after which a row is stopped, so that the others get their turn."""
ROWS: dict[str, dict[str, object]] = {  # the most important first
    "XL, T = 512": {"size": "xl", "inputs": 512, "options": CUBLAS},
    "XXL int8, T = 512": {"size": "xxl", "inputs": 512, "quantize": "int8", "options": CUBLAS},
    "XL, T = 64": {"size": "xl", "inputs": 64, "options": CUBLAS},
    "XXL int8, T = 64": {"size": "xxl", "inputs": 64, "quantize": "int8", "options": CUBLAS},
    "XL, T = 512, its kernels": {"size": "xl", "inputs": 512, "options": CUBLAS, "profile": True},
    "XL, T = 512, XLA's choice": {"size": "xl", "inputs": 512},
    "XL, T = 512, unrolled": {"size": "xl", "inputs": 512, "options": CUBLAS, "scan": False},
}
OPTIONAL = (*ROWS,)[4:]
"""Rows that may fail without failing the part: they may take too long to compile."""
NEEDS = 40
"""Seconds that must be left when a row begins; an optional one may take all of `LONGEST`."""
GOALS = {"utilisation": 0.50, "peak": 0.05}
"""MFU at XL, T = 512; largest relative error of the predicted peak."""
REHEARSED = {
    "toy int8, T = 16": {"size": "toy", "inputs": 16, "quantize": "int8", "profile": True},
}
TOY = {"batch": 2, "steps": 2, "turns": 2}


def settings(name: str) -> dict[str, object]:
    """A row as a `step_time.Row`, without its remat policy."""
    return COMMON | (REHEARSED[name] | TOY if name in REHEARSED else ROWS[name])


def programs() -> list[dict[str, object]]:
    """What `predictions.py` compiles: scanned rows, at T = 512 with every remat policy."""
    import step_time

    found = {}
    for row in map(settings, ROWS):
        for remat in ("none", "dots", "full") if row["inputs"] == 512 else ("none",):
            if row.get("scan", True):
                program = row | {"remat": remat}
                found[step_time.name_of(program)] = program
    return list(found.values())


def policies(row: dict[str, object], kind: str) -> list[str]:
    """Remat policies that are predicted to fit, or not predicted; the one that keeps most first."""
    import step_time

    known, usable = predictions.load(kind), predictions.usable_gib(kind)
    names = {
        remat: step_time.name_of(row | {"remat": remat, "scan": True}) for remat in step_time.REMATS
    }
    return [
        remat
        for remat, name in names.items()
        if name not in known or known[name]["peak_gib"] <= usable
    ]


def find(name: str, kind: str, deadline: float) -> dict[str, object]:
    """A row of the record; for an optional row that failed, the reason.

    Raises:
        RuntimeError: no policy runs, and the row is not optional.
    """
    import step_time

    row = settings(name)
    if row["size"] != "toy":
        deadline = min(deadline, time.monotonic() + LONGEST)
    found = step_time.first_that_runs(row, policies(row, kind), predictions.CHILD, deadline)
    if "error" in found and name in OPTIONAL:
        return {"left_out": found["error"]}
    if "error" in found:
        raise RuntimeError(found["error"])
    known = predictions.load(kind)
    planned = known.get(step_time.name_of(found))
    ideal = known.get(step_time.name_of(found | {"scan": True}), {}).get("ideal")
    return describe(found, planned, ideal, goal=row["size"] == "xl" and row["inputs"] == 512)


def describe(
    found: dict, planned: dict | None, ideal: float | None, *, goal: bool
) -> dict[str, object]:
    """What was measured beside what was planned, and which goals are met.

    Args:
        ideal: seconds of the useful work at the device's peak.
        goal: whether the utilisation has one.
    """
    peak = found["peak_bytes"]
    cells: dict[str, object] = {
        "remat": found["remat"],
        "compile_seconds": found["compile_seconds"],
        "peak_gib": peak and peak / GIB,
        "compiled_peak_gib": found["compiled_peak_bytes"] and found["compiled_peak_bytes"] / GIB,
    }
    if planned:
        cells["planned_gib"] = planned["peak_gib"]
        if peak:
            off = cells["peak_gib"] / planned["peak_gib"] - 1
            cells |= {"peak_off": off, "peak_met": abs(off) <= GOALS["peak"]}
    if "seconds" in found:
        seconds = found["seconds"]
        cells |= {"seconds": seconds, "examples_per_second": found["batch"] / seconds}
        if planned:
            low, high = planned["low"], planned["high"]
            cells |= {"planned_low": low, "planned_high": high}
            if high is not None:
                cells["range_met"] = low <= seconds <= high
        if ideal:
            cells["utilisation"] = ideal / seconds
            if goal:
                cells["utilisation_met"] = cells["utilisation"] >= GOALS["utilisation"]
    kept = {name: found[name] for name in ("kernels", "refused") if name in found}
    return cells | kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    record.add_flags(parser)
    flags = parser.parse_args()
    os.environ |= predictions.PARENT
    with record.Record.open("step", flags, started=STARTED) as found:
        kind = found.about["device"]
        for name in REHEARSED if flags.rehearse else ROWS:
            needs = 0 if flags.rehearse else LONGEST if name in OPTIONAL else NEEDS
            found.measure(name, lambda name=name: find(name, kind, found.deadline), needs=needs)


if __name__ == "__main__":
    main()
