"""One program on several processes: which of them writes files, and how they wait and agree.

All processes run the same steps on the same global arrays, so they reach the same decisions. Only
external events (a signal, the state of a disk) need an agreement. A single process skips all of it.
"""

from __future__ import annotations

import secrets
import time

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.typing import ArrayLike

from ptjax.errors import InputError

SHARED_WAIT_SECONDS = 10.0
"""How long a network file system may take to show a new file."""


def several() -> bool:
    """Whether the program runs on more than one process."""
    return jax.process_count() > 1


def first() -> bool:
    """Whether this process is the one that writes files and talks to the user."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Waits until every process has called this function with the same label `what`.

    Needed before others read what the first process wrote, and before it removes what they read.
    """
    if several():
        multihost_utils.sync_global_devices(what)


def stop_agreed(step: int) -> bool:
    """Whether all processes stop after `step`, because one of them received SIGTERM.

    JAX's preemption service catches the signal and chooses a step that no process has passed yet.
    Every process must call this after every step.
    """
    return several() and multihost_utils.reached_preemption_sync_point(step)


def of_first(number: int) -> int:
    """Returns the first process's `number` (int32) on all; all processes must call it together."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number))) if several() else number


def any_of_all(here: bool) -> bool:
    """Whether `here` is true on any process; all processes must call it together."""
    return bool(multihost_utils.process_allgather(np.array(here)).any()) if several() else here


def sum_of_all(numbers: np.ndarray) -> np.ndarray:
    """Sums an array of integers over all processes; all processes must call it together."""
    if not several():
        return numbers
    return multihost_utils.process_allgather(numbers).sum(axis=0, dtype=numbers.dtype)


def on_host(array: ArrayLike) -> np.ndarray:
    """Copies a whole array to this process's memory; all processes must call it together."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def check_shared(directory: epath.Path) -> None:
    """Raises InputError, on all processes, unless all of them see the same `directory`.

    All processes must call it together. With several processes it creates the directory and, for a
    moment, a file in it, so a dry run must not call it.
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
