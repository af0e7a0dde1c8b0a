"""The layers of T5, with the formulas of `t5x/examples/t5/layers.py`.

Letters: B batch, t positions, q queries, k keys, P prompt length, D model width, H heads, K head
width, J = H * K.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from ptjax.models.attention import AttendFn, Mask, Source, plain_attention, swap_heads
from ptjax.models.config import T5Config
from ptjax.models.prefix import KeysValues
from ptjax.models.quantized import Quantized, quantized_dot
from ptjax.trees import Tree

LayerCache = dict[str, Tree]
"""The cache of a decoder layer. T5's has self_key, self_value [B, H, L, K] and cross_key,
cross_value [B, H, S, K], in the order in which products read them, since every step does; other
networks keep their own trees here."""

Initializer = Callable[..., Array]
"""(key, shape, dtype) -> a parameter's first value."""

# The names in `T5Config.mlp_activations` that Flax has no function for.
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "linear": lambda x: x,
    "gelu_exact": functools.partial(nn.gelu, approximate=False),
}


def relative_position_bucket(
    relative_position: np.ndarray, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """Returns the bucket of each relative position: exact when near, logarithmic when far.

    Takes and returns int [...]. Computed in numpy, as T5X does, so that every backend agrees on the
    rounding of the logarithm.

    Args:
        relative_position: the key's position minus the query's.
        bidirectional: whether keys after the query have buckets of their own (the encoder's do).
        max_distance: all positions at least this far away share one bucket.
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


def param(module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...]) -> Tree:
    """Returns a parameter of `module`, which is float32 where `init` makes it.

    As `module.param`, which also traces `init` to compare shapes if there is a value already. That
    took 40% of the time to trace T5. The shapes of a backbone are checked when it is opened.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape, jnp.float32)


class Dense(nn.Module):
    """A linear map without bias; input and kernel are cast to `dtype`.

    The kernel may be `Quantized`.
    """

    features: int
    dtype: Any
    kernel_init: Initializer = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        kernel = param(self, "kernel", self.kernel_init, (x.shape[-1], self.features))
        if isinstance(kernel, Quantized):
            y = quantized_dot(x, kernel, self.dtype)
        else:
            y = jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype))
        return checkpoint_name(y, self.name or "")  # for rematerialisation, see `stacking`


class RMSNorm(nn.Module):
    """T5's layer norm: no mean, no bias; the mean square is taken in float32.

    The scale is rounded to `dtype` before it multiplies, as in T5X.
    """

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale = param(self, "scale", nn.initializers.ones, (x.shape[-1],))
        return rms_norm(x, scale.astype(self.dtype), self.epsilon, self.dtype)


# Recomputed in the backward pass: cheaper than storing float32 copies of every x.
@functools.partial(jax.checkpoint, static_argnums=(2, 3))
def rms_norm(
    x: Float[Array, "*b d"], scale: Float[Array, " d"], epsilon: float, dtype: Any
) -> Float[Array, "*b d"]:
    """Divides x by its root mean square, and multiplies by `scale` in the dtype of `scale`."""
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    normed = x * jax.lax.rsqrt(mean_square + epsilon)
    return (normed.astype(scale.dtype) * scale).astype(dtype)


class RelativePositionBias(nn.Module):
    """T5's learned attention biases by relative position, in a table [H, buckets].

    The layers of a stack share one module, or each layer has its own (umT5).
    """

    config: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(
        self, queries: int, keys: int, position: Int[Array, ""] | int = 0
    ) -> Float[Array, "1 H q k"]:
        """Returns the bias of queries `position ... position + queries - 1` for all `keys` keys."""
        cfg = self.config
        table = param(
            self,
            "rel_embedding",
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
            (cfg.num_heads, cfg.relpos_buckets),
        )
        buckets = relative_position_bucket(
            np.arange(keys)[None, :] - np.arange(keys)[:, None],
            bidirectional=self.bidirectional,
            num_buckets=cfg.relpos_buckets,
            max_distance=cfg.relpos_max_distance,
        )
        if queries != keys:
            # Rows are selected before the table lookup: a decoding step needs one of them.
            buckets = jax.lax.dynamic_slice_in_dim(jnp.asarray(buckets), position, queries)
        return table.astype(cfg.dtype)[None, :, buckets]


