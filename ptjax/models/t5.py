"""T5 1.0 and 1.1 with T5X's parameter tree, shapes and numerics.

mT5, ByT5 and Flan-T5 are the same network with other sizes; in umT5 every layer has its own
relative position biases (`T5Config.relpos_per_layer`). Names and formulas follow
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
    DecoderLayer,
    Dense,
    EncoderLayer,
    KeysValues,
    LayerCache,
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
from ptjax.trees import Tree

Cache = Layers[LayerCache]


class PromptStates(NamedTuple):
    """The keys and values [layers, P, H, K] of an input-independent prompt.

    They are the same for every example, so they are computed once and shared by all rows.

    Attributes:
        encoder: for the self-attention of every encoder layer.
        decoder: for the cross-attention in every decoder layer.
    """

    encoder: KeysValues
    decoder: KeysValues


class Encoded(NamedTuple):
    """The result of the encoder, which the decoder attends to.

    Attributes:
        states: the encoder's output [B, S, D].
        segment_ids: int32 [B, S]; 0 is padding, 1, 2, ... are the examples of a row.
        prompt: the states of an input-independent prompt, shared by all examples.
    """

    states: Array
    segment_ids: Array
    prompt: PromptStates | None = None


class Encoder(nn.Module):
    """T5's encoder, from embedded positions on."""

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
        """Returns the output, and with `keep` the keys and values [layers, B, S, H, K].

        Args:
            mask: which keys a query may attend to.
            prompt: `PromptStates.encoder`, shared by all examples.
            positions: positions inside an example, for packed rows.
        """
        cfg = self.config
        x = self.input_dropout(embedded, deterministic).astype(cfg.dtype)
        length = x.shape[1]
        masked = mask_bias(mask, cfg.dtype)

        def biases(relpos_bias: RelativePositionBias) -> tuple[Array, Tree]:
            bias = relpos_bias(length, length) + masked
            if prompt is None:
                return bias, None
            before = prompt[0].shape[1]
            prompt_bias = relpos_bias(length, before + length, before)[..., :before]
            if positions is not None:
                prompt_bias = jnp.swapaxes(prompt_bias[0][:, positions], 0, 1)
            return bias, prompt_bias

        of_stack = None if cfg.relpos_per_layer else biases(self.relpos_bias)

        def run(layer: EncoderLayer, x: Array, prompt: KeysValues | None) -> tuple[Array, Tree]:
            bias, prompt_bias = of_stack or biases(layer.relpos_bias)
            shared = None if prompt is None else (prompt, prompt_bias)
            x, keys_values = layer(x, bias, deterministic, shared)
            return x, keys_values if keep else None

        count = cfg.num_encoder_layers
        x, keys_values = run_layers(
            cfg,
            count,
            run,
            self.layers,
            x,
            unstack(cfg, count, prompt),
            gather=self.gather,
            collections=self.collections,
        )
        states = self.output_dropout(self.encoder_norm(x), deterministic)
        return states, stack(keys_values) if keep else None


class Decoder(nn.Module):
    """T5's decoder, from embedded targets to the states before the logits."""

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
            # Always float32, as in T5X: the softmax needs the precision.
            self.logits_dense = Dense(cfg.vocab_size, jnp.float32)

    def cross_keys_values(self, encoded: Float[Array, "B S D"]) -> Layers[KeysValues]:
        """Returns each layer's keys and values [B, S, H, K] of the encoder's output."""

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
        """Runs on whole targets or, with a cache, on the l targets from `position` on.

        Returns the states, and the updated cache (None without a cache).
        """
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
    """The encoder-decoder in separate steps, so that a prompt can be inserted between them.

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
        """Looks up the embeddings of tokens, in the activations' dtype."""
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
        """Runs the encoder on embedded tokens.

        Args:
            mask: which positions each one attends to.
            prompt: the states of an input-independent prompt, shared by all examples.
            positions: positions inside an example, for packed rows with such a prompt.
        """
        before = None if prompt is None else prompt.encoder
        return self.encoder(embedded, mask, not train, before, positions)[0]

    def prompt_states(self, prompt: Float[Array, "P D"], *, train: bool = False) -> PromptStates:
        """Computes the states of a prompt whose positions attend to the prompt alone."""
        seen = jnp.ones((1, 1, len(prompt)), bool)
        encoded, encoder = self.encoder(prompt[None], seen, not train, keep=True)
        made: Any = (encoder, stack(self.decoder.cross_keys_values(encoded)))
        return PromptStates(*jax.tree.map(lambda x: x[:, 0], made))

    def init_cache(self, encoded: Encoded, length: int) -> Cache:
        """Makes a cache with cross-attention's keys and values, and room for `length` targets."""
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
        """Decodes the targets `position ... position + l - 1`, which are `tokens`, with a cache.

        `encoded.states` is not used: its keys and values are in the cache.

        Returns:
            The float32 logits of the token after each target, and the updated cache.
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
        """Computes float32 logits for whole targets (teacher forcing)."""
        embedded = self.embed(decoder_input_tokens)
        return self._logits(self.decoder(embedded, encoded, not train, decoder_segment_ids)[0])

    def _logits(self, y: Float[Array, "B l D"]) -> Float[Array, "B l V"]:
        if not self.config.logits_via_embedding:
            return self.decoder.logits_dense(y)
        table = self.token_embedder.embedding.astype(jnp.float32)
        return jnp.dot(y.astype(jnp.float32), table.T) / np.sqrt(self.config.emb_dim)


def init_params(config: T5Config, key: Array) -> Tree:
    """Makes random float32 parameters with T5X's initialisers, for pre-training from scratch."""

    def everything(module: T5) -> None:
        tokens = jnp.ones((1, 2), jnp.int32)
        states = module.encode_embedded(module.embed(tokens), jnp.ones((1, 1, 2), bool))
        module.decode(Encoded(states, tokens), tokens)

    variables: Any = nn.init(everything, T5(config))(key)
    return variables["params"]


@functools.cache
def parameter_shapes(config: T5Config) -> Tree:
    """Returns the parameter tree as float32 `jax.ShapeDtypeStruct`s; computes no parameter."""
    if config.scan_layers:
        return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    # All layers of a stack have the same shapes; tracing dozens of them takes seconds.
    short = dataclasses.replace(config, num_encoder_layers=1, num_decoder_layers=1)
    shapes = jax.eval_shape(functools.partial(init_params, short), jax.random.key(0))
    counts = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    for name, count in counts.items():
        layer = shapes[name].pop("layers_0")
        shapes[name] |= {f"layers_{i}": layer for i in range(count)}
        shapes[name] = dict(sorted(shapes[name].items()))
    return shapes
