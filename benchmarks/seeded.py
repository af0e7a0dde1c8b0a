"""Random weights that JAX and PyTorch compute bit-identically from the parameters' names.

So both sides of a comparison make the same backbone on their own device, and no file is written or
read. Only int32 and float32 arithmetic is needed, no random generator of a library.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

MULTIPLIER = 0x45D9F3B
"""Multiplier of an integer hash; applied twice it mixes well."""
BITS = 24
"""Bits of a value before scaling; float32 holds it exactly."""


def seed_of(name: str) -> int:
    """The seed of an array, from its name; below 2**31."""
    return zlib.crc32(name.encode()) >> 1


def noise(index: Any, seed: Any) -> Any:
    """Integers in [-2**23, 2**23) for the entries of an array.

    Args:
        index: int32, each entry's position in the flattened array.
        seed: int32, broadcast against `index`.
    """
    mixed = index + seed
    for _ in range(2):
        mixed = (mixed ^ upper(mixed)) * MULTIPLIER  # wraps around
    return (mixed ^ upper(mixed)) >> (32 - BITS)


def upper(mixed: Any) -> Any:
    """The upper 16 bits, without the sign bits that the shift extends."""
    return (mixed >> 16) & 0xFFFF


def step_size(deviation: float) -> float:
    """The factor that gives `noise`, which is uniform, that standard deviation."""
    return deviation * 3**0.5 / 2 ** (BITS - 1)


def deviation(name: str, shape: tuple[int, ...], head_dim: int) -> float | None:
    """The standard deviation of T5's initial values; None for ones.

    Args:
        name: T5X's name of the parameter, in one layer or in stacked layers.
        shape: its shape in one layer.
    """
    leaf, *parents = reversed(name.split("/"))
    if leaf == "scale":
        return None
    if leaf == "embedding":
        return 1.0
    if leaf == "rel_embedding":
        return (2 / sum(shape)) ** 0.5
    return shape[0] ** -0.5 / (head_dim**0.5 if parents[0] == "query" else 1.0)


def describe(
    shapes: Mapping[str, tuple[int, ...]], head_dim: int
) -> dict[str, tuple[list[int], int, float | None]]:
    """T5X's name of a parameter -> (shape, seed, `step_size` or None for ones), for JSON."""
    about = {}
    for name, shape in shapes.items():
        spread = deviation(name, shape, head_dim)
        about[name] = (list(shape), seed_of(name), spread and step_size(spread))
    return about
