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
    """A text in which not every `<extra_id_N>` is a sentinel.

    Attributes:
        sentinels: the positions at which sentinels start.
    """

    sentinels: frozenset[int]

    def __new__(cls, text: str, sentinels: Iterable[int] = ()) -> Rendered:
        self = super().__new__(cls, text)
        self.sentinels = frozenset(sentinels)
        return self

    def __getnewargs__(self) -> tuple[str, frozenset[int]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return str(self), self.sentinels


def spelt_out(text: str) -> str:
    """Returns the text with each `<extra_id_N>` marked as ordinary text instead of a sentinel."""
    return Rendered(text) if _PREFIX in text else text


def join_texts(parts: Iterable[str]) -> str:
    """Joins the parts into one text, in which the sentinels of the parts remain sentinels.

    An `<extra_id_N>` that only arises by joining parts is ordinary text.
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
    """Returns the text with each sentinel replaced by `marked(N)`, and `MARK` nowhere else.

    Args:
        numbers: the sentinels of the vocabulary; others stay ordinary text.
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
    """Encodes texts whose marked sentinels are pieces with a space, mT5's `▁<extra_id_0>`.

    Splits the text before every sentinel that does not follow a space: SentencePiece adds a space
    before each part, which then belongs to the sentinel's piece. Inserting a space into the text
    instead could match an added token: `"\\n"` matches all spaces.
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
    """Returns the name inside a tokenizer of sentinel N or of a control token.

    It contains `MARK`, so no text can contain it.
    """
    return f"{MARK}{name}{MARK}"


def _positions(text: str) -> Collection[int]:
    if isinstance(text, Rendered):
        return text.sentinels
    return {match.start() for match in SENTINEL.finditer(text)}