class Attention(nn.Module):
    """Multi-head attention without the factor 1/sqrt(K), which T5 folds into the query's kernel.

    The kernel is initialised with that factor.
    """

    config: T5Config
    attend: AttendFn = plain_attention

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
        """Computes the key and the value of every position of x, for each head."""
        return self._split(self.key(x)), self._split(self.value(x))

    def __call__(
        self,
        x: Float[Array, "B q D"],
        keys: Float[Array, "B k H K"],
        values: Float[Array, "B k H K"],
        bias: Float[Array, "1 #H q k"] | None,
        mask: Mask,
        deterministic: bool,
        prompt: tuple[KeysValues, Float[Array, "#B #H #q P"] | None] | None = None,
    ) -> Float[Array, "B q D"]:
        """Returns the attention's output for the queries x.

        Args:
            prompt: the keys and values [P, H, K] of a prompt or prefix, to which all queries attend
                in addition, and their bias.
        """

        def keep(keys: int) -> Array | None:
            if deterministic or not self.config.dropout_rate:
                return None
            # Drawn as for the weights themselves.
            return self.dropout(jnp.ones((len(x), self.config.num_heads, 1, keys)), False)

        sources = [Source(keys, values, bias, mask, keep(keys.shape[1]))]
        if prompt is not None:
            (keys, values), bias = prompt
            sources.append(Source(keys, values, bias, keep=keep(len(keys))))
        attended = self.attend(self._split(self.query(x)), tuple(sources))
        return self.out(attended.reshape(*x.shape[:2], -1))


class MLP(nn.Module):
    """T5's feed-forward block, wo(dropout(activation(wi x))).

    With several `config.mlp_activations`, the block is gated: each activation has a kernel of its
    own, `wi_0`, `wi_1` and so on, and the activated results are multiplied.
    """

    config: T5Config

    @nn.compact
    def __call__(self, x: Float[Array, "B t D"], deterministic: bool) -> Float[Array, "B t D"]:
        cfg = self.config
        gated = len(cfg.mlp_activations) > 1
        names = [f"wi_{i}" for i in range(len(cfg.mlp_activations))] if gated else ["wi"]
        branches = [Dense(cfg.mlp_dim, cfg.dtype, name=name)(x) for name in names]

        # Recomputed in the backward pass: a GELU's derivative would store five arrays of this size.
        @jax.checkpoint
        def activate(*branches: Array) -> Array:
            activated = [
                (_ACTIVATIONS.get(name) or getattr(nn, name))(branch)
                for name, branch in zip(cfg.mlp_activations, branches, strict=True)
            ]
            return functools.reduce(jnp.multiply, activated)

        hidden = activate(*branches)
        hidden = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))(hidden, deterministic)
        return Dense(cfg.emb_dim, cfg.dtype, name="wo")(hidden)


class EncoderLayer(nn.Module):
    """A layer of T5's encoder: self-attention and feed-forward block, each with a residual."""

    config: T5Config
    attend: AttendFn = plain_attention

    def setup(self) -> None:
        cfg = self.config
        if cfg.relpos_per_layer:
            self.relpos_bias = RelativePositionBias(cfg, bidirectional=True)
        self.pre_attention_layer_norm = RMSNorm(cfg.layer_norm_epsilon, cfg.dtype)
        self.attention = Attention(cfg, self.attend)
        self.pre_mlp_layer_norm = RMSNorm(cfg.layer_norm_epsilon, cfg.dtype)
        self.mlp = MLP(cfg)
        self.dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))

    def __call__(
        self,
        x: Float[Array, "B S D"],
        bias: Float[Array, "1 H S S"],
        mask: Mask,
        deterministic: bool,
        prompt: tuple[KeysValues, Float[Array, "#B H S P"]] | None = None,
    ) -> tuple[Float[Array, "B S D"], KeysValues]:
        """Returns the layer's output, and its attention's keys and values [B, S, H, K]."""
        y = self.pre_attention_layer_norm(x)
        keys_values = self.attention.keys_values(y)
        y = self.attention(y, *keys_values, bias, mask, deterministic, prompt)
        x = x + self.dropout(y, deterministic)
        y = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
        return x + self.dropout(y, deterministic), keys_values


