"""The train step of a run on a slice, as shapes with shardings.

Planning needs neither weights, nor data, nor the machine: `abstract_step` builds the step that
`ptjax.train` would compile for the largest batch. `estimate` counts its work, `compiler` compiles
it ahead of time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from ptjax.data.pipeline import Shape
from ptjax.errors import check_at_least
from ptjax.files import JsonObject, Metadata
from ptjax.methods.base import Method, run_with
from ptjax.models.attention import AttendFn, plain_attention
from ptjax.models.config import Remat, T5Config
from ptjax.models.family import ApplyFn
from ptjax.models.stacking import GatherFn
from ptjax.models.t5_family import T5_FAMILY
from ptjax.planning.slices import Slice
from ptjax.settings import RunSettings
from ptjax.sharding import meshes
from ptjax.sharding.arrays import check_batch_size, gather_layer, replicated, rows_divisor
from ptjax.sharding.attention import Attention, Kind, choose_attention, make_attend
from ptjax.sharding.meshes import check_shape
from ptjax.sharding.quantize import sharded_shapes, weight_shapes
from ptjax.sharding.rules import AXES
from ptjax.training import freeze as freezing
from ptjax.training.compile import StepConfig, batch_shapes, lower_step, sweep_shapes
from ptjax.training.step import Batch, TrainState, TrainStep, batch_loss
from ptjax.trees import Tree


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: a method may hold lists
class StepSpec:
    """The train step of a run, independent of the machine.

    Attributes:
        config: the network's config; its `dtype` is also that of the weights.
        step_config: the run's settings for the optimizer, the loss and microbatches.
        method: what the run trains, such as a prompt.
        batch_size: the number of examples in a batch; in a sweep, in the batch of each member.
        inputs, targets: the lengths T and L of the largest batch, in tokens.
        pack: whether several examples may share a row.
        row_length: the number of encoder positions of a packed row. None means the number that one
            example of length T and its prompt need.
        members: the number of prompts that a sweep trains; None means an ordinary run.
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
    def from_settings(
        cls, config: T5Config, settings: RunSettings, members: int | None = None
    ) -> StepSpec:
        """Describes the train step of a run with these settings.

        Args:
            config: the network's config.
            members: the number of prompts in a sweep; None means an ordinary run.

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
        """The shape of the largest batch.

        For packed batches this is an upper bound: it assumes that no two examples share a row.
        """
        inputs = (self.row_length or self.inputs + self._prompt_slots) if self.pack else self.inputs
        return Shape(self.batch_size, inputs, self.targets, self.pack, self.members)

    def positions(self) -> int:
        """The number of encoder positions per row, prompts included."""
        return self.shape().inputs + (0 if self.pack else self._prompt_slots)

    @property
    def _prompt_slots(self) -> int:
        """Encoder positions that the prompt of an example occupies."""
        return self.method.extra_positions()


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How a step runs on a slice: MESH, FSDP, SCAN_LAYERS, REMAT, QUANTIZE and so on.

    Attributes:
        mesh: 'auto', or the sizes of the mesh axes: data x model, such as "2x4", or replica x data
            x model.
        fsdp, quantize, attention: as for `load_backbone`.
        scan_layers, remat: as in `T5Config`.
        dtype: the dtype of the weights; None keeps that of the `StepSpec`.
        microbatches: as in `Batching`; None keeps those of the `StepSpec`.
    """

    mesh: str
    fsdp: bool = False
    scan_layers: bool = True
    remat: Remat = "none"
    quantize: str | None = None
    dtype: str | None = None
    attention: Attention | Kind = "plain"
    microbatches: int | None = None

    def settings(self) -> JsonObject:
        """The fields as a dict with their names in gin files; `from_settings` is the inverse."""
        return {
            "MESH": self.mesh,
            "FSDP": self.fsdp,
            "SCAN_LAYERS": self.scan_layers,
            "REMAT": self.remat,
            "QUANTIZE": self.quantize,
            "dtype": self.dtype,
            "ATTENTION": self.attention,
            "MICROBATCHES": self.microbatches,
        }

    @classmethod
    def from_settings(cls, settings: Metadata) -> ParallelConfig:
        """Makes the configuration from the result of `settings`."""
        return cls(**{name.lower(): value for name, value in settings.items()})

    def applied(self, config: T5Config) -> T5Config:
        """Returns `config` with the `scan_layers`, `remat` and `dtype` of this configuration.

        If `dtype` is None, the config keeps its own.
        """
        changes = {"scan_layers": self.scan_layers, "remat": self.remat}
        return dataclasses.replace(config, **changes, dtype=self.dtype or config.dtype)

    def step_config(self, spec: StepSpec) -> StepConfig:
        """Returns the `step_config` of `spec` with the microbatches of this configuration."""
        number = self.microbatches or spec.step_config.microbatches
        return dataclasses.replace(spec.step_config, microbatches=number)

    def __str__(self) -> str:
        parts = [self.mesh, *filter(None, (self.dtype, self.quantize)), f"remat {self.remat}"]
        parts += ["fused"] * (self.attention in ("fused", "gpu"))
        parts += [f"{self.microbatches} microbatches"] * ((self.microbatches or 1) > 1)
        return ", ".join(parts + ["fsdp"] * self.fsdp + ["unrolled"] * (not self.scan_layers))


