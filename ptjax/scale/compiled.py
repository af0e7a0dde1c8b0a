"""The train step, compiled for its place and for every shape that its batches may have."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from ptjax.data.pipeline import Shape
from ptjax.scale import sharding
from ptjax.training.step import TrainState

Tree = Any


def lower_step(
    train_step: Callable[..., Any], state: TrainState, frozen: Tree, shape: Shape, mesh: Mesh
) -> jax.stages.Lowered:
    """The step for batches of `shape`, its state donated.

    Args:
        state, frozen: arrays on the mesh, or `jax.ShapeDtypeStruct`s with their shardings.
    """
    # The state goes out as it came in, so the next step takes it without moving anything.
    places = jax.tree.map(lambda x: x.sharding, state)
    batch = {
        name: jax.ShapeDtypeStruct(size, dtype, sharding=sharding.batch_sharding(mesh, len(size)))
        for name, (size, dtype) in shape.arrays().items()
    }
    jitted = jax.jit(train_step, donate_argnums=0, out_shardings=(places, None))
    return jitted.lower(state, frozen, batch)


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
