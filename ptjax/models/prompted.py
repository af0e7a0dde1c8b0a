"""A frozen T5 with a soft prompt before its encoder's input."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ptjax.errors import InputError
from ptjax.models.attention import AttendFn, Mask, plain_attention, positions_in_segments
from ptjax.models.config import T5Config
from ptjax.models.family import ApplyFn
from ptjax.models.prefix import PromptStates
from ptjax.models.prompt import Bank, Prompt, check_prompt_ids
from ptjax.models.stacking import GatherFn
from ptjax.models.t5 import T5, Cache, Encoded
from ptjax.trees import Variables


class PromptedT5(nn.Module):
    """A T5 that takes its prompt from the collection `prompt`; without that, a plain T5.

    The backbone shares this module's scope, so its parameters keep T5X's paths.

    The collection holds one of these: `prompt`, a matrix [P, D] or one per row, [B, P, D]; the
    arrays of a `Bank`, from which each row chooses by `prompt_ids`; or `states`, the `PromptStates`
    of an input-independent prompt or of a prefix, which may be float32 whatever the dtype of the
    activations.

    Attributes:
        attends_to_input: as in `Prompt`.
        attend, gather, collections: as in `make_apply_fn`.
    """

    config: T5Config
    attends_to_input: bool = True
    attend: AttendFn = plain_attention
    gather: GatherFn | None = None
    collections: tuple[str, ...] = ()

    def setup(self) -> None:
        self.backbone = T5(self.config, self.attend, self.gather, self.collections)
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
        """Runs the encoder, with the prompt, on S positions per row.

        S = P + T if the prompt is prepended. S = T without a prompt, in packed rows (which reserve
        positions for it), and for a single input-independent prompt, whose states are returned
        separately.

        Args:
            encoder_segment_ids: for packed rows. In these, the first P positions of every segment
                are reserved for a prompt that attends to its input.
            encoder_lengths: for rows of one example, the number of real tokens. Either lengths or
                segments are required, because a token's id does not mark it as padding.
            prompt_ids: for a bank, the index of every row's prompt; -1 means no prompt, as in a
                plain T5.
            train: whether to apply dropout.

        Raises:
            InputError: both or neither of lengths and segments were given; `prompt_ids` without a
                bank, a bank without `prompt_ids`, `prompt_ids` with packed rows, or a prefix of
                length 0.
        """
        self._check_choice(prompt_ids, packed=encoder_segment_ids is not None)
        embedded = self.backbone.embed(encoder_input_tokens)
        if encoder_lengths is not None and encoder_segment_ids is None:
            real = jnp.arange(encoder_input_tokens.shape[1]) < encoder_lengths[:, None]
            segment_ids, positions, lengths = real.astype(jnp.int32), None, encoder_lengths
        elif encoder_segment_ids is not None and encoder_lengths is None:
            segment_ids, positions = encoder_segment_ids, positions_in_segments(encoder_segment_ids)
            lengths = None
        else:
            raise InputError(
                "rows of one example need encoder_lengths, packed rows need encoder_segment_ids; "
                "give one of the two"
            )
        states = seen = None
        if self.has_variable("prompt", "states"):
            states = self.get_variable("prompt", "states")
            states.check()
        elif self.has_variable("prompt", "prompt"):
            matrix = self.prompt.matrix()
            if matrix.ndim == 2 and not self.attends_to_input:
                states = self.backbone.prompt_states(matrix, train=train)
            elif positions is not None:
                embedded = self.prompt.inside(embedded, segment_ids, positions)
            else:
                embedded, segment_ids, seen = self.prompt.before(embedded, segment_ids, prompt_ids)
                # The prompts of a bank differ in length: their padding is in front of the text.
                if lengths is not None:
                    lengths = lengths + len(matrix) if matrix.ndim == 2 else None
        mask = Mask(segment_ids, None if positions is None else segment_ids, seen, lengths)
        encoded = self.backbone.encode_embedded(
            embedded, mask, prompt=states, positions=positions, train=train
        )
        return Encoded(encoded, segment_ids, states)

    def _check_choice(self, prompt_ids: Int[Array, " B"] | None, packed: bool) -> None:
        """Rejects missing or superfluous `prompt_ids`."""
        check_prompt_ids(self.prompt.is_bank(), prompt_ids)
        if prompt_ids is not None and packed:
            raise InputError("prompt_ids cannot be used with packed rows: they choose one per row")

    def prompt_states(self) -> PromptStates:
        """Computes the states of an input-independent prompt, which all examples share."""
        return self.backbone.prompt_states(self.prompt.matrix())

    def prefix_states(self) -> PromptStates:
        """Computes a prefix for all layers from a prompt's vectors; see `t5.T5.prefix_states`."""
        return self.backbone.prefix_states(self.prompt.matrix())

    def decode(
        self,
        encoded: Encoded,
        decoder_input_tokens: Int[Array, "B L"],
        decoder_segment_ids: Int[Array, "B L"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B L V"]:
        """Computes the float32 logits of all targets in one pass; see `t5.T5.decode`."""
        return self.backbone.decode(encoded, decoder_input_tokens, decoder_segment_ids, train=train)

    def init_cache(self, encoded: Encoded, length: int) -> Cache:
        """Makes a cache for `decode_step`, with room for `length` targets per row."""
        return self.backbone.init_cache(encoded, length)

    def decode_step(
        self,
        tokens: Int[Array, "R l"],
        cache: Cache,
        position: Int[Array, ""] | int,
        encoded: Encoded,
    ) -> tuple[Float[Array, "R l V"], Cache]:
        """Runs the decoder on its next l inputs; see `t5.T5.decode_step`."""
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
        """Computes float32 logits for whole targets; arguments as for `encode`.

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
    attend: AttendFn = plain_attention,
) -> ApplyFn:
    """Returns `PromptedT5(...).apply`.

    Equal settings return the same object, so that `jax.jit` finds it in its cache.

    Args:
        gather: gathers weights that are sharded along D too (`sharding.arrays.gather_layer`).
        collections: names of the collections, other than `params`, that hold arrays of the layers;
            a scan over layers must carry them.
        attend: computes the attention, such as `sharding.attention.FusedAttention`.
    """
    return PromptedT5(config, attends_to_input, attend, gather, collections).apply


def with_prompt(
    variables: Variables,
    prompt: Float[Array, "*B P D"] | np.ndarray | Bank | PromptStates | None,
) -> Variables:
    """Returns a copy of `variables` whose collection `prompt` holds `prompt`.

    None removes the collection.
    """
    variables = {name: tree for name, tree in variables.items() if name != "prompt"}
    if prompt is None:
        return variables
    if isinstance(prompt, PromptStates):
        return variables | {"prompt": {"states": prompt}}
    if isinstance(prompt, Bank):
        return variables | {"prompt": prompt._asdict()}
    return variables | {"prompt": {"prompt": jnp.asarray(prompt, jnp.float32)}}
