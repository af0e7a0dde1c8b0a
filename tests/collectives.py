"""The collectives of a compiled program: what is sent, and between which devices of a mesh."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One array in one collective; an operation on several of them counts once for each.

    Attributes:
        axes: the mesh axes along which the devices of a group differ.
        in_loop: whether it is outside of the entry computation, as what loops run is.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    in_loop: bool


def collectives(compiled: Any, mesh: Mesh) -> list[Collective]:
    """All of a compiled function, from its HLO."""
    found, entry = [], False
    for line in compiled.as_text().splitlines():
        if line.endswith("{") and not line.startswith(" "):
            entry = line.startswith("ENTRY")
        pattern = rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\("
        if match := re.search(pattern, line):
            axes = _axes(_groups(line, mesh.size), mesh)
            for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
                shape = tuple(map(int, filter(None, sizes.split(","))))
                found.append(Collective(match[2], dtype, shape, axes, not entry))
    return found


def _groups(line: str, count: int) -> np.ndarray:
    """Positions in the mesh of the devices that talk to each other, [groups, members]."""
    # [2,4]<=[4,2]T(1,0): the numbers in order, as 4x2, transposed, read as 2 groups of 4.
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        groups, numbers, order = (
            [int(n) for n in part.split(",")] if part else None for part in match.groups()
        )
        assert groups is not None and numbers is not None
        return np.arange(count).reshape(numbers).transpose(order).reshape(groups)
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line):
        return np.array(
            [list(map(int, g.split(","))) for g in re.findall(r"\{([\d,]+)\}", match[1])]
        )
    # mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}: the numbers (here as 2x4,
    # transposed) as 4x2, groups along the second axis.
    ids = r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    if match := re.search(rf"replica_groups=mesh\[(.*?)\]{ids} \{{(.*?)\}}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        numbers = np.arange(count)
        if match[2]:
            tile, order = (
                [int(n) for n in part.split(",")] if part else None for part in match.group(2, 3)
            )
            numbers = numbers.reshape(tile or []).transpose(order)
        along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", match[4])]
        numbers = np.moveaxis(numbers.reshape(*sizes.values()), along, range(-len(along), 0))
        return numbers.reshape(-1, math.prod(numbers.shape[-len(along) :]))
    assert "replica_groups={}" in line, line
    return np.arange(count)[None]


def _axes(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    places = np.array(np.unravel_index(groups, mesh.devices.shape))  # [axes, groups, members]
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(name for name, one in zip(mesh.axis_names, differ, strict=True) if one)
