"""Callbacks: how other code is notified of the progress of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from etils import epath

from ptjax.trainer.progress import RunProgress


class Callback(Protocol):
    """Is notified of the events of a run, on every process. Subclasses override what they need.

    A callback may observe and write files, but not change the run. An exception ends the run.
    """

    def on_start(self, model_dir: epath.Path, step: int) -> None:
        """Called before the first step of this process; `step` is 0, or where the run resumes."""

    def on_step(self, step: int) -> None:
        """Called when a step was dispatched to the devices; it may not be computed yet."""

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called every `TrainSchedule.log_period` steps, with averages since the last call.

        Args:
            metrics: the loss, gradient norm, learning rate and speed, by the names that they have
                in `metrics.jsonl`.
        """

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called after each evaluation on the validation split.

        Args:
            metrics: the scores, by the names that they have in `metrics.jsonl`.
        """

    def on_end(self, step: int) -> None:
        """Called when the run has finished, failed or been stopped: close what `on_start` opened.

        It is called only if `on_start` of this callback returned.
        """


class CallbackList:
    """Notifies several callbacks, in their order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = list(callbacks)

    @contextlib.contextmanager
    def started(self, model_dir: epath.Path, progress: RunProgress) -> Iterator[None]:
        """Calls `on_start` now and `on_end` when the context ends, also with an exception.

        If an `on_start` raises, the callbacks before it are ended and those after it not started.
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
