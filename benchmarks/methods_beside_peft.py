"""LoRA and prefix tuning beside Hugging Face PEFT's: equal losses, and the time of a step.

    python benchmarks/methods_beside_peft.py [--peft_python=PYTHON] [--methods=lora,prefix]
        [--rounds=5] [--output=FILE.json]

Both sides start from the same random T5 1.1 and the same arrays: ptjax writes the adapter in PEFT's
format, and PEFT loads it to train on. Without dropout, and with plain SGD on the same random
batches, both must have the same loss after twenty steps; otherwise nothing is timed. LoRA has rank
8, on all queries and values; the prefix is the decoder's, the only one that PEFT has for a T5.

Then the sides take turns, each in a process of its own, all on the same core with one thread. The
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

from turns import SideError, Turns

HERE = Path(__file__).resolve().parent
METHODS = ("lora", "prefix")
TOLERANCE = 1e-4
"""Of the losses, relative."""


def compare(flags: argparse.Namespace, folder: Path, method: str) -> dict[str, Any]:
    """The result of a method: the losses of both sides, and the ratio of their times."""
    commands = {
        side: [python, str(HERE / f"methods_{side}_side.py"), str(folder), method]
        for side, python in (("peft", flags.peft_python), ("ptjax", sys.executable))
    }
    with Turns(commands, environment(flags)) as turns:
        turns.warm()
        about = dict(turns.about)
        worst = difference(about["ptjax"]["losses"], about["peft"]["losses"])
        if worst > TOLERANCE:
            raise SideError(f"{method}: the losses differ by {worst:.1e}, relative: {about}")
        answers = turns.take(flags.rounds)
    pairs = list(zip(answers["ptjax"], answers["peft"], strict=True))
    seconds = {
        f"{side}_seconds": statistics.median(one["seconds"] for one in taken) / flags.batches
        for side, taken in answers.items()
    }
    ratios = {
        name: statistics.median(ours[of] / theirs[of] for ours, theirs in pairs)
        for name, of in (("ratio", "seconds"), ("cpu_ratio", "cpu_seconds"))
    }
    return {"method": method, "difference": worst, **ratios, **seconds, "sides": about}


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
        "| | trained | first loss | after 20 steps | difference | PEFT, s a step | ptjax, s a step "
        "| ratio | CPU ratio |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for one in results:
        about = one["sides"]["ptjax"]
        cells = [
            one["method"],
            f"{about['trained']:,}",
            *(f"{about['losses'][i]:.4f}" for i in (0, -1)),
            f"{one['difference']:.1e}",
            *(f"{one[f'{side}_seconds']:.3f}" for side in ("peft", "ptjax")),
            *(f"{one[name]:.2f}" for name in ("ratio", "cpu_ratio")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peft_python", default=sys.executable, help="has torch and peft")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--size", default="small", help="of T5 1.1")
    parser.add_argument("--batch", type=int, default=16, help="B, examples of a step")
    parser.add_argument("--inputs", type=int, default=64, help="T")
    parser.add_argument("--targets", type=int, default=4, help="L")
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
