"""Splits text into lines, and CSV and TSV into rows: quotes, header lines, columns."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import logging

from ptjax.errors import InputError, setting

# A row while it is read: its fields, or a message that says what is wrong with it.
Row = dict[str, Any] | str

NEWLINE = re.compile("\r\n|\r|\n")


def lines(text: str) -> Iterator[tuple[int, str]]:
    """Yields the number (from 1) and text of each line that is not blank."""
    # Not str.splitlines: it also splits at U+2028, U+0085 and others, which are text here.
    for number, line in enumerate(NEWLINE.split(text), 1):
        if line and not line.isspace():
            yield number, line


def report_enclosed(text: str, delimiter: str, name: str) -> None:
    """Logs a warning if a file's double quotes seem to enclose fields.

    pandas and Excel enclose a field that contains a quote, and double that quote. Quotes that are
    ordinary characters, as in MRPC, also occur elsewhere.
    """
    if '"' not in text:
        return
    enclosed = 0
    for _, line in lines(text):
        for cell in line.split(delimiter) if '"' in line else ():
            inside = cell[1:-1]
            if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inside.replace('""', ""):
                enclosed += 1
            elif '"' in cell:
                return
    logging.warning(
        "%s: double quotes only enclose fields, %d of them, as in CSV; they are kept as text. To "
        "remove them set %s, else %s",
        name,
        enclosed,
        setting("quoting", True),
        setting("quoting", False),
    )


def quoted_cells(text: str, delimiter: str) -> list[tuple[int, list[str] | str, int]]:
    """Splits a text with quoted fields into rows: (first line, cells or a problem, line count).

    Quoted fields may span lines. A blank line is a row without cells. After a bad quote, which may
    have consumed any number of lines, reading resumes at the next line.
    """
    rows: list[tuple[int, list[str] | str, int]] = []
    lines = list(io.StringIO(text, newline=""))
    start = 0
    limit = csv.field_size_limit(sys.maxsize)  # the default refuses texts over 128 KiB
    try:
        while start < len(lines):
            # strict: a stray quote is an error here; otherwise it silently swallows rows.
            remaining = (lines[i] for i in range(start, len(lines)))
            reader, before = csv.reader(remaining, delimiter=delimiter, strict=True), 0
            try:
                for row in reader:
                    rows.append((start + before + 1, row, reader.line_num - before))
                    before = reader.line_num
                return rows
            except csv.Error as error:
                fix = f"where quotes are plain text, set {setting('quoting', False)}"
                problem = f"bad quoting ({error}); {fix}"
                rows.append((start + before + 1, problem, 1))
                start += before + 1
        return rows
    finally:
        csv.field_size_limit(limit)


def rows(
    cells: Iterator[tuple[int, list[str] | str, int]], columns: Sequence[str] | None, name: str
) -> Iterator[tuple[int, Row, int]]:
    """Names the cells of each row: yields (line, fields by name or a problem, number of lines).

    Args:
        cells: the rows as (line, list of cells or a problem, number of lines).
        columns: the names of the columns; None takes them from the first row, the header line.
        name: of the file, for messages.

    Raises:
        InputError: the header line cannot be read, or a column's name is empty or repeated.
    """
    nameless = 0
    if columns is None:
        first = next(cells, None)
        if first is None:
            return
        line, header, _ = first
        if isinstance(header, str):
            raise InputError(f"{name}:{line}: {header}")
        columns = [cell.strip() for cell in header]
        # pandas' index: a first column without a name.
        if len(columns) > 1 and not columns[0] and all(columns[1:]):
            logging.warning("%s:%d: the first column has no name and is ignored", name, line)
            nameless, columns = 1, columns[1:]
        where = f"{name}:{line}: the header line"
    else:
        where = f"{name}: {setting('columns')}"
    if not all(columns) or len(set(columns)) < len(columns):
        raise InputError(
            f"{where} has an empty or a repeated name ({', '.join(columns)}); "
            f"for a file without a header line set {setting('columns')}"
        )
    for line, row, height in cells:
        if isinstance(row, list) and len(row) != nameless + len(columns):
            problem = (
                f"{len(row)} columns instead of {nameless + len(columns)} ({', '.join(columns)}); "
                f"correct the line, {setting('columns')} or {setting('quoting')}"
            )
            yield line, problem, height
        elif isinstance(row, str):
            yield line, row, height
        else:
            yield line, dict(zip(columns, row[nameless:], strict=True)), height
