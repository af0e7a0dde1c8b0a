"""What the columns of records are to a task, and which records it can use."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ptjax.data.labels import find_values
from ptjax.data.memory import Table
from ptjax.data.sources import Record
from ptjax.data.templates import RecordError, find_field, parse_template
from ptjax.errors import InputError, listing, near


@dataclasses.dataclass(frozen=True)
class RecordFields:
    """The arguments of `from_records` that say what a record holds."""

    inputs: str
    label: str | None
    verbalizer: Mapping[Any, str] | None
    targets: str | None
    group: str | None
    settings: Mapping[str, Any]

    @property
    def skips(self) -> bool:
        return self.settings.get("on_bad_record", "error") == "skip"

    @property
    def targets_fields(self) -> tuple[str, ...]:
        return () if self.targets is None else template_fields("targets", self.targets)

    def group_of(self, record: Record) -> str | None:
        value = None if self.group is None else record.fields.get(self.group)
        return None if value is None else str(value)

    def text(self, record: Record) -> str:
        """The input of a record; RecordError if it has none."""
        sentinels = self.settings.get("sentinels", False)
        text = parse_template(self.inputs).render(record.fields, sentinels=sentinels)
        try:
            text.encode()
        except UnicodeEncodeError as error:  # it would crash a tokenizer
            raise RecordError("characters that are not text (lone surrogates)") from error
        return text


@dataclasses.dataclass(frozen=True)
class Row:
    """A usable record: its input, and its labels (none with open targets)."""

    record: Record
    text: str
    values: list[object]


def template_fields(setting: str, text: str) -> tuple[str, ...]:
    try:
        return parse_template(text).fields
    except ValueError as error:
        raise InputError(f"{setting}={text!r}: {error}") from error


def check_columns(fields: RecordFields, split: str, table: Table) -> None:
    """InputError for an argument that names a column that no record of the split has."""
    columns = table.columns
    names = template_fields("inputs", fields.inputs)
    if not names and fields.inputs in columns:
        raise InputError(f"inputs={fields.inputs!r} is a column; write '{{{fields.inputs}}}'")
    asked = [("inputs", name) for name in names] + [("targets", x) for x in fields.targets_fields]
    asked += [("label", fields.label), ("group", fields.group)]
    asked.append(("answers", fields.settings.get("answers")))
    for setting, column in asked:
        if column is None or column in columns or column.split(".")[0] in columns:
            continue
        hint = near(column, columns, listed=False)
        raise InputError(
            f"{split} has no column {column!r}, which {setting} names{hint} "
            f"(columns: {listing(columns)})"
        )


def usable_rows(fields: RecordFields, split: str, records: Iterable[Record]) -> list[Row]:
    """The records that fit; InputError for the others, unless they are skipped."""
    records = list(records)
    rows, bad = [], []
    for record in records:
        try:
            values = (
                [] if fields.targets is not None else find_values(record.fields, fields.label or "")
            )
            for name in fields.targets_fields:
                find_field(record.fields, name)
            rows.append(Row(record, fields.text(record), values))
        except RecordError as error:
            bad.append(f"{record.where}: {error}")
    if bad and (not rows or not fields.skips):
        raise InputError(
            f"{len(bad)} of {len(records)} records of {split} cannot be used; the first, {bad[0]}; "
            "correct or drop them, or give on_bad_record='skip'"
        )
    return rows
