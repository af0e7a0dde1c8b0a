"""T5 1.0 and 1.1 with T5X's parameter tree, shapes and numerics.

mT5, ByT5 and Flan-T5 are the same network with other sizes. Names and formulas follow
`t5x/examples/t5/{network,layers}.py`; a T5X checkpoint restores here without a translation table.
Letters: B batch, T input tokens, S encoder positions, L target length, D model width, H heads,
K head width, F feed-forward, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from ptjax.errors import check_share

Cache = list[dict[str, Array]]
"""Per decoder layer: self_key, self_value [B, L, H, K] and cross_key, cross_value [B, S, H, K]."""

MASKED = -1e10


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5, under the names that T5X's gin files use.

    Attributes:
        vocab_size: V, rows of the embedding table (T5: 32,128 for 32,100 pieces).
        emb_dim: D.
        num_heads: H.
        head_dim: K; H * K need not be D.
        mlp_dim: F.
        mlp_activations: `("relu",)` is T5 1.0, `("gelu", "linear")` (gated) is T5 1.1.
        logits_via_embedding: True ties the logits to the embedding, scaled by 1/sqrt(D) (T5 1.0).
        dtype: of the activations; the parameters' own dtype is decided where they are loaded.
    """

    vocab_size: int
    emb_dim: int
    num_heads: int
    num_encoder_layers: int
    num_decoder_layers: int
    head_dim: int
    mlp_dim: int
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    logits_via_embedding: bool = False
    dropout_rate: float = 0.1
    relpos_buckets: int = 32
    relpos_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_share("T5Config", dropout_rate=self.dropout_rate)


def relative_position_bucket(
    relative_position: np.ndarray, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """Buckets of `key - query` positions (int [...]): exact when near, logarithmic when far.

    Computed in numpy, as T5X does, so that every backend agrees on the rounding of the logarithm.
    """
    n = -relative_position
    offset = np.zeros_like(n)
    if bidirectional:
        num_buckets //= 2
        offset = (n < 0).astype(np.int32) * num_buckets
        n = np.abs(n)
    else:
        n = np.maximum(n, 0)
    max_exact = num_buckets // 2
    far = max_exact + (
        np.log(n.astype(np.float32) / max_exact + np.finfo(np.float32).eps)
        / np.log(max_distance / max_exact)
        * (num_buckets - max_exact)
    ).astype(np.int32)
    return offset + np.where(n < max_exact, n, np.minimum(far, num_buckets - 1))


class Dense(nn.Module):
    """A linear map without bias; input and kernel are cast to `dtype`."""

    features: int
    dtype: Any
    kernel_init: Callable[..., Array] = nn.initializers.variance_scaling(
        1.0, "fan_in", "truncated_normal"
    )

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        return jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype))


