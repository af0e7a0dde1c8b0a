"""A frozen T5 with a soft prompt in front of its encoder."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from ptjax.models.prompt import Prompt
from ptjax.models.t5 import T5, Cache, T5Config


class PromptedT5(nn.Module):
    """T5 that reads its prompt from the collection `prompt`, and is plain T5 without one.

    The backbone shares this module's scope, so its parameters keep T5X's paths.
    """

    config: T5Config

    def setup(self) -> None:
        self.backbone = T5(self.config)
        nn.share_scope(self, self.backbone)
        self.prompt = Prompt()
        nn.share_scope(self, self.prompt)

    def encode(
        self, encoder_input_tokens: Int[Array, "B T"], *, train: bool = False
    ) -> tuple[Float[Array, "B S D"], Bool[Array, "B S"]]:
        """Encoder output [B, P + T, D] and the mask of its real positions [B, P + T]."""
        embedded, mask = self.backbone.embed(encoder_input_tokens), encoder_input_tokens > 0
        if self.has_variable("prompt", "prompt"):
            embedded, mask = self.prompt(embedded, mask)
        return self.backbone.encode_embedded(embedded, mask, train=train), mask

    def decode(
        self,
        encoded: Float[Array, "B S D"],
        encoder_mask: Bool[Array, "B S"],
        decoder_input_tokens: Int[Array, "B L"],
        *,
        train: bool = False,
    ) -> Float[Array, "B L V"]:
        return self.backbone.decode(encoded, encoder_mask, decoder_input_tokens, train=train)

    def init_cache(self, encoded: Float[Array, "B S D"], length: int) -> Cache:
        return self.backbone.init_cache(encoded, length)

    def decode_step(
        self,
        tokens: Int[Array, "B l"],
        cache: Cache,
        position: Int[Array, ""] | int,
        encoder_mask: Bool[Array, "B S"],
    ) -> tuple[Float[Array, "B l V"], Cache]:
        return self.backbone.decode_step(tokens, cache, position, encoder_mask)

    def __call__(
        self,
        encoder_input_tokens: Int[Array, "B T"],
        decoder_input_tokens: Int[Array, "B L"],
        *,
        train: bool = False,
    ) -> Float[Array, "B L V"]:
        """Float32 logits. With `train`, dropout draws from the rng stream `dropout`."""
        encoded, mask = self.encode(encoder_input_tokens, train=train)
        return self.decode(encoded, mask, decoder_input_tokens, train=train)


def with_prompt(
    variables: dict[str, Any], prompt: Float[Array, "*B P D"] | np.ndarray | None
) -> dict[str, Any]:
    """`variables` with `prompt` as its prompt collection, or without one."""
    variables = {name: tree for name, tree in variables.items() if name != "prompt"}
    if prompt is None:
        return variables
    return variables | {"prompt": {"prompt": jnp.asarray(prompt, jnp.float32)}}
