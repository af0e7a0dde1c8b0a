"""Time from `ptjax.tune(...)` to the end of the first step, on the backbone that ptjax ships.

    python benchmarks/first_step.py

Each row is a process of its own. The first one fills a compile cache in a new folder, the others
find it filled, as every run does after the first one on a machine. CPU time counts all threads: on
a busy machine it says more than the wall time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine


class FirstStepError(Exception):
    """Ends the run after its first step."""


def measure(folder: Path) -> dict[str, float]:
    """Seconds of wall and CPU time of each part, in this process."""
    marks = {"": (time.perf_counter(), time.process_time())}

    def mark(name: str) -> None:
        marks[name] = time.perf_counter(), time.process_time()

    import ptjax

    class Watch(ptjax.Callback):
        def on_start(self, model_dir: object, step: int) -> None:
            mark("data")

        def on_step(self, step: int) -> None:
            mark("step")
            raise FirstStepError

    backbone = ptjax.load_backbone("ptjax-nano")
    mark("load")
    texts = {"billing": "I was charged twice", "login": "My password is refused"}
    records = [
        {"body": f"{text}, order {number}", "category": category}
        for number in range(150)
        for category, text in texts.items()
    ]
    task = ptjax.Task.from_records(records, validation=0.1, inputs="{body}", label="category")
    settings = ptjax.RunSettings(
        batching=ptjax.Batching(feature_lengths={"inputs": 64, "targets": 4})
    )
    mark("task")
    with contextlib.suppress(FirstStepError):
        ptjax.tune(backbone, task, folder / "run", settings, callbacks=[Watch()])
    spans = {
        "load_backbone": ("", "load"),
        "data": ("task", "data"),
        "first step": ("task", "step"),
    }
    return {
        f"{name} {kind}": marks[end][i] - marks[start][i]
        for name, (start, end) in spans.items()
        for i, kind in enumerate(("wall", "CPU"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="processes with a filled cache")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(Path(folder))))
        return
    machine.show()
    with tempfile.TemporaryDirectory() as cache:
        environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        environment["XDG_CACHE_HOME"] = cache
        for number in range(arguments.repeats + 1):
            command = [sys.executable, __file__, "--child=yes"]
            ran = subprocess.run(command, env=environment, capture_output=True, text=True)
            if ran.returncode:
                raise SystemExit(ran.stderr)
            seconds = json.loads(ran.stdout.splitlines()[-1])
            if not number:
                print(f"{'compile cache':<14}" + "".join(f"{name:>20}" for name in seconds))
            row = "".join(f"{value:>18.1f} s" for value in seconds.values())
            print(f"{'filled' if number else 'empty':<14}{row}", flush=True)


if __name__ == "__main__":
    main()
