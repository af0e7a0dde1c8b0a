"""Ends a run after the current step when SIGTERM or Ctrl-C arrives."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from absl import logging

from ptjax.sharding import processes


@dataclasses.dataclass
class Stop:
    """Tells whether a signal asks the run to stop early.

    Attributes:
        caught: the number of the signal that the handler of `caught()` received; None if none yet.
    """

    caught: int | None = None

    def after(self, step: int) -> bool:
        """Whether the run stops after this step.

        All processes must call it after each step; the result is the same on all of them.
        """
        return processes.stop_agreed(step) if processes.several() else self.caught is not None

    @property
    def exit_code(self) -> int:
        """The exit code of a stopped process: 128 + the signal's number."""
        # Without a signal of its own, another process received it.
        return 128 + (self.caught or signal.SIGTERM)


class StoppedError(SystemExit):
    """The run was stopped by a signal and has been saved; without a handler it ends Python.

    Attributes:
        number: the signal's number; SIGTERM if another process received it.
    """

    def __init__(self, stop: Stop) -> None:
        super().__init__(stop.exit_code)
        self.number = stop.exit_code - 128


@contextmanager
def caught() -> Iterator[Stop]:
    """Catches SIGTERM and Ctrl-C inside a `with` block, and restores the old handlers after it.

    The block gets a `Stop`. The first signal only sets its `caught`; a second one of the same kind
    has its default effect and ends Python. With several processes JAX catches SIGTERM instead (see
    `processes.stop_agreed`), and Ctrl-C is passed to it as a SIGTERM. Outside of the main thread no
    signal is caught.
    """
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        stop.caught = number
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )
        logging.info("signal %d: saving at the end of this step", number)
        if processes.several():
            os.kill(os.getpid(), signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    # With several processes, JAX's preemption service handles SIGTERM and notifies all of them; a
    # handler of ours would replace its own.
    numbers = (signal.SIGINT,) if processes.several() else (signal.SIGTERM, signal.SIGINT)
    old = {number: signal.signal(number, note) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