def resolve(spec: StepSpec, parallel: ParallelConfig, slice_: Slice) -> ParallelConfig:
    """Checks `parallel`; returns it with 'auto' replaced by what a run chooses.

    That is the sizes of the mesh, the kind of attention, and the number of microbatches.

    Raises:
        InputError: the mesh does not fit the slice, the network or the batch size. `ptjax.train`
            has the same message.
    """
    config = parallel.applied(spec.config)
    if parallel.mesh == "auto":
        weights = weight_shapes(config, config.dtype, parallel.quantize)
        shape, _ = meshes.smallest_that_fits(config, weights, slice_.devices(), parallel.fsdp)
        parallel = dataclasses.replace(parallel, mesh="x".join(map(str, shape)))
    attention = choose_attention(parallel.attention, slice_.generation.device_kind)
    if attention == "fused" and spec.method.collection == "params":
        attention = "plain"  # the biases train, and that kernel gives them no gradient
    microbatches = parallel.step_config(spec).microbatches
    parallel = dataclasses.replace(parallel, attention=attention, microbatches=microbatches)
    mesh = abstract_mesh(parallel, slice_)
    meshes.check_mesh(config, mesh, fsdp=parallel.fsdp)
    if not spec.pack:
        check_batch_size(spec.batch_size, mesh, microbatches)
    return parallel


def abstract_mesh(parallel: ParallelConfig, slice_: Slice) -> Any:
    """Makes the mesh of `parallel` as an `AbstractMesh`: without devices, for shapes and shardings.

    Raises:
        InputError: the slice's devices cannot form the mesh.
    """
    shape, devices = meshes.parse_mesh(parallel.mesh), slice_.devices()
    check_shape(shape, devices)
    return mesh_of_sizes(shape)


def mesh_of_sizes(shape: tuple[int, ...]) -> Any:
    """Makes an `AbstractMesh` with axes of these sizes: ([replica,] data, model)."""
    types = (AxisType.Auto,) * len(shape)
    return AbstractMesh(shape, AXES[-len(shape) :], axis_types=types)


@dataclasses.dataclass(frozen=True)
class PlannedBackbone:
    """A substitute for a `Backbone`: it has what methods use, but no weights.

    Attributes:
        config: the network's config.
        quantize: as for `load_backbone`.
        gather: the result of `gather_layer`; None without FSDP.
        attend: the result of `make_attend`.
    """

    config: T5Config
    quantize: str | None = None
    gather: GatherFn | None = None
    attend: AttendFn = plain_attention

    def make_apply_fn(self, attends_to_input: bool, collections: tuple[str, ...]) -> ApplyFn:
        """Makes the network's function, like `Backbone.make_apply_fn`."""
        return T5_FAMILY.build(
            self.config,
            attends_to_input=attends_to_input,
            attend=self.attend,
            gather=self.gather,
            collections=collections,
        )


