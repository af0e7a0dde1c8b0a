"""Preprocesses records of SQuAD 1.1 and 2.0 in the format of the Hugging Face hub and TFDS."""

from __future__ import annotations

from collections.abc import Iterator

from ptjax.files import JsonObject


def squad(record: JsonObject) -> Iterator[JsonObject]:
    """Yields the record once, with `answers` as a list of texts and `answer`, the first one.

    An unanswerable question of version 2.0 has no answers, and an empty `answer`. For inference
    the record may lack `answers`.
    """
    if "answers" in record:
        texts = list(record["answers"]["text"])
        record = {**record, "answers": texts, "answer": texts[0] if texts else ""}
    yield record
