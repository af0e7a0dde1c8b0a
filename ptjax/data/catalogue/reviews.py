"""Reviews scraped from web pages."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ptjax.files import JsonObject


def without_line_breaks(record: JsonObject) -> Iterator[JsonObject]:
    """IMDb's HTML line breaks in the field `text` become single spaces."""
    yield {**record, "text": re.sub(r"\s*(?:<br ?/?>\s*)+", " ", record["text"])}


def sentences(record: JsonObject) -> Iterator[JsonObject]:
    """Every sentence of the field `text` with three words or more, each with the record's label."""
    for whole in without_line_breaks(record):
        for text in re.split(r"(?<=[.!?])\s+", whole["text"]):
            if len(text.split()) >= 3:
                yield {**whole, "text": text}
