"""SQuAD's records, of version 1.1 or 2.0, as the Hugging Face hub and TFDS have them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def squad(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The record with `answers` as a list of texts and `answer`, the first one.

    An unanswerable question of version 2.0 has no answers, and the empty text as its `answer`. For
    inference there need be none.
    """
    if "answers" in record:
        texts = list(record["answers"]["text"])
        record = {**record, "answers": texts, "answer": texts[0] if texts else ""}
    yield record
