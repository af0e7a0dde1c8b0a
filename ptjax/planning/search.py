"""The best layout of a workload on a slice: counted for all, compiled for few."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ptjax.errors import InputError
from ptjax.planning.slices import Slice
from ptjax.planning.workload import TIGHT, Layout, Report, Workload, count, counted_mesh, settle
from ptjax.sharding import meshes
from ptjax.sharding.arrays import rows_divisor
from ptjax.training import freeze as freezing

WORTH = 0.95
"""Rounded weights, bfloat16 of a float32 run or int8, have to save a twentieth of the time."""


def expected_seconds(report: Report) -> float:
    """What layouts are compared by: a step that hides nothing of what it sends."""
    seconds = report["estimate"]
    return max(seconds["compute"], seconds["memory"]) + seconds["links"]


def search(
    workload: Workload,
    where: Slice,
    quantize: str | None,
    compile_one: Callable[[Layout], Report],
) -> tuple[list[Report], Report | None]:
    """(what was compiled, the best that fits): fastest first by estimate, until one fits.

    Args:
        quantize: what the gin file says. Unless the weights train, a float32 run is also tried in
            bfloat16, and kernels in int8 if the gin file says nothing.
        compile_one: `compile_ahead`, wherever it runs.
    """
    ways: list[dict[str, Any]] = [{"quantize": quantize}]
    if workload.method.collection != "params":
        rounded = {"dtype": "bfloat16"} if workload.config.dtype == "float32" else {}
        ways += [rounded | {"quantize": quantize}] if rounded else []
        ways += [rounded | {"quantize": "int8"}] if quantize is None else []
    tried: list[Report] = []
    best: Report | None = None
    for way in ways:
        full: set[tuple[str, bool]] = set()
        for layout, counted in _by_time(workload, where, way):
            if best and expected_seconds(counted) > WORTH * expected_seconds(best):
                break
            if (layout.mesh, layout.fsdp) in full:
                continue
            report = compile_one(layout)
            tried.append(report)
            if report["verdict"] == "fits":
                best = report
                break
            if layout.remat == "full":
                full.add((layout.mesh, layout.fsdp))
    return tried, best


def _by_time(
    workload: Workload, where: Slice, way: Mapping[str, Any]
) -> Iterator[tuple[Layout, Report]]:
    """The layouts whose weights and kept activations can fit, those first that may be faster."""
    found = []
    for mesh in _mesh_names(workload, where):
        for fsdp in (False, True):
            for remat in ("none", "dots", "full"):
                layout = Layout(mesh, fsdp, True, remat, **way)
                try:
                    settle(workload, layout, where)
                except InputError:
                    continue
                if fsdp and counted_mesh(layout, where).shape["data"] == 1:
                    continue
                report = count(workload, layout, where)
                held = report["bytes_per_device"]
                # Gradients wait before the optimizer sees them; those of little weigh nothing.
                trained, frozen = report["trainable"], report["parameters"] - report["trainable"]
                gradients = 0 if freezing.is_small(trained, frozen) else held["state"]
                kept = _kept_bytes(workload, layout, counted_mesh(layout, where)) + gradients
                needed = kept + sum(held.values())
                if needed <= TIGHT * where.usable_bytes:
                    found.append((layout, report))

    yield from sorted(found, key=lambda one: expected_seconds(one[1]))


def _mesh_names(workload: Workload, where: Slice) -> Iterator[str]:
    within = len(where.devices()) // where.slices
    front = [where.slices] if where.slices > 1 else []
    for shape in meshes.fitting_shapes(workload.config, within, fsdp=False):
        yield "x".join(map(str, [*front, *shape]))


def _kept_bytes(workload: Workload, layout: Layout, mesh: Mesh) -> int:
    """At least so much of the activations waits on a device for the way back."""
    config, model = layout.applied(workload.config), mesh.shape["model"]
    rows = workload.batch_size / (rows_divisor(mesh) * workload.step_config.microbatches)
    rows *= workload.members or 1
    encoder, decoder = workload.positions(), workload.targets
    heads = config.num_heads * config.head_dim
    entries = config.emb_dim  # the layer's input
    if layout.remat != "full":  # queries, keys, values, the two of the gated feed-forward part
        entries += (3 * heads + len(config.mlp_activations) * config.mlp_dim) / model
    total = entries * (config.num_encoder_layers * encoder + config.num_decoder_layers * decoder)
    if layout.remat == "none":  # the attention's weights
        total += config.num_encoder_layers * config.num_heads / model * encoder**2
    return int(rows * total * np.dtype(config.dtype).itemsize)
