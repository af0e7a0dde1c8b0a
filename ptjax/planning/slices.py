"""Slices by their Cloud names: what the compiler is asked for, and what the makers publish."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ptjax.errors import InputError, near
from ptjax.sharding.devices import GIB, GPU_MEMORY, known_memory

ENVIRONMENT = {
    # A CPU is all that is there; libtpu need not ask the network which TPU this is.
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Else two processes at once refuse each other, and each leaves log files behind.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    # The CUDA plugin compiles without the libraries that running needs.
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}
"""What a process needs that compiles for devices which are not there, before it imports JAX."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """A kind of device. Its rates are the makers' published ones, none of them measured by us.

    Attributes:
        device_kind: what JAX calls it.
        topology: libtpu's name of the generation; "" is a GPU.
        flops: bfloat16, dense, of a device a second.
        memory_rate: bytes of its memory a second.
        link_rate: bytes a second that a device sends to its neighbours in the slice, a GPU to the
            others of its machine.
        network_rate: its share of what a machine sends over the network. Not published for v2 to
            v4: as v5p's by the chip, or half of that.
        devices: of a chip, as JAX counts them.
        cores: of a chip, as Cloud names count ("v4-8" is four chips).
        axes: of the slice's torus.
        most: chips of the largest slice; GPUs of a machine.
        options: of `get_topology_desc`; of a GPU what the compiler wants to know of it, under the
            names of XLA's `GpuDeviceInfoProto`.
    """

    device_kind: str
    topology: str
    flops: float
    memory_rate: float
    link_rate: float
    network_rate: float
    devices: int = 1
    cores: int = 1
    axes: int = 2
    most: int = 256
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _gpu(
    capability: tuple[int, int],
    *,
    cores: int,
    lanes: int,
    clock: float,
    shared: int,
    cache: int,
) -> dict[str, Any]:
    """A GPU as NVIDIA's programming guide and data sheets have it.

    Args:
        lanes: of float32 in a core (a streaming multiprocessor).
        clock: GHz.
        shared: KiB of a core; a block may have all but one.
        cache: MiB of L2.
    """
    return {
        "cuda_compute_capability": dict(zip(("major", "minor"), capability, strict=True)),
        "core_count": cores,
        "fpus_per_core": lanes,
        "clock_rate_ghz": clock,
        "shared_memory_per_block": 48 * 2**10,
        "shared_memory_per_block_optin": (shared - 1) * 2**10,
        "shared_memory_per_core": shared * 2**10,
        "l2_cache_size": cache * 2**20,
        "threads_per_warp": 32,
        "threads_per_block_limit": 1024,
        "threads_per_core_limit": 2048,
        "registers_per_block_limit": 2**16,
        "registers_per_core_limit": 2**16,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
    }


GENERATIONS = {
    "v2": Generation("TPU v2", "v2", 22.5e12, 350e9, 31e9, 1.56e9, 2, 2),
    "v3": Generation("TPU v3", "v3", 61.5e12, 450e9, 41e9, 1.56e9, 2, 2, most=1024),
    "v4": Generation(
        "TPU v4", "v4", 275e12, 1228e9, 90e9, 6.25e9, cores=2, axes=3, most=4096,
        # Without it a chip is two devices of half the memory, which no TPU v4 shows today.
        options={"chip_config_name": "megacore"},
    ),
    "v5e": Generation("TPU v5 lite", "v5e", 197e12, 819e9, 90e9, 3.12e9),
    "v5p": Generation("TPU v5", "v5p", 459e12, 2765e9, 180e9, 6.25e9, cores=2, axes=3, most=8192),
    "v6e": Generation("TPU v6 lite", "v6e", 918e12, 1640e9, 180e9, 12.5e9),
    "tpu7x": Generation("TPU7x", "tpu7x", 1153e12, 3690e9, 180e9, 6.25e9, 2, 2, 3, 8192),
    "a100": Generation(
        "NVIDIA A100-SXM4-80GB", "", 312e12, 2039e9, 300e9, 25e9, most=8,
        options=_gpu((8, 0), cores=108, lanes=64, clock=1.41, shared=164, cache=40),
    ),
    "h100": Generation(
        "NVIDIA H100 80GB HBM3", "", 989e12, 3350e9, 450e9, 50e9, most=8,
        options=_gpu((9, 0), cores=132, lanes=128, clock=1.98, shared=228, cache=50),
    ),
    "h200": Generation(
        "NVIDIA H200", "", 989e12, 4800e9, 450e9, 50e9, most=8,
        options=_gpu((9, 0), cores=132, lanes=128, clock=1.98, shared=228, cache=50),
    ),
    "b200": Generation(
        "NVIDIA B200", "", 2250e12, 7700e9, 900e9, 50e9, most=8,
        options=_gpu((10, 0), cores=148, lanes=128, clock=1.9, shared=228, cache=126),
    ),
}  # fmt: skip
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x"}
EXAMPLES = ("v5e-8", "v4-16", "v5p-8", "v6e-8", "tpu7x-8", "2xv5e-16", "h100x8", "h100x16")
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
        chips: of a slice, as its torus has them; of GPUs (number in a machine,).
        slices: how many of them, over the data-centre network; JAX counts machines of GPUs so.
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
        return known_memory(self.generation.device_kind) or 0

    def flops(self, dtype: str) -> float:
        """Of a device a second, in products of matrices of that dtype as JAX does them by default.

        A TPU rounds float32 to bfloat16 for them, a GPU to TF32, which takes twice the time.
        """
        halved = dtype == "float32" and not self.is_tpu
        return self.generation.flops / (2 if halved else 1)

    @property
    def compiler(self) -> tuple[str, ...]:
        """The packages that compile for it, one of which has to be there."""
        return ("libtpu",) if self.is_tpu else ("jax_cuda13_plugin", "jax_cuda12_plugin")

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
            InputError: the compiler is missing or knows no such slice.
        """
        os.environ |= ENVIRONMENT
        from jax.experimental import topologies

        if self.is_tpu:
            platform, who = "tpu", "libtpu"
            name = f"{self.generation.topology}:{'x'.join(map(str, self.chips))}"
            bounds = [*_host_bounds(self.chips, self.generation.axes)]
            options = {"chips_per_host_bounds": bounds, **self.generation.options}
            if self.slices > 1:
                options["num_slices"] = self.slices
        else:
            platform, who, name = "cuda", "XLA's CUDA plugin", ""
            options = {
                "topology": f"{self.slices}x1x{self.chips[0]}",  # machines, processes, GPUs of each
                "target_config": _target_config(self.generation),
            }
        try:
            found = topologies.get_topology_desc(platform=platform, topology_name=name, **options)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{self.name}: {who} makes no such topology: {reason}") from None
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
        most = generation.most
        if size > most * _MOST_SLICES or (size > most and size % most):
            raise InputError(
                f"--slice={name}: GPUs are {kind}x1 to {kind}x{most}, or whole machines of {most}, "
                f"at most {_MOST_SLICES}"
            )
        return Slice(name, generation, (min(size, most),), -(-size // most))
    offered = {math.prod(chips) * generation.cores: chips for chips in _toruses(generation)}
    if size not in offered:
        closest = sorted(sorted(offered, key=lambda other: abs(other - size))[:3])
        *some, last = [f"{kind}-{n}" for n in closest]
        raise InputError(
            f"--slice={name}: there is no such size; near it {', '.join(some)}, {last}"
        )
    if not 1 <= count <= _MOST_SLICES:
        raise InputError(f"--slice={name}: 1 to {_MOST_SLICES} slices")
    return Slice(name, generation, offered[size], count)


def _parts(name: str) -> tuple[int, str, int]:
    """(slices, generation, size) in a name; several machines of GPUs are one size."""
    if match := re.fullmatch(r"(?:(\d+)x)?([a-z]\w*)-(\d+)", name.lower()):
        count, kind, size = int(match[1] or 1), ALIASES.get(match[2], match[2]), int(match[3])
        if kind in GENERATIONS and GENERATIONS[kind].topology:
            return count, kind, size
    match = re.fullmatch(r"([a-z]+\d+)x([1-9]\d*)", name.lower())
    if match and match[1] in GENERATIONS and not GENERATIONS[match[1]].topology:
        return 1, match[1], int(match[2])
    hint = near(name.lower(), EXAMPLES, listed=False)
    raise InputError(
        f"--slice={name}: no slice of that name"
        + (f"{hint} Names" if hint else "; names")
        + f" are such as {', '.join(EXAMPLES)}"
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


def _target_config(generation: Generation) -> str:
    """A GPU for XLA's compiler: its `GpuTargetConfigProto` as text."""

    def fields(values: Mapping[str, Any]) -> Iterator[str]:
        for name, value in values.items():
            nested = isinstance(value, Mapping)
            yield f"{name} {{ {' '.join(fields(value))} }}" if nested else f"{name}: {value}"

    return " ".join(
        fields(
            {
                "gpu_device_info": {
                    **generation.options,
                    "device_memory_size": int(GPU_MEMORY[generation.device_kind] * GIB),
                    "memory_bandwidth": int(generation.memory_rate),
                },
                "platform_name": '"CUDA"',
                "dnn_version_info": {"major": 9, "minor": 10, "patch": 0},
                "device_description_str": f'"{generation.device_kind}"',
            }
        )
    )
