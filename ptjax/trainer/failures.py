"""Failed members: a run stops those whose values are no longer finite."""

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

    The other members continue. When every member has failed, the run ends with a `TrainingError`.

    Args:
        check_weights: called first at each failure; raises an `InputError` if a weight of the
            backbone is itself not finite.
    """

    def __init__(self, members: Members, check_weights: Callable[[], None]) -> None:
        self._members, self._check_weights = members, check_weights

    def report(self, member_id: int, what: str, *, updated: bool = True) -> None:
        """Marks a member as failed and logs a warning; it is no longer trained.

        Args:
            what: the value that is not finite, as the message names it.
            updated: whether the variables had been updated before; the message's advice depends
                on it.

        Raises:
            InputError: a weight of the backbone is not finite and so the cause.
            TrainingError: every member has failed now.
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

        The last update may have caused it: the losses so far were computed before that update.
        """
        for member_id, trainable in self._members.running(state):
            for path, array in flatten_paths(trainable).items():
                if not bool(jnp.isfinite(array).all()):
                    self.report(member_id, f"{path} after the update")
                    break
