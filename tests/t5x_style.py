"""A network of the form of T5X's, under T5X's parameter names; it stands in for T5X, not on PyPI.

What `ptjax.flax_module` asks of a module, and no more: `encode`, `decode`, `token_embedder` and a
cache of [B, H, K, L] with a count, as T5X keeps it. `config` is a `T5Config`, for its sizes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

init = nn.initializers.normal(0.5)


def norm(name: str) -> nn.RMSNorm:
    return nn.RMSNorm(1e-6, name=name)


def buckets(config: Any, length: int, *, causal: bool) -> jax.Array:
    """Which bucket each (query, key) falls into, T5's: exact up to half of them, then by logs."""
    away = jnp.arange(length)[:, None] - jnp.arange(length)  # how far the key lies before
    count, first = config.relpos_buckets, jnp.zeros_like(away)
    if not causal:
        count //= 2
        first, away = jnp.where(away < 0, count, 0), jnp.abs(away)
    away, exact = jnp.maximum(away, 0), count // 2
    ratio = jnp.log(jnp.maximum(away, 1) / exact) / jnp.log(config.relpos_max_distance / exact)
    far = jnp.minimum(exact + (ratio * (count - exact)).astype(int), count - 1)
    return first + jnp.where(away < exact, away, far)


class RelativeBias(nn.Module):
    config: Any

    @nn.compact
    def __call__(self, length: int, *, causal: bool) -> jax.Array:
        shape = self.config.num_heads, self.config.relpos_buckets
        table = self.param("rel_embedding", init, shape)
        return table[:, buckets(self.config, length, causal=causal)][None]


class Attention(nn.Module):
    config: Any

    @nn.compact
    def __call__(self, x: Any, source: Any, bias: Any, mask: Any, length: int | None) -> Any:
        heads, size = self.config.num_heads, self.config.head_dim

        def project(name: str, y: Any) -> Any:
            y = nn.Dense(heads * size, use_bias=False, kernel_init=init, name=name)(y)
            return jnp.moveaxis(y.reshape(*y.shape[:2], heads, size), 1, -1)  # [B, H, K, l]

        query, key, value = project("query", x), project("key", source), project("value", source)
        if length is not None:
            filled = self.has_variable("cache", "cached_key")
            shape = (*key.shape[:-1], length)
            keys = self.variable("cache", "cached_key", jnp.zeros, shape)
            values = self.variable("cache", "cached_value", jnp.zeros, shape)
            index = self.variable("cache", "cache_index", lambda: jnp.int32(0))
            if filled:
                place = index.value
                key = keys.value = jax.lax.dynamic_update_slice(keys.value, key, (0, 0, 0, place))
                value = values.value = jax.lax.dynamic_update_slice(
                    values.value, value, (0, 0, 0, place)
                )
                index.value, mask = place + 1, (jnp.arange(length) <= place)[None, None, None]
                bias = jax.lax.dynamic_slice_in_dim(bias, place, 1, axis=2)
        scores = jnp.where(mask, jnp.einsum("bhkq,bhks->bhqs", query, key) + bias, -1e10)
        y = jnp.einsum("bhqs,bhks->bqhk", nn.softmax(scores), value)
        y = y.reshape(*y.shape[:2], heads * size)
        return nn.Dense(x.shape[-1], use_bias=False, kernel_init=init, name="out")(y)


class Mlp(nn.Module):
    config: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        gate, *linear = self.config.mlp_activations
        names = ("wi_0", "wi_1") if linear else ("wi",)
        made = [
            nn.Dense(self.config.mlp_dim, use_bias=False, kernel_init=init, name=name)(x)
            for name in names
        ]
        y = getattr(nn, gate)(made[0]) * (made[1] if linear else 1)
        return nn.Dense(x.shape[-1], use_bias=False, kernel_init=init, name="wo")(y)


class Layer(nn.Module):
    config: Any
    decoder: bool

    @nn.compact
    def __call__(self, x: Any, bias: Any, mask: Any, source: Any, length: Any) -> Any:
        own = "self_attention" if self.decoder else "attention"
        y = norm(f"pre_{own}_layer_norm")(x)
        x += Attention(self.config, name=own)(y, y, bias, mask, length)
        if self.decoder:
            y, (states, readable) = norm("pre_cross_attention_layer_norm")(x), source
            attend = Attention(self.config, name="encoder_decoder_attention")
            x += attend(y, states, 0.0, readable, None)
        return x + Mlp(self.config, name="mlp")(norm("pre_mlp_layer_norm")(x))


class Stack(nn.Module):
    config: Any
    embed: nn.Module
    decoder: bool = False

    @nn.compact
    def __call__(
        self, tokens: Any, mask: Any, train: bool, source: Any = None, length: int | None = None
    ) -> Any:
        config, stack = self.config, "decoder" if self.decoder else "encoder"
        bias = RelativeBias(config, name="relpos_bias")(
            length or tokens.shape[1], causal=self.decoder
        )
        x = nn.Dropout(config.dropout_rate)(self.embed(tokens), deterministic=not train)
        for i in range(getattr(config, f"num_{stack}_layers")):
            x = Layer(config, self.decoder, name=f"layers_{i}")(x, bias, mask, source, length)
        x = norm(f"{stack}_norm")(x)
        if not self.decoder:
            return x
        if config.logits_via_embedding:
            return self.embed.attend(x) / jnp.sqrt(x.shape[-1])
        return nn.Dense(config.vocab_size, use_bias=False, kernel_init=init, name="logits_dense")(x)


class Transformer(nn.Module):
    config: Any

    def setup(self) -> None:
        self.token_embedder = nn.Embed(
            self.config.vocab_size, self.config.emb_dim, embedding_init=nn.initializers.normal(1.0)
        )
        self.encoder = Stack(self.config, self.token_embedder)
        self.decoder = Stack(self.config, self.token_embedder, decoder=True)

    def encode(self, encoder_input_tokens: Any, enable_dropout: bool = True) -> Any:
        mask = (encoder_input_tokens > 0)[:, None, None]
        return self.encoder(encoder_input_tokens, mask, enable_dropout)

    def decode(
        self,
        encoded: Any,
        encoder_input_tokens: Any,
        decoder_input_tokens: Any,
        decoder_target_tokens: Any,
        enable_dropout: bool = True,
        decode: bool = False,
        max_decode_length: int | None = None,
    ) -> Any:
        source = encoded, (encoder_input_tokens > 0)[:, None, None]
        real = (decoder_target_tokens > 0)[:, None, None]
        mask = real & jnp.tri(decoder_input_tokens.shape[1], dtype=bool)
        length = max_decode_length if decode else None
        return self.decoder(decoder_input_tokens, mask, enable_dropout, source, length)
