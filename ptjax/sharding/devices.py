"""What a device offers: the memory that a program may use."""

from __future__ import annotations

import os
from typing import Any

from ptjax.errors import InputError

GIB = 2**30

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
"""`device_kind` -> GiB of a TPU that a compiled program may use, from the compiler's own refusals
of one that needs more (libtpu 0.0.42). A device is a core of v2, v3 and TPU7x, else a chip."""
GPU_MEMORY = {
    "NVIDIA A100-SXM4-80GB": 79.2,
    "NVIDIA H100 80GB HBM3": 79.2,
    "NVIDIA H200": 139.8,
    "NVIDIA B200": 178.4,
}
"""`device_kind` -> GiB of a GPU; of it JAX takes a fraction, three quarters by default."""
FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""The environment variables, the newer one first, that name another."""


def known_memory(kind: str) -> int | None:
    """Bytes that a program may use of such a device, from the tables; None is unknown.

    Raises:
        InputError: the fraction of a GPU is no number between 0 and 1.
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
        raise InputError(f"{name} = {text!r}: a number between 0 and 1")
    return int(fraction * GPU_MEMORY[kind]) * GIB  # whole, as `usable_memory` has it


def usable_memory(device: Any) -> int | None:
    """Bytes of `device` (also one of a topology that is only compiled for); None is unknown.

    TPUs come from the table, so that every host finds the same. Other devices tell their limit, if
    this process holds one of that kind, rounded down to whole GiB for the same reason; else theirs
    comes from the table too. A CPU's memory is its host's: None.
    """
    if device.platform == "cpu":
        return None
    if device.platform != "tpu":
        import jax  # here, for the tables are needed before JAX may be told where it runs

        for local in jax.local_devices():
            if local.device_kind == device.device_kind:
                limit = (local.memory_stats() or {}).get("bytes_limit")
                return None if limit is None else limit // GIB * GIB
    return known_memory(device.device_kind)
