"""Slices by their Cloud names: what the compiler is asked for, and what the makers publish."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ptjax.errors import InputError
from ptjax.scale.devices import USABLE_HBM

ENVIRONMENT = {
    # A CPU is all that is there; libtpu need not ask the network which TPU this is.
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Else two processes at once refuse each other, and each leaves log files behind.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}
"""What a process that compiles for a TPU needs, before it imports JAX, where there is none."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """A kind of device. Its rates are the makers' published ones, none of them measured by us.

    Attributes:
        device_kind: what JAX calls it.
        topology: libtpu's name of the generation; "" is a GPU.
        flops: bfloat16, dense, of a device a second.
        memory_rate: bytes of its memory a second.
        link_rate: bytes a second that a device sends to its neighbours in the slice.
        devices: of a chip, as JAX counts them.
        cores: of a chip, as Cloud names count ("v4-8" is four chips).
        axes: of the slice's torus.
        most: chips of the largest slice.
        options: of `get_topology_desc`.
    """

    device_kind: str
    topology: str
    flops: float
    memory_rate: float
    link_rate: float
    devices: int = 1
    cores: int = 1
    axes: int = 2
    most: int = 256
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


GENERATIONS = {
    "v2": Generation("TPU v2", "v2", 22.5e12, 350e9, 31e9, 2, 2),
    "v3": Generation("TPU v3", "v3", 61.5e12, 450e9, 41e9, 2, 2, most=1024),
    "v4": Generation(
        "TPU v4", "v4", 275e12, 1228e9, 90e9, cores=2, axes=3, most=4096,
        # Without it a chip is two devices of half the memory, which no TPU v4 shows today.
        options={"chip_config_name": "megacore"},
    ),
    "v5e": Generation("TPU v5 lite", "v5e", 197e12, 819e9, 90e9),
    "v5p": Generation("TPU v5", "v5p", 459e12, 2765e9, 180e9, cores=2, axes=3, most=8192),
    "v6e": Generation("TPU v6 lite", "v6e", 918e12, 1640e9, 180e9),
    "tpu7x": Generation("TPU7x", "tpu7x", 1153e12, 3690e9, 180e9, 2, 2, 3, 8192),
    "a100": Generation("NVIDIA A100-SXM4-80GB", "", 312e12, 2039e9, 300e9),
    "h100": Generation("NVIDIA H100 80GB HBM3", "", 989e12, 3350e9, 450e9),
    "h200": Generation("NVIDIA H200", "", 989e12, 4800e9, 450e9),
}  # fmt: skip
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x"}
NETWORK_RATE = 12.5e9
"""Bytes a second that a device sends to another slice: 100 Gbit/s, of the order of what is sold."""
EXAMPLES = ("v5e-8", "v4-16", "v5p-8", "v6e-8", "tpu7x-8", "2xv5e-16", "h100x8")
_MOST_SLICES = 64


class Device(NamedTuple):
    """One that is only counted with, under the names of `jax.Device`."""

    id: int
    platform: str
    device_kind: str
    slice_index: int


@dataclasses.dataclass(frozen=True)
class Slice:
    """Machines to plan for.

    Attributes:
        chips: of a slice, as its torus has them; of GPUs (number,).
        slices: how many of them, over the data-centre network.
    """

    name: str
    generation: Generation
    chips: tuple[int, ...]
    slices: int = 1

    @property
    def is_tpu(self) -> bool:
        return bool(self.generation.topology)

    @property
    def usable_bytes(self) -> int:
        """Of a device's memory."""
        return int(USABLE_HBM[self.generation.device_kind] * 2**30)

    def devices(self) -> list[Device]:
        """All of them, to be counted with."""
        each = math.prod(self.chips) * self.generation.devices
        platform = "tpu" if self.is_tpu else "gpu"
        kind = self.generation.device_kind
        return [Device(i, platform, kind, i // each) for i in range(each * self.slices)]

    def topology_devices(self) -> list[Any]:
        """`jax.Device`s that can be compiled for and hold nothing.

        In a process of its own with `ENVIRONMENT`: the compiler may crash.

        Raises:
            InputError: GPUs, or libtpu is missing or knows no such slice.
        """
        if not self.is_tpu:
            raise InputError(f"{self.name}: GPUs are not compiled for ahead of time; use --quick")
        os.environ |= ENVIRONMENT
        from jax.experimental import topologies

        bounds = [*_host_bounds(self.chips, self.generation.axes)]
        options = {"chips_per_host_bounds": bounds, **self.generation.options}
        if self.slices > 1:
            options["num_slices"] = self.slices
        name = f"{self.generation.topology}:{'x'.join(map(str, self.chips))}"
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{self.name}: libtpu makes no topology of {name}: {reason}") from None
        return list(found.devices)


def parse_slice(name: str) -> Slice:
    """What a name stands for.

    >>> parse_slice("v4-16").chips, parse_slice("2xv5e-16").chips, parse_slice("h100x8").chips
    ((2, 2, 2), (4, 4), (8,))

    Raises:
        InputError: no such generation, or no slice of that size.
    """
    count, kind, size = _parts(name)
    generation = GENERATIONS[kind]
    if not generation.topology:
        if count > 1 or size > 256:
            raise InputError(f"--slice={name}: GPUs are {kind}x1 to {kind}x256")
        return Slice(name, generation, (size,))
    offered = {math.prod(chips) * generation.cores: chips for chips in _toruses(generation)}
    if size not in offered:
        near = sorted(sorted(offered, key=lambda other: abs(other - size))[:3])
        *some, last = [f"{kind}-{n}" for n in near]
        raise InputError(
            f"--slice={name}: there is no such size; near it {', '.join(some)}, {last}"
        )
    if not 1 <= count <= _MOST_SLICES:
        raise InputError(f"--slice={name}: 1 to {_MOST_SLICES} slices")
    return Slice(name, generation, offered[size], count)


def _parts(name: str) -> tuple[int, str, int]:
    """(slices, generation, size) in a name."""
    if match := re.fullmatch(r"(?:(\d+)x)?([a-z]\w*)-(\d+)", name):
        count, kind, size = int(match[1] or 1), ALIASES.get(match[2], match[2]), int(match[3])
        if kind in GENERATIONS and GENERATIONS[kind].topology:
            return count, kind, size
    match = re.fullmatch(r"([a-z]+\d+)x([1-9]\d*)", name)
    if match and match[1] in GENERATIONS and not GENERATIONS[match[1]].topology:
        return 1, match[1], int(match[2])
    near = difflib.get_close_matches(name, EXAMPLES, 1, 0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(
        f"--slice={name}: no slice of that name; {hint}Names are such as {', '.join(EXAMPLES)}"
    )


def _toruses(generation: Generation) -> Iterator[tuple[int, ...]]:
    """The slices of a generation: the shortest axis doubles, the last one first."""
    chips = (1,) * generation.axes
    if generation.cores == 1:  # the others are not sold by the chip
        yield chips
    chips = (2, 2, *(1,) * (generation.axes - 2))
    while math.prod(chips) <= generation.most:
        yield chips
        shortest = max(i for i, size in enumerate(chips) if size == min(chips))
        chips = (*chips[:shortest], 2 * chips[shortest], *chips[shortest + 1 :])


def _host_bounds(chips: tuple[int, ...], axes: int) -> tuple[int, ...]:
    """Chips of a host: four in a square, but of a v5e or v6e that has no more, all eight."""
    if math.prod(chips) <= 8 and axes == 2:
        return (*chips, 1)
    return (2, 2, 1)
