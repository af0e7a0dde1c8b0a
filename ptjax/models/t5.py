"""T5 1.0 and 1.1 with T5X's parameter tree, shapes and numerics.

mT5, ByT5 and Flan-T5 are the same network with other sizes; in umT5 every layer has relative
position biases of its own (`T5Config.relpos_per_layer`). Names and formulas follow
`t5x/examples/t5/{network,layers}.py`; a T5X checkpoint restores here without a translation table.
Letters: B batch, T input tokens, S encoder positions, L target length, D model width, H heads,
K head width, F feed-forward, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from ptjax.data.batch import PADDING_SEGMENT
from ptjax.models.config import T5Config
from ptjax.models.layers import (
    MLP,
    Attention,
    Dense,
    KeysValues,
    RelativePositionBias,
    RMSNorm,
    mask_bias,
    same_segment,
)
from ptjax.models.stacking import (
    GatherFn,
    Layers,
    make_layers,
    map_layers,
    run_layers,
    stack,
    unstack,
)

LayerCache = dict[str, Any]
"""Of a decoder layer: self_key, self_value [B, L, H, K] and cross_key, cross_value [B, S, H, K]."""

Cache = Layers[LayerCache]


class PromptStates(NamedTuple):
    """What a prompt that sees no input leaves behind: keys and values [layers, P, H, K].

    They hold for every example, so they are computed once, and no row ever has a copy of them.

    Attributes:
        encoder: for the text's self-attention in every encoder layer.
        decoder: for the cross-attention in every decoder layer.
    """

    encoder: KeysValues
    decoder: KeysValues


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
        if cfg.relpos_per_layer:
            self.relpos_bias = RelativePositionBias(cfg, bidirectional=True)
        self.pre_attention_layer_norm = RMSNorm(cfg.layer_norm_epsilon, cfg.dtype)
        self.attention = Attention(cfg)
        self.pre_mlp_layer_norm = RMSNorm(cfg.layer_norm_epsilon, cfg.dtype)
        self.mlp = MLP(cfg)
        self.dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))

    def __call__(
        self,
        x: Float[Array, "B S D"],
        bias: Float[Array, "#B H S S"],
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
        if cfg.relpos_per_layer:
            self.relpos_bias = RelativePositionBias(cfg, bidirectional=False)
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
        encoded: Float[Array, "B S D"] | LayerCache,
        position: Int[Array, ""] | int,
        self_bias: Float[Array, "#B H l L"],
        cross_bias: Float[Array, "B 1 #l S"],
        deterministic: bool,
        prompt: KeysValues | None = None,
    ) -> tuple[Float[Array, "B l D"], LayerCache | None]:
        """Whole targets, which read `encoded`; or, with a cache in its place, a part of them.

        Those are targets `position ... position + l - 1`, whose keys and values the returned cache
        has.
        """
        y = self.pre_self_attention_layer_norm(x)
        key, value = self.self_attention.keys_values(y)
        cache = None
        if isinstance(encoded, dict):
            cross_keys_values = encoded["cross_key"], encoded["cross_value"]
            if key.shape != encoded["self_key"].shape:
                start = (0, position, 0, 0)
                key = jax.lax.dynamic_update_slice(encoded["self_key"], key, start)
                value = jax.lax.dynamic_update_slice(encoded["self_value"], value, start)
            cache = encoded | {"self_key": key, "self_value": value}
        else:
            cross_keys_values = self.encoder_decoder_attention.keys_values(encoded)
        y = self.self_attention(y, key, value, self_bias, deterministic)
        x = x + self.dropout(y, deterministic)
        y = self.pre_cross_attention_layer_norm(x)
        # Everyone may see all of a prompt, and cross-attention has no relative positions.
        shared = None if prompt is None else (prompt, jnp.zeros((1, 1, 1, 1), x.dtype))
        y = self.encoder_decoder_attention(y, *cross_keys_values, cross_bias, deterministic, shared)
        x = x + self.dropout(y, deterministic)
        y = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
        return x + self.dropout(y, deterministic), cache


class Encoder(nn.Module):
    config: T5Config
    gather: GatherFn | None = None
    collections: tuple[str, ...] = ()

    def setup(self) -> None:
        cfg = self.config
        if not cfg.relpos_per_layer:
            self.relpos_bias = RelativePositionBias(cfg, bidirectional=True)
        self.layers = make_layers(EncoderLayer, cfg, cfg.num_encoder_layers)
        self.encoder_norm = RMSNorm(cfg.layer_norm_epsilon, cfg.dtype)
        self.input_dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))
        self.output_dropout = nn.Dropout(cfg.dropout_rate)

    def __call__(
        self,
        embedded: Float[Array, "B S D"],
        mask: Bool[Array, "#B #S S"],
        deterministic: bool,
        prompt: KeysValues | None = None,
        positions: Int[Array, "B S"] | None = None,
        *,
        keep: bool = False,
    ) -> tuple[Float[Array, "B S D"], KeysValues | None]:
        """The output, and with `keep` the keys and values [layers, B, S, H, K] behind it.

        Args:
            mask: which keys a query may see.
            prompt: `PromptStates.encoder`, of a prompt that stands before every example.
            positions: inside the example, where rows hold several of them.
        """
        cfg = self.config
        x = self.input_dropout(embedded, deterministic).astype(cfg.dtype)
        length = x.shape[1]
        masked = mask_bias(mask, cfg.dtype)

        def biases(relpos_bias: RelativePositionBias) -> tuple[Array, Any]:
            bias = relpos_bias(length, length) + masked
            if prompt is None:
                return bias, None
            before = prompt[0].shape[1]
            prompt_bias = relpos_bias(length, before + length, before)[..., :before]
            if positions is not None:
                prompt_bias = jnp.swapaxes(prompt_bias[0][:, positions], 0, 1)
            return bias, prompt_bias

        of_stack = None if cfg.relpos_per_layer else biases(self.relpos_bias)

        def run(layer: EncoderLayer, x: Array, prompt: KeysValues | None) -> tuple[Array, Any]:
            bias, prompt_bias = of_stack or biases(layer.relpos_bias)
            shared = None if prompt is None else (prompt, prompt_bias)
            x, keys_values = layer(x, bias, deterministic, shared)
            return x, keys_values if keep else None

        count = cfg.num_encoder_layers
        own = unstack(cfg, count, prompt)
        x, made = run_layers(
            cfg, count, run, self.layers, x, own, gather=self.gather, collections=self.collections
        )
        states = self.output_dropout(self.encoder_norm(x), deterministic)
        return states, stack(made) if keep else None


class Decoder(nn.Module):
    config: T5Config
    gather: GatherFn | None = None
    collections: tuple[str, ...] = ()

    def setup(self) -> None:
        cfg = self.config
        if not cfg.relpos_per_layer:
            self.relpos_bias = RelativePositionBias(cfg, bidirectional=False)
        self.layers = make_layers(DecoderLayer, cfg, cfg.num_decoder_layers)
        self.decoder_norm = RMSNorm(cfg.layer_norm_epsilon, cfg.dtype)
        self.input_dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))
        self.output_dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))
        if not cfg.logits_via_embedding:
            # Float32 whatever the activations are, as T5X does: the softmax needs the digits.
            self.logits_dense = Dense(cfg.vocab_size, jnp.float32)

    def cross_keys_values(self, encoded: Float[Array, "B S D"]) -> Layers[KeysValues]:
        """Each layer's keys and values [B, S, H, K] of what the encoder made."""

        def of_layer(layer: DecoderLayer, _: None) -> tuple[None, KeysValues]:
            return None, layer.encoder_decoder_attention.keys_values(encoded)

        count = self.config.num_decoder_layers
        return run_layers(
            self.config,
            count,
            of_layer,
            self.layers,
            None,
            gather=self.gather,
            collections=self.collections,
        )[1]

    def __call__(
        self,
        embedded: Float[Array, "B l D"],
        encoded: Encoded,
        deterministic: bool,
        segment_ids: Int[Array, "B L"] | None = None,
        cache: Cache | None = None,
        position: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B l D"], Cache | None]:
        """Whole targets; with a cache, the part of them that starts at `position`."""
        cfg, count = self.config, self.config.num_decoder_layers
        steps = embedded.shape[1]
        of_layer = cache[0] if isinstance(cache, list) else cache
        length = steps if of_layer is None else of_layer["self_key"].shape[-3]
        seen = (jnp.arange(length) <= position + jnp.arange(steps)[:, None])[None]
        readable = (encoded.segment_ids != PADDING_SEGMENT)[:, None]
        if segment_ids is not None:
            seen &= same_segment(segment_ids, segment_ids)
            readable = same_segment(segment_ids, encoded.segment_ids)
        masked = mask_bias(seen, cfg.dtype)
        cross_bias = mask_bias(readable, cfg.dtype)

        def bias(relpos_bias: RelativePositionBias) -> Array:
            return relpos_bias(steps, length, position) + masked

        of_stack = None if cfg.relpos_per_layer else bias(self.relpos_bias)

        def run(
            layer: DecoderLayer, x: Array, layer_cache: LayerCache | None, prompt: KeysValues | None
        ) -> tuple[Array, LayerCache | None]:
            source = encoded.states if layer_cache is None else layer_cache
            self_bias = bias(layer.relpos_bias) if of_stack is None else of_stack
            return layer(x, source, position, self_bias, cross_bias, deterministic, prompt)

        shared = None if encoded.prompt is None else encoded.prompt.decoder
        shared = unstack(cfg, count, shared)
        x = self.input_dropout(embedded, deterministic).astype(cfg.dtype)
        x, made = run_layers(
            cfg,
            count,
            run,
            self.layers,
            x,
            cache,
            shared,
            gather=self.gather,
            collections=self.collections,
        )
        states = self.output_dropout(self.decoder_norm(x), deterministic)
        return states, None if cache is None else made


class T5(nn.Module):
    """The encoder-decoder, in pieces that a prompt can be put between.

    Attributes:
        gather, collections: see `stacking.run_layers`.
    """

    config: T5Config
    gather: GatherFn | None = None
    collections: tuple[str, ...] = ()

    def setup(self) -> None:
        cfg = self.config
        self.token_embedder = nn.Embed(
            cfg.vocab_size, cfg.emb_dim, embedding_init=nn.initializers.normal(1.0)
        )
        self.encoder = Encoder(cfg, self.gather, self.collections)
        self.decoder = Decoder(cfg, self.gather, self.collections)

    def embed(self, tokens: Int[Array, "B t"]) -> Float[Array, "B t D"]:
        return self.token_embedder.embedding.astype(self.config.dtype)[tokens]

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
        encoded, encoder = self.encoder(prompt[None], seen, not train, keep=True)
        made: Any = (encoder, stack(self.decoder.cross_keys_values(encoded)))
        return PromptStates(*jax.tree.map(lambda x: x[:, 0], made))

    def init_cache(self, encoded: Encoded, length: int) -> Cache:
        """Cross-attention's keys and values, computed once, and empty ones for `length` targets."""
        cfg = self.config
        shape = (len(encoded.states), length, cfg.num_heads, cfg.head_dim)
        empty = jnp.zeros(shape, cfg.dtype)

        def of_layer(cross: KeysValues) -> LayerCache:
            key, value = cross
            return {"self_key": empty, "self_value": empty, "cross_key": key, "cross_value": value}

        return map_layers(of_layer, self.decoder.cross_keys_values(encoded.states))

    def decode_step(
        self,
        tokens: Int[Array, "B l"],
        cache: Cache,
        position: Int[Array, ""] | int,
        encoded: Encoded,
    ) -> tuple[Float[Array, "B l V"], Cache]:
        """Float32 logits after targets `position ... position + l - 1`, and the grown cache.

        Of `encoded`, the states are in the cache already.
        """
        made: Any
        y, made = self.decoder(self.embed(tokens), encoded, True, cache=cache, position=position)
        return self._logits(y), made

    def decode(
        self,
        encoded: Encoded,
        decoder_input_tokens: Int[Array, "B L"],
        decoder_segment_ids: Int[Array, "B L"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B L V"]:
        """Float32 logits for whole targets (teacher forcing)."""
        embedded = self.embed(decoder_input_tokens)
        return self._logits(self.decoder(embedded, encoded, not train, decoder_segment_ids)[0])

    def _logits(self, y: Float[Array, "B l D"]) -> Float[Array, "B l V"]:
        if not self.config.logits_via_embedding:
            return self.decoder.logits_dense(y)
        table = self.token_embedder.embedding.astype(jnp.float32)
        return jnp.dot(y.astype(jnp.float32), table.T) / np.sqrt(self.config.emb_dim)


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
    if config.scan_layers:
        return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    # All layers of a stack have the same shapes, and tracing dozens of them takes seconds.
    short = dataclasses.replace(config, num_encoder_layers=1, num_decoder_layers=1)
    shapes = jax.eval_shape(functools.partial(init_params, short), jax.random.key(0))
    counts = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    for name, count in counts.items():
        layer = shapes[name].pop("layers_0")
        shapes[name] |= {f"layers_{i}": layer for i in range(count)}
        shapes[name] = dict(sorted(shapes[name].items()))
    return shapes
