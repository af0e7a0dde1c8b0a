"""The first state and the train step of a run, and checks of both before its first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp

from ptjax.backbones.load import Backbone
from ptjax.data.pipeline import Shape
from ptjax.methods.base import run_with
from ptjax.settings import RunSettings
from ptjax.sharding.arrays import replicate_key, replicated
from ptjax.trainer.loop import TrainingLoop
from ptjax.trainer.memory import Lower, explain_no_memory
from ptjax.trainer.setup import MemberSetup
from ptjax.training import freeze as freezing
from ptjax.training.compile import batch_shapes, lower_step
from ptjax.training.dependence import check_used
from ptjax.training.step import TrainState, TrainStep
from ptjax.trees import Tree


def make_step(
    backbone: Backbone, setups: Sequence[MemberSetup], settings: RunSettings, *, sweep: bool
) -> tuple[TrainState, TrainStep]:
    """The first state and its train step. In a `sweep` the state has all members, stacked."""
    first, mesh = setups[0], backbone.mesh
    init, step = _step_functions(backbone, first, settings, sweep=sweep)
    trainable, key = first.trainable, jax.random.key(first.seed)
    if sweep:
        trainable = jax.tree.map(lambda *x: jnp.stack(x), *(setup.trainable for setup in setups))
        trainable = jax.device_put(trainable, replicated(mesh))
        key = jnp.stack([jax.random.key(setup.seed) for setup in setups])
    # On the mesh: with a first state elsewhere the step would be compiled twice.
    return jax.jit(init)(trainable, replicate_key(key, mesh)), step


def _step_functions(
    backbone: Backbone, setup: MemberSetup, settings: RunSettings, *, sweep: bool
) -> tuple[Callable[[Tree, jax.Array], TrainState], TrainStep]:
    """The functions that `StepConfig.make` returns for a member."""
    return settings.step_config(sweep=sweep).make(
        run_with(settings.method, backbone),
        setup.freeze,
        backbone.mesh,
        setup.rms,
        small=freezing.is_small(*count_parameters(setup.trainable, setup.frozen).values()),
        attends_to_input=settings.method.attends_to_input,
    )


def lowering(
    backbone: Backbone, setups: Sequence[MemberSetup], state: TrainState, *, sweep: bool
) -> Lower:
    """A function that lowers the train step with other settings, even after `state` is donated."""
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )

    def lower(settings: RunSettings, shape: Shape) -> jax.stages.Lowered:
        _, step = _step_functions(backbone, setups[0], settings, sweep=sweep)
        return lower_step(step, abstract, setups[0].frozen, shape, backbone.mesh)

    return lower


def no_memory_explained(
    backbone: Backbone,
    setups: Sequence[MemberSetup],
    settings: RunSettings,
    state: TrainState,
    run: TrainingLoop,
) -> AbstractContextManager[None]:
    """A context manager around `run.fit`, see `memory.explain_no_memory`."""
    lower = lowering(backbone, setups, state, sweep=run.members.is_sweep)
    return explain_no_memory(settings, run.members.batches().shapes, lower, backbone.mesh)


def check_dependence(
    backbone: Backbone, setups: Sequence[MemberSetup], settings: RunSettings
) -> None:
    """InputError if the loss does not depend on every trainable variable."""
    setup = setups[0]
    batch = batch_shapes(min(setup.member.batches.shapes), backbone.mesh)
    apply_fn = run_with(settings.method, backbone)
    check_used(apply_fn, settings.loss, setup.trainable, setup.frozen, batch)


def count_parameters(trainable: Tree, frozen: Tree) -> dict[str, int]:
    """The numbers of trained and frozen parameters, under their names in `results.json`."""
    return {
        "trainable_parameters": freezing.sizes(trainable)[0],
        "frozen_parameters": freezing.sizes(frozen)[0],
    }
