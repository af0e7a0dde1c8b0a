"""Callbacks: how other code is notified of the progress of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from etils import epath

from ptjax.trainer.progress import RunProgress


class Callback(Protocol):
    """Receives the events of a run, on every process. Subclasses override the methods they need.

    A callback may observe the run and write files, but must not change the run. If a callback
    raises an exception, the run ends.
    """

    def on_start(self, model_dir: epath.Path, step: int) -> None:
        """Called before the first step; `step` is 0, or the step at which the run resumes."""

    def on_step(self, step: int) -> None:
        """Called after a step was dispatched to the devices, which may still be computing it."""

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called every `TrainSchedule.log_period` steps and at the last step.

        Args:
            metrics: the mean loss and gradient norm since the last call, the learning rate, and
                the examples per second, under the names that `metrics.jsonl` uses.
        """

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called after each evaluation on the validation split.

        Args:
            metrics: the scores and the duration, under the names that `metrics.jsonl` uses.
        """

    def on_end(self, step: int) -> None:
        """Called when the run has finished, failed or been stopped: close what `on_start` opened.

        It is not called if this callback's `on_start` raised an exception.
        """


class CallbackList:
    """Forwards the events of a run to several callbacks, in the given order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = list(callbacks)

    @contextlib.contextmanager
    def started(self, model_dir: epath.Path, progress: RunProgress) -> Iterator[None]:
        """A context manager: calls `on_start` on entry and `on_end` on exit, in reverse order.

        `on_end` is also called if the body raises. If one callback's `on_start` raises, `on_end` is
        called for the callbacks already started, and the remaining callbacks are not started.

        Args:
            progress: updated by the run; the callbacks get its `step` at entry and at exit.
        """
        with contextlib.ExitStack() as ends:
            for callback in self._callbacks:
                callback.on_start(model_dir, progress.step)
                ends.callback(lambda callback=callback: callback.on_end(progress.step))
            yield

    def on_step(self, step: int) -> None:
        """Calls `on_step` of every callback."""
        for callback in self._callbacks:
            callback.on_step(step)

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Calls `on_log` of every callback."""
        for callback in self._callbacks:
            callback.on_log(step, metrics)

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Calls `on_evaluation` of every callback."""
        for callback in self._callbacks:
            callback.on_evaluation(step, metrics)
