from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from ptjax.methods.base import Method
from ptjax.methods.model_tuning import ModelTuning
from ptjax.methods.prompt_tuning import PromptTuning
from ptjax.models.config import T5Config
from ptjax.models.prompted import PromptedT5
from ptjax.models.t5 import parameter_shapes
from ptjax.planning.flops import count_flops, step_flops
from ptjax.training import freeze as freezing
from ptjax.training.optimizer import Adafactor

B, T, P, L = 32, 512, 100, 16


def shape(*sizes: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def t5_1_1(width: int, heads: int, layers: int, mlp: int) -> T5Config:
    return T5Config(
        vocab_size=32128,
        emb_dim=width,
        num_heads=heads,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        head_dim=64,
        mlp_dim=mlp,
    )


SMALL = t5_1_1(512, 6, 8, 1024)
BASE, XXL = (  # scanned layers are traced once
    dataclasses.replace(t5_1_1(*sizes), scan_layers=True)
    for sizes in ((768, 12, 12, 2048), (4096, 64, 24, 10240))
)


def test_a_product_counts_two_per_multiplied_pair() -> None:
    assert count_flops(jnp.dot, shape(3, 5), shape(5, 7)) == 2 * 3 * 5 * 7
    assert count_flops(lambda x, w: jnp.tanh(x @ w), shape(2, 3, 5), shape(5, 7)) == 2 * 6 * 5 * 7
    scores = count_flops(
        lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k), shape(2, 3, 4, 5), shape(2, 7, 4, 5)
    )
    assert scores == 2 * (2 * 4 * 3 * 7) * 5
    assert count_flops(lambda x: jnp.exp(x) + jnp.sum(x), shape(3, 5)) == 0


def test_a_scan_counts_as_often_as_it_turns() -> None:
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    once = 2 * 3 * 5 * 5
    assert count_flops(layers, shape(3, 5), shape(11, 5, 5)) == 11 * once
    # Forward, and the two products of the way back.
    gradient = jax.grad(lambda x, w: jnp.sum(layers(x, w)), argnums=(0, 1))
    assert count_flops(gradient, shape(3, 5), shape(11, 5, 5)) == 3 * 11 * once
    assert count_flops(jax.jit(jax.jit(layers)), shape(3, 5), shape(11, 5, 5)) == 11 * once


def test_a_gradient_counts_what_it_is_taken_for() -> None:
    def loss(x, w1, w2):
        return jnp.sum(jnp.square(jnp.tanh(x @ w1) @ w2))

    shapes = shape(3, 5), shape(5, 7), shape(7, 9)
    first, second = 2 * 3 * 5 * 7, 2 * 3 * 7 * 9
    assert count_flops(loss, *shapes) == first + second
    # Frozen weights: every product once more, for the gradient of what came in.
    assert count_flops(jax.grad(loss), *shapes) == 2 * (first + second)
    # Weights alone: the input's own gradient is not needed.
    assert count_flops(jax.grad(loss, argnums=(1, 2)), *shapes) == 2 * first + 3 * second
    # What is rematerialised runs forward, again, and back.
    remat = jax.value_and_grad(jax.checkpoint(loss))
    assert count_flops(remat, *shapes) == 3 * (first + second)


def test_what_no_result_depends_on_does_not_count() -> None:
    def wasteful(x, w):
        x @ (w @ w)
        return x @ w

    assert count_flops(wasteful, shape(3, 5), shape(5, 5)) == 2 * 3 * 5 * 5
    assert count_flops(lambda x, w: jax.jit(wasteful)(x, w), shape(3, 5), shape(5, 5)) == 150


def test_a_branch_counts_as_its_dearest() -> None:
    def either(flag, x, w):
        return jax.lax.cond(flag, lambda: x @ w, lambda: x @ w @ w)

    assert count_flops(either, shape(dtype="bool"), shape(3, 5), shape(5, 5)) == 2 * 150


def test_unknown_work_is_an_error() -> None:
    def loop(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x @ w, x)

    with pytest.raises(ValueError, match="while"):
        count_flops(loop, shape(3, 5), shape(5, 5))
    with pytest.raises(ValueError, match="conv_general_dilated"):
        count_flops(lambda x, w: jnp.convolve(x, w), shape(9), shape(3))


def of_method(config: T5Config, method: Method) -> tuple[int, int]:
    """(forward, step) at the benchmark's shapes."""
    variables = {"params": parameter_shapes(config)} | method.variable_shapes(config)
    tokens = shape(B, L, dtype="int32")
    batch = {
        "encoder_input_tokens": shape(B, T, dtype="int32"),
        "encoder_lengths": shape(B, dtype="int32"),
        "decoder_input_tokens": tokens,
        "decoder_target_tokens": tokens,
        "decoder_loss_weights": shape(B, L),
    }
    freeze = freezing.make_freeze(variables, method.freeze_rules())
    optimizer = freezing.freeze_updates(Adafactor().make(), freeze)
    return step_flops(PromptedT5(config).apply, variables, freeze, batch, optimizer)


def test_the_forward_pass_of_t5_has_the_textbook_count() -> None:
    forward, _ = of_method(SMALL, PromptTuning(length=P))
    S, D, F, J, V = P + T, SMALL.emb_dim, SMALL.mlp_dim, SMALL.num_heads * 64, SMALL.vocab_size
    attention = 4 * D * J
    mlp = 3 * D * F
    encoder = S * (attention + mlp) + 2 * S * S * J
    decoder = L * (2 * attention + mlp) - 2 * L * D * J + 2 * S * D * J + 2 * L * (L + S) * J
    assert forward == 2 * B * (8 * (encoder + decoder) + L * D * V)


@pytest.mark.parametrize("config", [SMALL, BASE, XXL], ids=["small", "base", "xxl"])
def test_a_prompt_step_computes_no_gradient_of_a_weight(config) -> None:
    forward, step = of_method(config, PromptTuning(length=P))
    assert 2.0 < step / forward <= 2.25


def test_model_tuning_is_seen_to_compute_them() -> None:
    forward, step = of_method(SMALL, ModelTuning())
    assert 2.9 < step / forward < 3.1
