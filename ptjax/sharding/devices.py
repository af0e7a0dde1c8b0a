"""What a device may use: its memory, and compiled programs of earlier processes."""

from __future__ import annotations

import contextlib
import glob
import os
from typing import Any, Protocol

from ptjax.errors import InputError

GIB = 2**30
MOST_CACHED = 2 * GIB
"""Bytes of compiled programs that a new process leaves in the compile cache."""


class DeviceLike(Protocol):
    """A `jax.Device`, or a `planning.slices.Device`, which describes one that need not exist."""

    @property
    def platform(self) -> str: ...
    @property
    def device_kind(self) -> str: ...


USABLE_HBM = {
    "TPU v2": 7.48,
    "TPU v3": 15.48,
    "TPU v4": 30.75,
    "TPU v5 lite": 15.75,
    "TPU v5e": 15.75,
    "TPU v5": 95.74,
    "TPU v5p": 95.74,
    "TPU v6 lite": 31.25,
    "TPU v6e": 31.25,
    "TPU7x": 94.75,
}
"""`device_kind` -> GiB of a TPU that a compiled program may use, from the compiler's error for a
program that needs more (libtpu 0.0.42). A device is a core of v2, v3 and TPU7x, else a chip."""
GPU_MEMORY = {
    "NVIDIA A100-SXM4-80GB": 79.2,
    "NVIDIA H100 80GB HBM3": 79.2,
    "NVIDIA H200": 139.8,
    "NVIDIA B200": 178.4,
}
"""`device_kind` -> GiB of a GPU, of which JAX uses a fraction, three quarters by default."""
FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""JAX's environment variables for the fraction of a GPU's memory, newer one first."""


def known_memory(kind: str) -> int | None:
    """Looks up in tables how many bytes a program may use on a device; None if it is not listed.

    For a GPU this is the fraction of its memory that JAX uses, 3/4 by default.

    Args:
        kind: the `device_kind` of a `jax.Device`, such as "TPU v4".

    Raises:
        InputError: the environment variable for the fraction of a GPU's memory (`FRACTIONS`) is not
            a number between 0 and 1.
    """
    if kind not in GPU_MEMORY:
        usable = USABLE_HBM.get(kind)
        return None if usable is None else int(usable * GIB)
    name = next(filter(os.environ.get, FRACTIONS), "")
    text = os.environ.get(name) or "0.75"
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise InputError(f"{name} must be a number between 0 and 1, got {text!r}")
    return int(fraction * GPU_MEMORY[kind]) * GIB  # whole GiB, as in `usable_memory`


def usable_memory(device: DeviceLike) -> int | None:
    """Determines how many bytes a program may use on `device`; None if unknown.

    The device need not exist. TPUs are looked up in a table, so that all hosts agree. If this
    process has a GPU of the same kind, the result is the limit that JAX reports for it, rounded
    down to whole GiB so that all hosts agree; other GPUs are looked up. For a CPU it is None: it
    shares the memory of its host.
    """
    if device.platform == "cpu":
        return None
    if device.platform != "tpu":
        import jax  # imported late: planning sets JAX's environment variables first

        for local in jax.local_devices():
            if local.device_kind == device.device_kind:
                limit = (local.memory_stats() or {}).get("bytes_limit")
                return None if limit is None else limit // GIB * GIB
    return known_memory(device.device_kind)


def few_rows_options(platform: str) -> dict[str, str] | None:
    """Returns XLA's options for decoding, whose products have few rows.

    On CPUs, jaxlib 0.10 to 0.12 multiplies with YNNPACK, with which greedy decoding takes longer
    (benchmarks/README.md). Later versions, which may not know the option, keep their default.
    """
    import jax

    affected = platform == "cpu" and jax.__version_info__ < (0, 13)
    return {"xla_cpu_experimental_ynn_fusion_type": ""} if affected else None


def use_compile_cache() -> None:
    """Sets the folder of JAX's persistent compile cache, unless the user has set one.

    It is ~/.cache/ptjax/xla, or ptjax/xla in XDG_CACHE_HOME. It then also keeps programs that
    compile in less than a second, JAX's default: a run starts with dozens of them. If it has more
    than `MOST_CACHED` bytes, those that were used least recently are removed.

    JAX_ENABLE_COMPILATION_CACHE=false turns the cache off.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    config: Any = jax.config
    if config.jax_enable_compilation_cache and not config.jax_compilation_cache_dir:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.path.join(cache, "ptjax", "xla")
        _remove_oldest(folder, MOST_CACHED)
        config.update("jax_compilation_cache_dir", folder)
        config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        compilation_cache.reset_cache()  # JAX looks once, when it first compiles anything


def _remove_oldest(folder: str, most: int) -> None:
    """Removes files of a folder, the least recently used first, until at most `most` bytes remain.

    JAX's own limit, jax_compilation_cache_max_size, needs a second file beside each program. Up to
    jax 0.10, no program is kept any more once one lacks it (jax-ml/jax#39880), as after a kill.
    """
    found = []
    for path in glob.iglob(os.path.join(glob.escape(folder), "*")):
        with contextlib.suppress(OSError):  # another process removes files too
            stat = os.stat(path)
            if os.path.isfile(path):
                found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    excess = sum(size for _, size, _ in found) - most
    for _, size, path in sorted(found):
        if excess <= 0:
            return
        with contextlib.suppress(OSError):
            os.unlink(path)
            excess -= size
