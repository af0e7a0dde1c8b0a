"""`Task.from_records`: a task from records that Python code holds, its labels read off them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self, cast

from absl import logging

from ptjax.data.division import connected, divide
from ptjax.data.labelling import label_splits
from ptjax.data.labels import label_text
from ptjax.data.memory import Table, name_splits, read_table
from ptjax.data.record_fields import RecordFields, check_columns, usable_rows
from ptjax.data.sources import Record
from ptjax.errors import InputError, check_at_least, near

_READING = ("format", "columns", "quoting", "encoding")
_SCORING = ("metrics", "positive_label", "answers", "sentinels", "on_bad_record")


class FromRecords:
    """Gives `Task` its constructor `from_records`."""

    @classmethod
    def from_records(
        cls,
        train: object,
        validation: object = None,
        test: object = None,
        *,
        inputs: str,
        label: str | None = None,
        verbalizer: Mapping[Any, str] | None = None,
        targets: str | None = None,
        group: str | None = None,
        name: str | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> Self:
        """A task from records in memory or in files.

            task = ptjax.Task.from_records(
                [{"body": "I was charged twice", "category": "billing"}, ...],
                validation=0.1,
                inputs="{body}",
                label="category",
            )

        Labels, their counts and what looks wrong with the data are logged.

        Args:
            train: the records, a dict of column to value each: a list, a generator (read once into
                memory), a pandas DataFrame, a `datasets.Dataset`, or the path or glob of Parquet,
                CSV, TSV or JSONL files. A dict of splits (a `DatasetDict`) gives all splits.
            validation: records as for `train`, or the share of `train` to hold out (0.1),
                stratified by label. Records with the same input stay on one side.
            test: records as for `train`.
            inputs: template of the model's input over the columns.
            label: the column with the label. The class names of `datasets` are used where it has
                them. If it holds lists, a target is its words, sorted and separated by ', '.
            verbalizer: label value -> target text; by default each label is its own text.
            targets: template of the target, for open text instead of labels.
            group: the column whose value related records share (a customer, a document): the
                share that is held out keeps them on one side, and with them the records of
                other groups that have the same input.
            name: of the task; by default the label's column.
            seed: decides which records are held out.
            settings: metrics, positive_label, answers, sentinels, on_bad_record, and for files
                format, columns, quoting and encoding; see `Task`.

        Raises:
            InputError: no records, a column that does not exist, a single label, a label that
                `train` lacks, or records that do not fit (how many, and the first).
        """
        name = name or label or "records"
        try:
            _check_settings(label, targets, settings)
            fields = RecordFields(inputs, label, verbalizer, targets, group, settings)
            reading = {key: settings[key] for key in _READING if key in settings}
            tables = _read(fields, train, validation, test, reading, seed, name)
            made = label_splits(fields, tables, name)
        except InputError as error:
            raise InputError(f"task {name}: {error}") from error
        make = cast("Callable[..., Self]", cls)  # with the arguments of Task
        return make(name=name, inputs=inputs, label=label, group=group, **made, **settings)


def _check_settings(label: str | None, targets: str | None, settings: Mapping[str, object]) -> None:
    for key in settings:
        if key in ("preprocess", "train_preprocess", "held_out"):
            what = "validation takes a share" if key == "held_out" else "prepare the records first"
            raise InputError(f"from_records takes no {key}; {what}")
        if key not in (*_READING, *_SCORING):
            known = near(key, (*_READING, *_SCORING))
            raise InputError(f"from_records has no setting {key!r}{known}")
    if label is None and targets is None:
        raise InputError("give label, the column with the label, or targets for open text")


def _read(
    fields: RecordFields,
    train: object,
    validation: object,
    test: object,
    reading: Mapping[str, Any],
    seed: int,
    name: str,
) -> dict[str, Table]:
    """The records of every split, labels by name; divides `train` if a share is held out."""
    share = None
    if isinstance(validation, int | float) and not isinstance(validation, bool):
        share, validation = validation, None
        if not 0 < share < 1:
            raise InputError(
                f"validation={share} must be a share of train, such as 0.1, or records"
            )
    tables = {
        split: read_table(source, split, reading, skip=fields.skips)
        for split, source in name_splits(train, validation, test).items()
    }
    if reading and all(table.path is None for table in tables.values()):
        raise InputError(f"{next(iter(reading))} applies to files, but none are given; drop it")
    for split, table in tables.items():
        check_columns(fields, split, table)
        tables[split] = _named_classes(fields, table)
    if isinstance(train, Mapping) and "test" in tables and _unlabelled(fields, tables["test"]):
        logging.warning("%s: test is left out, none of its records has a label", name)
        del tables["test"]
    if share is not None:
        if "validation" in tables:
            raise InputError(f"validation={share}, but train has a validation split; drop one")
        check_at_least(0, "from_records", seed=seed)
        tables |= _divided(fields, tables["train"], share, seed)
    return tables


def _unlabelled(fields: RecordFields, table: Table) -> bool:
    label = fields.label
    return label is not None and all(record.fields.get(label) is None for record in table.records)


def _named_classes(fields: RecordFields, table: Table) -> Table:
    """The table with the names of classes instead of their numbers, in the targets' columns."""
    columns = set(fields.targets_fields) | {fields.label}
    class_names = {c: names for c, names in table.class_names.items() if c in columns}
    keys = {str(key).strip() for key in fields.verbalizer or ()}

    def name(value: Any, names: list[str]) -> object:
        if isinstance(value, list):
            return [name(item, names) for item in value]
        if not isinstance(value, int) or not 0 <= value < len(names):
            return None  # -1 means that the label is missing
        numbers = bool(keys) and keys <= set(map(str, range(len(names))))
        return value if numbers else names[value]  # a verbalizer of numbers means the numbers

    records = [
        dataclasses.replace(
            record,
            fields=record.fields
            | {c: name(record.fields.get(c), names) for c, names in class_names.items()},
        )
        for record in table.records
    ]
    return dataclasses.replace(table, records=records, class_names=class_names)


def _divided(fields: RecordFields, table: Table, share: float, seed: int) -> dict[str, Table]:
    """Train and validation from the records of `train`."""
    rows = usable_rows(fields, "train", table.records)
    keys = [(("input", row.text), ("group", fields.group_of(row.record))) for row in rows]
    units = connected([key for key in of_row if key[1] is not None] for of_row in keys)
    labels = [tuple(map(label_text, row.values)) for row in rows]
    held_out = divide(labels, units, share, seed)
    chosen = {id(row.record) for row, held in zip(rows, held_out, strict=True) if held}
    if not chosen:
        raise InputError(
            f"validation={share} of {len(rows)} records in {len(set(units))} groups holds out "
            "none; use a larger share, or give the records"
        )
    parts: dict[str, list[Record]] = {"train": [], "validation": []}
    for record in table.records:
        parts["validation" if id(record) in chosen else "train"].append(record)
    # Their content is no longer that of the file.
    return {k: dataclasses.replace(table, records=v, path=None) for k, v in parts.items()}
