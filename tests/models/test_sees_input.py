"""Prompts that do not see the input, and packed rows: both against the plain network."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from t5_ids import T5_IDS, decode, with_lengths

from ptjax.data.batch import make_batch, make_packed_batch
from ptjax.models.attention import Mask
from ptjax.models.config import T5Config
from ptjax.models.prompted import make_apply_fn, with_prompt
from ptjax.models.t5 import T5, Encoded, parameter_shapes
from ptjax.planning.flops import count_flops
from ptjax.training.loss import Loss
from ptjax.training.step import batch_loss

RNG = np.random.default_rng(0)
INPUTS = [RNG.integers(2, 64, n) for n in (12, 7, 1, 9, 12, 3, 5, 10)]
TARGETS = [RNG.integers(2, 64, n) for n in (6, 2, 4, 1, 3, 6, 5, 2)]
# Rows of three, of one and of four examples; the last row is left empty.
ROWS = np.array([0, 0, 0, 1, 2, 2, 2, 2])
KEY = jax.random.key(0)


def packed(prompt_slots: int) -> dict[str, np.ndarray]:
    return make_packed_batch(
        INPUTS,
        TARGETS,
        ROWS,
        row_count=4,
        input_length=56,
        target_length=18,
        ids=T5_IDS,
        prompt_slots=prompt_slots,
    )


@pytest.fixture(scope="module")
def unpacked() -> dict[str, np.ndarray]:
    return make_batch(INPUTS, TARGETS, input_length=12, target_length=6, ids=T5_IDS)


@functools.cache
def value_and_grad(config: T5Config, attends_to_input: bool):
    """Jitted `(prompt, params, batch) -> (loss, dP)` without dropout."""
    apply_fn = make_apply_fn(dataclasses.replace(config, dropout_rate=0.0), attends_to_input)

    def loss(prompt, params, batch):
        return batch_loss(apply_fn, Loss(), with_prompt({"params": params}, prompt), batch, KEY)

    return jax.jit(jax.value_and_grad(loss))


def assert_same(got, want, tolerance=1e-5) -> None:
    """Losses alike, and gradients to `tolerance` of the largest element: float32 rounding."""
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    scale = np.abs(want[1]).max()
    np.testing.assert_allclose(got[1], want[1], rtol=0, atol=tolerance * scale)


def masked_network(tiny, prompt, batch):
    """Logits of plain T5 run on [P; E] with a mask that forbids prompt -> input."""
    module, length = T5(tiny.config), len(prompt)
    tokens = batch["encoder_input_tokens"]
    rows, total = len(tokens), length + tokens.shape[1]
    real = np.concatenate([np.ones((rows, length), bool), tokens > 0], axis=1)
    mask = np.broadcast_to(real[:, None], (rows, total, total)).copy()
    mask[:, :length, length:] = False
    mask = jnp.asarray(mask)

    def run(module, prompt):
        embedded = module.embed(jnp.asarray(tokens))
        prompt = jnp.broadcast_to(prompt, (rows, *prompt.shape))
        states = module.encode_embedded(
            jnp.concatenate([prompt, embedded], axis=1), Mask(seen=mask)
        )
        encoded = Encoded(states, jnp.asarray(real, jnp.int32))
        return module.decode(encoded, jnp.asarray(batch["decoder_input_tokens"]))

    return module.apply({"params": tiny.params}, prompt, method=run)


def test_an_unseeing_prompt_is_plain_t5_under_a_mask(tiny, unpacked) -> None:
    targets, weights = unpacked["decoder_target_tokens"], unpacked["decoder_loss_weights"]

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def want(prompt):
        logits = masked_network(tiny, prompt, unpacked)
        return Loss()(logits, jnp.asarray(targets), jnp.asarray(weights)), logits

    (loss, logits), gradient = want(tiny.prompt)
    got = value_and_grad(tiny.config, False)(tiny.prompt, tiny.params, unpacked)
    assert_same(got, (loss, gradient))
    tokens = unpacked["encoder_input_tokens"], unpacked["decoder_input_tokens"]
    blind = jax.jit(with_lengths(make_apply_fn(tiny.config, False)))(tiny.variables, *tokens)
    np.testing.assert_allclose(blind, logits, rtol=0, atol=1e-5)
    # The paper's prompt is another function: the mask is felt.
    assert np.abs(tiny.jitted()(tiny.variables, *tokens) - blind).max() > 1e-3


def test_a_copy_for_every_row_is_the_same_prompt(tiny, unpacked) -> None:
    run = value_and_grad(tiny.config, False)
    copies = jnp.broadcast_to(tiny.prompt, (8, *tiny.prompt.shape))
    loss, gradients = run(copies, tiny.params, unpacked)
    assert_same(run(tiny.prompt, tiny.params, unpacked), (loss, gradients.sum(0)))


@pytest.mark.parametrize("attends_to_input", [True, False])
def test_packed_equals_unpacked(tiny, unpacked, attends_to_input) -> None:
    run = value_and_grad(tiny.config, attends_to_input)
    rows = packed(len(tiny.prompt) if attends_to_input else 0)
    assert_same(run(tiny.prompt, tiny.params, rows), run(tiny.prompt, tiny.params, unpacked))


@pytest.mark.parametrize("attends_to_input", [True, False])
def test_packed_logits_of_an_example_in_third_place(tiny, unpacked, attends_to_input) -> None:
    apply_fn = jax.jit(with_lengths(make_apply_fn(tiny.config, attends_to_input)))
    rows = packed(len(tiny.prompt) if attends_to_input else 0)
    names = "encoder_input_tokens", "decoder_input_tokens"
    segments = rows["encoder_segment_ids"], rows["decoder_segment_ids"]
    got = apply_fn(tiny.variables, *(rows[name] for name in names), *segments)
    want = apply_fn(tiny.variables, *(unpacked[name] for name in names))
    third = want[2, : len(TARGETS[2])]
    np.testing.assert_allclose(got[0, 8:12], third, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attends_to_input", [True, False])
def test_twenty_steps_of_sgd_packed_and_unpacked(tiny, unpacked, attends_to_input) -> None:
    run = value_and_grad(tiny.config, attends_to_input)
    rows = packed(len(tiny.prompt) if attends_to_input else 0)
    prompts = [tiny.prompt, tiny.prompt]
    for _ in range(20):
        steps = [run(p, tiny.params, b) for p, b in zip(prompts, (rows, unpacked), strict=True)]
        prompts = [p - 0.01 * g for p, (_, g) in zip(prompts, steps, strict=True)]
    assert np.abs(prompts[1] - tiny.prompt).max() > 0.01
    np.testing.assert_allclose(prompts[0], prompts[1], rtol=0, atol=1e-5)


def test_compiled_states_say_the_same(tiny, unpacked) -> None:
    apply_fn = with_lengths(make_apply_fn(tiny.config, False))
    tokens = unpacked["encoder_input_tokens"], unpacked["decoder_input_tokens"]
    states = jax.jit(apply_fn, static_argnames="method")(tiny.variables, method="prompt_states")
    run = jax.jit(apply_fn)
    got = run(with_prompt({"params": tiny.params}, states), *tokens)
    np.testing.assert_allclose(got, run(tiny.variables, *tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_decoding_reads_the_shared_prompt(tiny, unpacked, num_beams) -> None:
    copies = jnp.broadcast_to(tiny.prompt, (8, *tiny.prompt.shape))
    found = [
        decode(
            make_apply_fn(tiny.config, False),
            with_prompt({"params": tiny.params}, prompt),
            unpacked["encoder_input_tokens"],
            max_length=6,
            num_beams=num_beams,
        )
        for prompt in (tiny.prompt, copies)
    ]
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=0, atol=1e-4)


def test_the_prompt_costs_its_positions_once() -> None:
    """FLOPs go with B * T + P, but for attention to the prompt's keys."""
    config = T5Config(
        vocab_size=128,
        emb_dim=64,
        num_heads=6,
        num_encoder_layers=3,
        num_decoder_layers=2,
        head_dim=16,
        mlp_dim=96,
    )
    params, inputs, targets = parameter_shapes(config), 32, 8
    apply_fn = make_apply_fn(config, False)

    def forward(rows: int, length: int) -> int:
        variables = {"params": params}
        if length:
            matrix = jax.ShapeDtypeStruct((length, config.emb_dim), "float32")
            variables["prompt"] = {"prompt": matrix}
        shapes = [jax.ShapeDtypeStruct((rows, n), "int32") for n in (inputs, targets)]
        return count_flops(with_lengths(apply_fn), variables, *shapes)

    def attention_to_prompt(rows: int, length: int) -> int:
        queries = inputs * config.num_encoder_layers + targets * config.num_decoder_layers
        return 4 * rows * length * queries * config.num_heads * config.head_dim

    alone = forward(8, 100) - forward(8, 0) - attention_to_prompt(8, 100)
    assert alone > 0
    assert forward(64, 100) - forward(64, 0) - attention_to_prompt(64, 100) == alone
