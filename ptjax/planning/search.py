"""Finds the fastest parallel configuration for a slice: estimates all, compiles only a few."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import get_args

import numpy as np
from jax.sharding import Mesh

from ptjax.errors import InputError
from ptjax.files import JsonObject, Metadata
from ptjax.models.config import Remat
from ptjax.planning.estimate import TIGHT, Report, count
from ptjax.planning.slices import Slice
from ptjax.planning.workload import ParallelConfig, StepSpec, abstract_mesh, resolve
from ptjax.sharding import meshes
from ptjax.sharding.arrays import rows_divisor
from ptjax.sharding.attention import Attention, Kind
from ptjax.training import freeze as freezing

WORTH = 0.95
"""Lower-precision weights (bfloat16 for a float32 run, or int8) and more microbatches must be at
least 5% faster to be chosen."""
_AFTER_ONE = 4
"""The most configurations of a precision and a number of microbatches that are compiled once one
fits."""
_PARTS = (1, 2, 4)
"""The multiples of the run's microbatches that are tried."""


def expected_seconds(report: Report) -> float:
    """Returns the estimated seconds of a step, by which `search` compares configurations.

    It assumes that computation and memory access overlap, and communication with neither.

    Args:
        report: the result of `count` or `compile_ahead` for one configuration.
    """
    seconds = report["estimate"]
    return max(seconds["compute"], seconds["memory"]) + seconds["links"]


def search(
    spec: StepSpec,
    slice_: Slice,
    quantize: str | None,
    compile_one: Callable[[ParallelConfig], Report],
    attention: Attention | Kind = "auto",
) -> tuple[list[Report], Report | None]:
    """Finds the fastest configuration that fits: compiles the one with the best estimate first.

    It searches at the run's own precision and microbatches, until one fits, and then with more
    microbatches. If the network's weights are not trained, it repeats this at lower precisions:
    with bfloat16 weights if the run has float32, and with int8 kernels (other float32 weights
    become bfloat16) if `quantize` is None; on TPUs also with int8 products.
    Once a configuration fits, it only compiles the fastest, and only those whose estimated time is
    at most `WORTH` times that of the best so far.

    Args:
        quantize: the run's QUANTIZE.
        compile_one: compiles a configuration and returns its report, such as a `Compiler`.
        attention: the run's ATTENTION.

    Returns:
        `(tried, best)`: the reports of all compiled configurations; and the report of the fastest
        that fits, or None.
    """
    precisions: list[JsonObject] = [{"quantize": quantize, "attention": attention}]
    if spec.method.collection != "params":
        rounded = {"dtype": "bfloat16"} if spec.config.dtype == "float32" else {}
        precisions += [precisions[0] | rounded] if rounded else []
        kinds = ["int8", *["int8_products"] * slice_.is_tpu] if quantize is None else []
        precisions += [precisions[-1] | {"quantize": kind} for kind in kinds]
    tried: list[Report] = []
    best: Report | None = None
    for precision, parts in itertools.product(precisions, _PARTS):
        candidates = _by_time(spec, slice_, precision, parts)
        for parallel, counted in itertools.islice(candidates, _AFTER_ONE if best else None):
            if best and expected_seconds(counted) > WORTH * expected_seconds(best):
                break
            if best is None and parts > 1 and parallel.remat != "full":  # does anything fit?
                continue
            report = compile_one(parallel)
            tried.append(report)
            if report["verdict"] == "fits":
                best = report
                break
    return tried, best


def _by_time(
    spec: StepSpec, slice_: Slice, precision: Metadata, parts: int
) -> Iterator[tuple[ParallelConfig, Report]]:
    """The configurations whose weights and saved activations can fit, fastest estimate first."""
    candidates = []
    microbatches = parts * spec.step_config.microbatches
    if spec.batch_size % microbatches:  # `Batching` refuses it
        return
    for mesh in _mesh_names(spec, slice_):
        for fsdp in (False, True):
            for remat in get_args(Remat):
                parallel = ParallelConfig(
                    mesh, fsdp, True, remat, microbatches=microbatches, **precision
                )
                try:
                    parallel = resolve(spec, parallel, slice_)
                except InputError:
                    continue
                if fsdp and abstract_mesh(parallel, slice_).shape["data"] == 1:
                    continue
                report = count(spec, parallel, slice_)
                device_bytes = report["bytes_per_device"]
                # Gradients are kept until the optimizer's update; small ones can be neglected.
                trained, frozen = report["trainable"], report["parameters"] - report["trainable"]
                gradients = 0 if freezing.is_small(trained, frozen) else device_bytes["state"]
                saved = _saved_bytes(spec, parallel, abstract_mesh(parallel, slice_))
                if saved + gradients + sum(device_bytes.values()) <= TIGHT * slice_.usable_bytes:
                    candidates.append((parallel, report))

    yield from sorted(candidates, key=lambda candidate: expected_seconds(candidate[1]))


def _mesh_names(spec: StepSpec, slice_: Slice) -> Iterator[str]:
    within = len(slice_.devices()) // slice_.slices
    front = [slice_.slices] if slice_.slices > 1 else []
    for shape in meshes.fitting_shapes(spec.config, within, fsdp=False):
        yield "x".join(map(str, [*front, *shape]))


def _saved_bytes(spec: StepSpec, parallel: ParallelConfig, mesh: Mesh) -> int:
    """A lower bound of the activations that a device saves for the backward pass."""
    config, model = parallel.applied(spec.config), mesh.shape["model"]
    rows = spec.batch_size / (rows_divisor(mesh) * parallel.step_config(spec).microbatches)
    rows *= spec.members or 1
    encoder, decoder = spec.positions(), spec.targets
    heads = config.num_heads * config.head_dim
    entries = config.emb_dim  # the layer's input
    if parallel.remat != "full":  # queries, keys, values and what attention adds
        entries += 3 * heads / model + config.emb_dim
    if parallel.remat in ("none", "dots"):  # both inputs of the gated feed-forward
        entries += len(config.mlp_activations) * config.mlp_dim / model
    total = entries * (config.num_encoder_layers * encoder + config.num_decoder_layers * decoder)
    if (parallel.remat, parallel.attention) == ("none", "plain"):  # the attention weights
        total += config.num_encoder_layers * config.num_heads / model * encoder**2
    return int(rows * total * np.dtype(config.dtype).itemsize)
