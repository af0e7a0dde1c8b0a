"""Shows a run's progress, and writes its metrics for TensorBoard."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from etils import epath

from ptjax.model_dir import ModelDir
from ptjax.sharding import processes
from ptjax.trainer.callbacks import Callback
from ptjax.trainer.metrics_log import read_rows
from ptjax.trainer.screen import Lines, ShownProgress, View, choose_view

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

HIDDEN = {"gradient_norm", "learning_rate", "evaluation_seconds"}
"""Metrics that are written to files, but shown neither beside the bar nor in log lines."""


class Display(Callback):
    """Shows a run (see `screen`), and writes its metrics for TensorBoard.

    Only the first process shows more than lines and makes TensorBoard's file.

    Args:
        steps: the step at which the run ends.
        metric: the name of the metric that selects the best export; None marks no best.
    """

    def __init__(self, steps: int, metric: str | None = None) -> None:
        self._run = ShownProgress(steps)
        self._selects = None if metric is None else f"validation {metric}"
        self._events: SummaryWriter | None = None
        self._view: View | None = None

    def on_start(self, model_dir: epath.Path, step: int) -> None:
        """Opens TensorBoard's file, and shows the run as far as it is."""
        if processes.first():
            with _without_torch():
                import tensorboardX

            self._events = tensorboardX.SummaryWriter(
                logdir=str(ModelDir(model_dir).tensorboard), purge_step=step + 1 if step else None
            )
        self._run.step = step
        for row in read_rows(ModelDir(model_dir).metrics) if step and processes.first() else ():
            if row["step"] <= step:
                self._add(row.pop("step"), row)
        self._view = choose_view(self._run) if processes.first() else Lines(self._run)
        self._view.start()

    def on_end(self, step: int) -> None:
        """Ends the picture and closes TensorBoard's file.

        Raises:
            OSError: the file cannot be written. Not raised while another exception is being
                handled.
        """
        failing = sys.exc_info()[0] is not None
        if self._view:
            self._view.stop()
        if self._events:
            try:
                self._events.close()
            except OSError:
                _give_up(self._events)
                if not failing:  # else the first exception is the one to report
                    raise

    def on_step(self, step: int) -> None:
        """Shows that the run has reached `step`."""
        self._run.step = step
        if self._view:
            self._view.step()

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the metrics, and adds them to TensorBoard's file."""
        self._write(step, metrics)
        fresh, _ = self._add(step, metrics)
        if self._view:
            self._view.logged(fresh)

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the metrics, and adds them to TensorBoard's file."""
        self._write(step, metrics)
        fresh, is_best = self._add(step, metrics)
        if self._view:
            self._view.evaluated(fresh, is_best)

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._events:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)

    def _add(self, step: int, metrics: Mapping[str, float]) -> tuple[dict[str, float], bool]:
        """Adds metrics to what is shown: (those to show, whether they are of the best)."""
        fresh = {
            name.removeprefix("train/").removeprefix("time/").replace("/", " "): value
            for name, value in metrics.items()
            if name.count("/") < 2  # of a sweep only the means, not every member
        }
        fresh = {name: value for name, value in fresh.items() if name not in HIDDEN}
        self._run.step = max(self._run.step, step)
        self._run.latest |= fresh
        if not any(name.startswith("validation ") for name in fresh):
            return fresh, False
        return fresh, self._run.add_evaluation(step, fresh, self._selects)


def _give_up(events: SummaryWriter) -> None:
    """Ends the thread of a writer that cannot write, which would try again at exit."""
    writer: Any = events.file_writer.event_writer  # type: ignore[union-attr]
    writer.flush = lambda: None
    with contextlib.suppress(OSError):
        writer.close()
    writer.close = lambda: None


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """tensorboardX imports torch, if installed, for one type: seconds on every start."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # which makes its import fail
    try:
        yield
    finally:
        del sys.modules["torch"]
