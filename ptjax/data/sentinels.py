"""Which `<extra_id_N>` of a text are T5's sentinels, and which are only what a record says.

A sentinel in a task's template is one; in a record's field it is text, and is spelt out. A text
that the caller gives as it is, a plain `str`, may hold sentinels.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Sequence

SENTINEL = re.compile(r"<extra_id_(0|[1-9][0-9]{0,5})>")
MARK = "\uffff"
"""A noncharacter, which no text holds: inside of a tokenizer it encloses what may not be typed."""
_PREFIX = "<extra_id_"
_MARKED = re.compile(rf"(^|\s)?{MARK}[0-9]+{MARK}")


class Rendered(str):
    """A text in which not every `<extra_id_N>` is a sentinel.

    Attributes:
        sentinels: where those that are one start.
    """

    sentinels: frozenset[int]

    def __new__(cls, text: str, sentinels: Iterable[int] = ()) -> Rendered:
        self = super().__new__(cls, text)
        self.sentinels = frozenset(sentinels)
        return self

    def __getnewargs__(self) -> tuple[str, frozenset[int]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return str(self), self.sentinels


def spelt_out(text: str) -> str:
    """The text with none of its `<extra_id_N>` a sentinel."""
    return Rendered(text) if _PREFIX in text else text


def join_texts(parts: Iterable[str]) -> str:
    """The parts as one text, in which the sentinels of each are sentinels still.

    One that only the parts together spell is none.
    """
    parts = list(parts)
    text = "".join(parts)
    if _PREFIX not in text:
        return text
    start, sentinels = 0, set()
    for part in parts:
        sentinels |= {start + place for place in _places(part)}
        start += len(part)
    return text if sentinels == _places(text) else Rendered(text, sentinels)


def mark_sentinels(text: str, numbers: Collection[int]) -> str:
    """The text with `marked(N)` for each of its sentinels, and `MARK` nowhere else.

    Args:
        numbers: the sentinels that there are; others are spelt out.
    """
    plain = text.replace(MARK, "\ufffd")
    if _PREFIX not in plain:
        return plain
    places = _places(text)

    def replace(match: re.Match[str]) -> str:
        number = int(match[1])
        is_sentinel = match.start() in places and number in numbers
        return marked(number) if is_sentinel else match[0]

    return SENTINEL.sub(replace, plain)


def encode_parts(
    texts: Sequence[str], encode: Callable[[list[str]], list[list[int]]]
) -> list[list[int]]:
    """`encode` of texts whose marked sentinels are mT5's own pieces, `▁<extra_id_0>`.

    The text is cut in front of every sentinel that does not follow a space. SentencePiece puts a
    space in front of each part, which belongs to the sentinel's piece. A space inserted into the
    text could match an added token instead: `"\\n"` takes all spaces.
    """
    parts = [_cut_before_sentinels(text) for text in texts]
    rows = iter(encode([part for cut in parts for part in cut]))
    return [[index for _ in cut for index in next(rows)] for cut in parts]


def _cut_before_sentinels(text: str) -> list[str]:
    if MARK not in text:
        return [text]
    marks = _MARKED.finditer(text)
    places = [0, *(match.start() for match in marks if match[1] is None), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(places)]


def marked(name: object) -> str:
    """What stands inside of a tokenizer for the sentinel N, or for a control token."""
    return f"{MARK}{name}{MARK}"


def _places(text: str) -> Collection[int]:
    if isinstance(text, Rendered):
        return text.sentinels
    return {match.start() for match in SENTINEL.finditer(text)}
