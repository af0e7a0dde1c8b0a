"""Estimates the seconds that a step takes, from shapes alone: without compiler or weights."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from ptjax.files import JsonObject
from ptjax.planning.flops import count_flops, flops_by_dtype
from ptjax.planning.kernels import Kernel
from ptjax.planning.slices import Slice
from ptjax.planning.workload import (
    AbstractStep,
    ParallelConfig,
    StepSpec,
    abstract_mesh,
    abstract_step,
    mesh_of_sizes,
)
from ptjax.sharding.arrays import rows_axes, rows_divisor
from ptjax.training import freeze as freezing
from ptjax.trees import Tree

Report = JsonObject
"""Facts about a step on a slice, as JSON values: the result of `count`; `compiler` adds its own."""

TIGHT = 0.92
"""Share of the usable memory above which a program that compiles may still fail: the next batch,
evaluation and the programs themselves need memory too."""


def count(spec: StepSpec, parallel: ParallelConfig, slice_: Slice) -> Report:
    """Counts parameters, FLOPs, bytes per device and seconds, from the jaxpr and the shardings.

    Args:
        parallel: the result of `resolve`; its mesh must not be 'auto'.

    Returns:
        a report with the keys "slice", "devices", "settings" (of `parallel`), "dtype",
        "parameters" (trainable and frozen), "trainable", "flops" (of all devices: "forward",
        "useful", which leaves out recomputation, and "executed"), "bytes_per_device" ("frozen",
        "state" and "batch"), "usable_bytes" (per device), "examples" (per step) and "estimate"
        (the result of `step_seconds`).
    """
    mesh = abstract_mesh(parallel, slice_)
    abstract = abstract_step(spec, parallel, mesh)
    (trainable, _), (frozen, _) = map(freezing.sizes, (abstract.state.trainable, abstract.frozen))
    device_bytes = {
        "frozen": bytes_on_device(abstract.frozen),
        "state": bytes_on_device(abstract.state),
        "batch": bytes_on_device(abstract.inputs()),
    }
    # Tracing takes a second: what does not change the products is left out.
    plain = dataclasses.replace(parallel, mesh="", fsdp=False, scan_layers=True)
    groups = abstract.groups
    if spec.method.attends_to_input:  # else every group and microbatch computes the prompt's states
        groups, plain = 1, dataclasses.replace(plain, microbatches=None)
    if parallel.attention == "gpu":  # traced where cuDNN is; what it computes again is not counted
        plain = dataclasses.replace(plain, attention="plain")
    if parallel.quantize == "int8":  # cast before the products
        plain = dataclasses.replace(plain, quantize=None)
    forward, useful = _useful_flops(spec, groups)
    executed = _executed_flops(spec, plain, groups)
    # Each microbatch reads the weights in the forward pass, in the backward pass, and once more
    # where the forward pass is recomputed. With FSDP they are gathered first.
    passes = 3 if parallel.remat in ("attention", "full") else 2
    passes *= parallel.step_config(spec).microbatches
    gathered = dataclasses.replace(parallel, fsdp=False)
    weights, trained = _network_bytes(
        abstract_step(spec, gathered, mesh) if parallel.fsdp else abstract
    )
    dtype = parallel.applied(spec.config).dtype
    peak = mesh.size * slice_.flops(dtype)
    traffic = _expected_traffic(spec, parallel, mesh, weights, trained)
    seconds = {
        "compute": sum(n / slice_.flops(dtype) for dtype, n in executed.items()) / mesh.size,
        "memory": passes * weights / slice_.generation.memory_rate,
        "links": link_seconds(traffic, mesh, slice_),
    }
    return {
        "slice": slice_.name,
        "devices": mesh.size,
        "settings": parallel.settings(),
        "dtype": dtype,
        "parameters": trainable + frozen,
        "trainable": trainable,
        "flops": {"forward": forward, "useful": useful, "executed": sum(executed.values())},
        "bytes_per_device": device_bytes,
        "usable_bytes": slice_.usable_bytes,
        "examples": spec.batch_size * (spec.members or 1),
        "estimate": step_seconds(seconds, useful / peak),
    }


def _network_bytes(step: AbstractStep) -> tuple[int, int]:
    """Bytes on a device: (of the network, of the trainable variables)."""
    trained = step.state.trainable
    network = sum(bytes_on_device(tree.get("params", {})) for tree in (step.frozen, trained))
    return network, bytes_on_device(trained)


def bytes_on_device(tree: Tree) -> int:
    """Computes how many bytes of memory the arrays of `tree` occupy on one device.

    The leaves are arrays or `jax.ShapeDtypeStruct`s; each must have a sharding.
    """
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


@functools.lru_cache(maxsize=64)
def _useful_flops(spec: StepSpec, groups: int) -> tuple[int, int]:
    """FLOPs on all devices of a forward pass, and of a step without recomputation.

    Args:
        groups: as in `AbstractStep`.
    """
    once = abstract_step(spec, ParallelConfig("", remat="none"), mesh_of_sizes((groups, 1)))
    arguments = once.state, once.frozen, *once.inputs()
    return count_flops(once.forward, *arguments), count_flops(once.step, *arguments)


@functools.lru_cache(maxsize=64)
def _executed_flops(spec: StepSpec, parallel: ParallelConfig, groups: int) -> dict[str, int]:
    """FLOPs of a step on all devices, by dtype.

    Args:
        parallel: without a mesh; shardings do not change the count, and scanned layers trace fast.
        groups: as in `AbstractStep`.
    """
    real = abstract_step(spec, parallel, mesh_of_sizes((groups, 1)))
    return flops_by_dtype(real.step, real.state, real.frozen, *real.inputs())


def _expected_traffic(
    spec: StepSpec, parallel: ParallelConfig, mesh: Mesh, weights: int, trained: int
) -> dict[tuple[str, str], int]:
    """(kind, axis) -> bytes of the results that a device receives per step, before compiling.

    A layer sums its activations [rows, positions, D] over `model` once per sublayer in the forward
    pass and once per sublayer in the backward pass; remat "full" repeats the forward ones.

    Args:
        weights, trained: bytes of the network and of the trainable variables on a device, after
            FSDP's gathers.
    """
    config, shape, sizes = parallel.applied(spec.config), spec.shape(), mesh.shape
    traffic: dict[tuple[str, str], int] = {}
    width = np.dtype(config.dtype).itemsize * config.emb_dim
    rows = shape.rows * (spec.members or 1) / rows_divisor(mesh)
    again = parallel.remat == "full"
    if sizes["model"] > 1:
        encoder = config.num_encoder_layers * (4 + again) * spec.positions()
        decoder = config.num_decoder_layers * ((6 + 2 * again) * shape.targets + spec.positions())
        traffic["all-reduce", "model"] = int(rows * width * (encoder + decoder))
    if parallel.fsdp:
        traffic["all-gather", "data"] = 2 * parallel.step_config(spec).microbatches * weights
    for axis in rows_axes(mesh):
        if sizes[axis] > 1:
            traffic["all-reduce", axis] = traffic.get(("all-reduce", axis), 0) + trained
    return traffic


def link_seconds(traffic: Mapping[tuple[str, ...], int], mesh: Mesh, slice_: Slice) -> float:
    """Estimates how many seconds of a step its collectives take, one after another.

    It assumes rings: among n devices, a device sends 2 (n - 1) / n times the bytes of the result in
    an all-reduce, (n - 1) / n times in an all-gather. A collective between slices uses the network,
    at the sum of the network rates of those of its devices that are in one slice.

    Args:
        traffic: maps (kind of collective, *mesh axes over which it communicates) to the bytes of
            all its results in a step, on one device; the kinds are `hlo.KINDS`.
    """
    seconds, generation = 0.0, slice_.generation
    for (kind, *axes), size in traffic.items():
        members = math.prod(mesh.shape[axis] for axis in axes)
        between = slice_.slices > 1 and mesh.axis_names[0] in axes
        share = {"all-reduce": 2.0, "reduce-scatter": float(members)}.get(kind, 1.0)
        share = 1.0 if kind in ("send", "collective-permute") else share * (members - 1) / members
        rate = generation.link_rate
        if between or kind == "send":
            together = 1 if kind == "send" else max(members // slice_.slices, 1)
            rate = min(rate, together * generation.network_rate)
        seconds += share * size / rate
    return seconds


def kernel_seconds(kernels: Iterable[Kernel], slice_: Slice) -> float:
    """Estimates how long a program's kernels take, one after another.

    Each takes as long as its products at the devices' peak rate, or as its bytes at their memory's
    rate, whichever is longer.
    """
    return sum(
        kernel.times
        * max(
            sum(flops / slice_.flops(dtype) for dtype, flops in kernel.flops.items()),
            kernel.bytes / slice_.generation.memory_rate,
        )
        for kernel in kernels
    )


def step_seconds(seconds: Mapping[str, float], ideal: float) -> Report:
    """Bounds the seconds of a step from below and above.

    The lower bound assumes that computation, memory access and communication overlap completely.
    The upper bound assumes that kernels run one after another, and communication after them.

    Args:
        seconds: the time of each part alone: "compute", "memory" (of the weights alone) and
            "links". Of a compiled program also "memory_most" (of all that its kernels access) and
            "kernels", the result of `kernel_seconds`; without that, "high" is None.
        ideal: the seconds that the useful FLOPs would take at the devices' peak.

    Returns:
        `seconds` with "ideal", "low", "high", and "utilisation":
        [ideal / high, ideal / low].
    """
    low = max(seconds["compute"], seconds["memory"], seconds["links"])
    high = seconds["kernels"] + seconds["links"] if "kernels" in seconds else None
    utilisation = [ideal / x if x else None for x in (high, low)]
    return {**seconds, "ideal": ideal, "low": low, "high": high, "utilisation": utilisation}
