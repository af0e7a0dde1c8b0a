"""Code and docs speak an engineer's English: phrases that a reader stumbles over do not come back.

Each row is a phrase, and what to write instead. Comments, docstrings and messages are searched, a
room at a time, and the pages of docs/. A phrase that is right somewhere is not in the list: what is
listed has no good use.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ptjax

PACKAGE = Path(ptjax.__file__).parent
ROOMS = sorted(
    entry.name
    for entry in PACKAGE.iterdir()
    if entry.suffix == ".py" or (entry.is_dir() and any(entry.glob("*.py")))
)
DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(page.name for page in DOCS.glob("*.md"))
INSTEAD = {
    r"\b(is|are|was|were) no (?!longer|more|less|one\b)\w+": "is not a",
    r"\bha(s|ve) to be (at least|at most|of|a|an|from|one|in|the|texts|[A-Z\d{])": "must be",
    r"\b(goes|go|went|going) on\b": "resumes, continues",
    r"\bon the way back\b|\bway back\b": "in the backward pass",
    r"\bstands? (for|there|in|beside|before|behind|on|after|above|last|still|inside|where)\b": "is",
    r"\bas it stands\b": "as it is written, unchanged",
    r"\b(is|are) said\b": "is logged, is reported, is stated",
    r"\bnone of (T5's|T5X's|it|them)\b": "not part of",
    r"\b(is|are|be) (?-i:none)\b": "is not one",
    r"\bis over\b": "has finished",
    r"\bto blame\b": "the cause",
    r"\bgoe?s? with(?! each)\b": "fits, is compatible with",
    r"\bwithout a word\b": "silently",
    r"\banew\b": "again",
    r"\bbut for\b": "except",
    r"\bbut that\b": "except that",
    r"\ball but\b": "all except",
    r"\bby itself\b": "automatically, alone",
    r"\bof one's own\b": "custom",
    r"\bmakes? no (T5|prompt|mesh|network)\b": "is not a valid",
    r"\bwants\b": "expects, needs",
    r"\btold (by|of|apart)\b": "recognised by, notified of",
    r"\blooks? on\b": "observes",
    r"\bwhat trains\b": "the trainable variables",
    r"\bleaves? (\w+ )?behind\b": "writes, produces",
    r"\bwhatever machine\b": "on any machine",
    r"\bin a byte an entry\b": "at one byte per entry",
    r"\bhow it lies\b": "the layout",
    r"\bas if by\b": "as if",
    r"\bsomebody else's\b": "foreign",
    r"\bits own affair\b": "its own setting",
    r"\bat any instant\b": "at any point",
    r"\bfor whoever\b": "for those who",
    r"\bwhat a person sees\b": "user-facing output",
    r"\b(is|are) asked\b": "is called, is requested",
    r"\bto be had\b": "available",
    r"\bthe most of\b": "most of",
    r"\bis to say\b": "means",
    r"\bones? behind the other\b": "one after another",
    r"\bmost often\b": "most frequently",
    r"\btakes? note of\b": "records",
    r"\bsays? so\b": "reports it",
    r"\bso many\b": "that many, N",
    r"\bbesides what\b": "in addition to what",
    r"\bputs? (it )?in front\b": "prepends",
    r"\bfound out\b|\bfinds? out\b": "detects, determines",
    r"\bof which kind\b": "which kind",
    r"\bthinks?\b": "assumes",
    r"\b(is|are) (there|here) already\b": "already exists",
    r"\beverybody\b": "all processes, all users",
    r"\b(reader|user|process) has gone\b": "is closed, has ended",
    r"\bthe void\b": "a closed stream",
    r"\bat the most\b": "at most",
    r"\bin so far\b": "if, where",
    r"\bso much of\b": "that much, N bytes of",
    r"\bdearest\b": "most expensive",
    r"\bstrangers'? (own )?(file|bytes|text)s?\b|\bof a stranger\b": "untrusted",
    r"\b(is|are|was) (known|said) of\b": "is known about",
    r"\bto die of\b|\bdies of\b": "fails with, is aborted by",
    r"\bknows? no such\b": "does not support",
    r"\bas (it|he|she) wants\b": "in any order, freely",
    r"\bin a process of one's own\b": "in a separate process",
}


def hits(text: str) -> list[str]:
    """Phrases of the list in a file, each with its line."""
    joined = re.sub(r'\s*"?\s*\n\s*(# |f?")?', " ", text)  # a phrase may go over the end of a line
    return [
        f"{match[0]!r}: write {instead!r}"
        for pattern, instead in INSTEAD.items()
        for match in re.finditer(pattern, joined, re.IGNORECASE)
    ]


def test_the_list_is_long_enough() -> None:
    assert len(INSTEAD) >= 40


@pytest.mark.parametrize("room", ROOMS)
def test_no_phrase_of_the_list_is_left(room: str) -> None:
    place = PACKAGE / room
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    found = {file.name: hits(file.read_text("utf-8")) for file in files}
    assert not {name: phrases for name, phrases in found.items() if phrases}


@pytest.mark.parametrize("page", PAGES)
def test_no_phrase_of_the_list_is_left_in_a_page(page: str) -> None:
    assert not hits((DOCS / page).read_text("utf-8"))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("'this is no number'", 1),
        ("# it is\n    # no number", 1),
        ('"it has to "\n        f"be at least {least}"', 1),
        ("the run goes on; what trains", 2),
        ("is not a number, must be >= 1, resumes", 0),
        ("is no longer here", 0),
        ("it is there already; of a stranger", 2),
        ("strangers may write it; it is there; already so", 0),
    ],
)
def test_phrases_are_found(text: str, count: int) -> None:
    assert len(hits(text)) == count