class RMSNorm(nn.Module):
    """T5's layer norm: no mean, no bias; the mean square is taken in float32."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)

        # Recomputed on the way back: cheaper than to store float32 copies of every x.
        @jax.checkpoint
        def normalize(x: Array, scale: Array) -> Array:
            x = x.astype(jnp.float32)
            mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
            normed = x * jax.lax.rsqrt(mean_square + self.epsilon)
            return normed.astype(self.dtype) * scale.astype(self.dtype)

        return normalize(x, scale)


class RelativePositionBias(nn.Module):
    """One table per stack, [H, buckets], shared by its layers."""

    config: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(
        self, queries: int, keys: int, position: Int[Array, ""] | int = 0
    ) -> Float[Array, "1 H q k"]:
        """Bias of queries `position ... position + queries - 1` for keys 0 ... keys - 1."""
        cfg = self.config
        table = self.param(
            "rel_embedding",
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
            (cfg.num_heads, cfg.relpos_buckets),
            jnp.float32,
        )
        buckets = relative_position_bucket(
            np.arange(keys)[None, :] - np.arange(keys)[:, None],
            bidirectional=self.bidirectional,
            num_buckets=cfg.relpos_buckets,
            max_distance=cfg.relpos_max_distance,
        )
        if queries != keys:
            # The rows are picked before the table is looked up: a decoding step needs one of them.
            buckets = jax.lax.dynamic_slice_in_dim(jnp.asarray(buckets), position, queries)
        return table.astype(cfg.dtype)[None, :, buckets]


class Attention(nn.Module):
    """Multi-head attention without 1/sqrt(K): T5 folds it into the query's initialisation."""

    config: T5Config

    def setup(self) -> None:
        cfg = self.config
        normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal")

        def query_init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return normal(key, shape, dtype) / np.sqrt(cfg.head_dim)

        joined = cfg.num_heads * cfg.head_dim
        self.query = Dense(joined, cfg.dtype, query_init)
        self.key = Dense(joined, cfg.dtype, normal)
        self.value = Dense(joined, cfg.dtype, normal)
        self.out = Dense(cfg.emb_dim, cfg.dtype, normal)
        self.dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))

    def _split(self, x: Float[Array, "B t J"]) -> Float[Array, "B t H K"]:
        return x.reshape(*x.shape[:2], self.config.num_heads, self.config.head_dim)

    def keys_values(
        self, x: Float[Array, "B k D"]
    ) -> tuple[Float[Array, "B k H K"], Float[Array, "B k H K"]]:
        return self._split(self.key(x)), self._split(self.value(x))

    def __call__(
        self,
        x: Float[Array, "B q D"],
        keys: Float[Array, "B k H K"],
        values: Float[Array, "B k H K"],
        bias: Float[Array, "#B #H #q k"],
        deterministic: bool,
    ) -> Float[Array, "B q D"]:
        # Heads first: XLA's CPU products over a leading batch are twice as fast.
        queries, keys, values = (
            jnp.swapaxes(y, 1, 2) for y in (self._split(self.query(x)), keys, values)
        )
        logits = jnp.einsum("bhqd,bhkd->bhqk", queries, keys) + bias
        weights = jax.nn.softmax(logits).astype(self.config.dtype)
        weights = self.dropout(weights, deterministic=deterministic)
        attended = jnp.einsum("bhqk,bhkd->bhqd", weights, values)
        return self.out(jnp.swapaxes(attended, 1, 2).reshape(*x.shape[:2], -1))


