"""Hardware to plan for, by names such as "v5e-8": published rates and the compiler's topologies."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from ptjax.errors import InputError, near
from ptjax.files import JsonObject, Metadata
from ptjax.sharding.devices import GIB, GPU_MEMORY, known_memory

if TYPE_CHECKING:  # JAX is imported after `ENVIRONMENT` is set
    import jax

ENVIRONMENT = {
    # Run on the CPU, and keep libtpu from asking the network which TPU this machine is.
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Let processes load libtpu at the same time, without log files.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    # The CUDA plugin compiles without the libraries that execution needs.
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}
"""Environment variables of a process that compiles for absent devices, set before importing JAX."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """A kind of device. The rates are those that its maker publishes; none was measured.

    Attributes:
        device_kind: JAX's name for the kind.
        topology: libtpu's name for the generation; "" for a GPU.
        flops: dense bfloat16 FLOPs per second and device.
        memory_rate: bytes per second between a device and its memory.
        link_rate: bytes per second that a device sends to its neighbours in the slice; for a GPU,
            to the others in its machine.
        network_rate: a device's share of the bytes per second that a machine sends over the
            network. It is not published for v2 to v4: v4 is assumed to have v5p's rate per chip, v2
            and v3 half of it.
        devices: the number of JAX devices per chip.
        cores: the number of cores per chip that a slice's name counts ("v4-8" has four chips).
        axes: the number of axes of the slice's torus.
        most: the number of chips in the largest slice; for GPUs, the number in a machine.
        int8: int8 operations per second over `flops`; 1 where none is published.
        options: for a TPU, options of `get_topology_desc`; for a GPU, its properties under the
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
    options: Metadata = dataclasses.field(default_factory=dict)
    int8: float = 2.0


