"""Preprocesses reviews scraped from web pages."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ptjax.files import JsonObject


def without_line_breaks(record: JsonObject) -> Iterator[JsonObject]:
    """Yields the record once, with each run of HTML line breaks in `text` replaced by a space."""
    yield {**record, "text": re.sub(r"\s*(?:<br ?/?>\s*)+", " ", record["text"])}


def sentences(record: JsonObject) -> Iterator[JsonObject]:
    """Yields a copy of the record for each sentence of its field `text`, in that field.

    Skips sentences of fewer than three words.
    """
    for whole in without_line_breaks(record):
        for text in re.split(r"(?<=[.!?])\s+", whole["text"]):
            if len(text.split()) >= 3:
                yield {**whole, "text": text}
