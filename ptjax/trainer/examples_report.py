"""Logs a few training examples as the model reads them, before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from absl import logging

from ptjax.data.preprocess import TokenRows
from ptjax.data.tokenizer import Tokenizer
from ptjax.trainer.task_data import TaskData

_FIRST, _LAST = 28, 8
"""Token pieces shown at the start and at the end of a longer text."""
_CHARACTERS = 240


def report_examples_read(data: Iterable[TaskData]) -> None:
    """Logs three training examples of each task: text, tokens and target, as they are read.

    Where the lengths cut a text, the line says how many tokens are missing. The first and the
    middle example are shown, and one that is cut or, without a cut, the longest.
    """
    for of_task in dict.fromkeys(data):
        _report_task(of_task)


def _report_task(data: TaskData) -> None:
    source, tokenizer, lengths = data.source, data.evaluator.tokenizer, data.evaluator.lengths
    inputs = [example.inputs for example in data.train]
    targets = [example.targets for example in data.train]
    third = _first_cut(source.inputs, inputs, tokenizer)
    if third is None:
        third = _first_cut(source.targets, targets, tokenizer)
    if third is None:
        third = int(np.argmax(source.input_lengths))
    chosen = list(dict.fromkeys((0, third, len(source) // 2)))
    logging.info(
        "%s: %d of %d training examples as the model reads them; inputs cut to %d tokens: %d, "
        "targets cut to %d: %d",
        data.task.name,
        len(chosen),
        len(source),
        lengths["inputs"],
        source.inputs.truncated,
        lengths["targets"],
        source.targets.truncated,
    )
    for i in sorted(chosen):
        text, tokens = _shown(source.inputs[i], inputs[i], tokenizer)
        target, pieces = _shown(source.targets[i], targets[i], tokenizer)
        logging.info("  %d. %s", i + 1, text)
        logging.info("     tokens: %s", tokens)
        logging.info("     target: %s = %s", target, pieces)


def _first_cut(rows: TokenRows, texts: Sequence[str], tokenizer: Tokenizer) -> int | None:
    """The index of the first truncated row; None without one."""
    if not rows.truncated:
        return None
    longest = rows.lengths.max()  # a row of this length may just fit
    at_limit: list[int] = np.flatnonzero(rows.lengths == longest).tolist()
    return next(i for i in at_limit if _missing(rows[i], texts[i], tokenizer))


def _missing(row: np.ndarray, text: str, tokenizer: Tokenizer) -> int:
    """The number of tokens of `text` that its row lacks."""
    return len(tokenizer.prefix) + len(tokenizer.encode(text)) + 1 - len(row)


def _shown(row: np.ndarray, text: str, tokenizer: Tokenizer) -> tuple[str, str]:
    """The text that a row of ids encodes, and its pieces; both with a mark where it is cut."""
    missing = _missing(row, text, tokenizer)
    mark = f" [CUT: {missing} more tokens]" if missing else ""
    left = len(row) - _FIRST - _LAST
    left = left if left > 1 else 0  # one is as short as the words in its place
    shown = np.concatenate([row[:_FIRST], row[_FIRST + left :]]) if left else row
    pieces = [_printable(tokenizer.id_to_piece(int(index))) for index in shown]
    if left:
        pieces.insert(_FIRST, f"... {left} tokens ...")
    read = _printable(tokenizer.decode(row))
    if len(read) > _CHARACTERS:
        read = f"{read[: _CHARACTERS * 3 // 4]} ... {read[-_CHARACTERS // 4 :]}"
    return read + mark, " ".join(pieces[:-1]) + mark + " " + pieces[-1]


def _printable(text: str) -> str:
    """The text on one line; characters that a terminal does not print are written as escapes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
