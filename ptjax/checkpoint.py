"""Our own checkpoints: what trains, the optimizer, step, key, selection state.

Orbax writes them asynchronously, with all processes taking part, and commits each with a marker
written last; nothing of the frozen backbone is in them. The position in the data is the step, so a
run may go on with another number of processes.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath
from orbax.checkpoint import v1 as ocp

from ptjax.errors import InputError
from ptjax.identity import changed_versions, check_same
from ptjax.training.step import TrainState


class Checkpoints:
    """The newest `keep` checkpoints under `directory`, by step.

    `progress` and `identity` are plain JSON: where the run stands, and which run it is.
    """

    def __init__(self, directory: epath.Path, *, keep: int = 2) -> None:
        self.directory = directory
        context = ocp.Context()
        context.checkpointables.registry = ocp.handlers.local_registry()
        for name in ("identity", "progress"):
            context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
        # Orbax writes to absolute paths only, and says so in the middle of a save.
        remote = "://" in os.fspath(directory)
        policy: Any = ocp.training.preservation_policies.LatestN(n=keep)
        try:
            self._orbax = ocp.training.Checkpointer(
                directory if remote else directory.absolute(),
                context=context,
                preservation_policy=policy,
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            raise InputError(
                f"MODEL_DIR = {directory.parent}: it cannot be written to "
                f"({error.strerror or error}); choose another"
            ) from error

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._orbax.latest.step if self._orbax.latest else None

    def check_identity(self, identity: dict[str, Any]) -> None:
        """Refuses to go on with the checkpoints of another run.

        Raises:
            InputError: naming what differs, see `identity.check_same`.
        """
        if self.latest is None:
            return
        saved = self._orbax.load_checkpointables(self.latest, {"identity": None})["identity"]
        check_same(saved, identity, os.fspath(self.directory.parent))
        if changed := changed_versions(saved, identity):
            logging.warning(
                "resuming under other versions: %s; results agree to rounding, not to the bit",
                changed,
            )

    def check_steps(self, train_steps: int) -> None:
        """InputError where the run is past that step already."""
        if self.latest is not None and train_steps < self.latest:
            raise InputError(
                f"TRAIN_STEPS = {train_steps:_}, but {self.directory.parent} holds a checkpoint of "
                f"step {self.latest:_}; set TRAIN_STEPS to that or more, or choose another "
                "MODEL_DIR"
            )

    def restore_progress(self) -> dict[str, Any]:
        """Where the run stands: what `restore` needs to know."""
        return self._orbax.load_checkpointables(self.latest, {"progress": None})["progress"]

    def restore(self, like: TrainState) -> TrainState:
        """The state, with `like`'s shapes and shardings."""
        loaded = self._orbax.load_checkpointables(self.latest, {"state": like})
        # A typed key comes back with a spec of its raw data's rank.
        return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), loaded["state"], like)

    def save(
        self,
        step: int,
        state: TrainState,
        progress: dict[str, Any],
        identity: dict[str, Any],
    ) -> None:
        """Starts writing; `wait` returns when everything started is committed."""
        # The next step donates the state, and on CPU Orbax may still be reading the very buffers.
        state = jax.tree.map(jnp.copy, state)
        self._orbax.save_checkpointables_async(
            step,
            {"state": state, "progress": progress, "identity": identity},
            force=True,
        )

    def wait(self) -> None:
        self._orbax.wait()

    def close(self) -> None:
        self._orbax.close()
