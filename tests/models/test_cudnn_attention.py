"""What cuDNN is asked to compute is plain attention; here jax computes it without cuDNN."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from t5_ids import T5_IDS
from tiny import tiny_config, tiny_params

from ptjax.data.batch import make_batch
from ptjax.errors import InputError
from ptjax.models.attention import Mask, Source, plain_attention
from ptjax.models.prompted import make_apply_fn
from ptjax.sharding.attention import CudnnAttention, choose_attention
from ptjax.training.loss import Loss
from ptjax.training.step import batch_loss

SAME = CudnnAttention("xla")
LENGTHS = np.array([[12], [5]])


@pytest.fixture
def calls(monkeypatch) -> list[dict[str, Any]]:
    """The arguments of every call of jax's attention."""
    made, real = [], jax.nn.dot_product_attention

    def record(*arrays: Any, **settings: Any) -> jax.Array:
        made.append(settings)
        return real(*arrays, **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    return made


def inputs(keys: int = 12, queries: int = 12, **changes: Any) -> tuple[jax.Array, Source]:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    lengths = jnp.asarray(LENGTHS[:, 0], jnp.int32)
    mask = Mask(jnp.asarray(np.arange(keys) < LENGTHS, jnp.int32), lengths=lengths)
    source = Source(draw(2, keys, 3, 16), draw(2, keys, 3, 16), draw(1, 3, queries, keys), mask)
    return draw(2, queries, 3, 16) / 4, source._replace(**changes)


def results(attend: Any, queries: jax.Array, source: Source) -> tuple[jax.Array, Any]:
    """The output, and the gradients of queries, keys, values and bias."""

    def scalar(queries: jax.Array, keys: jax.Array, values: jax.Array, bias: Any) -> jax.Array:
        made = attend(queries, (source._replace(keys=keys, values=values, bias=bias),))
        return jnp.sum(jnp.sin(3 * made))

    arrays = queries, source.keys, source.values, source.bias
    return attend(queries, (source,)), jax.grad(scalar, range(4))(*arrays)


KEPT = jnp.asarray(np.random.default_rng(1).random((2, 3, 1, 12)) > 0.3, jnp.float32) / 0.7


@pytest.mark.parametrize(
    "changes",
    [{}, {"keep": KEPT}, {"bias": None}, {"mask": Mask()}],
    ids=["lengths", "dropout", "no bias", "no mask"],
)
def test_output_and_gradients_are_those_of_plain_attention(changes, calls) -> None:
    queries, source = inputs(**changes)
    found, wanted = results(SAME, queries, source), results(plain_attention, queries, source)
    assert len(calls) == 2
    # float32 sums in another order.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6), found, wanted)


@pytest.mark.parametrize(
    "changes",
    [
        {"queries": 2},
        {"keys": 13, "bias": None},
        {"mask": Mask(jnp.ones((2, 12), jnp.int32))},
        {"mask": Mask(jnp.ones((2, 12), jnp.int32), jnp.ones((2, 12), jnp.int32))},
        {"mask": Mask(seen=jnp.ones((1, 12, 12), bool))},
    ],
    ids=["few queries", "odd keys", "no lengths", "packed", "causal"],
)
def test_where_it_cannot_be_used_it_is_plain_attention(changes, calls) -> None:
    queries, source = inputs(**changes)
    found, wanted = SAME(queries, (source,)), plain_attention(queries, (source,))
    assert not calls and (found == wanted).all()
    assert (CudnnAttention()(queries, (source,)) == wanted).all()  # float32, too


def test_a_prompt_in_front_keeps_the_lengths(calls) -> None:
    """In a T5, and for the prompt's gradient; cross-attention and the decoder stay plain."""
    config = dataclasses.replace(tiny_config(num_encoder_layers=2), dropout_rate=0.0)
    prompt = jax.random.normal(jax.random.key(1), (4, config.emb_dim))
    rng = np.random.default_rng(0)
    texts = [rng.integers(2, 64, n) for n in (12, 7, 1)]
    batch = make_batch(texts, texts, input_length=12, target_length=12, ids=T5_IDS)
    batch = jax.tree.map(jnp.asarray, batch)

    def loss(prompt: jax.Array, attend: Any) -> jax.Array:
        variables = {"params": tiny_params(config), "prompt": {"prompt": prompt}}
        apply_fn = make_apply_fn(config, attend=attend)
        return batch_loss(apply_fn, Loss(), variables, batch, jax.random.key(0))

    found = jax.value_and_grad(loss)(prompt, SAME)
    assert len(calls) == config.num_encoder_layers
    assert calls[0]["key_value_seq_lengths"].tolist() == [4 + 12, 4 + 7, 4 + 1]
    wanted = jax.value_and_grad(loss)(prompt, plain_attention)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), found, wanted)


def test_gpus_take_cudnn_where_fused_attention_is_asked_for() -> None:
    chosen = [choose_attention(x, "NVIDIA H200") for x in ("auto", "plain", "fused")]
    assert chosen == ["plain", "plain", "cudnn"]


def test_other_gpus_have_no_fused_attention() -> None:
    assert choose_attention("auto", "AMD Instinct MI300X") == "plain"
    with pytest.raises(InputError, match="needs a TPU or an NVIDIA GPU, not AMD Instinct"):
        choose_attention("fused", "AMD Instinct MI300X")
