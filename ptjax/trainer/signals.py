"""SIGTERM and Ctrl-C end a run after the current step."""

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
    """Whether a signal asks the run to stop early.

    Attributes:
        caught: the number of the signal that this process received; None if none yet.
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


@contextmanager
def caught() -> Iterator[Stop]:
    """Catches SIGTERM and Ctrl-C: the first one only sets `Stop.caught`, a second one ends Python.

    Outside of the main thread it does nothing. At the end it restores the previous handlers.
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
