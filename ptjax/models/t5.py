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
from jaxtyping import Array, Float, Int

from ptjax.models.attention import (
    AttendFn,
    Mask,
    plain_attention,
    positions_in_segments,
    swap_heads,
)
from ptjax.models.config import T5Config
from ptjax.models.layers import (
    DecoderLayer,
    Dense,
    EncoderLayer,
    LayerCache,
    RelativePositionBias,
    RMSNorm,
)
from ptjax.models.prefix import KeysValues, PromptStates, bias_in_front
from ptjax.models.stacking import (
    GatherFn,
    Layers,
    join_layers,
    make_layers,
    map_layers,
    run_layers,
    stack,
    unstack,
)
from ptjax.trees import Tree

Cache = Layers[LayerCache]


class Encoded(NamedTuple):
    """The result of the encoder, which the decoder attends to.

    Attributes:
        states: the encoder's output [B, S, D].
        segment_ids: int32 [B, S]; 0 is padding, 1, 2, ... are the examples of a row.
        prompt: the states of an input-independent prompt or prefix, shared by all examples.
    """

    states: Array
    segment_ids: Array
    prompt: PromptStates | None = None


class Encoder(nn.Module):
    """T5's encoder without its embedding: dropout, the layers and the final norm."""

    config: T5Config
    attend: AttendFn = plain_attention
    gather: GatherFn | None = None
    collections: tuple[str, ...] = ()

    def setup(self) -> None:
        cfg = self.config
        if not cfg.relpos_per_layer:
            self.relpos_bias = RelativePositionBias(cfg, bidirectional=True)
        self.layers = make_layers(EncoderLayer, cfg, cfg.num_encoder_layers, self.attend)
        self.encoder_norm = RMSNorm(cfg.layer_norm_epsilon, cfg.dtype)
        self.input_dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))
        self.output_dropout = nn.Dropout(cfg.dropout_rate)

    def __call__(
        self,
        embedded: Float[Array, "B S D"],
        mask: Mask,
        deterministic: bool,
        prompt: KeysValues | None = None,
        positions: Int[Array, "B S"] | None = None,
        *,
        keep: bool = False,
    ) -> tuple[Float[Array, "B S D"], KeysValues | None]:
        """Returns the output, and with `keep` the keys and values [layers, B, S, H, K].

        Args:
            prompt: `PromptStates.encoder`, shared by all examples.
            positions: positions inside an example, for packed rows.
        """
        cfg = self.config
        x = self.input_dropout(embedded, deterministic).astype(cfg.dtype)
        length = x.shape[1]

        def biases(relpos_bias: RelativePositionBias) -> tuple[Array, Tree]:
            bias = relpos_bias(length, length)
            if prompt is None:
                return bias, None
            before = prompt[0].shape[1]
            return bias, bias_in_front(relpos_bias, before, length, length, positions=positions)

        of_stack = None if cfg.relpos_per_layer else biases(self.relpos_bias)

        def run(layer: EncoderLayer, x: Array, prompt: KeysValues | None) -> tuple[Array, Tree]:
            bias, prompt_bias = of_stack or biases(layer.relpos_bias)
            shared = None if prompt is None else (prompt, prompt_bias)
            x, keys_values = layer(x, bias, mask, deterministic, shared)
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
    """T5's decoder without its embedding: dropout, the layers and the final norm.

    `T5` computes the logits from its output.
    """

    config: T5Config
    attend: AttendFn = plain_attention
    gather: GatherFn | None = None
    collections: tuple[str, ...] = ()

    def setup(self) -> None:
        cfg = self.config
        if not cfg.relpos_per_layer:
            self.relpos_bias = RelativePositionBias(cfg, bidirectional=False)
        self.layers = make_layers(DecoderLayer, cfg, cfg.num_decoder_layers, self.attend)
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
        how: Any = {"gather": self.gather, "collections": self.collections}
        return run_layers(self.config, count, of_layer, self.layers, None, **how)[1]

    def __call__(
        self,
        embedded: Float[Array, "R l D"],
        encoded: Encoded,
        deterministic: bool,
        segment_ids: Int[Array, "R L"] | None = None,
        cache: Cache | None = None,
        position: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "R l D"], Cache | None]:
        """Runs on all inputs or, with a cache, on the l inputs from `position` on.

        Returns the states, and the updated cache (None without a cache).
        """
        cfg, count = self.config, self.config.num_decoder_layers
        steps = embedded.shape[1]
        of_layer = cache[0] if isinstance(cache, list) else cache
        length = steps if of_layer is None else of_layer["self_key"].shape[-2]
        seen = (jnp.arange(length) <= position + jnp.arange(steps)[:, None])[None]
        mask, cross_mask = (
            Mask(ids, segment_ids, part)
            for ids, part in ((segment_ids, seen), (encoded.segment_ids, None))
        )
        positions = None if segment_ids is None else positions_in_segments(segment_ids)
        _, shared, targets = encoded.prompt or (None, None, None)

        def biases(relpos_bias: RelativePositionBias) -> tuple[Array, Tree]:
            bias = relpos_bias(steps, length, position)
            if targets is None:
                return bias, None
            before = targets[0].shape[1]
            return bias, bias_in_front(relpos_bias, before, steps, length, position, positions)

        of_stack = None if cfg.relpos_per_layer else biases(self.relpos_bias)

        def run(
            layer: DecoderLayer,
            x: Array,
            layer_cache: LayerCache | None,
            prompt: KeysValues | None,
            targets: KeysValues | None,
        ) -> tuple[Array, LayerCache | None]:
            source = encoded.states if layer_cache is None else layer_cache
            bias, prefix_bias = of_stack or biases(layer.relpos_bias)
            prefix = None if targets is None else (targets, prefix_bias)
            masks = mask, cross_mask
            return layer(x, source, position, bias, *masks, deterministic, prompt, prefix)

        x = self.input_dropout(embedded, deterministic).astype(cfg.dtype)
        x, made = run_layers(
            cfg,
            count,
            run,
            self.layers,
            x,
            cache,
            unstack(cfg, count, shared),
            unstack(cfg, count, targets),
            gather=self.gather,
            collections=self.collections,
        )
        states = self.output_dropout(self.decoder_norm(x), deterministic)
        return states, None if cache is None else join_layers(cache, made)


