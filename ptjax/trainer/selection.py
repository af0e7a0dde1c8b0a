"""Evaluates and exports every member of a run, and keeps its best export."""

from __future__ import annotations

from collections.abc import Mapping

from ptjax.backbones.damage import NotFiniteError
from ptjax.sharding import processes
from ptjax.trainer.failures import Failures
from ptjax.trainer.members import Members
from ptjax.training.step import TrainState
from ptjax.trees import Tree

Scores = Mapping[int, Mapping[str, float]]
"""Metrics on the validation split, by member id."""


class Selection:
    """Selects the best export of each member.

    Args:
        patience: a member stops after this many evaluations without improvement; None: never.
        keep: the number of most recent exports to keep in addition to the best one.
    """

    def __init__(
        self, members: Members, failures: Failures, *, patience: int | None, keep: int
    ) -> None:
        self._members, self._failures = members, failures
        self._patience, self._keep = patience, keep

    def evaluate(self, state: TrainState) -> Scores:
        """Evaluates every running member; leaves out those with nothing to evaluate.

        A member whose scores are not finite is left out too, and stopped (see `Failures.report`).
        """
        scores = {}
        for member_id, trainable in self._members.running(state):
            evaluate = self._members[member_id].evaluate
            if evaluate is not None:
                try:
                    scores[member_id] = evaluate(trainable)
                except NotFiniteError:
                    self._failures.report(member_id, "a score on the validation split")
        return scores

    def export(self, state: TrainState, scores: Scores) -> dict[int, set[int | None]]:
        """Exports every running member, and updates its best export and its progress.

        A member whose patience has run out is stopped. All processes call it together.

        Returns:
            the steps whose exports must stay, by member id (for `prune`).
        """
        progress, keep = self._members.progress, {}
        for member_id, trainable in self._members.running(state):
            exports, member = self._members[member_id].exports, progress.members[member_id]
            recent = exports.steps()[-self._keep :] if processes.first() else ()
            # The two newest checkpoints may still refer to these.
            referenced = {member.best_before, member.best_step}
            self._export(member_id, trainable, scores.get(member_id))
            keep[member_id] = referenced | {member.best_step, progress.step, *recent}
        return keep

    def _export(self, member_id: int, trainable: Tree, metrics: Mapping[str, float] | None) -> None:
        """Exports a member; promotes the export if it is the best so far."""
        member, progress = self._members[member_id], self._members.progress
        own, step = progress.members[member_id], progress.step
        value = metrics[member.metric] if metrics and member.metric else None
        # Without an evaluation the newest export is the best.
        improved = value is None or own.best_value is None or value > own.best_value
        own.best_before = own.best_step
        self._members.export(member_id, trainable, value)
        if improved:
            own.best_step, own.best_value, own.without_gain = step, value, 0
            if processes.first():
                member.exports.promote(step)
        else:
            own.without_gain += 1
            own.stopped = self._patience is not None and own.without_gain >= self._patience

    def prune(self, keep: Mapping[int, set[int | None]]) -> None:
        """Removes the exports of the members in `keep`, except those of its steps.

        Call it only when no checkpoint refers to the others any more.
        """
        if processes.first():
            for member_id, steps in keep.items():
                self._members[member_id].exports.prune(steps)

    def prune_all(self) -> None:
        """Removes exports of a run that has finished, except the best and the most recent ones.

        The former best, to which the second newest checkpoint may refer, is kept too.
        """
        keep = {}
        for member_id, member in enumerate(self._members.progress.members):
            recent = self._members[member_id].exports.steps()[-self._keep :]
            keep[member_id] = {member.best_step, member.best_before, *recent}
        self.prune(keep)