def _gpu(
    capability: tuple[int, int],
    *,
    cores: int,
    lanes: int,
    clock: float,
    shared: int,
    cache: int,
) -> JsonObject:
    """A GPU's properties, from NVIDIA's programming guide and data sheets.

    Args:
        capability: CUDA compute capability (major, minor).
        cores: streaming multiprocessors.
        lanes: float32 lanes of a multiprocessor.
        clock: GHz.
        shared: KiB of shared memory of a multiprocessor; a block may use 1 KiB less.
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
    "v2": Generation("TPU v2", "v2", 22.5e12, 350e9, 31e9, 1.56e9, 2, 2, int8=1.0),
    "v3": Generation("TPU v3", "v3", 61.5e12, 450e9, 41e9, 1.56e9, 2, 2, most=1024, int8=1.0),
    "v4": Generation(
        "TPU v4", "v4", 275e12, 1228e9, 90e9, 6.25e9, cores=2, axes=3, most=4096,
        # Without it libtpu describes a chip as two devices, unlike real TPU v4.
        options={"chip_config_name": "megacore"}, int8=1.0,
    ),
    "v5e": Generation("TPU v5 lite", "v5e", 197e12, 819e9, 90e9, 3.12e9),
    "v5p": Generation("TPU v5", "v5p", 459e12, 2765e9, 180e9, 6.25e9, cores=2, axes=3, most=8192),
    "v6e": Generation("TPU v6 lite", "v6e", 918e12, 1640e9, 180e9, 12.5e9),
    "tpu7x": Generation("TPU7x", "tpu7x", 1153e12, 3690e9, 180e9, 6.25e9, 2, 2, 3, 8192, int8=1.0),
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
# Other names of generations, and names of slices for messages.
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x"}
EXAMPLES = ("v5e-8", "v4-16", "v5p-8", "v6e-8", "tpu7x-8", "2xv5e-16", "h100x8", "h100x16")
_MOST_SLICES = 64


class Device(NamedTuple):
    """A substitute for an absent `jax.Device`, with the attributes that meshes need."""

    id: int
    platform: str
    device_kind: str
    slice_index: int


@dataclasses.dataclass(frozen=True)
class Slice:
    """Hardware to plan for: one or several slices of TPUs, or machines with GPUs.

    Attributes:
        name: the name that `parse_slice` reads.
        chips: the shape of one slice's torus in chips; for GPUs `(GPUs per machine,)`.
        slices: the number of slices, or of machines with GPUs, joined by the data-centre network.
    """

    name: str
    generation: Generation
    chips: tuple[int, ...]
    slices: int = 1

    @property
    def is_tpu(self) -> bool:
        """Whether the devices are TPUs; otherwise they are GPUs."""
        return bool(self.generation.topology)

    @property
    def usable_bytes(self) -> int:
        """The bytes of one device's memory that a program may use."""
        return known_memory(self.generation.device_kind) or 0

    def flops(self, dtype: str) -> float:
        """The peak FLOPs per second and device, for matrix products at JAX's default precision.

        For float32, a TPU multiplies in bfloat16, a GPU in TF32 at half the rate of bfloat16.

        Args:
            dtype: of the operands, under JAX's name or HLO's.
        """
        if dtype in ("int8", "s8"):
            return self.generation.flops * self.generation.int8
        halved = dtype in ("float32", "f32") and not self.is_tpu
        return self.generation.flops / (2 if halved else 1)

    @property
    def compiler(self) -> tuple[str, ...]:
        """The Python packages that contain a compiler for the devices; one of them is enough."""
        return ("libtpu",) if self.is_tpu else ("jax_cuda13_plugin", "jax_cuda12_plugin")

    def devices(self) -> list[Device]:
        """Makes a substitute for each device, which no program can run on or be compiled for.

        They suffice to choose and check a mesh. For compiling, see `topology_devices`.
        """
        each = math.prod(self.chips) * self.generation.devices
        platform = "tpu" if self.is_tpu else "gpu"
        kind = self.generation.device_kind
        return [Device(i, platform, kind, i // each) for i in range(each * self.slices)]

    def topology_devices(self) -> list[jax.Device]:
        """Makes `jax.Device`s for which JAX can compile, but which hold no arrays.

        Call it in a process of its own: the compiler may crash, and it sets the environment
        variables `ENVIRONMENT`.

        Raises:
            InputError: the compiler is missing or does not support the slice.
        """
        os.environ |= ENVIRONMENT
        from jax.experimental import topologies

        if self.is_tpu:
            platform, compiler = "tpu", "libtpu"
            name = f"{self.generation.topology}:{'x'.join(map(str, self.chips))}"
            bounds = [*_host_bounds(self.chips, self.generation.axes)]
            options = {"chips_per_host_bounds": bounds, **self.generation.options}
            if self.slices > 1:
                options["num_slices"] = self.slices
        else:
            platform, compiler, name = "cuda", "XLA's CUDA plugin", ""
            options = {
                "topology": f"{self.slices}x1x{self.chips[0]}",  # machines, processes, GPUs
                "target_config": _target_config(self.generation),
            }
        try:
            topology = topologies.get_topology_desc(
                platform=platform, topology_name=name, **options
            )
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{self.name}: {compiler} supports no such topology: {reason}"
            ) from None
        return list(topology.devices)


def parse_slice(name: str) -> Slice:
    """Parses the name of a slice: GENERATION-SIZE, COUNTxGENERATION-SIZE or GPUxCOUNT.

    SIZE counts the chips of one slice or, for v2 to v4, v5p and tpu7x, their cores (two per chip).
    COUNT is the number of slices or of GPUs.

    >>> parse_slice("v4-16").chips, parse_slice("2xv5e-16").chips, parse_slice("h100x8").chips
    ((2, 2, 2), (4, 4), (8,))

    Raises:
        InputError: the generation is unknown, it has no slice of that size, or there are too many
            slices.
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
        raise InputError(f"--slice={name}: unknown size; the nearest are {', '.join(some)}, {last}")
    if not 1 <= count <= _MOST_SLICES:
        raise InputError(f"--slice={name}: the number of slices must be 1 to {_MOST_SLICES}")
    return Slice(name, generation, offered[size], count)


def _parts(name: str) -> tuple[int, str, int]:
    """(number of slices, generation, size) in a name; all machines of GPUs count as one size."""
    if match := re.fullmatch(r"(?:(\d+)x)?([a-z]\w*)-(\d+)", name.lower()):
        count, kind, size = int(match[1] or 1), ALIASES.get(match[2], match[2]), int(match[3])
        if kind in GENERATIONS and GENERATIONS[kind].topology:
            return count, kind, size
    match = re.fullmatch(r"([a-z]+\d+)x([1-9]\d*)", name.lower())
    if match and match[1] in GENERATIONS and not GENERATIONS[match[1]].topology:
        return 1, match[1], int(match[2])
    hint = near(name.lower(), EXAMPLES, listed=False)
    raise InputError(
        f"--slice={name}: unknown slice"
        + (f"{hint} Examples" if hint else "; examples")
        + f": {', '.join(EXAMPLES)}"
    )


def _toruses(generation: Generation) -> Iterator[tuple[int, ...]]:
    """The slices of a generation: each doubles the shortest axis of the one before."""
    chips = (1,) * generation.axes
    if generation.cores == 1:  # other generations are not sold as single chips
        yield chips
    chips = (2, 2, *(1,) * (generation.axes - 2))
    while math.prod(chips) <= generation.most:
        yield chips
        shortest = max(i for i, size in enumerate(chips) if size == min(chips))
        chips = (*chips[:shortest], 2 * chips[shortest], *chips[shortest + 1 :])


def _host_bounds(chips: tuple[int, ...], axes: int) -> tuple[int, ...]:
    """Chips of a host: 2x2; of a v5e or v6e slice of at most eight chips, all of them."""
    if math.prod(chips) <= 8 and axes == 2:
        return (*chips, 1)
    return (2, 2, 1)


def _target_config(generation: Generation) -> str:
    """A GPU's `GpuTargetConfigProto` as text, for XLA's compiler."""

    def fields(values: Metadata) -> Iterator[str]:
        for name, value in values.items():
            nested = isinstance(value, dict)
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


def find_slices(names: Iterable[str]) -> list[Slice]:
    """Returns the slices of these names, of which each may be several with commas.

    Raises:
        InputError: a name is unknown, or none is given.
    """
    parts = [part.strip() for name in names for part in name.split(",") if part.strip()]
    return [parse_slice(part) for part in parts or [""]]


def default_cache() -> str:
    """Returns the folder that caches results: ptjax/plan in XDG_CACHE_HOME, else in ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "ptjax", "plan")
