"""The one definition of a batch.

A batch is a dict of numpy arrays under T5X's names: `encoder_input_tokens` int32 [B, T],
`decoder_input_tokens` int32 [B, L] (the targets shifted right behind a 0),
`decoder_target_tokens` int32 [B, L], `decoder_loss_weights` float32 [B, L]. 0 is padding.

A packed batch has several examples in a row, one directly behind the other, and says which position
belongs to which: `encoder_segment_ids` int32 [B, T] and `decoder_segment_ids` int32 [B, L] count
the examples of a row from 1; 0 is padding. Each example's decoder inputs start with a 0, and so
does its encoder segment, with as many as a copy of the prompt needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ptjax.errors import InputError

Batch = dict[str, np.ndarray]


def shift_right(targets: np.ndarray) -> np.ndarray:
    """Decoder inputs for `targets` [..., L]: T5 starts with the padding id, 0."""
    return np.concatenate([np.zeros_like(targets[..., :1]), targets[..., :-1]], axis=-1)


def count_examples(batch: Batch, active: np.ndarray | None = None) -> int:
    """How many examples a batch holds, or those of a bank's `active` members (bool [N])."""
    members = ... if active is None else active
    if "encoder_segment_ids" in batch:
        return int(batch["encoder_segment_ids"][members].max(axis=-1).sum())
    return math.prod(batch["encoder_input_tokens"][members].shape[:-1])


def pad(rows: Sequence[Sequence[int] | np.ndarray], length: int) -> np.ndarray:
    """Rows of at most `length` ids as int32 [B, length], padded with 0."""
    out = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def make_batch(
    inputs: Sequence[Sequence[int] | np.ndarray],
    targets: Sequence[Sequence[int] | np.ndarray],
    *,
    input_length: int,
    target_length: int,
) -> Batch:
    """Token rows (EOS included) as a batch. An empty row is padding and weighs nothing."""
    target_tokens = pad(targets, target_length)
    return {
        "encoder_input_tokens": pad(inputs, input_length),
        "decoder_input_tokens": shift_right(target_tokens),
        "decoder_target_tokens": target_tokens,
        "decoder_loss_weights": (target_tokens > 0).astype(np.float32),
    }


def make_packed_batch(
    inputs: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    rows: np.ndarray,
    *,
    row_count: int,
    input_length: int,
    target_length: int,
    prompt_slots: int = 0,
) -> Batch:
    """Examples (EOS included) as a packed batch; example i lies in row `rows[i]`, ascending.

    Raises:
        InputError: the examples of a row are longer than the row.
    """
    prompt = np.zeros(prompt_slots, np.int32)
    encoder_tokens, encoder_segments = _pack(
        [part for tokens in inputs for part in (prompt, tokens)],
        np.array([prompt_slots + len(tokens) for tokens in inputs]),
        rows,
        (row_count, input_length),
    )
    target_lengths = np.array([len(tokens) for tokens in targets])
    target_tokens, segments = _pack(targets, target_lengths, rows, (row_count, target_length))
    # The token before is an input where it belongs to the same example.
    inside = segments == shift_right(segments)
    return {
        "encoder_input_tokens": encoder_tokens,
        "encoder_segment_ids": encoder_segments,
        "decoder_input_tokens": shift_right(target_tokens) * inside,
        "decoder_target_tokens": target_tokens,
        "decoder_segment_ids": segments,
        "decoder_loss_weights": (target_tokens > 0).astype(np.float32),
    }


def _pack(
    pieces: Sequence[np.ndarray], lengths: np.ndarray, rows: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segment ids, int32 of `shape`, of examples of `lengths` [B] in `rows` [B]."""
    first = np.searchsorted(rows, rows)  # the example that opens each one's row
    ends = np.cumsum(lengths)
    starts = ends - lengths
    used = ends - starts[first]
    if used.max() > shape[1]:
        row = int(rows[used.argmax()])
        raise InputError(f"the examples of row {row} take {used.max()} positions of {shape[1]}")
    places = np.repeat(rows * shape[1] - starts[first], lengths) + np.arange(ends[-1])
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    tokens.reshape(-1)[places] = np.concatenate(pieces)
    segments.reshape(-1)[places] = np.repeat(np.arange(len(rows)) - first + 1, lengths)
    return tokens, segments
