"""A frozen T5 with a soft prompt in front of its encoder."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ptjax.errors import InputError
from ptjax.models.config import T5Config
from ptjax.models.layers import positions_in_segments, same_segment
from ptjax.models.prompt import Bank, Prompt
from ptjax.models.stacking import GatherFn
from ptjax.models.t5 import T5, Cache, Encoded, PromptStates


class PromptedT5(nn.Module):
    """T5 that reads its prompt from the collection `prompt`, and is plain T5 without one.

    The backbone shares this module's scope, so its parameters keep T5X's paths.

    The collection holds `prompt`, a matrix [P, D] or one for every row [B, P, D]; or the arrays of
    a `Bank`, from which `prompt_ids` choose; or `states`, the `PromptStates` of a prompt that sees
    no input.
    """

    config: T5Config
    attends_to_input: bool = True
    gather: GatherFn | None = None
    collections: tuple[str, ...] = ()

    def setup(self) -> None:
        self.backbone = T5(self.config, self.gather, self.collections)
        nn.share_scope(self, self.backbone)
        self.prompt = Prompt(self.attends_to_input)
        nn.share_scope(self, self.prompt)

    def encode(
        self,
        encoder_input_tokens: Int[Array, "B T"],
        encoder_segment_ids: Int[Array, "B T"] | None = None,
        *,
        encoder_lengths: Int[Array, " B"] | None = None,
        prompt_ids: Int[Array, " B"] | None = None,
        train: bool = False,
    ) -> Encoded:
        """What the decoder reads, S = P + T positions a row, or T where they are packed.

        Args:
            encoder_segment_ids: of packed rows. There a prompt that sees its input has places of
                its own: the first P of every segment.
            encoder_lengths: of rows of one example, how many of its tokens are real. Either these
                or the segments are needed: a token's id does not say that it is padding.
            prompt_ids: of a bank, the prompt of every row; -1 is none, and equals plain T5.

        Raises:
            InputError: neither lengths nor segments, or both; `prompt_ids` without a bank or the
                other way round, or with packed rows.
        """
        self._check_choice(prompt_ids, packed=encoder_segment_ids is not None)
        embedded = self.backbone.embed(encoder_input_tokens)
        if encoder_lengths is not None and encoder_segment_ids is None:
            real = jnp.arange(encoder_input_tokens.shape[1]) < encoder_lengths[:, None]
            segment_ids, positions, mask = real.astype(jnp.int32), None, real[:, None]
        elif encoder_segment_ids is not None and encoder_lengths is None:
            segment_ids, positions = encoder_segment_ids, positions_in_segments(encoder_segment_ids)
            mask = same_segment(segment_ids, segment_ids)
        else:
            raise InputError(
                "rows of one example need encoder_lengths, packed rows need encoder_segment_ids; "
                "give one of the two"
            )
        states = None
        if self.has_variable("prompt", "states"):
            states = self.get_variable("prompt", "states")
        elif self.has_variable("prompt", "prompt"):
            matrix = self.prompt.matrix()
            if matrix.ndim == 2 and not self.attends_to_input:
                states = self.backbone.prompt_states(matrix, train=train)
            elif positions is not None:
                embedded = self.prompt.inside(embedded, segment_ids, positions)
            else:
                embedded, segment_ids, mask = self.prompt.before(embedded, segment_ids, prompt_ids)
        encoded = self.backbone.encode_embedded(
            embedded, mask, prompt=states, positions=positions, train=train
        )
        return Encoded(encoded, segment_ids, states)

    def _check_choice(self, prompt_ids: Int[Array, " B"] | None, packed: bool) -> None:
        """A prompt is neither taken for another nor left out without a word."""
        if self.prompt.is_bank() and prompt_ids is None:
            raise InputError("a bank of prompts needs prompt_ids, one for every row; -1 is none")
        if prompt_ids is not None and not self.prompt.is_bank():
            raise InputError("prompt_ids choose from a bank of prompts, and there is none")
        if prompt_ids is not None and packed:
            raise InputError("prompt_ids are one for every row; rows of several examples lack them")

    def prompt_states(self) -> PromptStates:
        """What every example shares of a prompt that sees no input."""
        return self.backbone.prompt_states(self.prompt.matrix())

    def decode(
        self,
        encoded: Encoded,
        decoder_input_tokens: Int[Array, "B L"],
        decoder_segment_ids: Int[Array, "B L"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B L V"]:
        return self.backbone.decode(encoded, decoder_input_tokens, decoder_segment_ids, train=train)

    def init_cache(self, encoded: Encoded, length: int) -> Cache:
        return self.backbone.init_cache(encoded, length)

    def decode_step(
        self,
        tokens: Int[Array, "B l"],
        cache: Cache,
        position: Int[Array, ""] | int,
        encoded: Encoded,
    ) -> tuple[Float[Array, "B l V"], Cache]:
        return self.backbone.decode_step(tokens, cache, position, encoded)

    def __call__(
        self,
        encoder_input_tokens: Int[Array, "B T"],
        decoder_input_tokens: Int[Array, "B L"],
        encoder_segment_ids: Int[Array, "B T"] | None = None,
        decoder_segment_ids: Int[Array, "B L"] | None = None,
        *,
        encoder_lengths: Int[Array, " B"] | None = None,
        prompt_ids: Int[Array, " B"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B L V"]:
        """Float32 logits; arguments as for `encode`.

        With `train`, dropout draws from the rng stream `dropout`.
        """
        encoded = self.encode(
            encoder_input_tokens,
            encoder_segment_ids,
            encoder_lengths=encoder_lengths,
            prompt_ids=prompt_ids,
            train=train,
        )
        return self.decode(encoded, decoder_input_tokens, decoder_segment_ids, train=train)


@functools.cache
def make_apply_fn(
    config: T5Config,
    attends_to_input: bool = True,
    gather: GatherFn | None = None,
    collections: tuple[str, ...] = (),
) -> Callable[..., Any]:
    """`PromptedT5(...).apply`, the same object for the same settings: jit caches by it.

    Args:
        gather: for weights that are divided along D too (`sharding.arrays.gather_layer`).
        collections: beside `params`, those in which layers have arrays of their own, which a scan
            over layers has to carry.
    """
    return PromptedT5(config, attends_to_input, gather, collections).apply


def with_prompt(
    variables: dict[str, Any],
    prompt: Float[Array, "*B P D"] | np.ndarray | Bank | PromptStates | None,
) -> dict[str, Any]:
    """`variables` with `prompt` as its prompt collection, or without one."""
    variables = {name: tree for name, tree in variables.items() if name != "prompt"}
    if prompt is None:
        return variables
    if isinstance(prompt, PromptStates):
        return variables | {"prompt": {"states": prompt}}
    if isinstance(prompt, Bank):
        return variables | {"prompt": prompt._asdict()}
    return variables | {"prompt": {"prompt": jnp.asarray(prompt, jnp.float32)}}
