"""A frozen network that is not a T5, with a soft prompt; imports only public names.

    python examples/own_network.py FOLDER          # random weights, to try it out

    import own_network, ptjax
    backbone = ptjax.load_backbone(FOLDER, family=own_network.family(), tokenizer=...)

In a gin file: `import own_network` and `ptjax.load_backbone.family = @own_network.family()`.

The network has learned positions, layer norms with a bias and Flax's own attention. What ptjax asks
of it is in docs/own_networks.md: `encode`, `decode`, an embedder, and a cache of one row a row.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import ptjax

VOCABULARY, WIDTH, HEADS, LAYERS, LONGEST = 8192, 16, 2, 1, 256


class Positions(nn.Module):
    """Adds learned positions: 0, 1, 2, ... or, one target at a time, the next one."""

    @nn.compact
    def __call__(self, x: jax.Array, decode: bool = False) -> jax.Array:
        shape = LONGEST, WIDTH
        table = self.param("table", nn.initializers.normal(0.1), shape)
        start = jnp.int32(0)
        if decode:
            running = self.has_variable("cache", "position")
            position = self.variable("cache", "position", lambda: jnp.int32(0))
            if running:
                start = position.value
                position.value = start + 1
        return x + jax.lax.dynamic_slice_in_dim(table, start, x.shape[1])


class Layer(nn.Module):
    """Attention to the row itself, in a decoder to the input too, and a feed-forward network."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        read: tuple[jax.Array, jax.Array] | None = None,
        *,
        decode: bool = False,
        dropout: bool = False,
    ) -> jax.Array:
        attention = nn.MultiHeadDotProductAttention(HEADS, decode=decode, name="attention")
        y = nn.LayerNorm(name="norm")(x)
        x += attention(y, mask=mask)
        if read is not None:
            states, readable = read
            cross = nn.MultiHeadDotProductAttention(HEADS, name="cross_attention")
            x += cross(nn.LayerNorm(name="cross_norm")(x), states, mask=readable)
        y = nn.Dense(4 * WIDTH, name="up")(nn.LayerNorm(name="mlp_norm")(x))
        y = nn.Dropout(0.1)(nn.silu(y), deterministic=not dropout)
        return x + nn.Dense(WIDTH, name="down")(y)


class Network(nn.Module):
    """An encoder-decoder of `LAYERS` layers each."""

    def setup(self) -> None:
        self.embed = nn.Embed(VOCABULARY, WIDTH, embedding_init=nn.initializers.normal(1.0))
        self.input_positions, self.target_positions = Positions(), Positions()
        self.encoder = [Layer() for _ in range(LAYERS)]
        self.decoder = [Layer() for _ in range(LAYERS)]
        self.logits = nn.Dense(VOCABULARY)

    def encode(self, encoder_input_tokens: jax.Array, enable_dropout: bool = True) -> jax.Array:
        """[B, S] -> [B, S, D]; token 0 is padding. The prompt goes in front inside `embed`."""
        mask = nn.make_attention_mask(encoder_input_tokens > 0, encoder_input_tokens > 0)
        x = self.input_positions(self.embed(encoder_input_tokens))
        for layer in self.encoder:
            x = layer(x, mask, dropout=enable_dropout)
        return x

    def decode(
        self,
        encoded: jax.Array,
        encoder_input_tokens: jax.Array,
        decoder_input_tokens: jax.Array,
        decoder_target_tokens: jax.Array,
        enable_dropout: bool = True,
        decode: bool = False,
        max_decode_length: int | None = None,
    ) -> jax.Array:
        """Logits [B, L, V] of whole targets or, with `decode`, of the next one.

        Flax's attention makes its cache from the first call, which has all `max_decode_length`.
        """
        tokens = decoder_input_tokens
        mask = None if decode else nn.make_causal_mask(tokens)
        readable = nn.make_attention_mask(jnp.ones_like(tokens), encoder_input_tokens > 0)
        x = self.target_positions(self.embed(tokens), decode)
        for layer in self.decoder:
            x = layer(x, mask, (encoded, readable), decode=decode, dropout=enable_dropout)
        return self.logits(x)


def family() -> Any:
    """For `ptjax.load_backbone(path, family=family())`."""
    return ptjax.flax_module(Network(), embedder="embed")


def init_params(seed: int = 0) -> dict[str, Any]:
    """Random weights."""
    tokens = jnp.ones((1, 2), jnp.int32)

    def everything(network: Network) -> None:
        network.decode(network.encode(tokens, False), tokens, tokens, tokens, False)

    return Network().init(jax.random.key(seed), method=everything)["params"]


if __name__ == "__main__":
    ptjax.save_backbone(sys.argv[1], None, init_params(), dtype="float32", family=family())