class MLP(nn.Module):
    """wo(dropout(activation(wi x))), or the product of two such branches when gated."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Float[Array, "B t D"], deterministic: bool) -> Float[Array, "B t D"]:
        cfg = self.config
        gated = len(cfg.mlp_activations) > 1
        names = [f"wi_{i}" for i in range(len(cfg.mlp_activations))] if gated else ["wi"]
        branches = [Dense(cfg.mlp_dim, cfg.dtype, name=name)(x) for name in names]

        # Recomputed on the way back: a GELU's derivative would store five arrays of this size.
        @jax.checkpoint
        def activate(*branches: Array) -> Array:
            activated = [
                branch if name == "linear" else getattr(nn, name)(branch)
                for name, branch in zip(cfg.mlp_activations, branches, strict=True)
            ]
            return functools.reduce(jnp.multiply, activated)

        hidden = activate(*branches)
        hidden = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))(hidden, deterministic)
        return Dense(cfg.emb_dim, cfg.dtype, name="wo")(hidden)


class EncoderLayer(nn.Module):
    config: T5Config

    def setup(self) -> None:
        cfg = self.config
        self.pre_attention_layer_norm = RMSNorm(cfg.layer_norm_epsilon, cfg.dtype)
        self.attention = Attention(cfg)
        self.pre_mlp_layer_norm = RMSNorm(cfg.layer_norm_epsilon, cfg.dtype)
        self.mlp = MLP(cfg)
        self.dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))

    def __call__(
        self, x: Float[Array, "B S D"], bias: Float[Array, "B H S S"], deterministic: bool
    ) -> Float[Array, "B S D"]:
        y = self.pre_attention_layer_norm(x)
        y = self.attention(y, *self.attention.keys_values(y), bias, deterministic)
        x = x + self.dropout(y, deterministic)
        y = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
        return x + self.dropout(y, deterministic)


class DecoderLayer(nn.Module):
    config: T5Config

    def setup(self) -> None:
        cfg = self.config
        self.pre_self_attention_layer_norm = RMSNorm(cfg.layer_norm_epsilon, cfg.dtype)
        self.self_attention = Attention(cfg)
        self.pre_cross_attention_layer_norm = RMSNorm(cfg.layer_norm_epsilon, cfg.dtype)
        self.encoder_decoder_attention = Attention(cfg)
        self.pre_mlp_layer_norm = RMSNorm(cfg.layer_norm_epsilon, cfg.dtype)
        self.mlp = MLP(cfg)
        self.dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))

    def init_cache(self, encoded: Float[Array, "B S D"], length: int) -> dict[str, Array]:
        """Cross-attention's keys and values, computed once, and empty ones for `length` targets."""
        cfg = self.config
        cross_key, cross_value = self.encoder_decoder_attention.keys_values(encoded)
        empty = jnp.zeros((len(encoded), length, cfg.num_heads, cfg.head_dim), cfg.dtype)
        return {
            "self_key": empty,
            "self_value": empty,
            "cross_key": cross_key,
            "cross_value": cross_value,
        }

    def __call__(
        self,
        x: Float[Array, "B l D"],
        cache: dict[str, Array],
        position: Int[Array, ""] | int,
        self_bias: Float[Array, "1 H l L"],
        cross_bias: Float[Array, "B 1 1 S"],
        deterministic: bool,
    ) -> tuple[Float[Array, "B l D"], dict[str, Array]]:
        """Runs targets `position ... position + l - 1`; their keys and values go into the cache."""
        y = self.pre_self_attention_layer_norm(x)
        key, value = self.self_attention.keys_values(y)
        if key.shape != cache["self_key"].shape:
            start = (0, position, 0, 0)
            key = jax.lax.dynamic_update_slice(cache["self_key"], key, start)
            value = jax.lax.dynamic_update_slice(cache["self_value"], value, start)
        cache = cache | {"self_key": key, "self_value": value}
        y = self.self_attention(y, key, value, self_bias, deterministic)
        x = x + self.dropout(y, deterministic)
        y = self.pre_cross_attention_layer_norm(x)
        y = self.encoder_decoder_attention(
            y, cache["cross_key"], cache["cross_value"], cross_bias, deterministic
        )
        x = x + self.dropout(y, deterministic)
        y = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
        return x + self.dropout(y, deterministic), cache


class Encoder(nn.Module):
    config: T5Config

    def setup(self) -> None:
        cfg = self.config
        self.relpos_bias = RelativePositionBias(cfg, bidirectional=True)
        self.layers = [EncoderLayer(cfg) for _ in range(cfg.num_encoder_layers)]
        self.encoder_norm = RMSNorm(cfg.layer_norm_epsilon, cfg.dtype)
        self.input_dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))
        self.output_dropout = nn.Dropout(cfg.dropout_rate)

    def __call__(
        self, embedded: Float[Array, "B S D"], mask: Bool[Array, "B S"], deterministic: bool
    ) -> Float[Array, "B S D"]:
        x = self.input_dropout(embedded, deterministic).astype(self.config.dtype)
        bias = self.relpos_bias(x.shape[1], x.shape[1]) + mask_bias(mask, self.config.dtype)
        for layer in self.layers:
            x = layer(x, bias, deterministic)
        return self.output_dropout(self.encoder_norm(x), deterministic)


