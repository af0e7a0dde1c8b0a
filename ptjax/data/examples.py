"""Examples: the texts made from a task's records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ptjax.data import catalogue
from ptjax.data.catalogue import Preprocess
from ptjax.data.sources import BadRecords, Records
from ptjax.data.templates import RecordError
from ptjax.errors import InputError
from ptjax.files import JsonObject

Fields = Mapping[str, Any]
"""A record's fields by name."""


@dataclass(frozen=True, slots=True)
class Example:
    """One example as text, the fields it was made from, and its record's file and line."""

    inputs: str
    targets: str
    fields: dict[str, Any]
    file: str
    line: int


class Examples(list[Example]):
    """The examples of a split.

    `bad` counts the records that were skipped; `digest` identifies the files, see `Records`.
    """

    def __init__(self, examples: Iterable[Example], bad: BadRecords, digest: str = "") -> None:
        super().__init__(examples)
        self.bad, self.digest = bad, digest

    def divided(self, held_out: int, *, validation: bool) -> Examples:
        """Returns `held_out` examples for validation or, if not `validation`, all others.

        They are evenly spaced, because files are often sorted by label.
        """
        indices = {i * len(self) // held_out for i in range(held_out)}
        chosen = (example for i, example in enumerate(self) if (i in indices) == validation)
        return Examples(chosen, self.bad, self.digest)

    def limited(self, limit: int | None) -> Examples:
        """Returns at most `limit` examples, evenly spaced; None returns all."""
        if limit is None or limit >= len(self):
            return self
        chosen = [self[i * len(self) // limit] for i in range(limit)]
        return Examples(chosen, self.bad, self.digest)


def make_examples(
    records: Records,
    preprocess: Preprocess | None,
    render: Callable[[Fields], tuple[str, str]],
    bad: BadRecords,
) -> Examples:
    """Makes the examples of all records.

    Args:
        preprocess: maps a record's fields to the fields of its examples; None makes one example
            with the record's own fields.
        render: maps fields to (inputs, targets); raises `RecordError` if it cannot use them.
        bad: counts the records that cannot be used, or raises at the first, as its policy says.

    Raises:
        InputError: a record cannot be used and the policy is 'error', or no record makes an
            example.
    """
    examples = []
    for record in records:
        try:
            # All of a record's examples or none.
            examples += [
                Example(*render(fields), fields, record.file, record.line)
                for fields in apply_preprocess(preprocess, record.fields)
            ]
        except RecordError as error:
            bad.report(record.where, str(error), record.lines)
    if not examples:
        raise InputError(_why_empty(records, bad))
    return Examples(examples, bad, records.digest)


def apply_preprocess(preprocess: Preprocess | None, fields: JsonObject) -> Iterator[JsonObject]:
    """Yields the fields of each example made from a record; without `preprocess`, the record's.

    Raises:
        RecordError: `preprocess` fails on the record.
    """
    if preprocess is None:
        yield fields
        return
    try:
        yield from preprocess(fields)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise RecordError(
            f"{catalogue.name_of(preprocess)} cannot use it ({type(error).__name__}: {error})"
        ) from error


def _why_empty(records: Records, bad: BadRecords) -> str:
    if bad.count:
        return f"no usable record, {bad.count} bad ones; the first: {bad.first}"
    return f"no record makes an example (the first is {records[0].where}); check `preprocess`"
