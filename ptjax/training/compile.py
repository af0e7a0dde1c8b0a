"""The train step, put together and compiled for its place and every shape of its batches."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging
from jax.sharding import Mesh

from ptjax.data.pipeline import Shape
from ptjax.sharding.arrays import reduction_groups, sharding_in_batch
from ptjax.training import freeze as freezing
from ptjax.training.loss import Loss
from ptjax.training.optimizer import Adafactor
from ptjax.training.step import TrainState, init_train_state, make_bank_step, make_train_step
from ptjax.trees import Tree


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What of a run's settings its train step consists of.

    Attributes:
        bank: whether a step trains several prompts.
    """

    optimizer: Adafactor
    loss: Loss
    microbatches: int = 1
    bank: bool = False

    def groups(self, mesh: Mesh, *, small: bool, attends_to_input: bool = True) -> int:
        """In how many groups of rows the step takes its batch (`sharding.arrays.reduction_groups`).

        Args:
            small: what trains (`freezing.is_small`): every group has a gradient of its own.
            attends_to_input: the prompt.
        """
        if not small:
            return 1
        parts = {"microbatches": self.microbatches, "sees_input": attends_to_input}
        return reduction_groups(mesh, **parts)

    def compose(
        self,
        apply_fn: Callable[..., Any],
        freeze: freezing.Freeze,
        mesh: Mesh,
        rms: float = 1.0,
        *,
        small: bool,
        attends_to_input: bool = True,
    ) -> tuple[Callable[[Tree, jax.Array], TrainState], Callable[..., Any]]:
        """(what makes the first state of trainable variables and a key, the step).

        Args:
            apply_fn: of the backbone, for such prompts.
            rms: of the embedding.
            small, attends_to_input: as for `groups`.
        """

        def make_optimizer(rate: jax.Array | None = None) -> optax.GradientTransformation:
            return freezing.lock(self.optimizer.make(rms, rate), freeze)

        def init(trainable: Tree, key: jax.Array) -> TrainState:
            # A copy: the step donates its state, and these arrays belong to the caller.
            return init_train_state(jax.tree.map(jnp.copy, trainable), make_optimizer(), key)

        groups = self.groups(mesh, small=small, attends_to_input=attends_to_input)
        parts = {"microbatches": self.microbatches, "groups": groups}
        if self.bank:
            step = make_bank_step(apply_fn, make_optimizer, self.loss, **parts)
            return jax.vmap(init), step
        return init, make_train_step(apply_fn, make_optimizer(), self.loss, **parts)


def lower_step(
    train_step: Callable[..., Any], state: TrainState, frozen: Tree, shape: Shape, mesh: Mesh
) -> jax.stages.Lowered:
    """The step for batches of `shape`, its state donated.

    Args:
        state, frozen: arrays on the mesh, or `jax.ShapeDtypeStruct`s with their shardings.
    """
    # The state goes out as it came in, so the next step takes it without moving anything.
    places = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(train_step, donate_argnums=0, out_shardings=(places, None))
    return jitted.lower(state, frozen, batch_shapes(shape, mesh))


def batch_shapes(shape: Shape, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of such a batch, with their shardings."""
    return {
        name: jax.ShapeDtypeStruct(size, dtype, sharding=sharding_in_batch(name, len(size), mesh))
        for name, (size, dtype) in shape.arrays().items()
    }


def compile_steps(
    train_step: Callable[..., Any],
    state: TrainState,
    frozen: Tree,
    shapes: Sequence[Shape],
    mesh: Mesh,
) -> dict[Shape, Callable[..., Any]]:
    """The step compiled for every batch shape, before the first batch is seen.

    A compiled step refuses any other shape, so nothing is ever compiled again on the way.
    """
    started = time.perf_counter()
    compiled = {
        shape: lower_step(train_step, state, frozen, shape, mesh).compile() for shape in shapes
    }
    logging.info(
        "compiled the step for %d batch shapes in %.1f s: %s",
        len(shapes),
        time.perf_counter() - started,
        ", ".join(map(str, shapes)),
    )
    return compiled
