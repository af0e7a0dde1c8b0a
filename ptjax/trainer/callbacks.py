"""How a run reports its progress to other code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from etils import epath

from ptjax.trainer.progress import RunProgress


class Callback(Protocol):
    """Notified of the events of a run, on every process. Inherit from it; override what you need.

    A callback may observe and write files, but not change the run. An exception ends the run.
    """

    def on_start(self, model_dir: epath.Path, step: int) -> None:
        """Before the first step of this process; `step` is 0, or where the run resumes."""

    def on_step(self, step: int) -> None:
        """After a step was dispatched to the devices; its result may not be computed yet."""

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A row of `metrics.jsonl` on training: loss, gradient norm, learning rate and speed."""

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """A row of `metrics.jsonl` on the validation split."""

    def on_end(self, step: int) -> None:
        """When the run has finished, failed or been stopped: close what `on_start` opened."""


class CallbackList:
    """Notifies several callbacks, in their order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = list(callbacks)

    @contextlib.contextmanager
    def started(self, model_dir: epath.Path, progress: RunProgress) -> Iterator[None]:
        """Calls `on_start`, and at the end `on_end` of every callback whose `on_start` returned."""
        with contextlib.ExitStack() as ends:
            for callback in self._callbacks:
                callback.on_start(model_dir, progress.step)
                ends.callback(lambda callback=callback: callback.on_end(progress.step))
            yield

    def on_step(self, step: int) -> None:
        for callback in self._callbacks:
            callback.on_step(step)

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        for callback in self._callbacks:
            callback.on_log(step, metrics)

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        for callback in self._callbacks:
            callback.on_evaluation(step, metrics)
