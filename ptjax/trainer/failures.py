"""What a run does about values that are not finite."""

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
    """Stops each member whose values are not finite; when the last one fails, the run ends.

    Args:
        check_weights: raises an `InputError` that names a weight of the backbone that is not
            finite.
    """

    def __init__(self, members: Members, check_weights: Callable[[], None]) -> None:
        self._members, self._check_weights = members, check_weights

    def report(self, member_id: int, what: str, *, updated: bool = True) -> None:
        """Stops a member.

        Args:
            what: is not finite.
            updated: whether the variables had been updated before.

        Raises:
            InputError: a weight of the backbone is the cause.
            TrainingError: no other member is left.
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
        """Reports members whose variables are not finite: no loss has seen the last update."""
        for member_id, trainable in self._members.running(state):
            for path, array in flatten_paths(trainable).items():
                if not bool(jnp.isfinite(array).all()):
                    self.report(member_id, f"{path} after the update")
                    break
