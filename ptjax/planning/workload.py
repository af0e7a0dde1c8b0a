"""What a run will need of a slice: counted in seconds, or compiled for it ahead of time.

Neither needs weights, data or the machine. Counting takes shapes alone. Compiling takes the train
step of `ptjax.train` itself, lowered for the largest batch, to the compiler of the slice's devices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from ptjax.data.pipeline import Shape
from ptjax.errors import check_at_least
from ptjax.methods.base import Method, run_with
from ptjax.models.config import Remat, T5Config
from ptjax.models.stacking import GatherFn
from ptjax.models.t5_family import T5_FAMILY
from ptjax.planning.flops import count_flops
from ptjax.planning.slices import Slice
from ptjax.settings import RunSettings
from ptjax.sharding import meshes
from ptjax.sharding.arrays import (
    check_batch_size,
    gather_layer,
    replicated,
    rows_axes,
    rows_divisor,
)
from ptjax.sharding.meshes import check_shape
from ptjax.sharding.quantize import held_shapes, placed_shapes
from ptjax.sharding.rules import AXES
from ptjax.training import freeze as freezing
from ptjax.training.compile import StepConfig, batch_shapes, lower_step, sweep_shapes
from ptjax.training.step import batch_loss
from ptjax.trees import Tree

Report = dict[str, Any]

TIGHT = 0.92
"""Of the usable memory; above it a program that compiles may fail beside what else is there: the
next batch, evaluation, the programs themselves."""


@dataclasses.dataclass(frozen=True, eq=False)  # hashed as it is: a method may hold lists
class Workload:
    """What a run asks for, whatever machine it is on.

    Attributes:
        config: its `dtype` is that of the weights too.
        inputs, targets: T and L of the largest batch.
        row_length: of packed rows; None is that of a row with one example.
        members: prompts of a bank.
    """

    config: T5Config
    step_config: StepConfig
    method: Method
    batch_size: int
    inputs: int
    targets: int
    pack: bool = False
    row_length: int | None = None
    members: int | None = None

    @classmethod
    def of(cls, config: T5Config, settings: RunSettings, members: int | None = None) -> Workload:
        """What a run with these settings asks for, of a network of this size.

        Raises:
            InputError: a length is below 1.
        """
        batching = settings.batching
        lengths = batching.lengths
        if batching.buckets and not batching.pack:
            inputs, targets = zip(*batching.buckets, strict=True)
            lengths = {"inputs": max(inputs), "targets": max(targets)}
        check_at_least(1, "TASK_FEATURE_LENGTHS", **lengths)
        return cls(
            config,
            settings.step_config(sweep=members is not None),
            settings.method,
            batching.batch_size,
            **lengths,
            pack=batching.pack,
            row_length=batching.row_length,
            members=members,
        )

    def shape(self) -> Shape:
        """The largest batch; a packed one about, as if no two examples fitted into one row."""
        inputs = (self.row_length or self.inputs + self._slots) if self.pack else self.inputs
        return Shape(self.batch_size, inputs, self.targets, self.pack, self.members)

    def positions(self) -> int:
        """Of the encoder in a row, prompts included."""
        return self.shape().inputs + (0 if self.pack else self._slots)

    @property
    def _slots(self) -> int:
        """Positions that an example's own prompt takes."""
        return self.method.extra_positions()


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a workload lies on a slice: what MESH, FSDP, SCAN_LAYERS, REMAT and QUANTIZE say.

    Attributes:
        dtype: of `load_backbone`; None is the workload's own.
    """

    mesh: str
    fsdp: bool = False
    scan_layers: bool = True
    remat: Remat = "none"
    quantize: str | None = None
    dtype: str | None = None

    def settings(self) -> dict[str, Any]:
        return {
            "MESH": self.mesh,
            "FSDP": self.fsdp,
            "SCAN_LAYERS": self.scan_layers,
            "REMAT": self.remat,
            "QUANTIZE": self.quantize,
            "dtype": self.dtype,
        }

    def applied(self, config: T5Config) -> T5Config:
        """`config` as `load_backbone` would have it."""
        kept = {"scan_layers": self.scan_layers, "remat": self.remat}
        return dataclasses.replace(config, **kept, dtype=self.dtype or config.dtype)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Layout:
        """The one that has these `settings`."""
        return cls(**{name.lower(): value for name, value in settings.items()})

    def __str__(self) -> str:
        parts = [self.mesh, *filter(None, (self.dtype, self.quantize)), f"remat {self.remat}"]
        return ", ".join(parts + ["fsdp"] * self.fsdp + ["unrolled"] * (not self.scan_layers))


def settle(workload: Workload, layout: Layout, where: Slice) -> Layout:
    """`layout` with a mesh in numbers, which has to go with the sizes and the batch.

    Raises:
        InputError: as `ptjax.train` has it.
    """
    config = layout.applied(workload.config)
    if layout.mesh == "auto":
        held = held_shapes(config, config.dtype, layout.quantize)
        shape, _ = meshes.smallest_that_fits(config, held, where.devices(), layout.fsdp)
        layout = dataclasses.replace(layout, mesh="x".join(map(str, shape)))
    mesh = counted_mesh(layout, where)
    meshes.check_mesh(config, mesh, fsdp=layout.fsdp)
    if not workload.pack:
        check_batch_size(workload.batch_size, mesh, workload.step_config.microbatches)
    return layout


def counted_mesh(layout: Layout, where: Slice) -> Any:
    """The mesh without devices, an `AbstractMesh`: it serves where nothing is put on a device."""
    shape, devices = meshes.parse_mesh(layout.mesh), where.devices()
    check_shape(shape, devices)
    return _abstract_mesh(shape)


def _abstract_mesh(shape: tuple[int, ...]) -> Any:
    types = (AxisType.Auto,) * len(shape)
    return AbstractMesh(shape, AXES[-len(shape) :], axis_types=types)


@dataclasses.dataclass(frozen=True)
class PlannedBackbone:
    """What methods ask of a backbone, of one without weights."""

    config: T5Config
    quantize: str | None = None
    gather: GatherFn | None = None

    def make_apply_fn(
        self, attends_to_input: bool, collections: tuple[str, ...]
    ) -> Callable[..., Any]:
        kept = {"gather": self.gather, "collections": collections}
        return T5_FAMILY.build(self.config, attends_to_input=attends_to_input, **kept)


@dataclasses.dataclass(frozen=True)
class Placed:
    """The train step and its arguments as shapes with shardings; `forward` is its loss alone.

    Attributes:
        groups: of rows with a gradient of their own, see `StepConfig.groups`.
    """

    step: Callable[..., Any]
    forward: Callable[..., Any]
    state: Tree
    frozen: Tree
    shape: Shape
    mesh: Mesh
    groups: int

    def lower(self) -> jax.stages.Lowered:
        return lower_step(self.step, self.state, self.frozen, self.shape, self.mesh)

    def inputs(self) -> tuple[Tree, ...]:
        """What the step takes after state and frozen weights."""
        return batch_shapes(self.shape, self.mesh), *sweep_shapes(self.shape.members, self.mesh)


def place(workload: Workload, layout: Layout, mesh: Mesh) -> Placed:
    """What `ptjax.train` would compile."""
    step_config, config = workload.step_config, layout.applied(workload.config)
    kept = {"fsdp": layout.fsdp, "quantize": layout.quantize}
    variables: Tree = {"params": placed_shapes(config, config.dtype, mesh, **kept)}
    variables |= jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
        workload.method.variable_shapes(config),
    )
    freeze = freezing.make_freeze(variables, workload.method.freeze_rules())
    trainable, frozen = freezing.split(variables, freeze)
    gather = gather_layer(mesh) if layout.fsdp else None
    apply_fn = run_with(workload.method, PlannedBackbone(config, layout.quantize, gather))
    kind = {
        "small": freezing.is_small(freezing.sizes(trainable)[0], freezing.sizes(frozen)[0]),
        "attends_to_input": workload.method.attends_to_input,
    }
    init, step = step_config.make(apply_fn, freeze, mesh, **kind)
    key = jax.eval_shape(lambda: jax.random.key(0))
    if workload.members:
        trainable, key = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (workload.members, *x.shape), x.dtype, sharding=replicated(mesh)
            ),
            (trainable, key),
        )
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
        jax.eval_shape(init, trainable, key),
    )
    # What trains lies as the table says; the second moments, factored, are small.
    state = dataclasses.replace(state, trainable=trainable)

    def forward(state: Any, frozen: Tree, batch: Any) -> jax.Array:
        variables = freezing.combine(state.trainable, frozen)
        return batch_loss(apply_fn, step_config.loss, variables, batch, state.key)

    if workload.members:
        of_member = jax.vmap(forward, (0, None, 0))

        def forward(state: Any, frozen: Tree, batch: Any, *_: Tree) -> jax.Array:
            return of_member(state, frozen, batch)

    shape = workload.shape()
    if shape.packed:  # as `task_data` has it: rows for every device and microbatch
        multiple = step_config.microbatches * rows_divisor(mesh)
        shape = shape._replace(rows=-(-shape.rows // multiple) * multiple)
    return Placed(step, forward, state, frozen, shape, mesh, step_config.groups(mesh, **kind))


def count(workload: Workload, layout: Layout, where: Slice) -> Report:
    """What the jaxpr and the shardings tell: parameters, FLOPs, bytes a device, in seconds.

    Args:
        layout: settled.
    """
    mesh = counted_mesh(layout, where)
    placed = place(workload, layout, mesh)
    (trainable, _), (frozen, _) = map(freezing.sizes, (placed.state.trainable, placed.frozen))
    held = {
        "frozen": _bytes_on_device(placed.frozen),
        "state": _bytes_on_device(placed.state),
        "batch": _bytes_on_device(placed.inputs()),
    }
    forward, useful, executed = _flops(workload, layout.remat, placed.groups)
    # Weights are read on the way there, on the way back, and where it is taken again; each
    # microbatch does so. With FSDP they are gathered first.
    passes = (3 if layout.remat == "full" else 2) * workload.step_config.microbatches
    weights, trained = _used_bytes(workload, layout, mesh)
    dtype = layout.applied(workload.config).dtype
    peak = mesh.size * where.flops(dtype)
    seconds = {
        "compute": executed / peak,
        "memory": passes * weights / where.generation.memory_rate,
        "links": link_seconds(
            _expected_traffic(workload, layout, mesh, weights, trained), mesh, where
        ),
    }
    return {
        "slice": where.name,
        "devices": mesh.size,
        "settings": layout.settings(),
        "dtype": dtype,
        "parameters": trainable + frozen,
        "trainable": trainable,
        "flops": {"forward": forward, "useful": useful, "executed": executed},
        "bytes_per_device": held,
        "usable_bytes": where.usable_bytes,
        "examples": workload.batch_size * (workload.members or 1),
        "estimate": estimate(seconds, useful / peak),
    }


def _used_bytes(workload: Workload, layout: Layout, mesh: Mesh) -> tuple[int, int]:
    """(of the network, of what trains) on a device, as they are used: gathered."""
    placed = place(workload, dataclasses.replace(layout, fsdp=False), mesh)
    trained = placed.state.trainable
    network = sum(_bytes_on_device(tree.get("params", {})) for tree in (placed.frozen, trained))
    return network, _bytes_on_device(trained)


def _bytes_on_device(tree: Tree) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


@functools.lru_cache(maxsize=64)
def _flops(workload: Workload, remat: Remat, groups: int) -> tuple[int, int, int]:
    """(forward, useful, executed) of a step on all devices; useful is nothing done twice.

    Args:
        groups: of rows with a gradient of their own, see `StepConfig.groups`.
    """
    # Neither where weights lie nor their dtype changes it; scanned, it traces fast.
    once = place(workload, Layout("", remat="none"), _abstract_mesh((groups, 1)))
    arguments = once.state, once.frozen, *once.inputs()
    forward, useful = count_flops(once.forward, *arguments), count_flops(once.step, *arguments)
    if remat == "none":
        return forward, useful, useful
    again = place(workload, Layout("", remat=remat), _abstract_mesh((groups, 1)))
    return forward, useful, count_flops(again.step, *arguments)


def _expected_traffic(
    workload: Workload, layout: Layout, mesh: Mesh, weights: int, trained: int
) -> dict[tuple[str, str], int]:
    """(kind, axis) -> bytes of the results that a device sees in a step, before compiling.

    A layer sums its activations [rows, positions, D] over `model` once after each of its parts, and
    once for each part's input on the way back; remat "full" does the first again.

    Args:
        weights, trained: see `_used_bytes`.
    """
    config, shape, sizes = layout.applied(workload.config), workload.shape(), mesh.shape
    found: dict[tuple[str, str], int] = {}
    width = np.dtype(config.dtype).itemsize * config.emb_dim
    rows = shape.rows * (workload.members or 1) / rows_divisor(mesh)
    again = layout.remat == "full"
    if sizes["model"] > 1:
        encoder = config.num_encoder_layers * (4 + again) * workload.positions()
        decoder = config.num_decoder_layers * (
            (6 + 2 * again) * shape.targets + workload.positions()
        )
        found["all-reduce", "model"] = int(rows * width * (encoder + decoder))
    if layout.fsdp:
        found["all-gather", "data"] = 2 * workload.step_config.microbatches * weights
    for axis in rows_axes(mesh):
        if sizes[axis] > 1:
            found["all-reduce", axis] = found.get(("all-reduce", axis), 0) + trained
    return found


def link_seconds(traffic: Mapping[tuple[str, ...], int], mesh: Mesh, where: Slice) -> float:
    """Rings: of n devices an all-reduce sends 2 (n - 1) / n of its result, a gather half of it.

    Between slices every device of a group brings its share of the network.
    """
    seconds, generation = 0.0, where.generation
    for (kind, *axes), size in traffic.items():
        members = math.prod(mesh.shape[axis] for axis in axes)
        between = where.slices > 1 and mesh.axis_names[0] in axes
        share = {"all-reduce": 2.0, "reduce-scatter": float(members)}.get(kind, 1.0)
        share = 1.0 if kind in ("send", "collective-permute") else share * (members - 1) / members
        rate = generation.link_rate
        if between or kind == "send":
            together = 1 if kind == "send" else max(members // where.slices, 1)
            rate = min(rate, together * generation.network_rate)
        seconds += share * size / rate
    return seconds


def estimate(seconds: Report, ideal: float) -> Report:
    """A step's time: from all at once to nothing sent while something is computed.

    Args:
        seconds: "compute", "memory", "links", and "memory_most" if it is known.
        ideal: seconds of the useful work at the devices' peak.
    """
    low = max(seconds["compute"], seconds["memory"], seconds["links"])
    high = None
    if "memory_most" in seconds:
        high = max(seconds["compute"], seconds["memory_most"]) + seconds["links"]
    utilisation = [ideal / x if x else None for x in (high, low)]
    return seconds | {"ideal": ideal, "low": low, "high": high, "utilisation": utilisation}
