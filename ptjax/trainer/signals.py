"""SIGTERM and Ctrl-C end a run after the step that is running."""

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
    """Whether the run ends before its end, because a signal asks for it."""

    caught: int | None = None

    def after(self, step: int) -> bool:
        """Whether it ends after this step; to be asked after each. All processes hear the same."""
        return processes.stop_agreed(step) if processes.several() else self.caught is not None

    @property
    def exit_code(self) -> int:
        # A process that ends because another one was asked to knows of no signal.
        return 128 + (self.caught or signal.SIGTERM)


@contextmanager
def caught() -> Iterator[Stop]:
    """Notes SIGTERM and the first Ctrl-C for the end of the step; a second Ctrl-C interrupts."""
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
    # On several processes SIGTERM belongs to JAX's preemption service, which tells all of them; a
    # handler of ours would take its place.
    numbers = (signal.SIGINT,) if processes.several() else (signal.SIGTERM, signal.SIGINT)
    old = {number: signal.signal(number, note) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
