"""Training metrics between two rows of the log."""

from __future__ import annotations

import math
import time

import numpy as np

from ptjax.trainer.failures import Failures
from ptjax.trainer.members import Members
from ptjax.training.step import Metrics


class TrainMetrics:
    """Sums the loss and gradient norm of each member, and measures the speed.

    The metrics of a step are read one step later, when the devices have computed them: the host
    never waits for the step that is running. The sums are part of the run's progress.
    """

    def __init__(self, members: Members, failures: Failures) -> None:
        self._members, self._failures = members, failures
        self._waiting: Metrics | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Starts to measure the speed from here."""
        self._started, self._examples = time.perf_counter(), 0

    def add(self, metrics: Metrics, examples: int) -> None:
        """Takes the metrics of a step that has just started, on this number of examples."""
        self._examples += examples
        self.flush()
        self._waiting = metrics

    def flush(self) -> None:
        """Adds the metrics of the last step to the sums, and waits for them."""
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
        """A row for the log: averages since the last row, and the speed. Resets both."""
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
