"""The train step: compiled once, donated, and no gradient of a frozen weight in it."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.interpreters import partial_eval
from t5_ids import with_lengths
from toy_network import SGD, begin, make_apply, prompt_of

from ptjax.models.prompted import with_prompt
from ptjax.sharding.arrays import put_batch, replicated
from ptjax.sharding.meshes import make_mesh
from ptjax.training.loss import Loss
from ptjax.training.optimizer import Adafactor
from ptjax.training.step import batch_loss, init_train_state, make_sweep_step, make_train_step


def begin_t5(tiny, optimizer=SGD):
    """(state, frozen) of the tiny T5, with a state of its own: the step donates it."""
    prompt = {"prompt": {"prompt": jnp.array(tiny.prompt)}}
    return init_train_state(prompt, optimizer, jax.random.key(0)), {"params": tiny.params}


def compiled(apply, optimizer=SGD, loss=Loss(), microbatches=1, groups=1):
    step = make_train_step(apply, optimizer, loss, microbatches=microbatches, groups=groups)
    return jax.jit(step, donate_argnums=0)


def test_compiles_once_per_batch_shape_and_donates_its_state(tiny_batch) -> None:
    traces = []

    def apply(*args, **kwargs):
        traces.append(args[1].shape)
        return make_apply(0.1)(*args, **kwargs)

    optimizer = Adafactor().make()
    step = compiled(apply, optimizer)
    state, frozen = begin(optimizer)
    shorter = {name: array[..., :6] for name, array in tiny_batch.items()}
    shorter["encoder_lengths"] = tiny_batch["encoder_lengths"]
    for number in range(6):
        old = state
        state, metrics = step(state, frozen, shorter if number % 2 else tiny_batch)
        assert old.trainable["prompt"]["prompt"].is_deleted()
        # The unused slots of Adafactor, of one element, are constants and not passed on.
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.opt_state) if leaf.size > 1)
        assert math.isfinite(metrics["loss"])
    assert traces == [(8, 12), (8, 6)]
    assert state.step == 6
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))


def test_metrics_are_the_loss_the_tokens_and_the_gradient(tiny_batch) -> None:
    state, frozen = begin()
    prompt = jnp.array(prompt_of(state))
    after, metrics = compiled(make_apply())(state, frozen, tiny_batch)
    tokens, lengths, targets, real, weights = map(jnp.asarray, tiny_batch.values())

    def loss(prompt):
        more = {"train": True, "rngs": {"dropout": jax.random.key(0)}, "encoder_lengths": lengths}
        logits = make_apply()(with_prompt(frozen, prompt), tokens, targets, None, None, **more)
        return Loss()(logits, real, weights)

    value, gradient = jax.jit(jax.value_and_grad(loss))(prompt)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], jnp.linalg.norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(prompt_of(after), prompt - 1e-2 * gradient, rtol=0, atol=1e-5)
    assert metrics["target_tokens"] == (real > 0).sum()


@pytest.mark.parametrize("per_token", [False, True])
def test_microbatches_add_up_to_the_whole_batch(tiny_batch, per_token) -> None:
    # Uneven weights: the parts of the batch do not count the same.
    weights = tiny_batch["decoder_loss_weights"] * np.arange(8)[:, None] / 4
    batch = tiny_batch | {"decoder_loss_weights": weights.astype(np.float32)}
    start = prompt_of(begin()[0])
    results = []
    for microbatches in (1, 4):
        step = compiled(make_apply(), SGD, Loss(per_token=per_token), microbatches)
        state, metrics = step(*begin(), batch)
        results.append((prompt_of(state) - start, jax.device_get(metrics)))
    (whole, whole_metrics), (parts, part_metrics) = results
    # Sums of float32 in another order; the difference to a prompt of size 1 keeps 5 digits.
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-5 * max(np.abs(whole).max(), 0.1))
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(part_metrics[name], value, rtol=1e-5)


def test_per_token_is_the_mean_over_target_tokens(tiny_batch) -> None:
    total = compiled(make_apply())(*begin(), tiny_batch)[1]
    mean = compiled(make_apply(), SGD, Loss(per_token=True))(*begin(), tiny_batch)[1]
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(mean[name], total[name] / total["target_tokens"], rtol=1e-5)


def test_dropout_follows_the_key_and_the_step(tiny_batch) -> None:
    still = optax.set_to_zero()  # the prompt stays, so only dropout can change the loss
    step = compiled(make_apply(0.5), still)

    def losses(seed):
        state, frozen = begin(still, seed)
        out = []
        for _ in range(3):
            state, metrics = step(state, frozen, tiny_batch)
            out.append(float(metrics["loss"]))
        return out

    first = losses(0)
    assert len(set(first)) == 3
    assert losses(0) == first
    assert not set(losses(1)) & set(first)


@pytest.mark.parametrize(("rate", "same"), [(0.0, True), (0.5, False)])
def test_microbatches_draw_different_dropout(tiny_batch, rate, same) -> None:
    # The same two examples four times: with one mask for all parts, the loss is 4 times a part's.
    small = {name: array[:2] for name, array in tiny_batch.items()}
    batch = {name: np.repeat(array, 4, axis=0) for name, array in small.items()}
    once = compiled(make_apply(rate))(*begin(), small)[1]["loss"]
    four = compiled(make_apply(rate), microbatches=4)(*begin(), batch)[1]["loss"]
    state, frozen = begin()
    tokens, lengths, targets, real, weights = map(jnp.asarray, small.values())

    @jax.jit
    def part(key):
        variables = frozen | state.trainable
        more = {"train": True, "rngs": {"dropout": key}, "encoder_lengths": lengths}
        logits = make_apply(rate)(variables, tokens, targets, None, None, **more)
        return Loss()(logits, real, weights)

    keys = jax.random.split(jax.random.fold_in(state.key, 0), 4)
    parts = [float(part(key)) for key in keys]
    np.testing.assert_allclose(four, sum(parts), rtol=1e-5)
    assert len(set(parts)) == (1 if same else 4)
    assert np.isclose(four, 4 * once, rtol=1e-4) == same


@pytest.mark.parametrize(("microbatches", "groups"), [(1, 4), (2, 1), (2, 4), (4, 2)])
def test_the_parts_of_a_batch_have_their_rows_and_their_dropout(tiny_batch, microbatches, groups):
    """A microbatch is every m-th row; a group is rows beside each other in it."""
    apply = make_apply(0.5)
    step = compiled(apply, microbatches=microbatches, groups=groups)
    after, metrics = step(*begin(), tiny_batch)
    state, frozen = begin()

    def loss(prompt, rows, key):
        batch = {name: jnp.asarray(array)[rows] for name, array in tiny_batch.items()}
        return batch_loss(apply, Loss(), with_prompt(frozen, prompt), batch, key)

    def split(key, count):
        return [key] if count == 1 else jax.random.split(key, count)

    part, total = jax.jit(jax.value_and_grad(loss)), []
    for m, of_microbatch in enumerate(split(jax.random.fold_in(state.key, 0), microbatches)):
        rows = np.split(np.arange(8)[m::microbatches], groups)
        keys = split(of_microbatch, groups)
        total += [part(prompt_of(state), *given) for given in zip(rows, keys, strict=True)]
    value, gradient = jax.tree.map(lambda *x: sum(x), *total)
    # Sums of float32 in another order.
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], jnp.linalg.norm(gradient), rtol=1e-5)
    moved = prompt_of(after) - prompt_of(state)
    np.testing.assert_allclose(moved, -1e-2 * gradient, rtol=0, atol=1e-5)


def test_the_network_gets_the_batch_and_the_loss_its_targets(tiny_batch) -> None:
    """Packed or not; each array where the network expects it."""
    given = []

    def apply(variables, *arrays, **settings):
        given.append((arrays, settings))
        return jnp.zeros((8, 6, 64))

    unpacked = jax.tree.map(jnp.asarray, dict(tiny_batch))
    packed = {name: array for name, array in unpacked.items() if name != "encoder_lengths"}
    packed |= {"encoder_segment_ids": "E", "decoder_segment_ids": "D"}
    key = jax.random.key(5)
    for batch in (unpacked, packed):
        value = batch_loss(apply, Loss(z_loss=0.0), {}, batch, key)
        # Every token has the same probability.
        tokens = tiny_batch["decoder_loss_weights"].sum()
        np.testing.assert_allclose(value, tokens * np.log(64), rtol=1e-6)
    (plain, settings), (rows, of_rows) = given
    for arrays in (plain, rows):
        assert arrays[0] is unpacked["encoder_input_tokens"]
        assert arrays[1] is unpacked["decoder_input_tokens"]
    assert plain[2:] == (None, None) and rows[2:] == ("E", "D")
    assert settings["encoder_lengths"] is unpacked["encoder_lengths"]
    assert of_rows["encoder_lengths"] is None
    assert settings["train"] is True and settings["rngs"] == {"dropout": key}


@pytest.mark.parametrize(("microbatches", "groups"), [(1, 1), (2, 2)])
def test_a_sweep_trains_each_member_as_if_it_were_alone(tiny_batch, microbatches, groups) -> None:
    """With its own prompt, batch, dropout and rate; who is not active stays as it was."""
    parts = {"microbatches": microbatches, "groups": groups}
    make = lambda rate: Adafactor(min_dim_size_to_factor=2).make(rate=rate)  # noqa: E731
    states, batches, frozen = [], [], begin()[1]
    for seed in range(3):
        state, _ = begin(make(0.0), seed)
        states.append(dataclasses.replace(state, step=jnp.asarray(seed, jnp.int32)))
        batches.append({name: np.roll(x, seed, axis=0) for name, x in dict(tiny_batch).items()})
    rates, active = jnp.asarray([0.3, 0.2, 0.1]), jnp.asarray([True, False, True])
    stack = lambda *arrays: jnp.stack(arrays)  # noqa: E731
    together = jax.tree.map(stack, *states), frozen, jax.tree.map(stack, *batches)
    sweep = jax.jit(make_sweep_step(make_apply(0.5), make, Loss(), **parts))
    after, metrics = sweep(*together, active, rates)

    @jax.jit
    def one(state, batch, rate):
        return make_train_step(make_apply(0.5), make(rate), Loss(), **parts)(state, frozen, batch)

    for number, state in enumerate(states):
        alone, told = one(state, batches[number], rates[number])
        for name, value in told.items():
            assert metrics[name].shape == (3,)
            np.testing.assert_allclose(metrics[name][number], value, rtol=1e-5)
        mine = jax.tree.map(lambda x, number=number: x[number], after)
        assert jax.random.key_data(mine.key).tolist() == jax.random.key_data(state.key).tolist()
        if not active[number]:
            assert mine.step == state.step
            jax.tree.map(np.testing.assert_array_equal, mine.trainable, state.trainable)
            jax.tree.map(np.testing.assert_array_equal, mine.opt_state, state.opt_state)
        else:
            assert mine.step == state.step + 1
            # float32 rounding: the members are computed as one program.
            np.testing.assert_allclose(prompt_of(mine), prompt_of(alone), rtol=0, atol=1e-5)
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-9),
                mine.opt_state,
                alone.opt_state,
            )


def dot_flops(jaxpr) -> int:
    """FLOPs of every matrix product in a jaxpr without loops, jitted calls included."""
    total = 0
    for equation in jaxpr.eqns:
        assert equation.primitive.name not in ("scan", "while"), "would have to be multiplied"
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            out = equation.outvars[0].aval.shape
            total += 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            total += dot_flops(inner) if hasattr(inner, "eqns") else 0
    return total


def flops_of(function, *args) -> int:
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return dot_flops(used)


def test_no_gradient_of_a_frozen_weight_is_formed(tiny, tiny_batch) -> None:
    apply = tiny.apply_fn()
    inputs = tiny_batch["encoder_input_tokens"], tiny_batch["decoder_input_tokens"]
    forward = flops_of(with_lengths(apply), tiny.variables, *inputs)
    step = flops_of(make_train_step(apply, SGD, Loss()), *begin_t5(tiny), tiny_batch)

    plain = flops_of(with_lengths(apply), {"params": tiny.params}, *inputs)
    everything = init_train_state({"params": tiny.params}, SGD, jax.random.key(0))
    full = flops_of(make_train_step(apply, SGD, Loss()), everything, {}, tiny_batch)
    # Forward and back once: 2. The gradients of the weights would be the third.
    assert 1.9 < step / forward < 2.3
    assert full / plain > 2.7


def test_training_lowers_the_loss_and_one_device_equals_eight(tiny, tiny_batch) -> None:
    # One layer each compiles fast; without dropout, and under SGD, runs can be compared.
    apply = tiny.apply_fn(num_encoder_layers=1, num_decoder_layers=1, dropout_rate=0.0)
    sgd = optax.sgd(0.1)
    mesh = make_mesh()
    assert mesh.shape["data"] == 8
    step = compiled(apply, sgd)
    state, frozen = begin_t5(tiny, sgd)
    spread_state, spread_frozen = jax.device_put(begin_t5(tiny, sgd), replicated(mesh))
    spread_batch = put_batch(tiny_batch, mesh)
    # Told to leave the state where it is, one executable takes its own output, step after step.
    train_step = make_train_step(apply, sgd, Loss())
    spread = jax.jit(train_step, donate_argnums=0, out_shardings=(replicated(mesh), None))
    spread = spread.lower(spread_state, spread_frozen, spread_batch).compile()
    losses = []
    for _ in range(10):
        state, metrics = step(state, frozen, tiny_batch)
        spread_state, spread_metrics = spread(spread_state, spread_frozen, spread_batch)
        losses.append(float(metrics["loss"]))
        # The sum over examples is taken device by device: float32 rounding, and ten steps of it.
        for name, value in metrics.items():
            np.testing.assert_allclose(spread_metrics[name], value, rtol=1e-4)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.98 * losses[0]
    moved = np.abs(prompt_of(state) - np.asarray(tiny.prompt)).max()
    np.testing.assert_allclose(prompt_of(spread_state), prompt_of(state), rtol=0, atol=1e-4 * moved)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("per_token", [False, True])
def test_a_weight_of_two_is_the_example_twice(tiny_batch, microbatches, per_token) -> None:
    def take(rows):
        return {name: array[np.array(rows)] for name, array in tiny_batch.items()}

    weighted = take([0, 1, 2, 3])
    weighted["decoder_loss_weights"] = weighted["decoder_loss_weights"] * [[2], [2], [1], [1]]
    step = compiled(make_apply(), loss=Loss(per_token=per_token), microbatches=microbatches)
    (one, of_weights), (two, of_copies) = (
        step(*begin(), batch) for batch in (weighted, take([0, 1, 2, 3, 0, 1]))
    )
    # Rows are summed in another order: float32 rounding.
    for name, value in of_copies.items():
        np.testing.assert_allclose(of_weights[name], value, rtol=1e-5)
    moved = prompt_of(two) - prompt_of(begin()[0])
    np.testing.assert_allclose(prompt_of(one), prompt_of(two), atol=1e-5 * np.abs(moved).max())
