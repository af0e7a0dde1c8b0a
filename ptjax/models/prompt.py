"""The soft prompt as the network reads it: its Flax module, and banks of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from ptjax.data.batch import PADDING_SEGMENT
from ptjax.errors import InputError

NO_PROMPT_ID = -1
"""Of the rows of a batch that take no prompt of their bank."""


class Bank(NamedTuple):
    """Prompts of one width, of which every row of a batch takes its own.

    A shorter one stands in the last of its P places, so that it keeps its distance to the text; the
    places before it are padding.

    Attributes:
        prompt: float32 [N, P, D].
        lengths: int32 [N], up to P.
        attends_to_input: bool [N], as `Prompt.attends_to_input`.
    """

    prompt: Array | np.ndarray
    lengths: Array | np.ndarray
    attends_to_input: Array | np.ndarray


def stack_prompts(
    prompts: Sequence[np.ndarray | Array] | np.ndarray | Array,
    attends_to_input: Sequence[bool] | bool = True,
) -> Bank:
    """N matrices [P_i, D], or an array [N, P, D], as a bank of numpy arrays."""
    matrices = [np.asarray(prompt, np.float32) for prompt in prompts]
    lengths = np.array([len(matrix) for matrix in matrices], np.int32)
    places = [((lengths.max() - len(matrix), 0), (0, 0)) for matrix in matrices]
    stacked = np.stack([np.pad(m, place) for m, place in zip(matrices, places, strict=True)])
    return Bank(stacked, lengths, np.broadcast_to(attends_to_input, lengths.shape))


class Prompt(nn.Module):
    """The learned matrix P [P, D] (float32), in the variable collection `prompt`.

    It is put in front of the embedded input, [P; E] (Lester et al. 2021, section 2). An array
    [B, P, D] in its place gives every example its own prompt, a `Bank` the one that it names.

    Attributes:
        attends_to_input: True as in the paper: prompt positions attend to prompt and text. If
            False they attend to the prompt alone (text still attends to both), so their states
            are the same for every example and are computed once.
    """

    attends_to_input: bool = True

    def matrix(self) -> Float[Array, "*B P D"]:
        return self.get_variable("prompt", "prompt")

    def is_bank(self) -> bool:
        return self.has_variable("prompt", "lengths")

    def before(
        self,
        embedded: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        prompt_ids: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B S D"], Int[Array, "B S"], Bool[Array, "#B #S S"]]:
        """[P; E], its segments, and which positions each position may see.

        Args:
            prompt_ids: of a bank, the prompt of every row; -1 is none.
        """
        prompt, own, attends_to_input = self.rows(len(embedded), prompt_ids)
        length = prompt.shape[1]
        prompt = prompt.astype(embedded.dtype)
        segment_ids = jnp.concatenate([own.astype(segment_ids.dtype), segment_ids], axis=1)
        mask = (segment_ids != PADDING_SEGMENT)[:, None]
        if attends_to_input is not True:
            of_prompt = jnp.arange(segment_ids.shape[1]) < length
            seen = of_prompt[None, :] | ~of_prompt[:, None]
            mask = mask & (seen | jnp.reshape(attends_to_input, (-1, 1, 1)))
        return jnp.concatenate([prompt, embedded], axis=1), segment_ids, mask

    def rows(
        self, count: int, prompt_ids: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B P D"], Int[Array, "B P"], bool | Bool[Array, " B"]]:
        """Each row's own prompt in float32, which of its places it has, whether it sees its input.

        Arguments as for `before`; the places of a shorter prompt of a bank are its last ones.
        """
        prompt, attends_to_input = self.matrix(), self.attends_to_input
        length = prompt.shape[-2]
        own = jnp.ones((count, length), jnp.int32)
        if prompt_ids is not None:
            chosen = jnp.maximum(prompt_ids, 0)
            prompt, lengths, attends_to_input = (
                self.get_variable("prompt", name)[chosen] for name in Bank._fields
            )
            lengths = jnp.where(prompt_ids <= NO_PROMPT_ID, 0, lengths)
            own *= jnp.arange(length) >= length - lengths[:, None]
        # Broadcast in float32; the caller casts after it: the sum of the examples' gradients, which
        # is the transpose of this broadcast, then adds up in float32.
        return jnp.broadcast_to(prompt, (count, *prompt.shape[-2:])), own, attends_to_input

    def inside(
        self,
        embedded: Float[Array, "B S D"],
        segment_ids: Int[Array, "B S"],
        positions: Int[Array, "B S"],
    ) -> Float[Array, "B S D"]:
        """Packed rows, with P in the first places of every segment, which are kept for it."""
        prompt = self.matrix()
        if prompt.ndim != 2:
            raise InputError("packed rows share one prompt [P, D]; one for every row has no place")
        own = (positions < len(prompt)) & (segment_ids != PADDING_SEGMENT)
        # Looked up in float32 and cast after it, as in `before`.
        rows = prompt[jnp.where(own, positions, 0)].astype(embedded.dtype)
        return jnp.where(own[..., None], rows, embedded)
