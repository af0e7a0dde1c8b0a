"""The step that a run's settings make, and its compilation for every batch shape."""

from __future__ import annotations

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from frozen import assert_frozen
from toy_network import begin, make_apply, prompt_of

from ptjax.data.pipeline import Shape
from ptjax.sharding.arrays import put_batch, replicated
from ptjax.sharding.meshes import make_mesh
from ptjax.training.compile import (
    StepConfig,
    batch_shapes,
    compile_steps,
    sweep_shapes,
)
from ptjax.training.loss import Loss
from ptjax.training.optimizer import Adafactor

FREEZE = {"params": True, "prompt": False}
CONSTANT = Adafactor(learning_rate=0.1, weight_decay=0.0, learning_rate_scale="embedding_rms")


def spread(tree, mesh):
    return jax.device_put(tree, replicated(mesh))


def rows_seen(config, batch, mesh, **parts) -> set[int]:
    """Numbers of rows that the network gets at once."""
    seen = set()

    def apply(variables, inputs, *args, **settings):
        seen.add(inputs.shape[0])
        return make_apply()(variables, inputs, *args, **settings)

    start, frozen = begin()
    init, step = config.make(apply, FREEZE, mesh, **parts)
    state = jax.eval_shape(init, start.trainable, jax.random.key(0))
    jax.eval_shape(step, state, frozen, dict(batch))
    return seen


def test_nothing_of_training_changes_once_it_is_made() -> None:
    assert_frozen("ptjax.training")


def test_a_run_trains_one_thing_on_whole_batches_by_default() -> None:
    config = StepConfig(Adafactor(), Loss())
    assert (config.microbatches, config.sweep) == (1, False)


@pytest.mark.parametrize(
    ("microbatches", "small", "attends", "groups"),
    [
        (1, True, True, 1),
        (1, True, False, 8),
        (2, True, True, 8),
        (2, False, True, 1),
        (1, False, False, 1),
    ],
)
def test_only_small_gradients_are_kept_for_each_device(microbatches, small, attends, groups):
    """Where the compiler would otherwise exchange them more than once."""
    config = StepConfig(Adafactor(), Loss(), microbatches)
    assert config.groups(make_mesh(), small=small, attends_to_input=attends) == groups


def test_the_step_divides_its_batch_as_the_config_says(tiny_batch) -> None:
    batch = jax.tree.map(lambda x: np.concatenate([x, x]), dict(tiny_batch))  # 16 rows
    mesh, whole, halves = make_mesh(), StepConfig(CONSTANT, Loss()), StepConfig(CONSTANT, Loss(), 2)
    assert rows_seen(whole, batch, mesh, small=True) == {16}
    assert rows_seen(whole, batch, mesh, small=True, attends_to_input=False) == {2}
    assert rows_seen(halves, batch, mesh, small=False) == {8}
    assert rows_seen(halves, batch, mesh, small=True) == {1}
    # As said where nothing is said about the prompt: it attends to the input.
    assert whole.groups(mesh, small=True) == 1


def test_the_first_state_is_a_copy(tiny_batch) -> None:
    """The step donates its state; the caller keeps what it passed."""
    mesh = make_mesh()
    start, frozen = begin()
    init, step = StepConfig(CONSTANT, Loss()).make(make_apply(), FREEZE, mesh, small=True)
    state = init(start.trainable, jax.random.key(3))
    assert state.step == 0 and state.step.dtype == jnp.int32
    assert jax.random.key_data(state.key).tolist() == [0, 3]
    np.testing.assert_array_equal(prompt_of(state), prompt_of(start))
    jax.jit(step, donate_argnums=0)(state, frozen, dict(tiny_batch))
    assert state.trainable["prompt"]["prompt"].is_deleted()
    assert not start.trainable["prompt"]["prompt"].is_deleted()


@pytest.mark.parametrize("parts", [{}, {"rms": 10.0}])
def test_learning_rates_are_relative_to_the_embedding(tiny_batch, parts) -> None:
    mesh, (start, frozen) = make_mesh(), begin()
    init, step = StepConfig(CONSTANT, Loss()).make(make_apply(), FREEZE, mesh, small=True, **parts)
    after, _ = jax.jit(step)(init(start.trainable, start.key), frozen, dict(tiny_batch))
    moved = prompt_of(after) - prompt_of(start)
    # Adafactor's first update, from an empty second moment, has the learning rate in every entry.
    np.testing.assert_allclose(np.abs(moved), 0.1 * parts.get("rms", 1.0), rtol=1e-3)


