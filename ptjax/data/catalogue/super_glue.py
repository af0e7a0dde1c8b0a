"""Converts SuperGLUE's records to the fields of T5's templates.

Each function takes the fields of one record, from the official JSON lines or TFDS, and yields the
fields of each example made from it. The formats are those of T5's preprocessors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Fields = dict[str, Any]


def multirc(record: Fields) -> Iterator[Fields]:
    """Yields the fields question, answer, paragraph, group and label of each answer to a question.

    Answers to the same question have the same group. The official test set has no labels.
    """
    if "passage" not in record:  # TFDS has one record per answer
        index = record.get("idx", {})
        group = f"{index.get('paragraph')}/{index.get('question')}"
        yield _without_html({**record, "group": group}, "question", "answer", "paragraph")
        return
    for question in record["passage"]["questions"]:
        for answer in question["answers"]:
            fields = {
                "question": question["question"],
                "answer": answer["text"],
                "paragraph": record["passage"]["text"],
                "group": f"{record['idx']}/{question['idx']}",
            }
            if "label" in answer:  # the official test set has none
                fields["label"] = answer["label"]
            yield _without_html(fields, "question", "answer", "paragraph")


def _without_html(fields: Fields, *names: str) -> Fields:
    for name in names:
        fields[name] = re.sub("</?b>", "", fields[name].replace("<br>", " "))
    return fields


def wsc(record: Fields) -> Iterator[Fields]:
    """Yields the record once, with two more fields, `marked_text` and `referent`.

    `marked_text` is the text with the pronoun between asterisks, `referent` the candidate.

    Raises:
        ValueError: the pronoun is not at the position that the record states.
    """
    spans = record.get("target", record)
    words = record["text"].split(" ")
    start, pronoun = spans["span2_index"], spans["span2_text"]
    length = len(pronoun.split(" "))
    # One of the official records points to the word before its pronoun.
    for first in (start, start + 1):
        text = " ".join(words[first : first + length])
        rest = text.removeprefix(pronoun)
        # Three records have punctuation attached to it ('him,"'), which T5 separates.
        if rest != text and not any(map(str.isalnum, rest)):
            words[first : first + length] = [f"*{pronoun}*", *filter(None, [rest])]
            yield {**record, "marked_text": " ".join(words), "referent": spans["span1_text"]}
            return
    raise ValueError(f"word {start} of the text is not the pronoun '{pronoun}'")


def wsc_referents(record: Fields) -> Iterator[Fields]:
    """Yields the fields of `wsc` if the record's candidate is right, else nothing; for training.

    Only these records have a target to learn.
    """
    if record["label"]:
        yield from wsc(record)


def record(record: Fields) -> Iterator[Fields]:
    """Yields the fields passage, query, entities ('a, b'), answers and answer of each query.

    `answers` are all correct ones, `answer` the first of them; `answer` is absent without any.
    """
    if "qas" not in record:  # TFDS has one record per query
        yield _record_query(record, record["passage"], record["entities"])
        return
    passage = record["passage"]["text"]
    spans = record["passage"]["entities"]
    entities = {passage[span["start"] : span["end"] + 1] for span in spans}
    for query in record["qas"]:
        answers = sorted({answer["text"] for answer in query.get("answers", ())})
        fields = {"query": query["query"], "answers": answers}
        yield _record_query(fields, passage, sorted(entities))


def record_answers(fields: Fields) -> Iterator[Fields]:
    """Yields the fields of `record` once per correct answer, as `answer`; for training."""
    for example in record(fields):
        for answer in example["answers"]:
            yield {**example, "answer": answer}


def _record_query(fields: Fields, passage: str, entities: list[str]) -> Fields:
    # The highlights become sentences of the passage.
    passage = re.sub("([.?!\"'])\n@highlight\n", r"\1 ", passage)
    passage = passage.replace("\n@highlight\n", ". ")
    answers = fields["answers"]
    first = {"answer": answers[0]} if answers else {}
    return {**fields, "passage": passage, "entities": ", ".join(entities), **first}
