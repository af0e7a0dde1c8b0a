"""The train step: compiled once, donated, and no gradient of a frozen weight in it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.interpreters import partial_eval

from ptjax.models.prompted import with_prompt
from ptjax.scale.sharding import make_mesh, put_batch, replicated
from ptjax.training.loss import Loss
from ptjax.training.optimizer import Adafactor
from ptjax.training.step import init_train_state, make_train_step

# One layer each is enough here and compiles fast; without dropout, runs can be compared.
SMALL = {"num_encoder_layers": 1, "num_decoder_layers": 1}
EXACT = SMALL | {"dropout_rate": 0.0}
SGD = optax.sgd(1e-2)


def begin(tiny, optimizer=SGD, seed=0):
    """(state, frozen), with a state of its own: the step donates it."""
    prompt = {"prompt": {"prompt": jnp.array(tiny.prompt)}}
    return init_train_state(prompt, optimizer, jax.random.key(seed)), {"params": tiny.params}


def compiled(tiny, loss=Loss(), *, optimizer=SGD, microbatches=1, **changes):  # noqa: B008
    step = make_train_step(tiny.apply_fn(**changes), optimizer, loss, microbatches=microbatches)
    return jax.jit(step, donate_argnums=0)


def prompt_of(state):
    return np.asarray(state.trainable["prompt"]["prompt"])


def test_compiles_once_per_batch_shape_and_donates_its_state(tiny, tiny_batch) -> None:
    step = compiled(tiny, optimizer=Adafactor().make(), **SMALL)
    state, frozen = begin(tiny, Adafactor().make())
    shorter = {name: array[:, :6] for name, array in tiny_batch.items()}
    for number in range(6):
        old = state
        state, metrics = step(state, frozen, shorter if number % 2 else tiny_batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.trainable))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.opt_state) if leaf.ndim)
        assert math.isfinite(metrics["loss"])
    assert step._cache_size() == 2
    assert state.step == 6
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))


def test_metrics_are_the_loss_the_tokens_and_the_gradient(tiny, tiny_batch) -> None:
    state, frozen = begin(tiny)
    _, metrics = compiled(tiny, **EXACT)(state, frozen, tiny_batch)

    def loss(prompt):
        inputs = tiny_batch["encoder_input_tokens"], tiny_batch["decoder_input_tokens"]
        logits = tiny.apply_fn(**EXACT)(with_prompt(frozen, prompt), *inputs)
        targets, weights = tiny_batch["decoder_target_tokens"], tiny_batch["decoder_loss_weights"]
        return Loss()(logits, targets, weights)

    value, gradient = jax.jit(jax.value_and_grad(loss))(tiny.prompt)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], jnp.linalg.norm(gradient), rtol=1e-5)
    assert metrics["target_tokens"] == (tiny_batch["decoder_target_tokens"] > 0).sum()


@pytest.mark.parametrize("per_token", [False, True])
def test_microbatches_add_up_to_the_whole_batch(tiny, tiny_batch, per_token) -> None:
    # Uneven weights: the parts of the batch do not count the same.
    weights = tiny_batch["decoder_loss_weights"] * np.arange(8)[:, None] / 4
    batch = tiny_batch | {"decoder_loss_weights": weights.astype(np.float32)}
    loss = Loss(per_token=per_token)
    results = []
    for microbatches in (1, 4):
        state, frozen = begin(tiny)
        step = compiled(tiny, loss, microbatches=microbatches, **EXACT)
        state, metrics = step(state, frozen, batch)
        results.append((prompt_of(state) - np.asarray(tiny.prompt), jax.device_get(metrics)))
    (whole, whole_metrics), (parts, part_metrics) = results
    # Sums of float32 in another order: 1e-6 of the largest.
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-5 * np.abs(whole).max())
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(part_metrics[name], value, rtol=1e-5)


def test_dropout_follows_the_key_and_the_step(tiny, tiny_batch) -> None:
    still = optax.set_to_zero()  # the prompt stays, so only dropout can change the loss
    step = compiled(tiny, optimizer=still, **SMALL)

    def losses(seed):
        state, frozen = begin(tiny, still, seed)
        out = []
        for _ in range(3):
            state, metrics = step(state, frozen, tiny_batch)
            out.append(float(metrics["loss"]))
        return out

    first = losses(0)
    assert len(set(first)) == 3
    assert losses(0) == first
    assert losses(1) != first


def test_microbatches_draw_different_dropout(tiny, tiny_batch) -> None:
    # The same two examples four times: with one mask for all parts, the loss is 4 times a part's.
    batch = {name: np.tile(array[:2], (4, 1)) for name, array in tiny_batch.items()}
    small = {name: array[:2] for name, array in tiny_batch.items()}
    state, frozen = begin(tiny)
    keys = jax.random.split(jax.random.fold_in(state.key, 0), 4)
    _, metrics = compiled(tiny, microbatches=4, **SMALL)(state, frozen, batch)

    @jax.jit
    def part(key):
        inputs = small["encoder_input_tokens"], small["decoder_input_tokens"]
        logits = tiny.apply_fn(**SMALL)(tiny.variables, *inputs, train=True, rngs={"dropout": key})
        return Loss()(logits, small["decoder_target_tokens"], small["decoder_loss_weights"])

    losses = [float(part(key)) for key in keys]
    assert len(set(losses)) == 4
    np.testing.assert_allclose(metrics["loss"], sum(losses), rtol=1e-5)


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
    state, frozen = begin(tiny)
    inputs = tiny_batch["encoder_input_tokens"], tiny_batch["decoder_input_tokens"]
    forward = flops_of(lambda v: apply(v, *inputs), tiny.variables)
    step = flops_of(make_train_step(apply, SGD, Loss()), state, frozen, tiny_batch)

    everything = init_train_state({"params": tiny.params}, SGD, jax.random.key(0))
    full = flops_of(make_train_step(apply, SGD, Loss()), everything, {}, tiny_batch)
    plain = flops_of(lambda v: apply(v, *inputs), {"params": tiny.params})
    # Forward and back once: 2. The gradients of the weights would be the third.
    assert 1.9 < step / forward < 2.3
    assert full / plain > 2.7


def test_training_lowers_the_loss_of_a_fixed_batch(tiny, tiny_batch) -> None:
    optimizer = Adafactor(learning_rate=0.1).make()
    step = compiled(tiny, optimizer=optimizer, **EXACT)
    state, frozen = begin(tiny, optimizer)
    losses = []
    for _ in range(60):
        state, metrics = step(state, frozen, tiny_batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]


def test_one_device_and_eight_agree(tiny, tiny_batch) -> None:
    state, frozen = begin(tiny)
    alone, alone_metrics = compiled(tiny, **EXACT)(state, frozen, tiny_batch)

    mesh = make_mesh()
    assert mesh.shape["data"] == 8
    step = compiled(tiny, **EXACT)
    state, frozen = jax.device_put(begin(tiny), replicated(mesh))
    batch = put_batch(tiny_batch, mesh)
    together, metrics = step(state, frozen, batch)
    moved = prompt_of(alone) - np.asarray(tiny.prompt)
    # The sum over examples is taken device by device: float32 rounding, 1e-6 of the largest.
    np.testing.assert_allclose(
        prompt_of(together), prompt_of(alone), rtol=0, atol=1e-5 * np.abs(moved).max()
    )
    for name, value in alone_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)

    # The state stays where it was put, so the second step is not compiled again.
    assert together.trainable["prompt"]["prompt"].sharding.is_equivalent_to(replicated(mesh), 2)
    step(together, frozen, batch)
    assert step._cache_size() == 1
