"""Trained keys and values in front of the attention layers, against tokens that stand there."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from t5_ids import T5_IDS, with_lengths
from tiny import tiny_config, tiny_params

from ptjax.data.batch import make_batch, make_packed_batch
from ptjax.errors import InputError
from ptjax.models import t5
from ptjax.models.attention import swap_heads
from ptjax.models.config import T5Config
from ptjax.models.prefix import PromptStates, shared_einsum
from ptjax.models.prompted import PromptedT5, with_prompt
from ptjax.models.stacking import stack, stack_paths
from ptjax.models.t5 import Encoded
from ptjax.models.t5_family import T5_FAMILY
from ptjax.sharding.arrays import gather_layer
from ptjax.sharding.meshes import make_mesh
from ptjax.sharding.quantize import quantize_kernel
from ptjax.sharding.rules import shardings_of
from ptjax.training.loss import Loss
from ptjax.training.step import batch_loss
from ptjax.trees import flatten_paths, unflatten_paths

RNG = np.random.default_rng(0)
INPUTS = [RNG.integers(2, 64, n) for n in (12, 7, 1, 9)]
TARGETS = [RNG.integers(2, 64, n) for n in (6, 2, 4, 1)]
TYPED = RNG.integers(2, 64, 5)
"""Real target tokens, whose keys and values are a prefix."""


def config_of(kind: str, scan_layers: bool = False, **changes) -> T5Config:
    """Two layers on each side, more heads than D / K; umT5 has biases of its own in every layer."""
    sizes = {"num_heads": 4, "num_encoder_layers": 2, "num_decoder_layers": 2, "dropout_rate": 0.0}
    return tiny_config(relpos_per_layer=kind == "umt5", scan_layers=scan_layers, **sizes | changes)


def params_of(config: T5Config):
    """The same weights for layers written out and for scanned ones."""
    params = tiny_params(dataclasses.replace(config, scan_layers=False, remat="none"))
    if config.scan_layers:
        return unflatten_paths(stack_paths(flatten_paths(params), jnp.stack))
    return params


def random_prefix(config: T5Config, length: int = 3) -> PromptStates:
    shape = (6, 2, length, config.num_heads, config.head_dim)
    arrays = jax.random.normal(jax.random.key(3), shape)
    return PromptStates(*((arrays[i], arrays[i + 1]) for i in (0, 2, 4)))


def typed_and_prefixed(module: PromptedT5, rest) -> tuple[jax.Array, ...]:
    """Logits of the targets `rest` [2, 4] after TYPED: typed, and with a prefix in two ways."""
    steps = rest.shape[1]
    one = module.encode(jnp.asarray(INPUTS[:1]), encoder_lengths=jnp.array([12]))
    two = Encoded(jnp.repeat(one.states, 2, axis=0), jnp.repeat(one.segment_ids, 2, axis=0))
    typed = jnp.broadcast_to(jnp.asarray(TYPED), (2, 5))
    want = module.decode(two, jnp.concatenate([typed, rest], axis=1))[:, 5:]

    _, cache = module.decode_step(typed[:1], module.init_cache(one, 5), 0, one)
    made = stack(cache)
    targets = (swap_heads(made["self_key"][:, 0]), swap_heads(made["self_value"][:, 0]))
    prefixed = two._replace(prompt=PromptStates(None, None, targets))
    forced = module.decode(prefixed, rest)

    def step(module, cache, i):
        token = jax.lax.dynamic_slice_in_dim(rest, i, 1, axis=1)
        logits, cache = module.decode_step(token, cache, i, prefixed)
        return cache, logits[:, 0]

    along = nn.scan(step, variable_broadcast="params", split_rngs={}, out_axes=1)
    _, by_cache = along(module, module.init_cache(prefixed, steps), jnp.arange(steps))
    return want, forced, by_cache


def run_both(config: T5Config):
    rest = jnp.asarray(RNG.integers(2, 64, (2, 4)))
    run = functools.partial(PromptedT5(config).apply, method=typed_and_prefixed)
    return jax.jit(run)({"params": params_of(config)}, rest)


@pytest.mark.parametrize(("kind", "scan_layers"), [("t5", False), ("umt5", True)])
def test_a_prefix_of_target_tokens_is_those_tokens_in_front(kind, scan_layers) -> None:
    """By teacher forcing, and one at a time through the cache."""
    want, *found = run_both(config_of(kind, scan_layers))
    for got in found:  # to float32 rounding: sums over the keys in another order
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def test_a_bias_of_zero_is_not_that_of_positions_in_front(monkeypatch) -> None:
    def zeros(relpos_bias, before, queries, *others, **more):
        return jnp.zeros((1, 4, queries, before))

    monkeypatch.setattr(t5, "bias_in_front", zeros)
    want, *found = run_both(config_of("t5", scan_layers=True))
    assert all(np.abs(got - want).max() > 0.1 for got in found)


def loss_of(config: T5Config, gather=None):
    """A function `(states, params, batch) -> loss`."""
    apply_fn = PromptedT5(config, gather=gather).apply

    def loss(states, params, batch):
        variables = with_prompt({"params": params}, states)
        return batch_loss(apply_fn, Loss(), variables, batch, jax.random.key(0))

    return loss


def loss_and_grad(config: T5Config, gather=None):
    return jax.jit(jax.value_and_grad(loss_of(config, gather)))


def unpacked():
    return make_batch(INPUTS, TARGETS, input_length=12, target_length=6, ids=T5_IDS)


def assert_same(got, want) -> None:
    """To float32 rounding: the compiler sums in another order."""
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    for mine, theirs in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def packed():
    sizes = {"row_count": 2, "input_length": 24, "target_length": 12}
    rows = np.array([0, 1, 1, 1])
    return make_packed_batch(INPUTS, TARGETS, rows, ids=T5_IDS, prompt_slots=0, **sizes)


@pytest.mark.slow
def test_packed_rows_are_the_same_examples_on_a_mesh() -> None:
    """Packed, written out, against one by one: scanned, rematerialised, with FSDP on 4x2."""
    plain, scanned = config_of("t5"), config_of("t5", scan_layers=True, remat="full")
    states, params, mesh = random_prefix(plain), params_of(scanned), make_mesh(2)
    got = loss_and_grad(plain)(states, params_of(plain), packed())
    where = shardings_of({"params": params}, mesh, fsdp=True)["params"]
    of_mesh = loss_and_grad(scanned, gather_layer(mesh))(
        jax.device_put(states, NamedSharding(mesh, P())),
        jax.device_put(params, where),
        jax.device_put(unpacked(), NamedSharding(mesh, P("data"))),
    )
    assert_same(got, of_mesh)
    assert len(jax.tree.leaves(got[1])) == 6
    for of_array in jax.tree.leaves(got[1]):  # every layer trains
        assert np.abs(of_array).max(axis=(1, 2, 3)).min() > 1e-4


def test_packed_rows_of_umt5() -> None:
    config = config_of("umt5", scan_layers=True)
    run = functools.partial(jax.jit(loss_of(config)), random_prefix(config), params_of(config))
    np.testing.assert_allclose(run(packed()), run(unpacked()), rtol=1e-6)


def test_a_prompt_s_own_activations_are_that_prompt() -> None:
    """Equal to the bit, in bfloat16 over int8 kernels: `prefix_states` and the prompt's own."""
    config = config_of("t5", dtype="bfloat16")
    whole = jax.jit(lambda p: jax.tree.map(lambda x: x.astype("bfloat16"), p))(params_of(config))
    in_int8 = jax.jit(
        lambda p: {k: quantize_kernel(x) if T5_FAMILY.is_quantized(k) else x for k, x in p.items()}
    )
    params = unflatten_paths(in_int8(flatten_paths(whole)))
    variables = {
        "params": params,
        "prompt": {"prompt": jax.random.normal(jax.random.key(1), (5, 16))},
    }
    apply_fn = PromptedT5(config, attends_to_input=False).apply

    @jax.jit
    def run(variables, batch):
        made: Any = apply_fn(variables, method="prefix_states")
        float32 = jax.tree.map(lambda x: x.astype(jnp.float32), made._replace(targets=None))
        found = [
            with_lengths(apply_fn)(
                {"params": variables["params"], "prompt": prompt},
                batch["encoder_input_tokens"],
                batch["decoder_input_tokens"],
            )
            for prompt in (variables["prompt"], {"states": float32})
        ]
        return made, apply_fn(variables, method="prompt_states"), found

    made, states, (want, got) = run(variables, unpacked())
    np.testing.assert_array_equal(made.encoder, states.encoder)
    np.testing.assert_array_equal(made.decoder, states.decoder)
    np.testing.assert_array_equal(got, want)
    assert made.targets[0].shape == (2, 5, 4, 8)


