"""The labels of a task's records: its verbalizer, their counts, and what looks wrong with them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from absl import logging

from ptjax.data.labels import (
    NO_LABEL,
    counted,
    infer_verbalizer,
    joined,
    label_text,
    verbalized,
)
from ptjax.data.memory import RecordsInMemory, Table
from ptjax.data.record_fields import RecordFields, Row, usable_rows
from ptjax.data.templates import RecordError, find_field
from ptjax.errors import InputError, listing, shortened

_IMBALANCE = 10
"""The ratio of the most to the least frequent label beyond which a warning is logged."""
_MANY_LABELS = 100
_FEW = 8
"""Records of validation below which a warning is logged."""


def label_splits(fields: RecordFields, tables: Mapping[str, Table], name: str) -> dict[str, Any]:
    """The settings `splits`, `verbalizer` and `targets` of the task; logs what is in the data."""
    rows = {split: usable_rows(fields, split, table.records) for split, table in tables.items()}
    _warn_overlap(fields, rows, name)
    if fields.targets is not None:
        for split, of_split in rows.items():
            logging.info("%s, split %s: %d records", name, split, len(of_split))
        splits = {split: _source(table) for split, table in tables.items()}
        return {"splits": splits, "verbalizer": fields.verbalizer, "targets": fields.targets}
    label = fields.label
    assert label is not None  # by _check_settings
    verbalizer = _verbalizer(fields, tables, rows, name)
    words = {split: _words(fields, verbalizer, of_split, split) for split, of_split in rows.items()}
    _say_counts(words, verbalizer, name)
    lists = any(
        isinstance(find_field(x.record.fields, label), list) for s in rows.values() for x in s
    )
    if not lists:
        splits = {split: _source(table) for split, table in tables.items()}
        return {"splits": splits, "verbalizer": verbalizer, "targets": None}
    if NO_LABEL in verbalizer.values() and any(
        () in of_split.values() for of_split in words.values()
    ):
        raise InputError(
            f"{NO_LABEL!r} is a label, and also the target of an empty list; rename it"
        )
    joined_splits = {}
    for split, table in tables.items():
        texts = {key: joined(of_record) for key, of_record in words[split].items()}
        joined_splits[split] = RecordsInMemory(
            dataclasses.replace(record, fields=record.fields | {label: texts[id(record)]})
            if id(record) in texts
            else record
            for record in table.records
        )
    return {"splits": joined_splits, "verbalizer": None, "targets": f"{{{label}}}"}


def _source(table: Table) -> str | RecordsInMemory:
    """A split's source: the file if its records are unchanged, so that commands can read it."""
    return RecordsInMemory(table.records) if table.path is None else table.path


def _verbalizer(
    fields: RecordFields, tables: Mapping[str, Table], rows: Mapping[str, list[Row]], name: str
) -> dict[str, str]:
    """The given verbalizer by the values' texts, else the one that the labels imply."""
    if fields.verbalizer is not None:
        return {str(value).strip(): text for value, text in fields.verbalizer.items()}
    values = [value for row in rows["train"] for value in row.values]
    texts = set(map(label_text, values))
    # Of other splits, other spellings of the same labels: 1 and 1.0.
    others = (v for split in rows.values() for row in split for v in row.values)
    values += [value for value in others if label_text(value) in texts]
    names = tables["train"].class_names.get(fields.label or "", [])
    verbalizer = infer_verbalizer(values, names)
    labels = list(dict.fromkeys(verbalizer.values()))
    alike = Counter(label.casefold() for label in labels)
    if written := [label for label in labels if alike[label.casefold()] > 1]:
        logging.warning(
            "%s: labels that only their case tells apart: %s; if they mean the same, give a "
            "verbalizer",
            name,
            listing(map(repr, written)),
        )
    numbers = all(label.lstrip("-").isdecimal() for label in labels)
    hint = "; words learn better than numbers: give a verbalizer" if numbers else ""
    logging.info(
        "%s: %d labels from the data: %s%s",
        name,
        len(labels),
        listing(map(shortened, labels)),
        hint,
    )
    if len(labels) > max(_MANY_LABELS, len(rows["train"]) / 2):
        logging.warning(
            "%s: %d labels for %d records; for open text give targets='{%s}' instead of a label",
            name,
            len(labels),
            len(rows["train"]),
            fields.label,
        )
    return verbalizer