@dataclasses.dataclass(frozen=True)
class AbstractStep:
    """The train step, and its arguments as shapes with shardings.

    Attributes:
        step: the train step.
        forward: computes only the loss; takes the same arguments as `step`.
        state, frozen: the first two arguments of `step`, as shapes.
        shape: the shape of the batch.
        mesh: the mesh of the shardings.
        groups: the number of groups of rows that each compute their own gradient
            (`StepConfig.groups`).
    """

    step: TrainStep
    forward: Callable[..., jax.Array]
    state: TrainState
    frozen: Tree
    shape: Shape
    mesh: Mesh
    groups: int

    def lower(self) -> jax.stages.Lowered:
        """Lowers the step, ready to be compiled."""
        return lower_step(self.step, self.state, self.frozen, self.shape, self.mesh)

    def inputs(self) -> tuple[Tree, ...]:
        """The other arguments of `step`, as shapes: the batch and, in a sweep, `sweep_shapes`."""
        return batch_shapes(self.shape, self.mesh), *sweep_shapes(self.shape.members, self.mesh)


def abstract_step(spec: StepSpec, parallel: ParallelConfig, mesh: Mesh) -> AbstractStep:
    """Makes the step that `ptjax.train` would compile, with shapes instead of arrays.

    Args:
        parallel: the result of `resolve`.
        mesh: the mesh of `parallel`, with devices or as an `AbstractMesh`.
    """
    step_config, config = parallel.step_config(spec), parallel.applied(spec.config)
    quantization = {"fsdp": parallel.fsdp, "quantize": parallel.quantize}
    variables: Tree = {"params": sharded_shapes(config, config.dtype, mesh, **quantization)}
    variables |= _replicated_shapes(spec.method.variable_shapes(config), mesh)
    freeze = freezing.make_freeze(variables, spec.method.freeze_rules())
    trainable, frozen = freezing.split(variables, freeze)
    gather = gather_layer(mesh) if parallel.fsdp else None
    attend = make_attend(parallel.attention, mesh)
    apply_fn = run_with(spec.method, PlannedBackbone(config, parallel.quantize, gather, attend))
    kind = {
        "small": freezing.is_small(freezing.sizes(trainable)[0], freezing.sizes(frozen)[0]),
        "attends_to_input": spec.method.attends_to_input,
    }
    init, step = step_config.make(apply_fn, freeze, mesh, **kind)
    key = jax.eval_shape(lambda: jax.random.key(0))
    if spec.members:
        trainable, key = _replicated_shapes((trainable, key), mesh, spec.members)
    state = _replicated_shapes(jax.eval_shape(init, trainable, key), mesh)
    # Trainable variables have the table's shardings; the factored second moments are small.
    state = dataclasses.replace(state, trainable=trainable)

    def member_loss(state: TrainState, frozen: Tree, batch: Batch) -> jax.Array:
        variables = freezing.combine(state.trainable, frozen)
        return batch_loss(apply_fn, step_config.loss, variables, batch, state.key)

    loss = jax.vmap(member_loss, (0, None, 0)) if spec.members else member_loss

    def forward(state: TrainState, frozen: Tree, batch: Batch, *_: Tree) -> jax.Array:
        return loss(state, frozen, batch)

    shape = spec.shape()
    if shape.packed:  # as in a run: rows for every device and microbatch
        multiple = step_config.microbatches * rows_divisor(mesh)
        shape = shape._replace(rows=-(-shape.rows // multiple) * multiple)
    return AbstractStep(step, forward, state, frozen, shape, mesh, step_config.groups(mesh, **kind))


def _replicated_shapes(tree: Tree, mesh: Mesh, *lead: int) -> Tree:
    """The shapes in `tree`, behind the axes `lead`, whole on every device."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype, sharding=replicated(mesh)), tree
    )