class T5(nn.Module):
    """The encoder-decoder in separate steps, so that a prompt can be inserted between them.

    Attributes:
        attend: computes the attention.
        gather, collections: see `stacking.run_layers`.
    """

    config: T5Config
    attend: AttendFn = plain_attention
    gather: GatherFn | None = None
    collections: tuple[str, ...] = ()

    def setup(self) -> None:
        cfg = self.config
        self.token_embedder = nn.Embed(
            cfg.vocab_size, cfg.emb_dim, embedding_init=nn.initializers.normal(1.0)
        )
        self.encoder = Encoder(cfg, self.attend, self.gather, self.collections)
        self.decoder = Decoder(cfg, self.attend, self.gather, self.collections)

    def embed(self, tokens: Int[Array, "B t"]) -> Float[Array, "B t D"]:
        """Looks up the embeddings of tokens, in the activations' dtype."""
        return self.token_embedder.embedding.astype(self.config.dtype)[tokens]

    def encode_embedded(
        self,
        embedded: Float[Array, "B S D"],
        mask: Mask,
        *,
        prompt: PromptStates | None = None,
        positions: Int[Array, "B S"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B S D"]:
        """Runs the encoder on embedded tokens.

        Args:
            prompt: the states of an input-independent prompt, shared by all examples.
            positions: for packed rows with such a prompt, each token's position in its example.
            train: whether to apply dropout.
        """
        before = None if prompt is None else prompt.encoder
        return self.encoder(embedded, mask, not train, before, positions)[0]

    def prompt_states(self, prompt: Float[Array, "P D"], *, train: bool = False) -> PromptStates:
        """Computes the states of a prompt whose positions attend to the prompt alone."""
        encoded, encoder = self._encode_alone(prompt, not train)
        made: Any = (encoder, stack(self.decoder.cross_keys_values(encoded.states)))
        return PromptStates(*jax.tree.map(lambda x: x[:, 0], made))

    def prefix_states(self, prompt: Float[Array, "P D"]) -> PromptStates:
        """Computes a prefix for all layers from vectors [P, D], such as embeddings of tokens.

        In the encoder and in cross-attention it is the prompt of `prompt_states`. In the decoder's
        self-attention, the vectors are P inputs in front of the start id, which attend to that
        prompt alone.
        """
        encoded, encoder = self._encode_alone(prompt, True)
        cache: Any = self.init_cache(encoded, len(prompt))
        cache = stack(self.decoder(prompt[None], encoded, True, cache=cache)[1])
        cache = jax.tree.map(swap_heads, cache)
        pairs = ((cache[f"{kind}_key"], cache[f"{kind}_value"]) for kind in ("cross", "self"))
        return PromptStates(*jax.tree.map(lambda x: x[:, 0], (encoder, *pairs)))

    def _encode_alone(
        self, prompt: Float[Array, "P D"], deterministic: bool
    ) -> tuple[Encoded, Any]:
        """Runs the encoder on a prompt without a text; also returns its keys and values."""
        segment_ids = jnp.ones((1, len(prompt)), jnp.int32)
        mask = Mask(segment_ids)
        encoded, keys_values = self.encoder(prompt[None], mask, deterministic, keep=True)
        return Encoded(encoded, segment_ids), keys_values

    def init_cache(self, encoded: Encoded, length: int) -> Cache:
        """Makes a cache for `decode_step`, with room for `length` targets per row.

        It holds the keys and values of the cross-attention.
        """
        cfg = self.config
        shape = (len(encoded.states), cfg.num_heads, length, cfg.head_dim)
        empty = jnp.zeros(shape, cfg.dtype)

        def of_layer(cross: KeysValues) -> LayerCache:
            key, value = map(swap_heads, cross)
            return {"self_key": empty, "self_value": empty, "cross_key": key, "cross_value": value}

        return map_layers(of_layer, self.decoder.cross_keys_values(encoded.states))

    def decode_step(
        self,
        tokens: Int[Array, "R l"],
        cache: Cache,
        position: Int[Array, ""] | int,
        encoded: Encoded,
    ) -> tuple[Float[Array, "R l V"], Cache]:
        """Runs the decoder on its next l inputs, with a cache of the previous ones.

        `encoded.states` is not used: its keys and values are in the cache.

        Args:
            tokens: the inputs; the first input of all is the decoder's start id. With l = 1 they
                may be R = B * K beams, K of each row of `encoded`; so are the cache's `self_...`.
            position: the position of the first of `tokens`, counted from 0.

        Returns:
            `(logits, cache)`: the float32 logits of the token that follows each input, and the
            updated cache.
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
        """Computes the float32 logits of all targets in one pass, from the correct previous ones.

        Args:
            encoded: the encoder's result, which the decoder attends to.
            decoder_input_tokens: the decoder's start id, then all targets except the last. The
                logits at a position predict the target of that position.
            decoder_segment_ids: for packed rows, the id of each target's example in its row, as in
                `encoded.segment_ids`; 0 is padding.
            train: whether to apply dropout.
        """
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
        states = module.encode_embedded(module.embed(tokens), Mask(tokens))
        module.decode(Encoded(states, tokens), tokens)

    variables: Any = nn.init(everything, T5(config))(key)
    return variables["params"]


@functools.cache
def parameter_shapes(config: T5Config) -> Tree:
    """Returns the parameter tree as float32 `jax.ShapeDtypeStruct`s; computes no parameter."""
    if config.scan_layers:
        return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    # All layers of a stack have the same shapes; tracing dozens of them takes seconds.
    short = dataclasses.replace(config, num_encoder_layers=1, num_decoder_layers=1)
    shapes = jax.eval_shape(lambda: init_params(short, jax.random.key(0)))
    counts = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    for name, count in counts.items():
        layer = shapes[name].pop("layers_0")
        shapes[name] |= {f"layers_{i}": layer for i in range(count)}
        shapes[name] = dict(sorted(shapes[name].items()))
    return shapes