class Decoder(nn.Module):
    config: T5Config

    def setup(self) -> None:
        cfg = self.config
        self.relpos_bias = RelativePositionBias(cfg, bidirectional=False)
        self.layers = [DecoderLayer(cfg) for _ in range(cfg.num_decoder_layers)]
        self.decoder_norm = RMSNorm(cfg.layer_norm_epsilon, cfg.dtype)
        self.input_dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))
        self.output_dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))
        if not cfg.logits_via_embedding:
            # Float32 whatever the activations are, as T5X does: the softmax needs the digits.
            self.logits_dense = Dense(cfg.vocab_size, jnp.float32)

    def init_cache(self, encoded: Float[Array, "B S D"], length: int) -> Cache:
        return [layer.init_cache(encoded, length) for layer in self.layers]

    def __call__(
        self,
        embedded: Float[Array, "B l D"],
        cache: Cache,
        position: Int[Array, ""] | int,
        encoder_mask: Bool[Array, "B S"],
        deterministic: bool,
    ) -> tuple[Float[Array, "B l D"], Cache]:
        cfg = self.config
        steps, length = embedded.shape[1], cache[0]["self_key"].shape[1]
        seen = jnp.arange(length) <= position + jnp.arange(steps)[:, None]
        causal = jnp.where(seen, 0.0, MASKED).astype(cfg.dtype)
        self_bias = self.relpos_bias(steps, length, position) + causal
        cross_bias = mask_bias(encoder_mask, cfg.dtype)
        x = self.input_dropout(embedded, deterministic).astype(cfg.dtype)
        updated = []
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x, layer_cache = layer(x, layer_cache, position, self_bias, cross_bias, deterministic)
            updated.append(layer_cache)
        return self.output_dropout(self.decoder_norm(x), deterministic), updated


def mask_bias(mask: Bool[Array, "B k"], dtype: Any) -> Float[Array, "B 1 1 k"]:
    """0 where a key may be seen, -1e10 elsewhere.

    T5X masks padded queries too. Their outputs reach neither the loss nor any real position, so
    here they are left to attend as they like.
    """
    return jnp.where(mask, 0.0, MASKED).astype(dtype)[:, None, None, :]


class T5(nn.Module):
    """The encoder-decoder, in pieces that a prompt can be put between."""

    config: T5Config

    def setup(self) -> None:
        cfg = self.config
        self.token_embedder = nn.Embed(
            cfg.vocab_size, cfg.emb_dim, embedding_init=nn.initializers.normal(1.0)
        )
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)

    def embed(self, tokens: Int[Array, "B t"]) -> Float[Array, "B t D"]:
        return self.token_embedder.embedding.astype(self.config.dtype)[tokens]

    def encode_embedded(
        self, embedded: Float[Array, "B S D"], mask: Bool[Array, "B S"], *, train: bool = False
    ) -> Float[Array, "B S D"]:
        return self.encoder(embedded, mask, not train)

    def init_cache(self, encoded: Float[Array, "B S D"], length: int) -> Cache:
        return self.decoder.init_cache(encoded, length)

    def decode_step(
        self,
        tokens: Int[Array, "B l"],
        cache: Cache,
        position: Int[Array, ""] | int,
        encoder_mask: Bool[Array, "B S"],
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "B l V"], Cache]:
        """Float32 logits after targets `position ... position + l - 1`, and the grown cache."""
        y, cache = self.decoder(self.embed(tokens), cache, position, encoder_mask, not train)
        if not self.config.logits_via_embedding:
            return self.decoder.logits_dense(y), cache
        table = self.token_embedder.embedding.astype(jnp.float32)
        return jnp.dot(y.astype(jnp.float32), table.T) / np.sqrt(self.config.emb_dim), cache

    def decode(
        self,
        encoded: Float[Array, "B S D"],
        encoder_mask: Bool[Array, "B S"],
        decoder_input_tokens: Int[Array, "B L"],
        *,
        train: bool = False,
    ) -> Float[Array, "B L V"]:
        """Float32 logits for whole targets (teacher forcing)."""
        cache = self.init_cache(encoded, decoder_input_tokens.shape[1])
        logits, _ = self.decode_step(decoder_input_tokens, cache, 0, encoder_mask, train=train)
        return logits


def init_params(config: T5Config, key: Array) -> dict[str, Any]:
    """Random float32 parameters with T5X's initialisers, for pre-training from scratch."""

    def everything(module: T5) -> None:
        tokens = jnp.ones((1, 2), jnp.int32)
        encoded = module.encode_embedded(module.embed(tokens), tokens > 0)
        module.decode(encoded, tokens > 0, tokens)

    variables: Any = nn.init(everything, T5(config))(key)
    return variables["params"]


@functools.cache
def parameter_shapes(config: T5Config) -> dict[str, Any]:
    """The parameter tree as float32 `jax.ShapeDtypeStruct`s; nothing is computed."""
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
