"""Reads from a compiled program's HLO which collectives it runs."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

# Operations by which devices communicate, under their names in HLO.
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "send")
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}


class Collective(NamedTuple):
    """One array in one collective; an operation on several arrays counts once for each.

    Attributes:
        kind: one of `KINDS`. A "send" transfers to another slice, over the network.
        dtype: HLO's name of the result's dtype, such as "f32".
        shape: the shape of the result on one device.
        axes: the mesh axes over which it communicates: the devices of a group differ along them.
            For a send this is the first axis, which spans the slices.
        times: how often it runs in one run of the program.
        in_loop: whether it is inside a loop.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    times: int
    in_loop: bool

    @property
    def bytes(self) -> int:
        """The bytes of the result on one device, summed over all `times` that it runs."""
        return self.times * array_bytes(self.dtype, self.shape)


def collectives(compiled: jax.stages.Compiled, mesh: Mesh) -> list[Collective]:
    """Lists the collectives in a compiled function.

    Args:
        mesh: the mesh that the function was compiled for.
    """
    lines, entry = computations(compiled.as_text() or "")
    results = []
    pattern = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
    for name, (times, in_loop) in loops(lines, entry).items():
        for line in lines[name]:
            if not (match := pattern.search(line)):
                continue
            result, kind = match.groups()
            if kind == "send":
                axes, result = mesh.axis_names[:1], result.partition("}")[0]
            else:
                axes = _axes(_groups(line, mesh.size), mesh)
            made = arrays(result)
            pair = kind in ("all-gather", "collective-permute") or result.startswith("((")
            if pair and f"{kind}-start(" in line:
                # (operands, results), followed by 32-bit counters.
                made = [array for array in made if array != ("u32", ())]
                made = made[len(made) // 2 :]
            for dtype, shape in made:
                results.append(Collective(kind, dtype, shape, axes, times, in_loop))
    return results


def arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of the arrays in a type such as "(f32[4,8]{1,0}, u32[])"."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", text)
    return [(dtype, tuple(map(int, filter(None, sizes.split(","))))) for dtype, sizes in found]


def array_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """The bytes of an array, whose dtype has HLO's name."""
    bits = _BITS[dtype] if dtype in _BITS else int(re.sub(r"\D*(\d+).*", r"\1", dtype))
    return math.prod(shape) * bits // 8


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """(computation -> its lines, the name of the entry computation)."""
    found: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if line.endswith("{") and (match := re.match(r"(ENTRY )?(%[\w.\-]+) ", line)):
            name = match[2]
            found[name] = []
            entry = name if match[1] else entry
        elif name:
            found[name].append(line)
    return found, entry


def loops(computations: dict[str, list[str]], entry: str) -> dict[str, tuple[int, bool]]:
    """Computation -> (how often it runs, whether in a loop), for all reachable from the entry."""
    reached = {entry: (1, False)}
    for name in reversed(computations):  # a computation precedes its callers
        if name not in reached:
            continue
        times, in_loop = reached[name]
        for line in computations[name]:
            body = re.search(r"body=(%[\w.\-]+)", line)
            for called in re.findall(r"%[\w.\-]+", line.partition("(")[2]):
                if called in computations:
                    turns = _turns(line, computations) if body and body[1] == called else 1
                    before, looped = reached.get(called, (0, False))
                    inside = in_loop or looped or body is not None
                    reached[called] = before + times * turns, inside
    return reached


def _turns(line: str, computations: dict[str, list[str]]) -> int:
    """The number of iterations of a while loop: its counter starts at 0 and has this limit."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition = re.search(r"condition=(%[\w.\-]+)", line)
    assert condition is not None, line
    lines = list(computations[condition[1]])
    for called in [x for text in lines for x in re.findall(r"calls=(%[\w.\-]+)", text)]:
        lines += computations[called]
    limits = [int(n) for text in lines for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", text)]
    return max(limits, default=1)


def _groups(line: str, count: int) -> np.ndarray:
    """The groups of devices that communicate, as positions in the mesh [groups, members]."""
    # [2,4]<=[4,2]T(1,0): 0..7 reshaped to 4x2, transposed, read as 2 groups of 4.
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
    # mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}: 0..7 (here reshaped to 2x4
    # and transposed) reshaped to 4x2, in groups along the second axis.
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
    return tuple(name for name, differs in zip(mesh.axis_names, differ, strict=True) if differs)
