"""The members that a run trains side by side, and their part of its train state."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from absl import logging

from ptjax.data.pipeline import Batches, SweepBatches
from ptjax.trainer.exports import Exports
from ptjax.trainer.progress import RunProgress
from ptjax.training.step import TrainState
from ptjax.trees import Tree


@dataclasses.dataclass(frozen=True)
class Member:
    """One member of a run; an ordinary run has a single one, whose name is "".

    Attributes:
        rate_at: maps a step to the learning rate: for the log and, in a sweep, for the train step.
        evaluate: maps the trainable variables to metrics by name; None: nothing is evaluated, and
            the newest export is the best.
        metric: the name of the metric that selects the best export, the one where it is highest.
    """

    batches: Batches
    exports: Exports
    rate_at: Callable[[int], float]
    evaluate: Callable[[Tree], dict[str, float]] | None = None
    metric: str | None = None
    name: str = ""


class Members:
    """All members of a run, with their progress.

    In a sweep every array of the train state has a leading axis, with a place for each member that
    the state holds (`progress.member_ids`). An ordinary run has no such axis.

    A member's id is its index in the run.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = list(members)
        self.is_sweep = any(member.name for member in members)
        self.progress = RunProgress.at_start(len(members))

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members)

    def __getitem__(self, member_id: int) -> Member:
        return self._members[member_id]

    def batches(self) -> Batches:
        """The training batches of the members in the train state; in a sweep, one for each."""
        batches = [self[member_id].batches for member_id in self.progress.member_ids]
        return SweepBatches(batches) if self.is_sweep else batches[0]

    def sweep_inputs(self) -> tuple[np.ndarray, ...]:
        """The arguments that the train step of a sweep has in addition; () in an ordinary run.

        Returns:
            (active, learning_rate) of the members in the train state: bool [members] (False for
            stopped ones) and float32 [members].
        """
        if not self.is_sweep:
            return ()
        progress = self.progress
        active = [not progress.members[member_id].stopped for member_id in progress.member_ids]
        rates = [self[member_id].rate_at(progress.step) for member_id in progress.member_ids]
        return np.array(active), np.array(rates, np.float32)

    def trainable(self, state: TrainState, place: int) -> Tree:
        """The trainable variables of the member at `place` in the train state."""
        return (
            jax.tree.map(lambda x: x[place], state.trainable) if self.is_sweep else state.trainable
        )

    def running(self, state: TrainState) -> list[tuple[int, Tree]]:
        """The (id, trainable variables) of every member that still trains."""
        return [
            (member_id, self.trainable(state, place)) for place, member_id in self.progress.running
        ]

    def reduce(self, state: TrainState, places: Sequence[int]) -> TrainState:
        """The part of `state` that belongs to the members at `places`, in that order.

        If there are as many `places` as members in the run, it is `state` itself.
        """
        if len(places) == len(self._members):
            return state
        index = np.array(places)
        return jax.tree.map(lambda x: jax.device_put(x[index], x.sharding), state)

    def shrink(self, state: TrainState) -> TrainState:
        """Drops stopped members from the train state, once half of its places are idle.

        The number of places is only ever halved, as often as possible: the steps are compiled again
        for each size. Stopped members fill places that are left over. Updates
        `progress.member_ids`. Returns `state` itself if it keeps its size.
        """
        progress, running = self.progress, self.progress.running
        count = size = len(progress.member_ids)
        while running and size // 2 >= len(running):
            size //= 2
        if size == count:
            return state
        logging.info(
            "%d of %d members still train: the sweep shrinks to %d places",
            len(running),
            count,
            size,
        )
        kept = [place for place, _ in running]
        idle = [place for place in range(count) if place not in kept]
        places = sorted(kept + idle[: size - len(kept)])
        progress.member_ids = [progress.member_ids[place] for place in places]
        return self.reduce(state, places)

    def export(self, member_id: int, trainable: Tree, value: float | None) -> None:
        """Writes a member's export of the current step. All processes call it together.

        Args:
            value: the member's `metric`, for the export's metadata; None if not evaluated.
        """
        member, step = self[member_id], self.progress.step
        metadata = {"step": step, "metric": member.metric, "value": value}
        member.exports.write(member.exports.path(step), trainable, metadata)

    def merge(self, metrics: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
        """Merges metrics by member id into one row: "NAME" is the mean over the members.

        In a sweep, "NAME/MEMBER" is the member's own value.
        """
        names = dict.fromkeys(name for values in metrics.values() for name in values)
        row = {
            name: statistics.fmean(values[name] for values in metrics.values() if name in values)
            for name in names
        }
        if self.is_sweep:
            for member_id, values in metrics.items():
                row |= {f"{name}/{self[member_id].name}": x for name, x in values.items()}
        return row
