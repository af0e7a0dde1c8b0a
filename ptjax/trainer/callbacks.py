"""How a run reports its progress to other code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from etils import epath


class Callback(Protocol):
    """Told what happens in a run, on every process; inherit from it and override what you need.

    A callback may look and write, but not change the run. What it raises ends the run.
    """

    def on_start(self, model_dir: epath.Path, step: int) -> None:
        """Before the first step of this process; `step` is 0, or where the run resumes."""

    def on_step(self, step: int) -> None:
        """After a step was given to the devices; its result may not be there yet."""

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A line of `metrics.jsonl` on training: its loss, gradient norm, rate and speed."""

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """A line of `metrics.jsonl` on the split that selects."""

    def on_end(self, step: int) -> None:
        """When the run is over or has been stopped, however: closes what `on_start` opened."""
