"""Collects the training metrics between two rows of the log."""

from __future__ import annotations

import math
import time

import numpy as np

from ptjax.trainer.failures import Failures
from ptjax.trainer.members import Members
from ptjax.training.step import Metrics


class TrainMetrics:
    """Sums the loss and gradient norm of each member, and measures the speed.

    The metrics of a step are read one step later, so that the host does not wait for the step that
    is running. The sums are part of the run's progress.
    """

    def __init__(self, members: Members, failures: Failures) -> None:
        self._members, self._failures = members, failures
        self._waiting: Metrics | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Starts to measure the speed again, after a pause such as an evaluation."""
        self._started, self._examples = time.perf_counter(), 0

    def add(self, metrics: Metrics, examples: int) -> None:
        """Calls `flush` for the step before, and keeps `metrics` of the step that has just started.

        Args:
            examples: the number of examples of the step, for the speed.
        """
        self._examples += examples
        self.flush()
        self._waiting = metrics

    def flush(self) -> None:
        """Waits for the metrics that `add` kept, and adds them to the sums.

        Stops each member whose loss or gradient norm is not finite; see `Failures.report`, also for
        the exceptions.
        """
        if self._waiting is not None:
            self._sum(self._waiting)
            self._waiting = None

    def _sum(self, metrics: Metrics) -> None:
        progress = self._members.progress
        losses, norms = (np.atleast_1d(metrics[name]) for name in ("loss", "gradient_norm"))
        for place, member_id in progress.running:
            loss, norm = float(losses[place]), float(norms[place])
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = f"the loss ({loss}, gradient norm {norm})"
                self._failures.report(member_id, what, updated=progress.step > 1)
                continue
            progress.members[member_id].loss_sum += loss
            progress.members[member_id].norm_sum += norm
        progress.steps_summed += 1

    def take_row(self) -> dict[str, float]:
        """Returns a row for the log, and resets the sums and the clock.

        It has the averages since the last row, the learning rate, and the examples per second.
        """
        self.flush()
        rate = self._examples / (time.perf_counter() - self._started)
        self.restart_clock()
        progress = self._members.progress
        count = max(progress.steps_summed, 1)
        values = {}
        for _, member_id in progress.running:
            member = progress.members[member_id]
            values[member_id] = {
                "train/loss": member.loss_sum / count,
                "train/gradient_norm": member.norm_sum / count,
                "train/learning_rate": self._members[member_id].rate_at(progress.step - 1),
            }
            member.loss_sum = member.norm_sum = 0.0
        progress.steps_summed = 0
        return self._members.merge(values) | {"time/examples_per_second": rate}
