"""Reads the inputs of `predict` and `infer`, as records: of files, of streams or in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, Unpack

from absl import logging

from ptjax import files
from ptjax.data.memory import rows_of
from ptjax.data.plain import plain_rows
from ptjax.data.sources import (
    BadRecords,
    Format,
    Record,
    Records,
    is_text,
    non_empty,
    parse_records,
    read_records,
)
from ptjax.errors import InputError
from ptjax.inference.records import PLAIN


class Reading(TypedDict, total=False):
    """How files of inputs are read; see `ptjax.data.sources.read_records`."""

    format: Format | None
    columns: Sequence[str] | None
    quoting: bool | None
    encoding: str


def read_inputs(
    source: object, *, on_bad_record: str = "error", **reading: Unpack[Reading]
) -> Records:
    """Reads inputs from files or from memory; a plain line or text becomes a record of `PLAIN`.

    Args:
        source: the path or glob of files, else as for `records_in_memory`.
        on_bad_record: 'error' stops at the first record that cannot be read, 'skip' counts them.
        reading: for files only.

    Raises:
        InputError: the input is missing or empty, or a record in it cannot be read.
    """
    if not isinstance(source, str | os.PathLike):
        if reading:
            raise InputError(f"{next(iter(reading))} applies to files, but the inputs are in none")
        return records_in_memory(source, "infer", BadRecords(on_bad_record))
    path, kind = os.fspath(source), reading.get("format")
    records = read_records(path, on_bad_record=on_bad_record, **reading)
    stem = path.removesuffix(".gz").removesuffix(".xz").removesuffix(".bz2")
    lines = kind == "text" or (kind is None and os.path.splitext(stem)[1] == ".txt")
    return _checked(records, path, lines=lines)


def read_stream(
    data: bytes, name: str, *, on_bad_record: str = "error", **reading: Unpack[Reading]
) -> Records:
    """Reads inputs from the bytes of a stream, like `read_inputs`.

    Args:
        name: the stream's name, for messages.
        reading: without a format, it is JSON lines or plain lines by the first character.
    """
    bad, encoding = BadRecords(on_bad_record), reading.get("encoding", "utf-8")
    kind = reading.get("format") or ("jsonl" if is_json(data, encoding) else "text")
    columns, quoting = reading.get("columns"), reading.get("quoting")
    parsed = parse_records(
        data, name, kind, bad, columns=columns, quoting=quoting, encoding=encoding
    )
    return _checked(non_empty(Records(parsed, bad), name), name, lines=kind == "text")


def _checked(records: Records, name: str, *, lines: bool) -> Records:
    """The records, as records of `PLAIN` if the input is plain `lines`; says what is left out."""
    if records.bad.blank:
        logging.warning(
            "%s: %d of %d lines are blank and left out; the others are answered in order",
            name,
            records.bad.blank,
            records.bad.blank + records.bad.count + len(records),
        )
    if not lines:
        return records
    plain = [Record({PLAIN: record.fields["text"]}, record.file, record.line) for record in records]
    return Records(plain, records.bad)


def is_json(data: bytes, encoding: str) -> bool:
    """Returns whether `data` is meant as JSON rather than plain text.

    True if it starts with "{" or "[{", or if all of it is a JSON array. The reader of JSON lines
    then rejects an array with a clear message.

    Args:
        encoding: the name of the encoding of `data`; the result is False if Python lacks it.
    """
    try:
        start = data.decode(encoding, "replace").lstrip("\ufeff \t\r\n")
    except LookupError:  # no such encoding, which the reader reports
        return False
    if not start.startswith("["):
        return start.startswith("{")
    try:
        return isinstance(files.parse_json(start), list)
    except ValueError:
        # Broken, or a line of plain text such as "[1] a footnote".
        return re.match(r"\[\s*\{", start) is not None


def records_of_texts(texts: Iterable[str], name: str) -> Records:
    """Makes a record of `PLAIN` of each text; `name` says in messages where they are from."""
    return Records([Record({PLAIN: text}, name, i) for i, text in enumerate(texts, 1)])


def records_in_memory(inputs: object, function: str, bad: BadRecords | None = None) -> Records:
    """Makes records of inputs that Python code holds.

    Args:
        inputs: texts or records (dicts), which may be mixed: a list, a generator, a pandas
            DataFrame, a `datasets.Dataset`.
        function: the public function that they were given to, for messages.
        bad: receives the inputs that are neither; by default the first of them raises.

    Raises:
        InputError: it is one text or one record instead of several, or something else.
    """
    bad = bad or BadRecords()
    if isinstance(inputs, str | Mapping):
        one, name = ("text", "string") if isinstance(inputs, str) else ("record", "record")
        raise InputError(f"{function} needs a list of inputs, not one {name}: write [{one}]")
    if isinstance(inputs, bytes) or not isinstance(inputs, Iterable):
        raise InputError(
            f"{function} needs a list of texts or records (dicts), got {type(inputs).__name__}"
        )
    rows: list[Any] = rows_of(inputs, "inputs")
    kept: dict[int, Mapping[str, object]] = {}
    for number, row in enumerate(rows, 1):
        problem = None
        if not isinstance(row, str | Mapping):
            problem = f"{type(row).__name__}, neither a text nor a record (a dict)"
        elif isinstance(row, str) and not is_text({PLAIN: row}):
            problem = "characters that are not UTF-8 text; correct it"
        if problem is None:
            kept[number] = {PLAIN: str(row)} if isinstance(row, str) else row
        elif bad.policy == "error":
            raise InputError(f"inputs:{number}: {problem}")
        else:
            bad.report(f"inputs:{number}", problem)
    fields = plain_rows(kept.values(), "inputs")
    return Records(
        [Record(row, "inputs", number) for number, row in zip(kept, fields, strict=True)], bad
    )
