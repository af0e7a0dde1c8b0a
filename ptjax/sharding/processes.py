"""One program on several processes: which of them writes, when they wait, what they agree on.

Every process runs the same steps on the same global arrays, sees the same numbers and so decides
alike; only what comes from outside (a signal, a disk) has to be agreed on. One process alone pays
nothing for any of this.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ptjax.errors import InputError

SHARED_WAIT_SECONDS = 10.0
"""A network file system may show a new file late."""


def several() -> bool:
    return jax.process_count() > 1


def first() -> bool:
    """Whether this process is the one that writes files and talks to the user."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns when every process has come here; `what` has to be the same word on all of them.

    Before one reads what the first wrote, or the first removes what others may still read.
    """
    if several():
        multihost_utils.sync_global_devices(what)


def stop_agreed(step: int) -> bool:
    """Whether all processes end after `step`, because one of them was sent SIGTERM.

    JAX's preemption service catches the signal, tells the others and settles on a step that none
    of them has passed. It has to be asked after every step, on every process.
    """
    return several() and multihost_utils.reached_preemption_sync_point(step)


def of_first(number: int) -> int:
    """The `number` of the first process, on all of them."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number))) if several() else number


def any_of_all(here: bool) -> bool:
    """Whether it is so on any process; all of them have to ask together."""
    return bool(multihost_utils.process_allgather(np.array(here)).any()) if several() else here


def on_host(array: Any) -> np.ndarray:
    """The whole array in this process's memory; all processes have to ask for it together."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def check_shared(directory: epath.Path) -> None:
    """InputError, on all processes, unless all of them see the same `directory`.

    It creates the directory, and briefly a file in it, so a dry run must not call it.
    """
    if not several():
        return
    number = multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32)))
    token = directory / f".shared-{int(number):08x}"
    if first():
        directory.mkdir(parents=True, exist_ok=True)
        token.write_text("")
    wait_for_all("shared directory: written")
    until = time.monotonic() + SHARED_WAIT_SECONDS
    while not (seen := token.exists()) and time.monotonic() < until:
        time.sleep(0.2)
    blind = np.flatnonzero(~multihost_utils.process_allgather(np.array(seen)))
    if first():
        token.unlink(missing_ok=True)
    if blind.size:
        raise InputError(
            f"MODEL_DIR = {directory}: process {blind[0]} does not see what process 0 writes "
            "there; choose a folder that all processes share (gs://, NFS)"
        )
