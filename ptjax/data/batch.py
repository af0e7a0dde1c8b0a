"""The one definition of a batch.

A batch is a dict of numpy arrays under T5X's names: `encoder_input_tokens` int32 [B, T],
`decoder_input_tokens` int32 [B, L] (the targets shifted right behind a 0),
`decoder_target_tokens` int32 [B, L], `decoder_loss_weights` float32 [B, L]. 0 is padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Batch = dict[str, np.ndarray]


def shift_right(targets: np.ndarray) -> np.ndarray:
    """Decoder inputs for `targets` [..., L]: T5 starts with the padding id, 0."""
    return np.concatenate([np.zeros_like(targets[..., :1]), targets[..., :-1]], axis=-1)


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
