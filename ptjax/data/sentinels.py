"""Distinguishes T5's sentinels `<extra_id_N>` from the same characters as ordinary text.

In a task's template `<extra_id_N>` is a sentinel; in a record's field it is ordinary text. In a
plain `str` from the caller, it is a sentinel.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Sequence

SENTINEL = re.compile(r"<extra_id_(0|[1-9][0-9]{0,5})>")
MARK = "\uffff"
"""A noncharacter, which no text contains; in a tokenizer it encloses names that texts must not
contain."""
_PREFIX = "<extra_id_"
_MARKED = re.compile(rf"(^|\s)?{MARK}[0-9]+{MARK}")


class Rendered(str):
    """A string that records which of its `<extra_id_N>` are sentinels; the others are plain text.

    In an ordinary `str`, each of them is a sentinel.

    Attributes:
        sentinels: the character positions in the string at which sentinels start.
    """

    sentinels: frozenset[int]

    def __new__(cls, text: str, sentinels: Iterable[int] = ()) -> Rendered:
        self = super().__new__(cls, text)
        self.sentinels = frozenset(sentinels)
        return self

    def __getnewargs__(self) -> tuple[str, frozenset[int]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return str(self), self.sentinels


def spelt_out(text: str) -> str:
    """Returns a string with the same characters, in which no `<extra_id_N>` is a sentinel.

    This is a `Rendered` without sentinels or, if the text has no `<extra_id_`, the text itself.
    """
    return Rendered(text) if _PREFIX in text else text


def join_texts(parts: Iterable[str]) -> str:
    """Joins the parts into one text, in which the sentinels of the parts remain sentinels.

    An `<extra_id_N>` that spans two or more parts is ordinary text.
    """
    parts = list(parts)
    text = "".join(parts)
    if _PREFIX not in text:
        return text
    start, sentinels = 0, set()
    for part in parts:
        sentinels |= {start + position for position in _positions(part)}
        start += len(part)
    return text if sentinels == _positions(text) else Rendered(text, sentinels)


def mark_sentinels(text: str, numbers: Collection[int]) -> str:
    """Returns the text with each sentinel `<extra_id_N>` replaced by `marked(N)`.

    Tokenizers search the result for these names. `MARK`, the character that encloses a name, is
    replaced by U+FFFD where the text already contains it.

    Args:
        numbers: the numbers N of the vocabulary's sentinels; others stay ordinary text.
    """
    plain = text.replace(MARK, "\ufffd")
    if _PREFIX not in plain:
        return plain
    positions = _positions(text)

    def replace(match: re.Match[str]) -> str:
        number = int(match[1])
        is_sentinel = match.start() in positions and number in numbers
        return marked(number) if is_sentinel else match[0]

    return SENTINEL.sub(replace, plain)


def encode_parts(
    texts: Sequence[str], encode: Callable[[list[str]], list[list[int]]]
) -> list[list[int]]:
    """Encodes texts for a vocabulary whose sentinels include a space, as mT5's `▁<extra_id_0>`.

    Such a vocabulary only recognises a sentinel after a space. So each text is split before every
    sentinel without a space before it, and the parts are encoded separately: SentencePiece adds a
    space before each part. (Inserting a space into the text instead could match an added token:
    `"\\n"` matches all spaces.)

    Args:
        texts: texts with marked sentinels, from `mark_sentinels`.
        encode: encodes a list of texts, here the parts, to one list of ids each.

    Returns:
        For each text, the ids of its parts, joined.
    """
    parts = [_cut_before_sentinels(text) for text in texts]
    rows = iter(encode([part for cut in parts for part in cut]))
    return [[index for _ in cut for index in next(rows)] for cut in parts]


def _cut_before_sentinels(text: str) -> list[str]:
    if MARK not in text:
        return [text]
    marks = _MARKED.finditer(text)
    cuts = [0, *(match.start() for match in marks if match[1] is None), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(cuts)]


def marked(name: object) -> str:
    """Returns the internal name of a sentinel or control token, which no text contains.

    Tokenizers search marked texts for these names, so that other text never matches.

    Args:
        name: the sentinel's number N, or the control token's text.
    """
    return f"{MARK}{name}{MARK}"


def _positions(text: str) -> Collection[int]:
    if isinstance(text, Rendered):
        return text.sentinels
    return {match.start() for match in SENTINEL.finditer(text)}
