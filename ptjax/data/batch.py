"""The definition of a batch.

A batch is a dict of numpy arrays under T5X's names: `encoder_input_tokens` int32 [B, T],
`decoder_input_tokens` int32 [B, L] (the targets shifted right, after the decoder's start id),
`decoder_target_tokens` int32 [B, L], `decoder_loss_weights` float32 [B, L]; and in addition
`encoder_lengths` int32 [B], the number of real tokens of each row. Padding is defined by lengths,
never by a token: id 0 is a word in many vocabularies. A row of length 0 is filler.

A packed batch has several consecutive examples per row. `encoder_segment_ids` int32 [B, T] and
`decoder_segment_ids` int32 [B, L] number the examples of a row from 1; 0 is padding. It has no
`encoder_lengths`. Each example's decoder inputs begin with the decoder's start id, and its encoder
segment with as many padding ids as a copy of the prompt needs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from ptjax.errors import InputError

Batch = dict[str, np.ndarray]

PADDING_SEGMENT = 0
"""The segment id of padding."""

PER_ROW = ("encoder_lengths",)
"""The arrays of a batch that have one number per row."""


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """The special ids of a vocabulary; see `models.config.T5Config`.

    They have no defaults: every caller takes the ids from its backbone's config.
    """

    pad_id: int
    eos_ids: tuple[int, ...]
    decoder_start_id: int
    forced_bos_id: int | None


def shift_right(targets: np.ndarray, start_id: int) -> np.ndarray:
    """Returns the decoder inputs of `targets` [..., L]: the start id, then `targets[..., :-1]`."""
    start = np.full_like(targets[..., :1], start_id)
    return np.concatenate([start, targets[..., :-1]], axis=-1)


def trailing_lengths(tokens: np.ndarray, pad_id: int) -> np.ndarray:
    """Computes the lengths, int32 [B], of rows [B, L] without their trailing `pad_id`s.

    For callers who pass arrays without lengths; this is the only place where padding is
    recognised by its id.
    """
    real = tokens != pad_id
    behind = np.argmax(real[:, ::-1], axis=1) if tokens.size else 0
    return np.where(real.any(axis=1), tokens.shape[1] - behind, 0).astype(np.int32)


def length_weights(lengths: np.ndarray, length: int) -> np.ndarray:
    """Returns float32 [B, length]: 1 in the first `lengths` [B] positions of each row, else 0."""
    return (np.arange(length) < np.asarray(lengths)[:, None]).astype(np.float32)


def count_examples(batch: Batch, active: np.ndarray | None = None) -> int:
    """Counts the examples of a batch; an empty row (filler) of an unpacked batch counts too.

    Args:
        active: for a sweep's batch, the members that are counted, bool [N]; None counts all.
    """
    members = ... if active is None else active
    if "encoder_segment_ids" in batch:
        return int(batch["encoder_segment_ids"][members].max(axis=-1).sum())
    return math.prod(batch["encoder_input_tokens"][members].shape[:-1])


def pad(rows: Sequence[Sequence[int] | np.ndarray], length: int, pad_id: int) -> np.ndarray:
    """Pads rows on the right with `pad_id`, to int32 [B, length]; no row may be longer."""
    out = np.full((len(rows), length), pad_id, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def make_batch(
    inputs: Sequence[Sequence[int] | np.ndarray],
    targets: Sequence[Sequence[int] | np.ndarray],
    *,
    input_length: int,
    target_length: int,
    ids: SpecialIds,
) -> Batch:
    """Builds a batch from the token ids (EOS included) of one example per row.

    No example may be longer than `input_length` and `target_length`. An empty row is filler; its
    loss weights are 0.
    """
    target_tokens = pad(targets, target_length, ids.pad_id)
    return {
        "encoder_input_tokens": pad(inputs, input_length, ids.pad_id),
        "encoder_lengths": np.array([len(row) for row in inputs], np.int32),
        "decoder_input_tokens": shift_right(target_tokens, ids.decoder_start_id),
        "decoder_target_tokens": target_tokens,
        "decoder_loss_weights": length_weights(
            np.array([len(row) for row in targets], np.int32), target_length
        ),
    }


def make_packed_batch(
    inputs: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    rows: np.ndarray,
    *,
    row_count: int,
    input_length: int,
    target_length: int,
    ids: SpecialIds,
    prompt_slots: int = 0,
) -> Batch:
    """Builds a packed batch from the token ids (EOS included) of its examples.

    Args:
        rows: int [B], ascending: the row of the batch in which each example is.
        row_count: the number of rows of the batch.
        prompt_slots: positions reserved before each example's inputs for its copy of the prompt.

    Raises:
        InputError: the examples of a row are longer than the row.
    """
    prompt = np.full(prompt_slots, ids.pad_id, np.int32)
    encoder_tokens, encoder_segments = _pack(
        [part for tokens in inputs for part in (prompt, tokens)],
        np.array([prompt_slots + len(tokens) for tokens in inputs]),
        rows,
        (row_count, input_length),
        ids.pad_id,
    )
    target_lengths = np.array([len(tokens) for tokens in targets])
    shape = (row_count, target_length)
    target_tokens, segments = _pack(targets, target_lengths, rows, shape, ids.pad_id)
    # The previous token is an input only within the same example.
    inside = segments == shift_right(segments, PADDING_SEGMENT)
    start_id = ids.decoder_start_id
    return {
        "encoder_input_tokens": encoder_tokens,
        "encoder_segment_ids": encoder_segments,
        "decoder_input_tokens": np.where(inside, shift_right(target_tokens, start_id), start_id),
        "decoder_target_tokens": target_tokens,
        "decoder_segment_ids": segments,
        "decoder_loss_weights": (segments != PADDING_SEGMENT).astype(np.float32),
    }


def _pack(
    pieces: Sequence[np.ndarray],
    lengths: np.ndarray,
    rows: np.ndarray,
    shape: tuple[int, int],
    pad_id: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segment ids, int32 of `shape`, of examples of `lengths` [B] in `rows` [B]."""
    first = np.searchsorted(rows, rows)  # the first example of each example's row
    ends = np.cumsum(lengths)
    starts = ends - lengths
    used = ends - starts[first]
    if used.max() > shape[1]:
        row = int(rows[used.argmax()])
        raise InputError(f"the examples of row {row} take {used.max()} positions of {shape[1]}")
    places = np.repeat(rows * shape[1] - starts[first], lengths) + np.arange(ends[-1])
    tokens = np.full(shape, pad_id, np.int32)
    segments = np.full(shape, PADDING_SEGMENT, np.int32)
    tokens.reshape(-1)[places] = np.concatenate(pieces)
    segments.reshape(-1)[places] = np.repeat(np.arange(len(rows)) - first + 1, lengths)
    return tokens, segments
