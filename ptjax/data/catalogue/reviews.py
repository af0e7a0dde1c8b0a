"""Reviews scraped from web pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any


def without_line_breaks(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """IMDb's HTML line breaks in the field `text` become single spaces."""
    yield {**record, "text": re.sub(r"\s*(?:<br ?/?>\s*)+", " ", record["text"])}
