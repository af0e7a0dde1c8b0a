"""The part `peft` of `run.sh`: ptjax against Hugging Face PEFT, compared as in `against_peft.py`.

T5 1.1 base and XL, bfloat16, P = 100, 32 real examples of SST-2 and IMDb a step, dropout 0.1. PEFT
uses PyTorch's fused attention (sdpa); the last rows are base with torch.compile. Each side runs in
its own process and has the GPU to itself; the processes of a task import their libraries at the
same time. If a batch does not fit, PEFT splits it and ptjax chooses another remat policy. ptjax's
steps are compiled without Triton matrix products, as in the part `step`.

This file is not called peft.py because it would shadow PEFT itself.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STARTED = time.monotonic()

import numpy as np  # noqa: E402
import predictions  # noqa: E402
import record  # noqa: E402
from predictions import GIB  # noqa: E402

SIDES = ("peft", "paper", "both", "packed", "unseeing")
"""The first is the baseline of the others; see `against_peft.NAMES`."""
OPTIONAL = ("peft_compiled",)
TASKS = (("base", "sst2"), ("base", "imdb"), ("xl", "sst2"), ("xl", "imdb"))
NEEDS = {"toy": 0, "base": 35, "xl": 60}
"""Seconds that must be left when a side begins."""
LONGEST = 110
"""Seconds after which a side is stopped, so that the others get their turn."""
GOALS = {"paper": 1.5, "both": 4.0}
"""In multiples of PEFT's examples a second."""
AGREES = 0.5
"""Largest allowed difference of two sides' bfloat16 logits, in units of their standard deviation.

It is the maximum over a quarter of a million logits; different networks differ by several units.
"""
NO_TRITON = {"XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false"}


def read_examples(folder: Path, task: str) -> Any:
    """Reads what `prepare.write_examples` wrote, as `TokenizedExamples`.

    Raises:
        SystemExit: there is no such file.
    """
    file = folder / f"{task}.npz"
    if not file.exists():
        raise SystemExit(f"{file} is missing: make it with benchmarks/on_gpu/prepare.py")
    with np.load(file) as stored:
        labels = np.split(stored["label_ids"], stored["label_offsets"][1:-1])
        targets = [labels[number] for number in stored["train_targets"]]
        return to_examples(stored["train_ids"], stored["train_offsets"], targets)


def invent_examples() -> Any:
    """Random examples, for a rehearsal without data."""
    rng = np.random.default_rng(0)
    offsets = np.cumsum([0, *rng.integers(4, 25, 64)])
    ids = rng.integers(2, 8000, offsets[-1])
    return to_examples(ids, offsets, [np.array([7 + i % 2, 1]) for i in range(64)])


def to_examples(ids: np.ndarray, offsets: np.ndarray, targets: list[np.ndarray]) -> Any:
    from ptjax.data.preprocess import TokenizedExamples, TokenRows

    inputs = TokenRows(ids.astype(np.int32), offsets, truncated=0)
    ends = np.cumsum([0, *map(len, targets)])
    return TokenizedExamples(inputs, TokenRows(np.concatenate(targets).astype(np.int32), ends, 0))


def make_flags(size: str, device: str, data: Path) -> argparse.Namespace:
    """The flags of `against_peft.py`."""
    toy = size == "toy"
    return argparse.Namespace(
        size=size,
        device=device,
        torch_device="cpu" if device == "cpu" else "cuda",
        dtype="bfloat16",
        batch=4 if toy else 32,
        prompt=8 if toy else 100,
        dropout=0.1,
        scan=True,
        rounds=1 if toy else 3,
        batches=2 if toy else 6,
        threads=len(os.sched_getaffinity(0)),
        peft_python=sys.executable,
        data=data,
    )


def programs(data: Path) -> Iterator[dict[str, Any]]:
    """ptjax's steps at XL as `step_time.Row`s, for `predictions.py`."""
    from ptjax_side import WAYS, make_batches, row_of, step_settings

    from ptjax.data.pipeline import Shape

    for size, task in TASKS:
        if size != "xl":
            continue
        flags = make_flags(size, "gpu", data)
        examples = read_examples(data, task)
        for side, (attends_to_input, _) in WAYS.items():
            for shape in dict.fromkeys(map(Shape.of, make_batches(examples, flags, side))):
                row = row_of(shape, step_settings(flags), attends_to_input)
                yield row


def first_policies(kind: str) -> dict[str, str]:
    """Program without remat -> policy to begin with, where it is predicted not to fit."""
    usable = predictions.usable_gib(kind)
    known = predictions.load(kind)
    return {name: "dots" for name, program in known.items() if program["peak_gib"] > usable}


def environment(flags: argparse.Namespace) -> dict[str, str]:
    """The environment of the sides."""
    import against_peft

    given = against_peft.environment(flags) | NO_TRITON
    return given | predictions.CHILD if flags.device == "gpu" else given


