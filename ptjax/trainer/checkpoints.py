"""Checkpoints of a run: trainable variables, optimizer state, step, random key and progress.

Orbax writes them asynchronously, all processes together, and commits each with a marker that is
written last. They contain nothing of the frozen backbone. The position in the data is the step, so
a run can resume with another number of processes. Orbax does not notice every damaged file, so
checksums of the arrays and of the JSON are saved too, and compared when a checkpoint is read.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from ptjax.errors import InputError, gin_flag, one_line
from ptjax.files import JsonObject
from ptjax.model_dir import steps_in
from ptjax.sharding import processes
from ptjax.trainer.checksums import Sums, find_damage, hash_json, sum_arrays
from ptjax.trainer.identity import changed_versions, check_same
from ptjax.trainer.lock import cannot_write
from ptjax.training.step import TrainState

SUMS = "array_checksums"
"""Their key in the JSON of `progress`; checkpoints of older versions have none."""


class _DamagedError(ValueError):
    """A checkpoint differs from what was saved."""


class Checkpoints:
    """Writes and reads the newest `keep` checkpoints of a run, in folders `directory/STEP`.

    `progress` (how far the run has got) and `identity` (which run it is) are plain JSON.

    Args:
        clean: remove half-written checkpoints of a killed run. Only the holder of MODEL_DIR's lock
            may: another run could be writing them. False (a dry run) creates no folder.
    """

    def __init__(self, directory: epath.Path, *, keep: int = 2, clean: bool = True) -> None:
        from orbax.checkpoint import v1 as ocp  # imported late: infer names the trainer in gin

        self.directory = directory
        context = ocp.Context()
        context.checkpointables.registry = ocp.handlers.local_registry()
        for name in ("identity", "progress"):
            context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
        # Orbax accepts absolute paths only, and raises in the middle of a save.
        self._remote = "://" in os.fspath(directory)
        self._orbax: Any = None
        if not clean and not directory.exists():
            return
        policy: Any = ocp.training.preservation_policies.LatestN(n=keep)
        try:
            self._orbax = ocp.training.Checkpointer(
                directory if self._remote else directory.absolute(),
                context=context,
                preservation_policy=policy,
                cleanup_tmp_directories=clean,
            )
        except OSError as error:
            raise cannot_write(directory.parent, error) from error

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        newest = self._orbax and self._orbax.latest
        return newest.step if newest else None

    @property
    def steps(self) -> list[int]:
        """The steps of all checkpoints, newest first, damaged ones included."""
        steps = (
            {checkpoint.step for checkpoint in self._orbax.checkpoints} if self._orbax else set()
        )
        if not self._remote:
            # A local folder is named when it is complete; if Orbax ignores it, it lost a part.
            steps |= {*steps_in(self.directory)}
        return sorted(steps, reverse=True)

    def check_identity(self, identity: JsonObject) -> None:
        """Raises InputError if the checkpoints belong to another run; see `check_same`.

        Only warns if the versions of ptjax or of its libraries differ.
        """
        newest = self._newest_json()
        if newest is None:
            return
        _, saved = newest
        check_same(saved, identity, os.fspath(self.directory.parent))
        if changed := changed_versions(saved, identity):
            logging.warning(
                "resuming under other versions: %s; results agree to rounding, not to the bit",
                changed,
            )

    def check_steps(self, train_steps: int) -> None:
        """Raises InputError if the newest checkpoint is already past step `train_steps`."""
        if self.latest is not None and train_steps < self.latest:
            raise InputError(
                f"TRAIN_STEPS = {train_steps:_}, but {self.directory.parent} holds a checkpoint of "
                f"step {self.latest:_}; set {gin_flag('TRAIN_STEPS', self.latest)} or more, or "
                "choose another MODEL_DIR"
            )

    def restore(
        self, like: Callable[[JsonObject], TrainState]
    ) -> tuple[TrainState, JsonObject] | None:
        """Reads (state, progress) of the newest intact checkpoint; None if no checkpoint exists.

        Removes the damaged checkpoints that are newer, with a warning for each. All processes must
        call it together.

        Args:
            like: maps the saved progress to a state whose shapes and shardings the result has.

        Raises:
            InputError: there are checkpoints, but all are damaged.
        """
        damaged: dict[int, str] = {}
        for step in self.steps:
            problem, loaded = "", None
            try:
                loaded = self._load(step, like)
            except (MemoryError, jax.errors.JaxRuntimeError):
                raise  # the file is not the cause
            except Exception as error:  # Orbax has no exception of its own for damage
                problem = _reason(error)
            if loaded is None:
                _drop_pending_reads()
            if processes.any_of_all(loaded is None):
                damaged[step] = problem or "another process cannot read it"
                continue
            for other, why in damaged.items():
                logging.warning(
                    "%s: the checkpoint of step %d is damaged (%s); going back to step %d",
                    self.directory.parent, other, why, step,
                )  # fmt: skip
                self._remove(other)
            return loaded
        if damaged:
            raise self._all_damaged(damaged)
        return None

    def save(
        self,
        step: int,
        state: TrainState,
        progress: JsonObject,
        identity: JsonObject,
    ) -> None:
        """Starts writing a checkpoint in the background; `wait` blocks until it is committed."""
        # The next step donates the state, and on CPU Orbax may still be reading its buffers.
        state = jax.tree.map(jnp.copy, state)
        sums = sum_arrays(state)
        checked = {SUMS: {"state": sums, "json": hash_json(progress, identity, sums)}}
        self._orbax.save_checkpointables_async(
            step,
            {"state": state, "progress": progress | checked, "identity": identity},
            force=True,
        )

    def wait(self) -> None:
        """Waits until every checkpoint that `save` started is committed."""
        self._orbax.wait()

    def close(self) -> None:
        """Waits for pending writes and frees Orbax's resources."""
        if self._orbax:
            self._orbax.close()

    def newest_progress(self) -> JsonObject | None:
        """The progress in the newest checkpoint with intact JSON; None without checkpoints."""
        newest = self._newest_json()
        return None if newest is None else newest[0]

    def _newest_json(self) -> tuple[JsonObject, JsonObject] | None:
        """(progress, identity) of the newest checkpoint whose JSON is intact."""
        damaged = {}
        for step in self.steps:
            try:
                return self._read_json(step)[:2]
            except Exception as error:  # `restore` reports it in detail
                damaged[step] = _reason(error)
        if damaged:
            raise self._all_damaged(damaged)
        return None

    def _load(
        self, step: int, like: Callable[[JsonObject], TrainState]
    ) -> tuple[TrainState, JsonObject]:
        folder, problem = self.directory / str(step) / "state", ""
        if processes.first():
            problem = find_damage(folder, remote=self._remote)
        # All processes fail here, or none: a read that some of them leave would hang the others.
        if processes.of_first(int(bool(problem))):
            raise _DamagedError(problem or "process 0 cannot read it")
        progress, _, sums = self._read_json(step)
        wanted = like(progress)
        state = self._orbax.load_checkpointables(step, {"state": wanted})["state"]
        # Orbax restores a typed key with a spec of the rank of its raw data.
        state = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), state, wanted)
        if sums is not None and sum_arrays(state) != sums:
            raise _DamagedError("its arrays differ from those that were saved")
        return state, progress

    def _read_json(self, step: int) -> tuple[JsonObject, JsonObject, Sums | None]:
        """Progress, identity, and the arrays' checksums (None in older versions' checkpoints)."""
        loaded = self._orbax.load_checkpointables(step, {"progress": None, "identity": None})
        progress, identity = loaded["progress"], loaded["identity"]
        sums = progress.pop(SUMS, None)
        if sums is None:
            return progress, identity, None
        if sums["json"] != hash_json(progress, identity, sums["state"]):
            raise _DamagedError("its JSON differs from what was saved")
        return progress, identity, sums["state"]

    def _remove(self, step: int) -> None:
        if any(checkpoint.step == step for checkpoint in self._orbax.checkpoints):
            self._orbax.delete(step)
        elif processes.first():
            (self.directory / str(step)).rmtree()

    def _all_damaged(self, damaged: dict[int, str]) -> InputError:
        reasons = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
        return InputError(
            f"{self.directory}: every checkpoint is damaged ({reasons}); restore the folder from a "
            "copy, or remove it to start from step 0"
        )


def _drop_pending_reads() -> None:
    """Frees the reads that Orbax started and left; later, each would print a traceback."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = hook


def _reason(error: BaseException) -> str:
    """The first cause: Orbax itself only reports that none of its handlers fits."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)
