"""Pre-training examples from plain text: span corruption and prefix LM (T5, sections 3.1, 3.2).

Both cut a stream of tokens into pieces of fixed length, so all examples of an objective have one
batch shape. Cuts and noise are random, seeded by (seed, epoch, index).
"""

from __future__ import annotations

import numpy as np

from ptjax.data.tokenizer import Tokenizer
from ptjax.errors import InputError


class _Stream:
    """Pieces of a token stream, at a different offset in each epoch."""

    def __init__(
        self, stream: np.ndarray, piece: int, input_length: int, target_length: int, seed: int
    ) -> None:
        if len(stream) < 2 * piece:
            raise InputError(f"{len(stream)} tokens of text are too few for pieces of {piece}")
        self.stream, self.piece, self.seed = stream, piece, seed
        self._size = len(stream) // piece - 1
        self.input_lengths = np.full(self._size, input_length, np.int32)
        self.target_lengths = np.full(self._size, target_length, np.int32)

    def __len__(self) -> int:
        return self._size

    def _piece(self, index: int, epoch: int) -> tuple[np.ndarray, np.random.Generator]:
        offset = np.random.default_rng((self.seed, epoch)).integers(self.piece)
        start = offset + index * self.piece
        rng = np.random.default_rng((self.seed, epoch, index))
        return self.stream[start : start + self.piece].astype(np.int32), rng


class SpanCorruptionSource(_Stream):
    """Examples of span corruption; an `ExampleSource`.

    Sentinels replace random spans of a piece of text; the target lists these spans.

    Args:
        stream: token ids [N].
        input_length: the most input tokens of an example, EOS included; pieces have the largest
            length that shrinks to it (`random_spans_helper` in t5's preprocessors).
        noise_density: the share of a piece's tokens that are replaced.
        mean_span: the mean number of tokens per span.

    Raises:
        InputError: impossible settings, or a stream that is too short.
    """

    def __init__(
        self,
        stream: np.ndarray,
        tokenizer: Tokenizer,
        *,
        input_length: int = 128,
        noise_density: float = 0.15,
        mean_span: float = 3.0,
        seed: int = 0,
    ) -> None:
        if not (0 < noise_density < 1 and mean_span >= 1 and input_length >= 8):
            raise InputError(
                f"span corruption with noise_density = {noise_density}, mean_span = {mean_span}, "
                f"input_length = {input_length}: they must be in (0, 1), at least 1, at least 8"
            )
        self.tokenizer = tokenizer
        piece = 4
        while _corrupted_lengths(piece + 1, noise_density, mean_span)[0] <= input_length:
            piece += 1
        inputs, targets = _corrupted_lengths(piece, noise_density, mean_span)
        self.noise, self.spans = _noise(piece, noise_density, mean_span)
        if self.spans > min(100, piece - self.noise):
            raise InputError(
                f"span corruption of {piece} tokens needs {self.spans} spans, more than there are "
                "sentinels (100) or tokens between them; lower noise_density or input_length"
            )
        super().__init__(stream, piece, inputs, targets, seed)

    def tokens(self, index: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        piece, rng = self._piece(index, epoch)
        noise = _segments(rng, self.noise, self.spans)
        clean = _segments(rng, self.piece - self.noise, self.spans)
        inputs, targets, start = [], [], 0
        for k, (keep, drop) in enumerate(zip(clean, noise, strict=True)):
            sentinel = [self.tokenizer.sentinel_id(k)]
            inputs += [piece[start : start + keep], sentinel]
            targets += [sentinel, piece[start + keep : start + keep + drop]]
            start += keep + drop
        eos = [self.tokenizer.eos_id]
        return (
            np.concatenate([*inputs, eos]).astype(np.int32),
            np.concatenate([*targets, eos]).astype(np.int32),
        )


class PrefixLMSource(_Stream):
    """Examples of prefix language modelling, the paper's LM adaptation; an `ExampleSource`.

    The input is a random number of tokens, at most `input_length` with its EOS, and the target the
    `target_length` tokens that follow, without sentinels and without an EOS.

    Args:
        stream: token ids [N].

    Raises:
        InputError: impossible lengths, or a stream that is too short.
    """

    def __init__(
        self,
        stream: np.ndarray,
        tokenizer: Tokenizer,
        *,
        input_length: int = 64,
        target_length: int = 32,
        seed: int = 0,
    ) -> None:
        if input_length < 2 or target_length < 1:
            raise InputError(
                f"prefix LM with input_length = {input_length}, target_length = {target_length}: "
                "they must be at least 2 and 1"
            )
        self.tokenizer = tokenizer
        self.input_length, self.target_length = input_length, target_length
        super().__init__(stream, input_length + target_length, input_length, target_length, seed)

    def tokens(self, index: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        piece, rng = self._piece(index, epoch)
        length = int(rng.integers(1, self.input_length))
        prefix, rest = np.split(piece[-self.target_length - length :], [length])
        return np.append(prefix, np.int32(self.tokenizer.eos_id)), rest


def _noise(piece: int, density: float, mean_span: float) -> tuple[int, int]:
    """(number of noise tokens, number of spans) in a piece."""
    noise = min(max(round(piece * density), 1), piece - 1)
    return noise, max(round(noise / mean_span), 1)


def _corrupted_lengths(piece: int, density: float, mean_span: float) -> tuple[int, int]:
    """(input, target) lengths that a piece shrinks to, sentinels and EOS included."""
    noise, spans = _noise(piece, density, mean_span)
    return piece - noise + spans + 1, noise + spans + 1


def _segments(rng: np.random.Generator, total: int, parts: int) -> np.ndarray:
    """`parts` positive random lengths that add up to `total`."""
    cuts = np.sort(rng.choice(np.arange(1, total), parts - 1, replace=False))
    return np.diff(np.concatenate([[0], cuts, [total]]))
