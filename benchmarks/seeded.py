"""Weights that JAX and PyTorch make alike, each on its own device, from nothing but their names.

So two sides of a comparison have the same backbone, to the bit, and none is written, moved or read.
The arithmetic is that of int32 and float32 arrays of any library: no generator is needed.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

MULTIPLIER = 0x45D9F3B
"""Of a hash of integers that mixes well when it is applied twice."""
BITS = 24
"""Of a number before it is scaled: float32 holds it exactly."""


def seed_of(name: str) -> int:
    """A seed for the array of that name, below 2**31."""
    return zlib.crc32(name.encode()) >> 1


def noise(index: Any, seed: Any) -> Any:
    """Integers in [-2**23, 2**23) for the entries of an array.

    Args:
        index: int32, the place of every entry when the array is flat.
        seed: int32; arrays broadcast.
    """
    mixed = index + seed
    for _ in range(2):
        mixed = (mixed ^ upper(mixed)) * MULTIPLIER  # wraps around
    return (mixed ^ upper(mixed)) >> (32 - BITS)


def upper(mixed: Any) -> Any:
    """The upper 16 bits, without the sign that shifts bring along."""
    return (mixed >> 16) & 0xFFFF


def step_size(deviation: float) -> float:
    """What `noise` is multiplied by, to be uniform and of that standard deviation."""
    return deviation * 3**0.5 / 2 ** (BITS - 1)


def deviation(name: str, shape: tuple[int, ...], head_dim: int) -> float | None:
    """The standard deviation with which T5 starts a parameter; None is ones.

    Args:
        name: T5X's, of a layer or of stacked ones.
        shape: of one layer's.
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
    """T5X's name of a parameter -> (shape, seed, `step_size` or None for ones), as JSON has it."""
    about = {}
    for name, shape in shapes.items():
        spread = deviation(name, shape, head_dim)
        about[name] = (list(shape), seed_of(name), spread and step_size(spread))
    return about
