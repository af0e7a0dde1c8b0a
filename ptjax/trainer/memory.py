"""Turns XLA's out-of-memory errors into one line that names a batch that fits."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence

import jax
from absl import logging
from jax.sharding import Mesh

from ptjax.data.pipeline import Shape
from ptjax.errors import InputError, gin_flag
from ptjax.settings import RunSettings
from ptjax.sharding import processes
from ptjax.sharding.arrays import rows_divisor
from ptjax.sharding.devices import GIB, usable_memory
from ptjax.training.compile import program_bytes

_NO_MEMORY = re.compile("RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)
"""A CPU reports "INTERNAL: ... Out of memory" if the step was dispatched asynchronously."""
_SHARE = 0.9
"""Of the memory that a step may take: the next batch, the evaluation and the programs need some."""

Lower = Callable[[RunSettings, Shape], jax.stages.Lowered]
"""Lowers the train step of a run with these settings, for batches of this shape."""


@contextlib.contextmanager
def explain_no_memory(
    settings: RunSettings, shapes: Sequence[Shape], lower: Lower, mesh: Mesh
) -> Iterator[None]:
    """Replaces an out-of-memory error of XLA by an `InputError` that names a batch that fits.

    Args:
        shapes: the shapes of the run's batches.
        lower: lowers the train step. It is compiled again for smaller batches, but not run.

    Raises:
        InputError: XLA had no memory for the train step or for an evaluation.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not _NO_MEMORY.search(str(error)):
            raise
        largest = max(shapes, key=lambda shape: shape.rows * (shape.inputs + shape.targets))
        raise InputError(advise(settings, largest, lower, mesh)) from error


def advise(settings: RunSettings, shape: Shape, lower: Lower, mesh: Mesh) -> str:
    """Returns the message for a run whose step, or evaluation, found no memory.

    Compiles the step with more and more microbatches, until the compiler says that it fits.

    Args:
        shape: of the largest batch.
    """
    batching, problem = settings.batching, f"no memory for a batch of {shape} tokens"
    if processes.several():  # the other processes do not compile with this one
        return f"{problem}; lower BATCH_SIZE, or raise MICROBATCHES"
    logging.warning("%s; compiling smaller ones to see what fits", problem)
    need = _measure(lower, settings, shape)
    if need is not None:
        problem += f" (the step needs {need})"
        if need.fits:
            return (
                f"no memory for an evaluation: the step itself fits ({need}); lower "
                f"Evaluation.batch_size ({settings.evaluation.batch_size})"
            )
    tried = batching.microbatches
    for parts in range(2 * tried, batching.batch_size + 1):
        multiple = parts * rows_divisor(mesh)
        if parts < 2 * tried or batching.batch_size % (parts if batching.pack else multiple):
            continue
        changed = dataclasses.replace(batching, microbatches=parts)
        rows = -(-shape.rows // multiple) * multiple
        tried = parts
        need = _measure(
            lower, dataclasses.replace(settings, batching=changed), shape._replace(rows=rows)
        )
        if need is not None and need.fits:
            smaller = batching.batch_size * batching.microbatches // parts
            return (
                f"{problem}; set Batching.microbatches to {parts}, which computes the same batch "
                f"in parts and needs {need} ({gin_flag('MICROBATCHES', parts)}), or batch_size to "
                f"{smaller} ({gin_flag('BATCH_SIZE', smaller)})"
            )
    return (
        f"{problem}, and no smaller batch fits; shorten the texts "
        f"({gin_flag('TASK_FEATURE_LENGTHS', {'inputs': shape.inputs // 2})}), or use more devices "
        "or remat='full' (load_backbone)"
    )


@dataclasses.dataclass(frozen=True)
class _Need:
    """The bytes of a device's memory that a program needs, and those it may use (None: unknown)."""

    needed: int
    available: int | None

    @property
    def fits(self) -> bool:
        return self.available is None or self.needed <= _SHARE * self.available

    def __str__(self) -> str:
        of = "" if self.available is None else f" of {self.available / GIB:.3g}"
        return f"{self.needed / GIB:.3g}{of} GiB"


def _measure(lower: Lower, settings: RunSettings, shape: Shape) -> _Need | None:
    """What a step needs; None if the compiler itself rejects it, as that of TPUs does."""
    try:
        memory = lower(settings, shape).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if not _NO_MEMORY.search(str(error)):
            raise
        return None
    if memory is None:
        return _Need(0, None)
    return _Need(program_bytes(memory), _available(memory.argument_size_in_bytes))


def _available(arguments: int) -> int | None:
    """The bytes that a program may use on the first device; None if unknown.

    Args:
        arguments: the bytes of its arguments, which are on the device already.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        others = max(stats.get("bytes_in_use", 0) - arguments, 0)
        return stats["bytes_limit"] - others
    if device.platform != "cpu":
        return usable_memory(device)
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    known = hasattr(os, "sysconf") and all(name in os.sysconf_names for name in names)
    return math.prod(map(os.sysconf, names)) if known else None
