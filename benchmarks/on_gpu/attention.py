"""The part `attention` of `run.sh`: the step with `ATTENTION = 'fused'` against `'plain'`.

T5 1.1 XL, B = 32, P = 100, L = 16, no dropout, random weights, layers scanned, remat 'dots', matrix
products by cuBLAS. The encoder's self-attention over rows of one example uses cuDNN; packed rows,
the keys that all rows share and cross-attention use ptjax's Triton kernels. Each side runs in a
process of its own, plain, fused, and plain again, so that clock drift shows.
"""

from __future__ import annotations

import argparse
import os
import time

STARTED = time.monotonic()

import predictions  # noqa: E402
import record  # noqa: E402
import step  # noqa: E402
from predictions import GIB  # noqa: E402

GOAL = 1.25
"""Times the plain step's examples a second, at T = 512."""
ROWS: dict[str, dict[str, object]] = {  # the most important first
    "T = 512": {"inputs": 512},
    "T = 512, packed": {"inputs": 512, "pack": True},
    "T = 512, packed, sees_input = False": {"inputs": 512, "pack": True, "sees_input": False},
    "T = 64": {"inputs": 64},
}
SETTINGS: dict[bool, dict[str, object]] = {
    False: step.COMMON | {"size": "xl", "remat": "dots", "options": step.CUBLAS},
    True: step.COMMON | step.TOY | {"size": "toy", "remat": "dots"},
}
"""Of a real run (False) and of a rehearsal (True), which compares plain attention with itself: on a
CPU, 'fused' would run the TPU's kernel in Pallas's interpreter."""
NEEDS = 120
"""Seconds that must be left when a row begins: for three processes, of which two compile."""


def find(name: str, deadline: float, *, rehearse: bool) -> dict[str, object]:
    """A row of the record.

    Raises:
        RuntimeError: a side does not run.
    """
    import step_time

    settings = SETTINGS[rehearse] | ROWS[name] | ({"inputs": 16} if rehearse else {})
    sides = []
    for attention in ("plain", "plain" if rehearse else "fused", "plain"):
        row = settings | {"attention": attention}
        sides.append(step_time.answer(row, predictions.CHILD, deadline=deadline))
        if "error" in sides[-1]:
            raise RuntimeError(f"{attention}: {sides[-1]['error']}")
    return describe(*sides, goal=not rehearse and settings["inputs"] == 512)


def describe(plain: dict, fused: dict, again: dict, *, goal: bool) -> dict[str, object]:
    """Times, memory and the ratio of examples a second; whether the goal, if any, is met."""
    slow = (plain["seconds"] * again["seconds"]) ** 0.5
    ratio = slow / fused["seconds"]
    cells: dict[str, object] = {
        "plain_seconds": plain["seconds"],
        "plain_again_seconds": again["seconds"],
        "fused_seconds": fused["seconds"],
        "ratio": ratio,
    }
    for side, row in (("plain", plain), ("fused", fused)):
        if row["compiled_peak_bytes"]:  # not on every device
            cells[f"{side}_compiled_peak_gib"] = row["compiled_peak_bytes"] / GIB
    return cells | ({"ratio_met": ratio >= GOAL} if goal else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    record.add_flags(parser)
    flags = parser.parse_args()
    os.environ |= predictions.PARENT
    with record.Record.open("attention", flags, started=STARTED) as found:
        for name in [*ROWS][:2] if flags.rehearse else ROWS:
            found.measure(
                name,
                lambda name=name: find(name, found.deadline, rehearse=flags.rehearse),
                needs=0 if flags.rehearse else NEEDS,
            )


if __name__ == "__main__":
    main()
