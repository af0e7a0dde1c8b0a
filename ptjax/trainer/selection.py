"""Evaluates and exports every member of a run, and keeps each member's best export."""

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
        """Computes the validation scores of every running member, by member id.

        The result leaves out members whose `Member.evaluate` is None. A member whose scores are not
        finite is stopped (see `Failures.report`) and left out too.
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
        """Writes an export of every running member at the current step, and updates its progress.

        An export becomes the member's best one if its score is the highest so far, or if the member
        was not evaluated. A member whose patience has run out is stopped. All processes must call
        this together.

        Args:
            scores: the result of `evaluate`.

        Returns:
            the steps whose exports must be kept, by member id. Pass it to `prune`. A None in a set
            means that the member had no best export at that time; ignore it.
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
        """Removes old exports. Call it only when no checkpoint refers to them any more.

        Args:
            keep: maps a member id to the steps whose exports are kept. All other exports of this
                member are removed, except the copy of its best one. Members that are not in `keep`
                lose nothing.
        """
        if processes.first():
            for member_id, steps in keep.items():
                self._members[member_id].exports.prune(steps)

    def prune_all(self) -> None:
        """Removes exports of a finished run, except the best and the most recent of each member.

        The previous best is also kept: the second newest checkpoint may refer to it.
        """
        keep = {}
        for member_id, member in enumerate(self._members.progress.members):
            recent = self._members[member_id].exports.steps()[-self._keep :]
            keep[member_id] = {member.best_step, member.best_before, *recent}
        self.prune(keep)