def test_the_decoder_s_part_is_that_of_tokens_in_front(tiny) -> None:
    """`prefix_states` of embedded tokens has the keys of those tokens in the decoder's cache."""
    matrix = tiny.params["token_embedder"]["embedding"][TYPED]
    variables = with_prompt({"params": tiny.params}, matrix)

    def run(module):
        made = module.prefix_states()
        alone = module.backbone.prompt_states(matrix)
        nothing = Encoded(jnp.zeros((1, 1, 16)), jnp.zeros((1, 1), jnp.int32), alone)
        cache = module.init_cache(nothing, 5)
        return made, stack(module.decode_step(jnp.asarray(TYPED[None]), cache, 0, nothing)[1])

    made, cache = jax.jit(lambda v: PromptedT5(tiny.config).apply(v, method=run))(variables)
    # Rounding: the encoder's states are read as a prompt, or from the cache.
    np.testing.assert_allclose(
        made.targets[0], swap_heads(cache["self_key"][:, 0]), rtol=0, atol=1e-5
    )
    np.testing.assert_allclose(
        made.targets[1], swap_heads(cache["self_value"][:, 0]), rtol=0, atol=1e-5
    )


def test_the_gradient_over_bfloat16_adds_up_in_float32() -> None:
    rng = np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.normal(0.5, 1, (64, 2, 32, n)), jnp.bfloat16) for n in (8, 5))
    shared = jnp.asarray(rng.normal(size=(5, 2, 8)), jnp.float32)

    def plain(spec, x, shared):
        return jnp.einsum(spec, x, shared.astype(x.dtype))

    def loss(shared, x, einsum):
        return jnp.sum((einsum("bhqd,phd->bhqp", x, shared) * weights).astype(jnp.float32))

    run = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    want = np.einsum("bhqp,bhqd->phd", *(np.asarray(a, np.float64) for a in (weights, x)))
    (got, of_x), (rounded, plain_of_x) = (run(shared, x, f) for f in (shared_einsum, plain))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert np.abs(rounded / want - 1).max() > 1e-3
    np.testing.assert_array_equal(of_x, plain_of_x)


@pytest.mark.parametrize("name", PromptStates._fields)
def test_a_prefix_without_positions_is_refused(tiny, name) -> None:
    empty = jnp.zeros((2, 0, 4, 8))
    variables = with_prompt(
        {"params": tiny.params}, PromptStates(None, None)._replace(**{name: (empty, empty)})
    )
    tokens = jnp.ones((1, 2), jnp.int32)
    with pytest.raises(InputError, match=rf"PromptStates.{name} has length 0; leave it out"):
        jax.eval_shape(tiny.jitted(), variables, tokens, tokens)
