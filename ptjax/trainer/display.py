"""Shows a run's progress: a bar on a terminal, else plain lines, and TensorBoard's files."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from absl import logging
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ptjax.model_dir import ModelDir
from ptjax.sharding import processes
from ptjax.trainer.callbacks import Callback

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

HIDDEN = {"gradient_norm", "learning_rate", "evaluation_seconds"}
"""Metrics that are written to files, but shown neither beside the bar nor in log lines."""


class Display(Callback):
    """Shows a run of `steps` steps as a progress bar or as log lines; writes TensorBoard's file.

    The bar and the file are made on the first process only.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._latest: dict[str, float] = {}
        self._events: SummaryWriter | None = None
        self._bar: Progress | None = None

    def on_start(self, model_dir: epath.Path, step: int) -> None:
        """Opens TensorBoard's file, and starts the bar if standard error is a terminal."""
        if processes.first():
            with _without_torch():
                import tensorboardX

            self._events = tensorboardX.SummaryWriter(
                logdir=str(ModelDir(model_dir).tensorboard), purge_step=step + 1 if step else None
            )
        if processes.first() and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[shown]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("train", total=self._steps, completed=step, shown="")
            self._bar.start()

    def on_end(self, step: int) -> None:
        """Stops the bar and closes TensorBoard's file.

        Raises:
            OSError: the file cannot be written; not raised while another exception is handled.
        """
        failing = sys.exc_info()[0] is not None
        if self._bar:
            self._bar.stop()
        if self._events:
            try:
                self._events.close()
            except OSError:
                _give_up(self._events)
                if not failing:  # else the first exception is the one to report
                    raise

    def on_step(self, step: int) -> None:
        """Moves the bar."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the metrics, and adds them to TensorBoard's file."""
        self._show(step, metrics)

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the metrics, and adds them to TensorBoard's file."""
        self._show(step, metrics)

    def _show(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._events:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)
        fresh = {
            name.removeprefix("train/").removeprefix("time/").replace("/", " "): value
            for name, value in metrics.items()
            if name.count("/") < 2  # of a sweep only the means, not every member
        }
        fresh = {name: value for name, value in fresh.items() if name not in HIDDEN}
        self._latest |= fresh
        if self._bar:
            self._bar.update(self._task, completed=step, shown=_text(self._latest))
        else:
            logging.info("step %d/%d  %s", step, self._steps, _text(fresh))


def _give_up(events: SummaryWriter) -> None:
    """Ends the thread of a writer that cannot write, which would try again at exit."""
    writer: Any = events.file_writer.event_writer  # type: ignore[union-attr]
    writer.flush = lambda: None
    with contextlib.suppress(OSError):
        writer.close()
    writer.close = lambda: None


def _text(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


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