def _words(
    fields: RecordFields, verbalizer: Mapping[str, str], rows: Iterable[Row], split: str
) -> dict[int, tuple[str, ...]]:
    """id(record) -> the texts of its labels; InputError for labels without a text."""
    words: dict[int, tuple[str, ...]] = {}
    unknown: list[tuple[str, str]] = []
    label = fields.label or ""
    for row in rows:
        try:
            texts = [verbalized(verbalizer, value, label) for value in row.values]
            words[id(row.record)] = tuple(dict.fromkeys(texts))
        except RecordError:
            missing = [v for v in row.values if str(v).strip() not in verbalizer]
            unknown.append((label_text(missing[0]), row.record.where))
    if unknown and not fields.skips:
        count = Counter(text for text, _ in unknown)
        lacking = "train" if fields.verbalizer is None else "the verbalizer"
        raise InputError(
            f"{split} has labels that {lacking} lacks: {_counts(count)}; the first is "
            f"{unknown[0][1]} (labels: {listing(dict.fromkeys(verbalizer.values()))})"
        )
    return words


def _say_counts(
    words: Mapping[str, Mapping[int, tuple[str, ...]]], verbalizer: Mapping[str, str], name: str
) -> None:
    """Logs how often each label occurs. InputError for one label; warns about few of another."""
    for split, of_split in words.items():
        count = counted(of_split.values())
        logging.info("%s, split %s: %d records: %s", name, split, len(of_split), _counts(count))
    count = counted(words["train"].values())
    if len(count) < 2:
        labels = ", ".join(map(repr, count)) or "none"
        raise InputError(
            f"all {len(words['train'])} records of train have the label {labels}; training needs "
            "at least two labels"
        )
    if absent := [text for text in dict.fromkeys(verbalizer.values()) if text not in count]:
        logging.warning("%s: train has no record of %s", name, listing(map(repr, absent)))
    _warn_validation(words.get("validation"), count, name)
    (most, many), (least, few) = count.most_common()[0], count.most_common()[-1]
    if many > _IMBALANCE * few:
        logging.warning(
            "%s: %r has %d records in train and %r %d, a ratio of %.0f:1; consider "
            "Loss(class_weights='balanced') and metrics='mean_f1'",
            name,
            most,
            many,
            least,
            few,
            many / few,
        )


def _warn_validation(
    words: Mapping[int, tuple[str, ...]] | None, train: Iterable[str], name: str
) -> None:
    """Warns about a validation split that selects by chance: a label is absent, or few records."""
    if words is None:
        return
    count = counted(words.values())
    if absent := [text for text in train if text not in count]:
        logging.warning("%s: validation has no record of %s", name, listing(map(repr, absent)))
    if 0 < len(words) < _FEW:
        logging.warning(
            "%s: validation has only %d records; accuracies on them differ by up to %.2f by chance "
            "(one standard error), so the best step is little more than a guess",
            name,
            len(words),
            0.5 / len(words) ** 0.5,
        )


def _counts(count: Counter[str]) -> str:
    """ "billing (120), login (77)": labels with their counts, most frequent first."""
    return listing(f"{shortened(text)} ({number})" for text, number in count.most_common())


def _warn_overlap(fields: RecordFields, rows: Mapping[str, list[Row]], name: str) -> None:
    """Warns about inputs and groups of other splits that are also in train."""
    texts = {row.text for row in rows["train"]}
    groups = {fields.group_of(row.record) for row in rows["train"]} - {None}
    for split, of_split in rows.items():
        if split == "train":
            continue
        repeated = sum(row.text in texts for row in of_split)
        if repeated:
            logging.warning(
                "%s: %d of %d records of %s have the same input as a record of train, which "
                "flatters their score",
                name,
                repeated,
                len(of_split),
                split,
            )
        related = sum(fields.group_of(row.record) in groups for row in of_split)
        if related:
            logging.warning(
                "%s: %d of %d records of %s share their %s with records of train",
                name,
                related,
                len(of_split),
                split,
                fields.group,
            )
