"""LoRA and prefix tuning beside Hugging Face PEFT's: equal losses, and the time of a step.

    python benchmarks/methods_beside_peft.py --data_dir=DIR [--peft_python=PYTHON]
        [--methods=lora,prefix] [--rounds=5] [--output=FILE.json]

All sides start from the same random T5 1.1 and the same arrays: ptjax writes the adapter in PEFT's
format, and PEFT loads it to train on. A batch is 16 sentences of SST-2, padded to the longest of
them, as PEFT's users do; DIR is laid out as tasks/sst2.gin says. ptjax takes the same arrays, and
a second time the same examples packed, several in a row. Without dropout, and with plain SGD, all
sides must have the same loss after twenty steps; otherwise nothing is timed. LoRA has rank 8, on
all queries and values; the prefix is the decoder's, the only one that PEFT has for a T5.

Then the sides take turns, each in a process of its own, all on the same core with one thread. A
ratio is ptjax's time over PEFT's, the median over the rounds, of wall time and of CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
from turns import SideError, Turns

HERE = Path(__file__).resolve().parent
METHODS = ("lora", "prefix")
SIDES = {"peft": "PEFT", "ptjax": "ptjax, the same arrays", "packed": "ptjax, packed"}
TOLERANCE = 1e-4
"""Of the losses, relative."""


def compare(flags: argparse.Namespace, folder: Path, method: str) -> dict[str, Any]:
    """The result of a method: the losses of all sides, and the ratios of their times to PEFT's."""
    programs = {
        "peft": [flags.peft_python, str(HERE / "methods_peft_side.py")],
        "ptjax": [sys.executable, str(HERE / "methods_ptjax_side.py")],
    }
    commands = {name: [*program, str(folder), method] for name, program in programs.items()}
    commands["packed"] = [*commands["ptjax"], "--packed"]
    with Turns(commands, environment(flags)) as turns:
        turns.warm()
        about = dict(turns.about)
        peft, *ours = (about[name]["losses"] for name in SIDES)
        worst = max(difference(losses, peft) for losses in ours)
        if worst > TOLERANCE:
            raise SideError(f"{method}: the losses differ by {worst:.1e}, relative: {about}")
        answers = turns.take(flags.rounds)
    times = {
        name: {
            "seconds": statistics.median(one["seconds"] for one in taken) / flags.batches,
            **{
                ratio: statistics.median(
                    one[of] / other[of] for one, other in zip(taken, answers["peft"], strict=True)
                )
                for ratio, of in (("ratio", "seconds"), ("cpu_ratio", "cpu_seconds"))
            },
        }
        for name, taken in answers.items()
    }
    return {"method": method, "difference": worst, "times": times, "sides": about}


def difference(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference of two sides' losses, over all checked steps."""
    pairs = zip(ours, theirs, strict=True)
    return max(abs(one - other) / abs(other) for one, other in pairs)


def environment(flags: argparse.Namespace) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": str(flags.threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": path,
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = [
        "| | trained | first loss | after 20 steps | difference | side | s a step | ratio "
        "| CPU ratio |",
        "|---|--:|--:|--:|--:|---|--:|--:|--:|",
    ]
    for one in results:
        about = one["sides"]["peft"]
        first, *_, last = about["losses"]
        head = [one["method"], f"{about['trained']:,}", f"{first:.4f}", f"{last:.4f}"]
        head.append(f"{one['difference']:.1e}")
        for name, title in SIDES.items():
            times = one["times"][name]
            cells = [
                f"{times['seconds']:.3f}",
                f"{times['ratio']:.2f}",
                f"{times['cpu_ratio']:.2f}",
            ]
            lines.append(f"| {' | '.join([*head, title, *cells])} |")
            head = [""] * len(head)
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--peft_python", default=sys.executable, help="has torch and peft")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--size", default="small", help="of T5 1.1")
    parser.add_argument("--batch", type=int, default=16, help="B, examples of a step")
    parser.add_argument("--inputs", type=int, default=64, help="T at most")
    parser.add_argument("--prompt", type=int, default=20, help="P, positions of the prefix")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every side")
    parser.add_argument("--batches", type=int, default=4, help="steps of a turn")
    parser.add_argument("--output", type=Path, help="a JSON file of all that was measured")
    flags = parser.parse_args(arguments)
    flags.methods = flags.methods.split(",")
    if unknown := [name for name in flags.methods if name not in METHODS]:
        parser.error(f"--methods: {unknown[0]!r} is none of {', '.join(METHODS)}")
    flags.threads, flags.checked_steps = 1, 20
    return flags


def main() -> None:
    flags = parse()
    # Before any library starts its threads: XLA makes as many as it may use processors.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: flags.threads])
    os.environ["JAX_PLATFORMS"] = "cpu"  # this process only prepares
    from methods_ptjax_side import write_inputs

    machine.show()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), flags)
        for method in flags.methods:
            results.append(compare(flags, Path(folder), method))
            print(table(results), flush=True)
    if flags.output:
        flags.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except SideError as error:
        sys.exit(str(error))