class Task:
    """A backbone size and a task: the processes of its sides, and their rows."""

    def __init__(
        self, found: record.Record, size: str, task: str, sides: list[str], flags: Any
    ) -> None:
        import against_peft
        from turns import Turns

        self.found, self.size, self.task, self.sides = found, size, task, sides
        self.flags = make_flags(size, "cpu" if flags.rehearse else "gpu", flags.data)
        # A fixed folder, so that a later call on this machine finds PEFT's logits.
        self.folder = Path(tempfile.gettempdir()) / "ptjax_on_gpu_peft" / f"{size}_{task}"
        self.folder.mkdir(parents=True, exist_ok=True)
        commands = {side: against_peft.command(self.flags, self.folder, side) for side in sides}
        self.turns = Turns(commands, environment(self.flags))
        self.flops: dict[str, float] = {}

    def __enter__(self) -> Task:
        return self

    def __exit__(self, *_: object) -> None:
        self.turns.end()

    def prepare(self) -> None:
        """Writes the sides' inputs while they import their libraries."""
        from ptjax_side import write_speed_inputs

        there = (self.flags.data / f"{self.task}.npz").exists()
        toy = self.size == "toy" and not there
        examples = invent_examples() if toy else read_examples(self.flags.data, self.task)
        self.flops = write_speed_inputs(self.folder, self.flags, examples, self.sides)
        file = self.folder / "settings.json"
        settings = json.loads(file.read_text())
        settings["remats"] = first_policies(self.found.about["device"])
        file.write_text(json.dumps(settings))

    def measure(self) -> None:
        for side in self.sides:
            self.found.measure(
                name_of(self.size, self.task, side),
                lambda side=side: self.find(side),
                needs=NEEDS[self.size],
            )

    def find(self, side: str) -> dict[str, Any]:
        """A row of the record; for an optional side that failed, the reason."""
        from turns import SideError

        self.turns.timeout = max(min(LONGEST, self.found.time_left()), 1)
        if self.size == "toy":
            self.turns.timeout = None
        try:
            self.turns.warm([side])
            about = dict(self.turns.about[side])
            answers = self.turns.take(self.flags.rounds)[side]
        except SideError as error:
            if side not in OPTIONAL:
                raise
            return {"left_out": str(error)}
        finally:
            self.turns.end([side])
        return self.describe(side, about, answers)

    def describe(self, side: str, about: dict[str, Any], answers: list[Any]) -> dict[str, Any]:
        """A side's row, with its ratio to PEFT."""
        from against_peft import PEAK_FLOPS, result

        theirs = self.answers_of_peft()
        reference = answers if side == "peft" else theirs
        found = result(self.flags, side, answers, reference or answers, self.flops[side])
        cells: dict[str, Any] = {"examples_per_second": found["examples_per_second"]}
        if reference:
            cells["ratio"] = found["ratio"]
            if side in GOALS:
                cells |= {"goal": GOALS[side], "met": found["ratio"] >= GOALS[side]}
        cells["peak_gib"] = found["peak_bytes"] / GIB
        kind = self.found.about["device"]
        if peak := next((peak for name, peak in PEAK_FLOPS.items() if name in kind), None):
            cells["utilisation"] = found["flops_per_second"] / peak
        kept = {name: found[name] for name in ("flops_per_example", "seconds", "cpu_seconds")}
        return cells | self.agreement(side) | about | kept

    def answers_of_peft(self) -> list[dict[str, Any]]:
        """The turns of PEFT's row, perhaps from an earlier call; [] if there is none."""
        name = name_of(self.size, self.task, "peft")
        rows = [row for row in self.found.rows if row["row"] == name and "seconds" in row]
        return [
            {"seconds": taken, "cpu_seconds": cpu, "peak_bytes": 0}
            for row in rows
            for taken, cpu in zip(row["seconds"], row["cpu_seconds"], strict=True)
        ]

    def agreement(self, side: str) -> dict[str, Any]:
        """How far the logits are from those of another side that computes the same."""
        from against_peft import difference

        other = {"unseeing": "both", "both": "unseeing", "peft": None}.get(side, "peft")
        if other is None or not (self.folder / f"{other}_logits.npy").exists():
            return {}
        off = difference(self.folder, other, side)
        return {"logits_off": off, "logits_met": off <= AGREES}


def name_of(size: str, task: str, side: str) -> str:
    """The name of a row."""
    import against_peft

    return f"{size}, {task}: {against_peft.NAMES[side]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    record.add_flags(parser)
    flags = parser.parse_args()
    os.environ |= predictions.PARENT
    plan = [(size, task, SIDES) for size, task in TASKS]
    plan += [(size, task, OPTIONAL) for size, task in TASKS if size == "base"]
    if flags.rehearse:
        plan = [("toy", "sst2", SIDES[:3])]
    with record.Record.open("peft", flags, started=STARTED) as found:
        for size, task, sides in plan:
            done = {row["row"] for row in found.rows if "error" not in row}
            left = [side for side in sides if name_of(size, task, side) not in done]
            if not left:
                continue
            if found.time_left() < NEEDS[size]:
                raise TimeoutError(f"no time left for {size}, {task}")
            with Task(found, size, task, left, flags) as one:
                one.prepare()
                one.measure()


if __name__ == "__main__":
    main()
