"""What a device offers: the memory that a program may use."""

from __future__ import annotations

from typing import Any

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
    "NVIDIA A100-SXM4-80GB": 59,
    "NVIDIA H100 80GB HBM3": 59,
    "NVIDIA H200": 104,
    "NVIDIA B200": 133,
}
"""`device_kind` -> GiB that a compiled program may use. TPUs: from the compiler's own refusals of
one that needs more (libtpu 0.0.42); a device is a core of v2, v3 and TPU7x, a chip of the others.
GPUs: the three quarters of 79.2, 139.8 and 178.4 GiB that JAX takes by default."""


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
    usable = USABLE_HBM.get(device.device_kind)
    return None if usable is None else int(usable * GIB)
