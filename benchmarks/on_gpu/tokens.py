"""Token rows for the parts of `run.sh`, so that the GPU machine needs no T5 tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ptjax.data.preprocess import TokenizedExamples, TokenRows


class IdsAsText:
    """Takes the place of a tokenizer when decoding: writes each id as a number."""

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(str, ids))


def make_rows(rows: Sequence[np.ndarray]) -> TokenRows:
    """Concatenates rows of ids [n]."""
    offsets = np.cumsum([0, *map(len, rows)])
    return TokenRows(np.concatenate([*rows, np.zeros(0, np.int32)]).astype(np.int32), offsets, 0)


def make_inputs(rows: Sequence[np.ndarray]) -> TokenizedExamples:
    """Inputs without targets."""
    return TokenizedExamples(make_rows(rows), make_rows([np.zeros(0, np.int32)] * len(rows)))


def random_rows(seed: int, count: int, longest: int, ids: tuple[int, int]) -> list[np.ndarray]:
    """`count` rows of 1 to `longest` ids, drawn from range(*ids); the first row is the longest."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, count, endpoint=True)
    lengths[0] = longest
    return [rng.integers(*ids, length).astype(np.int32) for length in lengths]


def draw_rows(file: Path, count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(inputs of `count` random training examples, all labels), from a file of prepare.py.

    Raises:
        SystemExit: there is no such file.
    """
    if not file.exists():
        raise SystemExit(f"{file} is missing: run prepare.py, and give its folder as --data")
    with np.load(file) as stored:
        inputs, labels = (
            np.split(stored[f"{name}_ids"].astype(np.int32), stored[f"{name}_offsets"][1:-1])
            for name in ("train", "label")
        )
    chosen = np.random.default_rng(0).choice(len(inputs), count, replace=False)
    return [inputs[i] for i in chosen], labels
