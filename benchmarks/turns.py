"""Sides of a comparison that take turns: each is a process that runs its steps on request.

So each side has its own peak memory, has compiled and warmed up before the clock starts, and other
load on the machine slows all of them alike. A side imports its libraries, then waits for the
request to start. It uses no accelerator until then, so sides can use a GPU one after another. This
module needs nothing but Python, because a side may run in another environment.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


class SideError(Exception):
    """A side failed, ended or took too long."""


def resident_bytes() -> int:
    """Largest resident memory of this process so far (Linux counts in KiB, macOS in bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclasses.dataclass(frozen=True)
class Side:
    """What a process does for the clock.

    Attributes:
        warm_up: compiles whatever a turn needs.
        steps: one turn; returns when all its steps are done.
        about: what it reports once it is warm, for JSON.
        peak_bytes: the largest memory so far, on the device that it steps on.
        beside: what else to measure after each turn, outside of its time, for JSON.
    """

    warm_up: Callable[[], None]
    steps: Callable[[], None]
    about: Mapping[str, Any]
    peak_bytes: Callable[[], int] = resident_bytes
    beside: Callable[[], Mapping[str, Any]] = dict


def training_side(
    run: Callable[[Iterable[int]], list[float]], batches: int, checked_steps: int, trained: int
) -> Side:
    """A side that trains: its warm-up tells the losses, a turn is a step on each batch.

    Args:
        run: trains on the batches of these numbers, and returns the loss of each step.
        batches: how many batches there are.
        checked_steps: the warm-up trains one step more, whose loss is that after so many.
        trained: the number of trained parameters.
    """
    about: dict[str, Any] = {"trained": trained}

    def warm_up() -> None:
        about["losses"] = run(range(checked_steps + 1))

    def turn() -> None:
        run(range(batches))

    return Side(warm_up, turn, about)


def serve(start: Callable[[], Side]) -> None:
    """The loop of a side's process: answers every line of stdin with a line of JSON.

    The first line starts it and is answered with `about` once it is warm; every other line is one
    turn. If it raises an exception, the error is its last answer.
    """
    # Libraries may print; the answers go out on a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(found: Mapping[str, Any]) -> None:
        print(json.dumps(dict(found)), file=answers, flush=True)

    side = None
    try:
        for _ in sys.stdin:
            if side is None:
                side = start()
                side.warm_up()
                answer(side.about)
                continue
            began, cpu_began = time.perf_counter(), time.process_time()
            side.steps()
            seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
            found = {"seconds": seconds, "cpu_seconds": cpu_seconds}
            answer(found | {"peak_bytes": side.peak_bytes()} | dict(side.beside()))
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"[:500]})
        raise


class Turns:
    """The processes of several sides; `about` holds the reports of those that are warm.

    Args:
        optional: sides to leave out if they fail to warm up.
        timeout: seconds that a side may take for an answer; may be changed later.
    """

    def __init__(
        self,
        commands: Mapping[str, Sequence[str]],
        environment: Mapping[str, str],
        optional: Sequence[str] = (),
        timeout: float | None = None,
    ) -> None:
        self.about: dict[str, dict[str, Any]] = {}
        self._optional, self.timeout = optional, timeout
        self._workers: dict[str, subprocess.Popen[str]] = {}
        try:
            for name, command in commands.items():
                self._workers[name] = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=dict(environment),
                )
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self, names: Iterable[str] | None = None) -> None:
        """Kills some sides, or all of them, which frees their memory."""
        for name in list(self._workers) if names is None else names:
            worker = self._workers.pop(name)
            worker.kill()
            worker.communicate()  # waits, and closes the pipes
            self.about.pop(name, None)

    def warm(self, names: Iterable[str] | None = None) -> None:
        """Starts some sides, or all of them, at the same time, and waits until they are warm.

        Raises:
            SideError: a side that is not optional failed.
        """
        names = list(self._workers if names is None else names)
        for name in names:
            self._tell(name)
        for name in names:
            try:
                self.about[name] = self._answer(name)
            except SideError as error:
                if name not in self._optional:
                    raise
                self.end([name])
                print(f"left out: {error}", file=sys.stderr)

    def take(self, rounds: int) -> dict[str, list[dict[str, Any]]]:
        """Answers of every warm side, one per round; every second round runs in reverse order.

        One round before them is not counted. The system reclaims memory from waiting processes, and
        sides that were warm long before their first turn pay for it in that round.

        Raises:
            SideError: a side failed.
        """
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in self.about}
        for turn in range(-1, rounds):
            for name in list(self.about)[:: 1 if turn % 2 == 0 else -1]:
                self._tell(name)
                answers[name].append(self._answer(name))
            told = (f"{name} {taken[-1]['seconds']:.2f} s" for name, taken in answers.items())
            print(f"round {turn + 1} of {rounds}: {', '.join(told)}", file=sys.stderr)
        return {name: taken[1:] for name, taken in answers.items()}

    def _tell(self, name: str) -> None:
        stdin = self._workers[name].stdin
        assert stdin is not None
        try:
            stdin.write("\n")
            stdin.flush()
        except BrokenPipeError:
            pass  # the process has ended; `_answer` reports it

    def _answer(self, name: str) -> dict[str, Any]:
        worker = self._workers[name]
        assert worker.stdout is not None
        timer = threading.Timer(self.timeout or 0, worker.kill)
        if self.timeout:
            timer.start()
        try:
            line = worker.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            limit = f", limit {self.timeout:.0f} s" if self.timeout else ""
            raise SideError(f"{name} ended with {worker.wait()}{limit}")
        found = json.loads(line)
        if "error" in found:
            raise SideError(f"{name}: {found['error']}")
        return found
