"""The soft prompt inside the network: its Flax module, and banks of prompts."""

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
"""The `prompt_ids` entry of a row without a prompt."""


class Bank(NamedTuple):
    """N prompts of one width; each row of a batch chooses one of them by `prompt_ids`.

    Shorter prompts are padded at the front, so that their distance to the text is unchanged.

    Attributes:
        prompt: float32 [N, P, D], the padded prompts.
        lengths: int32 [N], the length of each prompt without padding, at most P.
        attends_to_input: bool [N], as `Prompt.attends_to_input`.
    """

    prompt: Array | np.ndarray
    lengths: Array | np.ndarray
    attends_to_input: Array | np.ndarray


def stack_prompts(
    prompts: Sequence[np.ndarray | Array] | np.ndarray | Array,
    attends_to_input: Sequence[bool] | bool = True,
) -> Bank:
    """Makes a bank, of numpy arrays, from N prompts.

    Args:
        prompts: N matrices [P_i, D], or an array [N, P, D].
        attends_to_input: one value for all prompts, or one per prompt; see `Prompt`.
    """
    matrices = [np.asarray(prompt, np.float32) for prompt in prompts]
    lengths = np.array([len(matrix) for matrix in matrices], np.int32)
    padding = [((lengths.max() - len(matrix), 0), (0, 0)) for matrix in matrices]
    stacked = np.stack([np.pad(m, width) for m, width in zip(matrices, padding, strict=True)])
    return Bank(stacked, lengths, np.broadcast_to(attends_to_input, lengths.shape))


def check_prompt_ids(is_bank: bool, prompt_ids: Int[Array, " B"] | None) -> None:
    """Raises InputError if `prompt_ids` are missing for a bank of prompts, or given without one.

    Args:
        is_bank: whether the variables hold a bank.
    """
    if is_bank and prompt_ids is None:
        raise InputError("a bank of prompts needs prompt_ids, one per row; -1 means no prompt")
    if prompt_ids is not None and not is_bank:
        raise InputError("prompt_ids were given without a bank of prompts")


class Prompt(nn.Module):
    """The soft prompt, a learned matrix [P, D] (float32) in the variable collection `prompt`.

    It is prepended to the embedded input, [P; E] (Lester et al. 2021, section 2). If the collection
    holds an array [B, P, D], every row has its own prompt; with a `Bank`, every row chooses one.

    Attributes:
        attends_to_input: True as in the paper: prompt positions attend to prompt and text. If
            False they attend to the prompt alone (text still attends to both), so their states
            are the same for every example and are computed once.
    """

    attends_to_input: bool = True

    def matrix(self) -> Float[Array, "*B P D"]:
        """Returns the array `prompt` of the collection `prompt`: one prompt, or one per row."""
        return self.get_variable("prompt", "prompt")

    def is_bank(self) -> bool:
        """Whether the collection holds a `Bank`."""
        return self.has_variable("prompt", "lengths")

    def before(
        self,
        embedded: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        prompt_ids: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B S D"], Int[Array, "B S"], Bool[Array, "#B S S"] | None]:
        """Prepends each row's prompt to the embedded input.

        Args:
            embedded: the embeddings of the input's tokens.
            segment_ids: 1 for each token of the input, 0 for padding.
            prompt_ids: for a bank, the index of every row's prompt; -1 means no prompt.

        Returns:
            `(rows, segment_ids, seen)`: the rows [P; E] with S = P + T positions, their segment
            ids, and `Mask.seen`, None if all prompts attend to their input.
        """
        prompt, real, attends_to_input = self.rows(len(embedded), prompt_ids)
        length = prompt.shape[1]
        prompt = prompt.astype(embedded.dtype)
        segment_ids = jnp.concatenate([real.astype(segment_ids.dtype), segment_ids], axis=1)
        seen = None
        if attends_to_input is not True:
            of_prompt = jnp.arange(segment_ids.shape[1]) < length
            seen = of_prompt[None, :] | ~of_prompt[:, None]
            seen = seen | jnp.reshape(attends_to_input, (-1, 1, 1))
        return jnp.concatenate([prompt, embedded], axis=1), segment_ids, seen

    def rows(
        self, count: int, prompt_ids: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B P D"], Int[Array, "B P"], bool | Bool[Array, " B"]]:
        """Returns the prompt of each of `count` rows; `prompt_ids` as for `before`.

        Returns:
            `(prompts, real, attends_to_input)`: float32 prompts; 1 at each prompt position that is
            not padding, else 0; and whether prompts attend to the input, one bool or one per row.
        """
        prompt, attends_to_input = self.matrix(), self.attends_to_input
        length = prompt.shape[-2]
        real = jnp.ones((count, length), jnp.int32)
        if prompt_ids is not None:
            chosen = jnp.maximum(prompt_ids, 0)
            prompt, lengths, attends_to_input = (
                self.get_variable("prompt", name)[chosen] for name in Bank._fields
            )
            lengths = jnp.where(prompt_ids <= NO_PROMPT_ID, 0, lengths)
            real *= jnp.arange(length) >= length - lengths[:, None]
        # Broadcast in float32, cast by the caller: the transpose of this broadcast, the sum of the
        # examples' gradients, is then computed in float32.
        return jnp.broadcast_to(prompt, (count, *prompt.shape[-2:])), real, attends_to_input

    def inside(
        self,
        embedded: Float[Array, "B S D"],
        segment_ids: Int[Array, "B S"],
        positions: Int[Array, "B S"],
    ) -> Float[Array, "B S D"]:
        """Writes the prompt into packed rows, over the first P positions of every segment.

        These positions are reserved for it (`data.batch.make_packed_batch`).

        Args:
            positions: each token's position within its segment (`attention.positions_in_segments`).

        Raises:
            InputError: the prompt is not a single matrix [P, D].
        """
        prompt = self.matrix()
        if prompt.ndim != 2:
            raise InputError(
                "packed rows share one prompt [P, D]; a prompt per row cannot be packed"
            )
        reserved = (positions < len(prompt)) & (segment_ids != PADDING_SEGMENT)
        # Looked up in float32 and cast afterwards, as in `before`.
        rows = prompt[jnp.where(reserved, positions, 0)].astype(embedded.dtype)
        return jnp.where(reserved[..., None], rows, embedded)
