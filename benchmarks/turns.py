"""Sides of a comparison that take turns: each is a process of its own, which steps when it is told.

So the peak memory of each is its own, each has compiled and warmed up before the clock starts, and
what else the machine does slows all alike. Needs nothing but Python, for a side may live in
another environment.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def resident_bytes() -> int:
    """Largest resident memory of this process so far (Linux counts in KiB, macOS in bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclasses.dataclass(frozen=True)
class Side:
    """What a process does for the clock.

    Attributes:
        warm_up: compiles whatever a turn needs.
        steps: one turn; returns when all its steps are done. It is given the words of `take`.
        about: what it says of itself beforehand, as JSON has it.
        peak_bytes: the largest memory so far, on the device that it steps on.
    """

    warm_up: Callable[[], None]
    steps: Callable[..., None]
    about: Mapping[str, Any]
    peak_bytes: Callable[[], int] = resident_bytes


def serve(start: Callable[[], Side]) -> None:
    """The process of a side: a line of JSON when it is warm, then one for every line of stdin."""
    # Libraries may print; the answers go out on a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side = start()
    side.warm_up()
    print(json.dumps(dict(side.about)), file=answers, flush=True)
    for line in sys.stdin:
        began, cpu_began = time.perf_counter(), time.process_time()
        side.steps(*line.split())
        answer = {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu_began,
            "peak_bytes": side.peak_bytes(),
        }
        print(json.dumps(answer), file=answers, flush=True)


class Turns:
    """Processes of several sides; `about` is what each says of itself.

    A side that ends before it is warm is left out if it is among `optional`.
    """

    def __init__(
        self,
        commands: Mapping[str, Sequence[str]],
        environment: Mapping[str, str],
        optional: Sequence[str] = (),
    ) -> None:
        self._workers = {
            name: subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=dict(environment),
            )
            for name, command in commands.items()
        }
        self.about: dict[str, dict[str, Any]] = {}
        try:
            for name, worker in list(self._workers.items()):
                answer = worker.stdout.readline()
                if answer:
                    self.about[name] = json.loads(answer)
                elif name in optional:
                    print(f"{name} does not run here and is left out", file=sys.stderr)
                else:
                    raise SystemExit(f"{name} ended with {worker.wait()}")
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        for worker in self._workers.values():
            worker.kill()
            worker.wait()

    def take(self, rounds: int, *words: str) -> dict[str, list[dict[str, Any]]]:
        """Every side's answers, one a round; each second round goes backwards.

        `words` tell the sides what to do, where they can do more than one thing.

        A round before them does not count: the system takes memory back from those that wait, and
        sides that were warm long before their first turn pay for it there.
        """
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in self.about}
        for turn in range(-1, rounds):
            for name in list(self.about)[:: 1 if turn % 2 == 0 else -1]:
                worker = self._workers[name]
                worker.stdin.write(" ".join(words) + "\n")
                worker.stdin.flush()
                answer = worker.stdout.readline()
                if not answer:
                    raise SystemExit(f"{name} ended with {worker.wait()}")
                answers[name].append(json.loads(answer))
            told = (f"{name} {taken[-1]['seconds']:.2f} s" for name, taken in answers.items())
            print(f"round {turn + 1} of {rounds}: {', '.join(told)}", file=sys.stderr)
        return {name: taken[1:] for name, taken in answers.items()}
