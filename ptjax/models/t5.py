"""T5 1.0 and 1.1 with T5X's parameter tree, shapes and numerics.

mT5, ByT5 and Flan-T5 are the same network with other sizes. Names and formulas follow
`t5x/examples/t5/{network,layers}.py`; a T5X checkpoint restores here without a translation table.
Letters: B batch, T input tokens, S encoder positions, L target length, D model width, H heads,
K head width, F feed-forward, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from ptjax.models.config import T5Config
from ptjax.models.layers import (
    MLP,
    Attention,
    Dense,
    KeysValues,
    RelativePositionBias,
    RMSNorm,
    gathered,
    mask_bias,
    same_segment,
)

Cache = list[dict[str, Array]]
"""Per decoder layer: self_key, self_value [B, L, H, K] and cross_key, cross_value [B, S, H, K]."""


class PromptStates(NamedTuple):
    """What a prompt that sees no input leaves behind: keys and values [P, H, K] of every layer.

    They hold for every example, so they are computed once, and no row ever has a copy of them.

    Attributes:
        encoder: per encoder layer, for the text's self-attention.
        decoder: per decoder layer, for the cross-attention.
    """

    encoder: tuple[KeysValues, ...]
    decoder: tuple[KeysValues, ...]


class Encoded(NamedTuple):
    """What the decoder reads.

    Attributes:
        states: the encoder's output [B, S, D].
        segment_ids: int32 [B, S]; 0 is padding, 1, 2, ... are the examples that share a row.
        prompt: of a prompt that sees no input; every example reads it too.
    """

    states: Array
    segment_ids: Array
    prompt: PromptStates | None = None


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
        self,
        x: Float[Array, "B S D"],
        bias: Float[Array, "B H S S"],
        deterministic: bool,
        prompt: tuple[KeysValues, Float[Array, "#B H S P"]] | None = None,
    ) -> tuple[Float[Array, "B S D"], KeysValues]:
        """The layer's output, and the keys and values [B, S, H, K] that its attention made."""
        y = self.pre_attention_layer_norm(x)
        keys_values = self.attention.keys_values(y)
        y = self.attention(y, *keys_values, bias, deterministic, prompt)
        x = x + self.dropout(y, deterministic)
        y = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
        return x + self.dropout(y, deterministic), keys_values


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

    def __call__(
        self,
        x: Float[Array, "B l D"],
        cache: dict[str, Array],
        position: Int[Array, ""] | int,
        self_bias: Float[Array, "#B H l L"],
        cross_bias: Float[Array, "B 1 #l S"],
        deterministic: bool,
        prompt: tuple[KeysValues, Float[Array, "#B #H #l P"]] | None = None,
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
            y, cache["cross_key"], cache["cross_value"], cross_bias, deterministic, prompt
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
        self,
        embedded: Float[Array, "B S D"],
        mask: Bool[Array, "#B #S S"],
        deterministic: bool,
        prompt: Sequence[KeysValues] | None = None,
        positions: Int[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B S D"], tuple[KeysValues, ...]]:
        """The output, and each layer's keys and values [B, S, H, K].

        Args:
            mask: which keys a query may see.
            prompt: `PromptStates.encoder`, of a prompt that stands before every example.
            positions: inside the example, where rows hold several of them.
        """
        x = self.input_dropout(embedded, deterministic).astype(self.config.dtype)
        length = x.shape[1]
        bias = self.relpos_bias(length, length) + mask_bias(mask, self.config.dtype)
        shared: list[Any] = [None] * len(self.layers)
        if prompt is not None:
            before = len(prompt[0][0])
            prompt_bias = self.relpos_bias(length, before + length, before)[..., :before]
            if positions is not None:
                prompt_bias = jnp.swapaxes(prompt_bias[0][:, positions], 0, 1)
            shared = [(keys_values, prompt_bias) for keys_values in prompt]
        made = []
        for layer, layer_prompt in zip(self.layers, shared, strict=True):
            x, keys_values = layer(x, bias, deterministic, layer_prompt)
            made.append(keys_values)
        return self.output_dropout(self.encoder_norm(x), deterministic), tuple(made)


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

    def cross_keys_values(self, encoded: Float[Array, "B S D"]) -> tuple[KeysValues, ...]:
        """Each layer's keys and values [B, S, H, K] of what the encoder made."""
        return tuple(layer.encoder_decoder_attention.keys_values(encoded) for layer in self.layers)

    def __call__(
        self,
        embedded: Float[Array, "B l D"],
        cache: Cache,
        position: Int[Array, ""] | int,
        encoded: Encoded,
        deterministic: bool,
        segment_ids: Int[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B l D"], Cache]:
        cfg = self.config
        steps, length = embedded.shape[1], cache[0]["self_key"].shape[1]
        seen = (jnp.arange(length) <= position + jnp.arange(steps)[:, None])[None]
        readable = (encoded.segment_ids > 0)[:, None]
        if segment_ids is not None:
            seen &= same_segment(segment_ids, segment_ids)
            readable = same_segment(segment_ids, encoded.segment_ids)
        self_bias = self.relpos_bias(steps, length, position) + mask_bias(seen, cfg.dtype)
        cross_bias = mask_bias(readable, cfg.dtype)
        x = self.input_dropout(embedded, deterministic).astype(cfg.dtype)
        updated = []
        for index, (layer, layer_cache) in enumerate(zip(self.layers, cache, strict=True)):
            shared = None
            if encoded.prompt is not None:
                shared = encoded.prompt.decoder[index], jnp.zeros((1, 1, 1, 1), cfg.dtype)
            x, layer_cache = layer(
                x, layer_cache, position, self_bias, cross_bias, deterministic, shared
            )
            updated.append(layer_cache)
        return self.output_dropout(self.decoder_norm(x), deterministic), updated


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
        table = gathered(self.token_embedder.embedding, 1)
        return table.astype(self.config.dtype)[tokens]

    def encode_embedded(
        self,
        embedded: Float[Array, "B S D"],
        mask: Bool[Array, "#B #S S"],
        *,
        prompt: PromptStates | None = None,
        positions: Int[Array, "B S"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B S D"]:
        """`mask`: which positions each may see; see `Encoder` for `prompt` and `positions`."""
        before = None if prompt is None else prompt.encoder
        return self.encoder(embedded, mask, not train, before, positions)[0]

    def prompt_states(self, prompt: Float[Array, "P D"], *, train: bool = False) -> PromptStates:
        """The prompt's way through the network, when it sees nothing but itself."""
        seen = jnp.ones((1, 1, len(prompt)), bool)
        encoded, encoder = self.encoder(prompt[None], seen, not train)
        made = PromptStates(encoder, self.decoder.cross_keys_values(encoded))
        return jax.tree.map(lambda x: x[0], made)

    def init_cache(self, encoded: Encoded, length: int) -> Cache:
        """Cross-attention's keys and values, computed once, and empty ones for `length` targets."""
        cfg = self.config
        shape = (len(encoded.states), length, cfg.num_heads, cfg.head_dim)
        empty = jnp.zeros(shape, cfg.dtype)
        return [
            {"self_key": empty, "self_value": empty, "cross_key": key, "cross_value": value}
            for key, value in self.decoder.cross_keys_values(encoded.states)
        ]

    def decode_step(
        self,
        tokens: Int[Array, "B l"],
        cache: Cache,
        position: Int[Array, ""] | int,
        encoded: Encoded,
        *,
        segment_ids: Int[Array, "B l"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B l V"], Cache]:
        """Float32 logits after targets `position ... position + l - 1`, and the grown cache.

        Of `encoded`, the states are in the cache already. `segment_ids` go with whole targets.
        """
        y, cache = self.decoder(
            self.embed(tokens), cache, position, encoded, not train, segment_ids
        )
        if not self.config.logits_via_embedding:
            return self.decoder.logits_dense(y), cache
        table = gathered(self.token_embedder.embedding, 1).astype(jnp.float32)
        return jnp.dot(y.astype(jnp.float32), table.T) / np.sqrt(self.config.emb_dim), cache

    def decode(
        self,
        encoded: Encoded,
        decoder_input_tokens: Int[Array, "B L"],
        decoder_segment_ids: Int[Array, "B L"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B L V"]:
        """Float32 logits for whole targets (teacher forcing)."""
        cache = self.init_cache(encoded, decoder_input_tokens.shape[1])
        logits, _ = self.decode_step(
            decoder_input_tokens,
            cache,
            0,
            encoded,
            segment_ids=decoder_segment_ids,
            train=train,
        )
        return logits


def init_params(config: T5Config, key: Array) -> dict[str, Any]:
    """Random float32 parameters with T5X's initialisers, for pre-training from scratch."""

    def everything(module: T5) -> None:
        tokens = jnp.ones((1, 2), jnp.int32)
        states = module.encode_embedded(module.embed(tokens), jnp.ones((1, 1, 2), bool))
        module.decode(Encoded(states, tokens), tokens)

    variables: Any = nn.init(everything, T5(config))(key)
    return variables["params"]


@functools.cache
def parameter_shapes(config: T5Config) -> dict[str, Any]:
    """The parameter tree as float32 `jax.ShapeDtypeStruct`s; nothing is computed."""
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
