"""Failures: stops the members of a run whose values become NaN or infinite."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from absl import logging

from ptjax.backbones.damage import advice
from ptjax.errors import TrainingError
from ptjax.trainer.members import Members
from ptjax.training.step import TrainState
from ptjax.trees import flatten_paths


class Failures:
    """Stops each member of a run whose loss, scores or variables become NaN or infinite.

    An ordinary run has one member, a sweep several. The other members continue. When every member
    has failed, the run ends with a `TrainingError`.

    Args:
        members: all members of the run; their progress records which have failed.
        check_weights: called when a member fails, before anything else; raises an `InputError` if
            a weight of the backbone is itself not finite.
    """

    def __init__(self, members: Members, check_weights: Callable[[], None]) -> None:
        self._members, self._check_weights = members, check_weights

    def report(self, member_id: int, what: str, *, updated: bool = True) -> None:
        """Marks a member as failed and logs a warning; the member is no longer trained.

        Args:
            member_id: the index of the member in the run.
            what: a description of the value that is not finite, for the message.
            updated: whether the trainable variables were updated before the value was computed. If
                not, the message rules out the learning rate as the cause.

        Raises:
            InputError: the cause is a weight of the backbone that is not finite.
            TrainingError: this was the last member that had not failed.
        """
        self._check_weights()
        progress, name = self._members.progress, self._members[member_id].name
        member = progress.members[member_id]
        best = member.best_step
        kept = f"the prompt of step {best} is kept" if best else "nothing was exported yet"
        problem = (
            f"{f'{name}: ' if name else ''}{what} of a step near {progress.step} is not finite; "
            f"{kept}. {advice(updated)}"
        )
        member.stopped = member.failed = True
        if all(other.failed for other in progress.members):
            raise TrainingError(problem)
        logging.warning("%s. The other members continue", problem)

    def check_trainable(self, state: TrainState) -> None:
        """Calls `report` for each running member with a variable that is not finite.

        Checking losses is not enough: no loss has been computed since the last update.
        """
        for member_id, trainable in self._members.running(state):
            for path, array in flatten_paths(trainable).items():
                if not bool(jnp.isfinite(array).all()):
                    self.report(member_id, f"{path} after the update")
                    break
