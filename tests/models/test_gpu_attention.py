"""What cuDNN is asked to compute is plain attention; here jax computes it without cuDNN.

`test_attention.py` has the Triton kernels.
"""

from __future__ import annotations

import dataclasses
import functools
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
from ptjax.sharding.attention import GpuAttention, choose_attention
from ptjax.sharding.meshes import make_mesh
from ptjax.training.loss import Loss
from ptjax.training.step import batch_loss

MESH = make_mesh((1, 1), jax.devices()[:1])
SAME = GpuAttention(MESH, "xla")
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
    [{"queries": 2}, {"mask": Mask(seen=jnp.ones((1, 12, 12), bool))}],
    ids=["few queries", "causal"],
)
def test_where_it_cannot_be_used_it_is_plain_attention(changes, calls) -> None:
    queries, source = inputs(**changes)
    found, wanted = SAME(queries, (source,)), plain_attention(queries, (source,))
    assert not calls and (found == wanted).all()
    assert (GpuAttention(MESH)(queries, (source,)) == wanted).all()  # float32, too


ONES = jnp.ones((2, 12), jnp.int32)


@pytest.mark.parametrize(
    "changes",
    [{"keys": 13, "bias": None}, {"mask": Mask(ONES)}, {"mask": Mask(ONES, ONES)}],
    ids=["odd keys", "no lengths", "packed"],
)
def test_what_cudnn_cannot_compute_is_tritons(changes, calls) -> None:
    queries, source = inputs(**changes)
    found = jax.make_jaxpr(lambda x: SAME(x, (source,)))(queries)
    assert not calls and "pallas_call" in str(found)


def test_a_prompt_in_front_keeps_the_lengths(calls) -> None:
    """In a T5, and for the prompt's gradient; the decoder's self-attention stays plain."""
    config = dataclasses.replace(tiny_config(num_encoder_layers=2, head_dim=16), dropout_rate=0.0)
    params, prompt = tiny_params(config), jax.random.normal(jax.random.key(1), (4, config.emb_dim))
    rng = np.random.default_rng(0)
    texts = [rng.integers(2, 64, n) for n in (12, 7, 1)]
    batch = make_batch(texts, texts, input_length=12, target_length=12, ids=T5_IDS)
    batch = jax.tree.map(jnp.asarray, batch)

    @functools.partial(jax.jit, static_argnums=1)
    @jax.value_and_grad
    def loss(prompt: jax.Array, attend: Any) -> jax.Array:
        variables = {"params": params, "prompt": {"prompt": prompt}}
        apply_fn = make_apply_fn(config, attend=attend)
        return batch_loss(apply_fn, Loss(), variables, batch, jax.random.key(0))

    found = loss(prompt, SAME)
    assert len(calls) == config.num_encoder_layers
    assert all(call["key_value_seq_lengths"] is not None for call in calls)
    wanted = loss(prompt, plain_attention)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), found, wanted)


def test_gpus_have_kernels_of_their_own_where_fused_attention_is_asked_for() -> None:
    chosen = [choose_attention(x, "NVIDIA H200") for x in ("auto", "plain", "fused")]
    assert chosen == ["plain", "plain", "gpu"]


def test_without_cudnn_it_says_what_to_install() -> None:
    queries, source = inputs()
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (queries, source[:3]))
    with pytest.raises(InputError, match=r"needs cuDNN on GPUs .*: pip install nvidia-c"):
        GpuAttention(MESH)(low[0], (Source(*low[1], source.mask),))


def test_gpus_before_ampere_are_refused() -> None:
    assert choose_attention("fused", "NVIDIA A100-SXM4-40GB", "8.0") == "gpu"
    assert choose_attention("auto", "Tesla V100-SXM2-16GB", "7.0") == "plain"
    with pytest.raises(InputError, match=r"Ampere on .* not Tesla V100.* \(7\.0\)"):
        choose_attention("fused", "Tesla V100-SXM2-16GB", "7.0")


def test_other_gpus_have_no_fused_attention() -> None:
    assert choose_attention("auto", "AMD Instinct MI300X") == "plain"
    with pytest.raises(InputError, match="needs a TPU or an NVIDIA GPU, not AMD Instinct"):
        choose_attention("fused", "AMD Instinct MI300X")