def test_frozen_parts_of_the_trainable_half_do_not_move(tiny_batch) -> None:
    """The second safeguard: the optimizer knows the freeze map too."""
    start, frozen = begin()
    make = StepConfig(CONSTANT, Loss()).make
    init, step = make(make_apply(), {"params": True, "prompt": True}, make_mesh(), small=True)
    state = init(start.trainable, start.key)
    after, _ = jax.jit(step)(state, frozen, dict(tiny_batch))
    np.testing.assert_array_equal(prompt_of(after), prompt_of(start))


def test_members_of_a_sweep_have_their_own_rates_and_keys(tiny_batch) -> None:
    mesh, (start, frozen) = make_mesh(), begin()
    config = StepConfig(CONSTANT, Loss(), sweep=True)
    init, step = config.make(make_apply(), FREEZE, mesh, rms=10.0, small=True)
    both = jax.tree.map(lambda x: jnp.stack([x, x]), (start.trainable, dict(tiny_batch)))
    state = init(both[0], jax.random.split(jax.random.key(0), 2))
    assert state.step.tolist() == [0, 0] and state.key.shape == (2,)
    rates = jnp.asarray([0.5, 0.25])  # absolute: the caller has multiplied by the RMS
    after, metrics = jax.jit(step)(state, frozen, both[1], jnp.asarray([True, True]), rates)
    assert metrics["loss"].shape == (2,)
    moved = np.abs(prompt_of(after) - prompt_of(state))
    np.testing.assert_allclose(moved[0], 0.5, rtol=1e-3)
    np.testing.assert_allclose(moved[1], 0.25, rtol=1e-3)


def test_shapes_of_a_batch_are_those_of_a_batch_on_the_mesh(tiny_batch) -> None:
    mesh = make_mesh()
    shapes, arrays = batch_shapes(Shape(8, 12, 6), mesh), put_batch(tiny_batch, mesh)
    assert set(shapes) == set(arrays)
    for name, array in arrays.items():
        assert (shapes[name].shape, shapes[name].dtype) == (array.shape, array.dtype)
        assert shapes[name].sharding.is_equivalent_to(array.sharding, array.ndim), name
        assert not array.sharding.is_fully_replicated


def test_a_sweeps_step_also_gets_who_is_active_and_the_rates() -> None:
    mesh = make_mesh()
    assert sweep_shapes(None, mesh) == ()
    active, rates = sweep_shapes(3, mesh)
    assert (active.shape, active.dtype, rates.shape, rates.dtype) == ((3,), bool, (3,), np.float32)
    assert active.sharding == rates.sharding == replicated(mesh)


def test_a_run_has_one_program_for_each_shape_of_its_batches(tiny_batch, caplog) -> None:
    mesh = make_mesh()
    start, frozen = begin()
    init, step = StepConfig(CONSTANT, Loss()).make(make_apply(), FREEZE, mesh, small=True)
    state = spread(init(start.trainable, start.key), mesh)
    short = {name: array[..., :4] for name, array in tiny_batch.items()}
    short["encoder_lengths"] = np.minimum(tiny_batch["encoder_lengths"], 4)
    shapes = [Shape.of(tiny_batch), Shape.of(short)]
    with caplog.at_level(logging.INFO, logger="absl"):
        steps = compile_steps(step, state, spread(frozen, mesh), shapes, mesh)
    assert list(steps) == shapes
    message = r"compiled the step for 2 batch shapes in \d+\.\d s: 8x12\+6, 8x4\+4"
    assert re.fullmatch(message, caplog.messages[-1])
    seconds = float(caplog.messages[-1].split(" in ")[1].split()[0])
    assert seconds < 600  # a duration, not a time of day

    for number, batch in enumerate((tiny_batch, short, tiny_batch)):
        before = state
        state, metrics = steps[Shape.of(batch)](state, spread(frozen, mesh), put_batch(batch, mesh))
        assert metrics["target_tokens"] == batch["decoder_loss_weights"].sum()
        assert state.step == number + 1
        assert before.trainable["prompt"]["prompt"].is_deleted()
        assert state.trainable["prompt"]["prompt"].sharding.is_equivalent_to(replicated(mesh), 2)
    with pytest.raises(TypeError, match="compiled"):
        steps[shapes[1]](state, spread(frozen, mesh), put_batch(tiny_batch, mesh))
