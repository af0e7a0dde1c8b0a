"""Builds the train step from a run's settings and compiles it for every batch shape."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epy
from jax.sharding import Mesh

from ptjax.data.pipeline import Shape
from ptjax.models.family import ApplyFn
from ptjax.sharding.arrays import reduction_groups, replicated, sharding_in_batch
from ptjax.training import freeze as freezing
from ptjax.training.loss import Loss
from ptjax.training.optimizer import Adafactor
from ptjax.training.step import (
    Metrics,
    TrainState,
    TrainStep,
    init_train_state,
    make_sweep_step,
    make_train_step,
)
from ptjax.trees import Tree

with epy.lazy_imports():
    import optax


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The settings of a run that determine its train step.

    Attributes:
        microbatches: number of parts of a batch whose gradients are computed one after another.
        sweep: whether one step trains several members.
    """

    optimizer: Adafactor
    loss: Loss
    microbatches: int = 1
    sweep: bool = False

    def groups(self, mesh: Mesh, *, small: bool, attends_to_input: bool = True) -> int:
        """Returns the number of row groups per batch: the argument `groups` of `make_train_step`.

        Each group needs memory for a gradient of its own. So the result is that of
        `sharding.arrays.reduction_groups` if the trainable variables are few, and 1 otherwise.

        Args:
            small: whether the trainable variables are few (`freeze.is_small`).
            attends_to_input: whether the prompt's positions attend to the input.
        """
        if not small:
            return 1
        return reduction_groups(
            mesh, microbatches=self.microbatches, attends_to_input=attends_to_input
        )

    def make(
        self,
        apply_fn: ApplyFn,
        freeze: freezing.Freeze,
        mesh: Mesh,
        rms: float = 1.0,
        *,
        small: bool,
        attends_to_input: bool = True,
    ) -> tuple[Callable[[Tree, jax.Array], TrainState], TrainStep]:
        """Builds the function that makes the initial state, and the train step.

        Args:
            apply_fn: the network as the method runs it (`methods.base.run_with`).
            freeze: which variables are frozen (`freeze.make_freeze`).
            rms: the RMS of the embedding table; scales learning rates that are relative to it.
            small, attends_to_input: as for `groups`.

        Returns:
            `(init, step)`. `init(trainable, key)` copies `trainable` and returns the initial
            state; `key` is the random key for dropout. For a sweep, both arguments have a leading
            axis of members. `step` is the train step, not yet jitted.
        """

        def make_optimizer(rate: jax.Array | None = None) -> optax.GradientTransformation:
            return freezing.freeze_updates(self.optimizer.make(rms, rate), freeze)

        def init(trainable: Tree, key: jax.Array) -> TrainState:
            # A copy: the step donates its state, and these arrays belong to the caller.
            return init_train_state(jax.tree.map(jnp.copy, trainable), make_optimizer(), key)

        groups = self.groups(mesh, small=small, attends_to_input=attends_to_input)
        parts = {"microbatches": self.microbatches, "groups": groups}
        if self.sweep:
            step = make_sweep_step(apply_fn, make_optimizer, self.loss, **parts)
            return jax.vmap(init), step
        return init, make_train_step(apply_fn, make_optimizer(), self.loss, **parts)


def trace_step(
    train_step: TrainStep, state: TrainState, frozen: Tree, shape: Shape, mesh: Mesh
) -> jax.stages.Traced:
    """Traces the step for batches of `shape`. The compiled step donates its argument `state`.

    Args:
        state, frozen: arrays on the mesh, or `jax.ShapeDtypeStruct`s with their shardings.
    """
    # The new state has the shardings of the old one: the next step takes it without a transfer.
    shardings = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))
    inputs = batch_shapes(shape, mesh), *sweep_shapes(shape.members, mesh)
    return jitted.trace(state, frozen, *inputs)


def lower_step(
    train_step: TrainStep, state: TrainState, frozen: Tree, shape: Shape, mesh: Mesh
) -> jax.stages.Lowered:
    """Lowers the step for batches of `shape`; arguments as for `trace_step`."""
    return trace_step(train_step, state, frozen, shape, mesh).lower()


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A compiled train step, which is called like the step itself, and what it was compiled from.

    Attributes:
        traced: the step's jaxpr.
        compiled: the program.
    """

    traced: jax.stages.Traced
    compiled: jax.stages.Compiled

    def __call__(self, *arguments: Tree) -> tuple[TrainState, Metrics]:
        return self.compiled(*arguments)


def batch_shapes(shape: Shape, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Describes the arrays of a batch without making them, to compile a step for such batches.

    Args:
        shape: the numbers of rows and positions of the batch.

    Returns:
        the shape, dtype and sharding of each array, by its name in the batch.
    """
    return {
        name: jax.ShapeDtypeStruct(size, dtype, sharding=sharding_in_batch(name, len(size), mesh))
        for name, (size, dtype) in shape.arrays().items()
    }


def sweep_shapes(members: int | None, mesh: Mesh) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Describes the arguments `active` and `learning_rate` of a sweep's step, to compile it.

    Args:
        members: the number of members in the train state. None means an ordinary run, whose step
            has no such arguments: the result is then ().
    """
    if members is None:
        return ()
    where = replicated(mesh)
    dtypes = np.bool_, np.float32
    return tuple(jax.ShapeDtypeStruct((members,), x, sharding=where) for x in dtypes)


def program_bytes(memory: Tree) -> int:
    """Returns the memory of a device that a compiled program needs, its arguments included.

    It is not the compiler's own peak: that of a CPU's program leaves out the temporary arrays.

    Args:
        memory: the result of the program's `memory_analysis`.
    """
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + made


def compile_steps(
    train_step: TrainStep,
    state: TrainState,
    frozen: Tree,
    shapes: Sequence[Shape],
    mesh: Mesh,
) -> dict[Shape, CompiledStep]:
    """Compiles the step for each of `shapes`.

    A compiled step rejects any other shape, so nothing is recompiled during the run.

    Args:
        state, frozen: arrays on the mesh, or `jax.ShapeDtypeStruct`s with their shardings.
    """
    started = time.perf_counter()
    compiled = {}
    for shape in shapes:
        traced = trace_step(train_step, state, frozen, shape, mesh)
        compiled[shape] = CompiledStep(traced, traced.lower().compile())
    logging.info(
        "compiled the step for %d batch shapes in %.1f s: %s",
        len(shapes),
        time.perf_counter() - started,
        ", ".join(map(str, shapes)),
    )
    return compiled
