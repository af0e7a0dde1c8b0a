r"""The part `generate` of `run.sh`: ptjax against transformers, same device and weights.

    benchmarks/on_gpu/run.sh generate
    PYTHONPATH=benchmarks python benchmarks/on_gpu/generate.py --any_device --data=DIR \
        --output=DIR --limit=7000

T5 1.1 has random weights and a prompt of 100 rows in front of real inputs (SST-2). Each side
generates 16 tokens, greedily or with four beams, or chooses the likelier of the task's two labels
(`labels_once`: with one pass of transformers' encoder instead of one for each label).
transformers gets the prompt as the first rows of `inputs_embeds` and uses PyTorch's sdpa. A row has
the inputs a second of both sides (from the median turn), how many answers differ, how many distinct
answers ptjax gave, and the peak memory. The weights are chosen so that no text ends early.

A GPU computes all inputs at once, in bfloat16. Texts may differ there where two tokens nearly tie,
since both sides round. With --any_device, a CPU takes T5 1.1 small in float32, with one thread and
32 inputs at a time. Both sides sort them by length; transformers pads to the longest of a batch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# isort: split
from record import Record, add_flags  # first: it looks at the clock

# isort: split
import numpy as np
from generate_sides import METHODS
from prompt_step import t5_1_1
from tokens import draw_rows, make_rows, random_rows
from turns import SideError, Turns

from ptjax.models.config import T5Config
from ptjax.sharding.devices import GIB

HERE = Path(__file__).parent
SIDES = ("ptjax", "torch")
SECONDS = {"base": 45, "xl": 100}  # that a row needs, starting the sides included
TOY = T5Config(512, 64, 2, 2, 2, 32, 128)


@dataclasses.dataclass(frozen=True)
class Setup:
    """A comparison of both sides.

    Attributes:
        config: the backbone's.
        inputs, labels: rows of ids.
        batch: the inputs computed at a time; None takes all.
        multiple: transformers' inputs are padded to a multiple of this.
        patience: seconds that a side may take for an answer, compiling included.
        restart: start new sides for every method, so that ptjax's peak memory is that method's.
    """

    config: T5Config
    inputs: list[np.ndarray]
    labels: list[np.ndarray]
    device: str
    prompt: int = 100
    new_tokens: int = 16
    dtype: str = "bfloat16"
    batch: int | None = None
    multiple: int = 16
    rounds: int = 5
    patience: float = 120
    restart: bool = True

    def write(self, folder: Path) -> None:
        """Writes what the sides read. A child process makes the weights, to free their memory."""
        folder.mkdir(exist_ok=True)
        settings = {
            "config": {f.name: getattr(self.config, f.name) for f in dataclasses.fields(T5Config)},
            "beams": 4,
            **{x: getattr(self, x) for x in ("dtype", "device", "prompt", "new_tokens", "batch")},
            "multiple": self.multiple,
        }
        (folder / "settings.json").write_text(json.dumps(settings))
        rows = {"input": make_rows(self.inputs), "label": make_rows(self.labels)}
        arrays = {f"{name}_ids": x.ids for name, x in rows.items()}
        arrays |= {f"{name}_offsets": x.offsets for name, x in rows.items()}
        np.savez(folder / "inputs.npz", **arrays)
        on_cpu = os.environ | {"JAX_PLATFORMS": "cpu"}
        subprocess.run(side_command("write", folder), check=True, env=on_cpu)


def side_command(side: str, folder: Path) -> list[str]:
    return [sys.executable, str(HERE / "generate_sides.py"), side, str(folder)]


class Comparison:
    """The rows of a backbone; writes files and starts the sides at the first row."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        self._setup, self._folder = setup, folder
        self._turns: Turns | None = None
        self._method = ""

    def row(self, method: str, count: int) -> dict[str, Any]:
        """A row: both sides' speed and peak memory, and how many answers differ."""
        if not (self._folder / "prompt.npy").exists():  # the file that is written last
            self._setup.write(self._folder)
        (self._folder / "turn").write_text(f"{method} {count}")
        try:
            answers = self._sides(method).take(self._setup.rounds)
        except SideError:  # the next row starts new sides
            self.end()
            raise
        per_second, peak = (
            {side: choose([turn[what] for turn in taken]) for side, taken in answers.items()}
            for what, choose in (("seconds", statistics.median), ("peak_bytes", max))
        )
        per_second = {side: count / seconds for side, seconds in per_second.items()}
        said = [
            json.loads((self._folder / f"{side}_{method}_{count}.json").read_text())
            for side in SIDES
        ]
        return (
            {f"{side}_per_s": value for side, value in per_second.items()}
            | {"ratio": per_second["ptjax"] / per_second["torch"]}
            | {"differ": sum(ours != theirs for ours, theirs in zip(*said, strict=True))}
            | {"distinct": len(set(said[0]))}
            | {f"{side}_peak_gib": value / GIB for side, value in peak.items()}
        )

    def _sides(self, method: str) -> Turns:
        if self._turns is None or (self._setup.restart and method != self._method):
            self.end()
            commands = {side: side_command(side, self._folder) for side in SIDES}
            self._method = method
            self._turns = Turns(commands, os.environ, timeout=self._setup.patience)
            self._turns.warm()
        return self._turns

    def end(self) -> None:
        if self._turns is not None:
            self._turns.end()
        self._turns = None


def setups(flags: argparse.Namespace) -> Iterator[tuple[str, Setup, list[tuple[str, int]]]]:
    """(name, comparison, its rows as (method, inputs)), the more important ones first."""
    if flags.rehearse:
        rows = random_rows(0, 8, 12, (3, TOY.vocab_size)), random_rows(1, 2, 3, (3, TOY.vocab_size))
        small: dict[str, Any] = {"prompt": 4, "new_tokens": 4, "rounds": 1}
        # The machine may be busy, so a side may take as long as the part.
        setup = Setup(TOY, *rows, "cpu", patience=flags.limit, restart=False, **small)
        yield "toy", setup, [(method, 8) for method in METHODS]
        return
    file = flags.data / "sst2.npz"
    inputs, labels = draw_rows(file, 256)
    rows = [(method, count) for method in METHODS for count in (64, 256)]
    if flags.any_device:
        how: dict[str, Any] = {"dtype": "float32", "batch": 32, "multiple": 1, "patience": 900}
        yield "small", Setup(t5_1_1("small"), inputs, labels, "cpu", rounds=3, **how), rows
        return
    for size, counts, methods in (
        ("base", (64, 256), METHODS),
        ("xl", (64,), ("labels", "greedy")),
    ):
        setup = Setup(t5_1_1(size), inputs, labels, "cuda")
        yield size, setup, [(method, count) for method in methods for count in counts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    parser.add_argument("--any_device", action="store_true", help="generate on a CPU")
    flags = parser.parse_args()
    if flags.any_device:  # before any library starts its threads
        os.environ |= {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    # Also for the sides: JAX allocates memory as it needs it, as PyTorch does.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    with contextlib.ExitStack() as stack:
        record = stack.enter_context(Record.open("generate", flags, any_device=flags.any_device))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for size, setup, rows in setups(flags):
            comparison = Comparison(setup, folder / size)
            stack.callback(comparison.end)
            for method, count in rows:
                record.measure(
                    f"{size}, {method}, {count} inputs",
                    functools.partial(comparison.row, method, count),
                    needs=SECONDS.get(size, 0),
                )
            comparison.end()


if __name__ == "__main__":
    main()
