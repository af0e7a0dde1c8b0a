"""Our own checkpoints: what trains, the optimizer, step, key, selection state.

Orbax writes them asynchronously, with all processes taking part, and commits each with a marker
written last; nothing of the frozen backbone is in them. The position in the data is the step, so a
run may go on with another number of processes. Orbax does not notice every damaged file, so sums
over the arrays' bits and a hash of the JSON beside them are saved as well and compared on reading.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from orbax.checkpoint import v1 as ocp

from ptjax.errors import InputError, gin_flag, one_line
from ptjax.model_dir import steps_in
from ptjax.sharding import processes
from ptjax.trainer.identity import changed_versions, check_same
from ptjax.trainer.lock import cannot_write
from ptjax.training.step import TrainState

SUMS = "checksums"
"""Where the JSON of `progress` holds them; checkpoints of older versions have none."""
READ_TWICE = 1 << 30
"""Bytes of a checkpoint that are checked before Orbax reads it; the rest is checked by then."""


class _DamagedError(ValueError):
    """A checkpoint is not what was saved."""


class Checkpoints:
    """The newest `keep` checkpoints under `directory`, by step.

    `progress` and `identity` are plain JSON: where the run stands, and which run it is.

    Args:
        clean: remove what a killed run left half-written; only of one that holds MODEL_DIR's lock,
            as another run's may be in the making. One that does not (a dry run) makes no folder.
    """

    def __init__(self, directory: epath.Path, *, keep: int = 2, clean: bool = True) -> None:
        self.directory = directory
        context = ocp.Context()
        context.checkpointables.registry = ocp.handlers.local_registry()
        for name in ("identity", "progress"):
            context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
        # Orbax writes to absolute paths only, and says so in the middle of a save.
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
        """Step of the newest complete checkpoint."""
        newest = self._orbax and self._orbax.latest
        return newest.step if newest else None

    @property
    def steps(self) -> list[int]:
        """The steps of all checkpoints, the newest first; also of those that are damaged."""
        steps = (
            {checkpoint.step for checkpoint in self._orbax.checkpoints} if self._orbax else set()
        )
        if not self._remote:
            # A local folder gets its name when it is complete; one unknown to Orbax lost a part.
            steps |= {*steps_in(self.directory)}
        return sorted(steps, reverse=True)

    def check_identity(self, identity: dict[str, Any]) -> None:
        """Refuses to go on with the checkpoints of another run.

        Raises:
            InputError: naming what differs, see `identity.check_same`.
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
        """InputError where the run is past that step already."""
        if self.latest is not None and train_steps < self.latest:
            raise InputError(
                f"TRAIN_STEPS = {train_steps:_}, but {self.directory.parent} holds a checkpoint of "
                f"step {self.latest:_}; set {gin_flag('TRAIN_STEPS', self.latest)} or more, or "
                "choose another MODEL_DIR"
            )

    def restore(
        self, like: Callable[[dict[str, Any]], TrainState]
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """(state, progress) of the newest checkpoint that is whole; None if there is none at all.

        Newer ones that are damaged are removed, with a line for each.

        Args:
            like: progress -> a state with the shapes and shardings to restore to.

        Raises:
            InputError: there are checkpoints, and none is whole.
        """
        damaged: dict[int, str] = {}
        for step in self.steps:
            problem, loaded = "", None
            try:
                loaded = self._load(step, like)
            except (MemoryError, jax.errors.JaxRuntimeError):
                raise  # not the file's fault
            except Exception as error:  # Orbax has no kind of its own for damage
                problem = _reason(error)
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
            raise self._none_whole(damaged)
        return None

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
        sums = _sums_of(state)
        checked = {SUMS: {"state": sums, "json": _hash_of(progress, identity, sums)}}
        self._orbax.save_checkpointables_async(
            step,
            {"state": state, "progress": progress | checked, "identity": identity},
            force=True,
        )

    def wait(self) -> None:
        self._orbax.wait()

    def close(self) -> None:
        if self._orbax:
            self._orbax.close()

    def newest_progress(self) -> dict[str, Any] | None:
        """Where the newest checkpoint whose JSON is whole stands, if there is any."""
        newest = self._newest_json()
        return None if newest is None else newest[0]

    def _newest_json(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """(progress, identity) of the newest checkpoint that has them whole."""
        damaged = {}
        for step in self.steps:
            try:
                return self._read_json(step)[:2]
            except Exception as error:  # as in `restore`, which says more of it
                damaged[step] = _reason(error)
        if damaged:
            raise self._none_whole(damaged)
        return None

    def _load(
        self, step: int, like: Callable[[dict[str, Any]], TrainState]
    ) -> tuple[TrainState, dict[str, Any]]:
        problem = self._unreadable(step) if processes.first() else ""
        if processes.of_first(int(bool(problem))):  # before all enter a read that only some leave
            raise _DamagedError(problem or "process 0 cannot read it")
        progress, _, sums = self._read_json(step)
        wanted = like(progress)
        state = self._orbax.load_checkpointables(step, {"state": wanted})["state"]
        # A typed key comes back with a spec of its raw data's rank.
        state = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), state, wanted)
        if sums is not None and _sums_of(state) != sums:
            raise _DamagedError("its arrays are not those that were saved")
        return state, progress

    def _read_json(self, step: int) -> tuple[dict[str, Any], dict[str, Any], Any]:
        """Progress, identity, and the sums of the arrays (None of an older version's)."""
        loaded = self._orbax.load_checkpointables(step, {"progress": None, "identity": None})
        progress, identity = loaded["progress"], loaded["identity"]
        sums = progress.pop(SUMS, None)
        if sums is None:
            return progress, identity, None
        if sums["json"] != _hash_of(progress, identity, sums["state"]):
            raise _DamagedError("its JSON is not what was saved")
        return progress, identity, sums["state"]

    def _unreadable(self, step: int) -> str:
        """What tensorstore finds wrong with the arrays' files; "" if nothing.

        Orbax would find it too, but its threads then fill the terminal with tracebacks.
        """
        import tensorstore as ts

        folder = self.directory / str(step) / "state"
        try:
            if not json.loads((folder / "_METADATA").read_bytes()).get("use_ocdbt"):
                return ""
            base = os.fspath(folder) if self._remote else folder.absolute().as_uri()
            spec: Any = {"driver": "ocdbt", "base": f"{base}/"}
            store: Any = ts.KvStore.open(spec).result()
            size = 0
            for key in store.list().result():
                size += len(store.read(key).result().value)  # reading compares checksums
                if size > READ_TWICE:
                    break
        except (OSError, ValueError, AttributeError) as error:
            return one_line(error)
        return ""

    def _remove(self, step: int) -> None:
        if any(checkpoint.step == step for checkpoint in self._orbax.checkpoints):
            self._orbax.delete(step)
        elif processes.first():
            (self.directory / str(step)).rmtree()

    def _none_whole(self, damaged: dict[int, str]) -> InputError:
        reasons = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
        return InputError(
            f"{self.directory}: no checkpoint is whole ({reasons}); put the folder back from a "
            "copy, or remove it to start anew"
        )


def _reason(error: BaseException) -> str:
    """What is wrong with a file; Orbax then only says that no handler of its own fits."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)


def _hash_of(progress: dict[str, Any], identity: dict[str, Any], sums: Any) -> str:
    text = json.dumps([progress, identity, sums], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _sums_of(state: TrainState) -> list[list[int]]:
    """Two sums for every array. They change with any one element, and tell its place."""
    sums = jax.device_get(_sum_bits(jax.tree.leaves(state)))
    return np.asarray(sums).tolist()


@jax.jit
def _sum_bits(leaves: list[jax.Array]) -> jax.Array:
    """[number of leaves, 2] uint32, computed where the arrays lie: no host sees a shard."""
    return jnp.stack([_sum_of_one(leaf) for leaf in leaves])


def _sum_of_one(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    unsigned = jnp.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}")
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place = place * np.uint32(size) + along
    # Odd factors: no single difference is multiplied away modulo 2^32.
    factors = (place * np.uint32(2_654_435_761)) | np.uint32(1)
    return jnp.stack([jnp.sum(bits), jnp.sum(bits * factors)])
