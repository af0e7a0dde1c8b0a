"""Resumes a run from its newest intact checkpoint, with the files that belong to it."""

from __future__ import annotations

from absl import logging
from etils import epath

from ptjax import files
from ptjax.errors import InputError
from ptjax.sharding import processes
from ptjax.trainer.checkpoints import Checkpoints
from ptjax.trainer.members import Members
from ptjax.trainer.progress import RunProgress
from ptjax.training.step import TrainState


def remove_leftovers(model_dir: epath.Path, members: Members) -> None:
    """Removes the half-written files that a killed run left in MODEL_DIR and its members' exports.

    Call it only while holding MODEL_DIR's lock.
    """
    if processes.first():
        files.remove_leftovers(model_dir)
        for member in members:
            member.exports.remove_leftovers()


def resume(
    model_dir: epath.Path, members: Members, checkpoints: Checkpoints, state: TrainState
) -> TrainState:
    """Returns the state to start from, and makes MODEL_DIR and `members.progress` agree with it.

    With a checkpoint: restores the newest intact one and the best exports that belong to it, and
    removes later exports. Without one: returns `state` and removes all exports by step. All
    processes call it together, while the first one holds MODEL_DIR's lock.

    Args:
        state: the state of step 0.

    Raises:
        InputError: every checkpoint is damaged, or a best export is and cannot be restored.
    """
    remove_leftovers(model_dir, members)
    restored = checkpoints.restore(
        lambda saved: members.reduce(state, RunProgress.from_json(saved).member_ids)
    )
    if restored is None:
        if processes.first():
            for member in members:
                member.exports.prune(set())
        return state
    state, saved = restored
    members.progress = RunProgress.from_json(saved)
    logging.info("resuming from step %d of %s", members.progress.step, model_dir)
    _restore_exports(model_dir, members, checkpoints, state)
    return state


def _restore_exports(
    model_dir: epath.Path, members: Members, checkpoints: Checkpoints, state: TrainState
) -> None:
    """Drops exports ahead of the checkpoint; makes the best export what the checkpoint says.

    Raises:
        InputError: the best export is missing or damaged, and nothing is left to restore it from.
    """
    progress = members.progress
    places = {member_id: place for place, member_id in enumerate(progress.member_ids)}
    for member_id, member in enumerate(members):
        best, problem = progress.members[member_id].best_step, None
        if processes.first():
            member.exports.prune(set(), newer_than=progress.step)
            if best is not None:
                problem = member.exports.recover(best)
        damaged = processes.of_first(int(problem is not None))
        if damaged and best == progress.step and member_id in places:
            # The export of this very state: the same bytes as before.
            logging.warning("%s; restored from the checkpoint of step %d", problem, progress.step)
            trainable = members.trainable(state, places[member_id])
            members.export(member_id, trainable, progress.members[member_id].best_value)
        elif damaged:
            raise InputError(
                f"{problem or f'MODEL_DIR = {model_dir}: the best export is damaged'}, and the "
                f"checkpoint of step {progress.step} cannot restore it; copy it back, or remove "
                f"{checkpoints.directory} to start from step 0"
            )
        if processes.first() and best is not None:
            member.exports.promote(best)
