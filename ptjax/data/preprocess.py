"""Tokenises examples by T5's convention; stores ids without padding."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ptjax.data.examples import Example
from ptjax.data.tokenizer import Tokenizer
from ptjax.errors import InputError, shortened

CHUNK = 4096  # texts per call: the ids of a chunk are temporarily Python integers


@dataclass(frozen=True)
class TokenRows:
    """N rows of ids of any length, stored one after the other.

    Attributes:
        ids: int32 [sum of lengths]; row i is `ids[offsets[i] : offsets[i + 1]]`.
        offsets: int64 [N + 1].
        truncated: the number of rows that were truncated.
    """

    ids: np.ndarray
    offsets: np.ndarray
    truncated: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Row `index`, int32 [length]; a view."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """The number of ids of each row, int32 [N]."""
        return np.diff(self.offsets).astype(np.int32)


@dataclass(frozen=True)
class TokenizedExamples:
    """Tokenised examples, the same in every epoch; an `ExampleSource`."""

    inputs: TokenRows
    targets: TokenRows

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def input_lengths(self) -> np.ndarray:
        """The number of input ids of each example, int32 [N], EOS included."""
        return self.inputs.lengths

    @property
    def target_lengths(self) -> np.ndarray:
        """The number of target ids of each example, int32 [N], EOS included."""
        return self.targets.lengths

    def tokens(self, index: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns views of an example's inputs int32 [t] and targets int32 [l]."""
        del epoch  # the same tokens in every epoch
        return self.inputs[index], self.targets[index]


def tokenize_texts(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> TokenRows:
    """Encodes texts to at most `length` ids each, like T5: truncates, then appends EOS.

    Prepends the tokenizer's prefix, if it has one. `length` includes prefix and EOS.

    Raises:
        InputError: `length` leaves no room for a token of text.
    """
    prefix, eos = list(tokenizer.prefix), [tokenizer.eos_id]
    room = length - len(prefix) - len(eos)
    if room < 1:
        raise InputError(f"a length of {length} tokens has no room for text and its end; use more")
    chunks: list[np.ndarray] = []
    lengths = np.zeros(len(texts) + 1, np.int64)
    truncated = 0
    for start in range(0, len(texts), CHUNK):
        rows = tokenizer.encode_batch(texts[start : start + CHUNK])
        for i, row in enumerate(rows, start + 1):
            truncated += len(row) > room
            lengths[i] = min(len(row), room) + length - room
        chunks.append(np.array([t for row in rows for t in prefix + row[:room] + eos], np.int32))
    ids = np.concatenate(chunks) if chunks else np.zeros(0, np.int32)
    return TokenRows(ids, np.cumsum(lengths), truncated)


def tokenize_examples(
    examples: Sequence[Example], tokenizer: Tokenizer, input_length: int, target_length: int
) -> TokenizedExamples:
    """Tokenises the inputs and targets of the examples by `tokenize_texts`, in order."""
    return TokenizedExamples(
        tokenize_texts([example.inputs for example in examples], tokenizer, input_length),
        tokenize_texts([example.targets for example in examples], tokenizer, target_length),
    )


def check_labels(labels: Sequence[str], tokenizer: Tokenizer, target_length: int) -> None:
    """Raises InputError for labels that the model could not generate or could not distinguish.

    If the vocabulary lacks a character of a label, or the target length truncates the label, every
    prediction of it would be wrong. Of two labels with the same tokens, the first would always win.

    Raises:
        InputError: encoding and decoding changes a label, or two labels have the same tokens.
    """
    rows = tokenize_texts(labels, tokenizer, target_length)
    room = target_length - len(tokenizer.prefix) - 1  # EOS
    seen: dict[bytes, str] = {}
    for i, label in enumerate(labels):
        text = tokenizer.decode(rows[i])
        if text.strip() != label.strip():
            needed = len(tokenizer.encode_batch([label])[0]) + target_length - room
            raise InputError(
                f"the label '{shortened(label)}' comes back as '{shortened(text)}' from "
                f"{tokenizer.name} with {target_length} target tokens; "
                + (f"it needs {needed}; or " if needed > target_length else "")
                + "give it another text in the task's verbalizer"
            )
        tokens = rows[i].tobytes()
        if tokens in seen:
            raise InputError(
                f"the labels {seen[tokens]!r} and {label!r} are the same tokens to "
                f"{tokenizer.name}; give one of them another text"
            )
        seen[tokens] = label
