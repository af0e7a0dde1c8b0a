"""The members of a run, and where they stand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ptjax.data.pipeline import Batches
from ptjax.trainer.exports import Exports
from ptjax.trees import Tree


@dataclasses.dataclass
class Standing:
    """Where one member of a run stands. Sums start at the last logged step.

    `failed` says that its loss was not finite. `best_before` was the best until the last
    evaluation: the checkpoint before the newest one names it.
    """

    best_value: float | None = None
    best_step: int | None = None
    without_gain: int = 0
    stopped: bool = False
    failed: bool = False
    loss_sum: float = 0.0
    norm_sum: float = 0.0
    best_before: int | None = None


@dataclasses.dataclass
class Progress:
    """Where a run stands; plain JSON inside the checkpoint.

    `held` are the numbers of the members that the train state holds, in its order. `seconds` are
    those of all starts together, up to the checkpoint.
    """

    standings: list[Standing]
    held: list[int]
    step: int = 0
    steps_summed: int = 0
    seconds: float = 0.0

    @classmethod
    def from_json(cls, loaded: dict[str, Any]) -> Progress:
        """The inverse of `dataclasses.asdict`."""
        standings = [Standing(**standing) for standing in loaded["standings"]]
        fields: dict[str, Any] = loaded | {"standings": standings}
        return cls(**fields)

    @property
    def running(self) -> list[tuple[int, int]]:
        """(place in the train state, number) of every member that has not stopped."""
        return [(i, m) for i, m in enumerate(self.held) if not self.standings[m].stopped]


@dataclasses.dataclass(frozen=True)
class Member:
    """One of those that a run trains side by side; an ordinary run has one, whose name is "".

    Attributes:
        evaluate: metrics of its trainable variables; None, and the newest is the best.
        metric: which of them selects.
        rate_at: its learning rate at a step, for the log and, in a bank, for the step itself.
    """

    batches: Batches
    exports: Exports
    rate_at: Callable[[int], float]
    evaluate: Callable[[Tree], dict[str, float]] | None = None
    metric: str | None = None
    name: str = ""