class DecoderLayer(nn.Module):
    """A layer of T5's decoder: self-attention, cross-attention and feed-forward block."""

    config: T5Config
    attend: AttendFn = plain_attention

    def setup(self) -> None:
        cfg = self.config
        if cfg.relpos_per_layer:
            self.relpos_bias = RelativePositionBias(cfg, bidirectional=False)
        self.pre_self_attention_layer_norm = RMSNorm(cfg.layer_norm_epsilon, cfg.dtype)
        self.self_attention = Attention(cfg, self.attend)
        self.pre_cross_attention_layer_norm = RMSNorm(cfg.layer_norm_epsilon, cfg.dtype)
        self.encoder_decoder_attention = Attention(cfg, self.attend)
        self.pre_mlp_layer_norm = RMSNorm(cfg.layer_norm_epsilon, cfg.dtype)
        self.mlp = MLP(cfg)
        self.dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))

    def __call__(
        self,
        x: Float[Array, "R l D"],
        encoded: Float[Array, "B S D"] | LayerCache,
        position: Int[Array, ""] | int,
        bias: Float[Array, "1 H l L"],
        mask: Mask,
        cross_mask: Mask,
        deterministic: bool,
        prompt: KeysValues | None = None,
        prefix: tuple[KeysValues, Float[Array, "#R H l P"]] | None = None,
    ) -> tuple[Float[Array, "R l D"], LayerCache | None]:
        """Runs on all inputs with the encoder's output, or on the next l inputs with a cache.

        Args:
            x: with a cache, the decoder's inputs `position ... position + l - 1`. R = B rows, or in
                a beam search B times the number of beams, all beams of a row one after another.
            encoded: the encoder's output, or the layer's cache.
            bias, mask: of the self-attention.
            cross_mask: of the cross-attention, which has no bias.
            prompt: `PromptStates.decoder` of this layer.
            prefix: `PromptStates.targets` of this layer, and their bias.

        Returns:
            `(output, cache)`: the cache's arrays of the self-attention, with the keys and values of
            x; None without a cache.
        """
        y = self.pre_self_attention_layer_norm(x)
        key, value = self.self_attention.keys_values(y)
        cache = None
        if isinstance(encoded, dict):
            cross_keys_values = swap_heads(encoded["cross_key"]), swap_heads(encoded["cross_value"])
            cache = {"self_key": swap_heads(key), "self_value": swap_heads(value)}
            if key.shape[1] != encoded["self_key"].shape[2]:
                start = (0, 0, position, 0)
                cache = {
                    name: jax.lax.dynamic_update_slice(encoded[name], x, start)
                    for name, x in cache.items()
                }
            key, value = map(swap_heads, cache.values())
        else:
            cross_keys_values = self.encoder_decoder_attention.keys_values(encoded)
        y = self.self_attention(y, key, value, bias, mask, deterministic, prefix)
        x = x + self.dropout(y, deterministic)
        y = self.pre_cross_attention_layer_norm(x)
        # Every target attends to the whole prompt; cross-attention has no relative positions.
        shared = None if prompt is None else (prompt, None)
        # A row's beams share its keys and values: they are further queries of that row.
        y = y.reshape(len(cross_keys_values[0]), -1, y.shape[-1])
        y = self.encoder_decoder_attention(
            y, *cross_keys_values, None, cross_mask, deterministic, shared
        )
        x = x + self.dropout(y.reshape(x.shape), deterministic)
        y = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
        return x + self.dropout(y, deterministic), cache
