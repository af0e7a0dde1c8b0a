"""Reads records from files: JSON lines, CSV, TSV, Parquet and plain lines.

A record is a dict of field name to value, with its file and line for error messages. Files may be
compressed (.gz, .xz, .bz2) and in any place that `etils.epath` reads.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from etils import epath

from ptjax import files, untrusted
from ptjax.data import tables
from ptjax.data.parquet import parquet_rows
from ptjax.data.tables import Row
from ptjax.errors import InputError, check_choice, missing, setting

Format = Literal["jsonl", "csv", "tsv", "text", "parquet"]
FORMATS = get_args(Format)
OnBadRecord = Literal["error", "skip"]
_FORMAT_OF_SUFFIX = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".parquet": "parquet",
}
_COMPRESSED = (".gz", ".xz", ".bz2")


@dataclass(frozen=True, slots=True)
class Record:
    """One record: its fields, file, first line (from 1) and number of lines."""

    fields: dict[str, Any]
    file: str
    line: int
    lines: int = 1

    @property
    def where(self) -> str:
        """The record's file and first line as 'file:line', for error messages."""
        return f"{self.file}:{self.line}"


@dataclass
class BadRecords:
    """Handles unusable records: policy 'error' stops at the first, 'skip' counts them.

    Attributes:
        count: the number of unusable records.
        first: the first of them, as 'file:line: problem'.
        lines: the number of lines that unusable records take.
        blank: the number of blank lines, which are not records.
    """

    policy: str = "error"
    count: int = 0
    first: str | None = None
    lines: int = 0
    blank: int = 0

    def __post_init__(self) -> None:
        check_choice(get_args(OnBadRecord), "Task", on_bad_record=self.policy)

    def report(self, where: str, problem: str, lines: int = 1) -> None:
        """Counts one unusable record.

        Args:
            where: the record's 'file:line'.
            problem: why it cannot be used.
            lines: the number of lines that it takes.

        Raises:
            InputError: the policy is 'error'.
        """
        if self.policy == "error":
            raise InputError(
                f"{where}: {problem}; to skip and count such records, set "
                + setting("on_bad_record", "skip")
            )
        self.count += 1
        self.lines += lines
        self.first = self.first or f"{where}: {problem}"


@dataclass(frozen=True)
class Records(Sequence[Record]):
    """The records of one source, in file order.

    Attributes:
        bad: the number of skipped records, and the first of them.
        digest: identifies the content: "sha256:..." of the concatenated, decompressed bytes of the
            files; for a TFDS data set its name, its version and the hash of its rows.
    """

    records: list[Record]
    bad: BadRecords = field(default_factory=BadRecords)
    digest: str = ""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)


def resolve_path(path: str | os.PathLike[str]) -> epath.Path:
    """Returns a path with '~' expanded; for 'package:NAME', the path of NAME in ptjax's own data.

    Raises:
        InputError: nothing or '..' follows 'package:'.
    """
    text = os.fspath(path)
    if not text.startswith("package:"):
        return epath.Path(text).expanduser()
    parts = [part for part in text.removeprefix("package:").split("/") if part]
    if not parts or ".." in parts:
        raise InputError(f"{text}: 'package:' must be followed by the name of data in ptjax")
    folder = importlib.resources.files("ptjax") / "assets"
    for part in parts:
        folder = folder / part
    return epath.Path(str(folder))


def find_files(pattern: str | os.PathLike[str]) -> list[epath.Path]:
    """Returns the file at this path or, if it does not exist, the files that match it as a glob.

    The files are sorted by path.

    Raises:
        InputError: the file does not exist or is a folder, or the glob has no match.
    """
    path = resolve_path(pattern)
    if path.is_dir():
        raise InputError(f"{path}: a folder; name a file in it or a glob such as {path}/*.jsonl")
    if path.exists():
        return [path]
    text = os.fspath(path)
    magic = re.search(r"[*?\[]", text)
    if magic is None:
        raise missing("records", path)
    base, _, rest = (text[: magic.start()]).rpartition("/")
    glob = rest + text[magic.start() :]
    root = epath.Path(base or ("/" if text.startswith("/") else "."))
    matches = sorted((p for p in root.glob(glob) if not p.is_dir()), key=os.fspath)
    if not matches:
        raise InputError(f"{path}: no file matches; correct the glob (or DATA_DIR)")
    return matches


def read_records(
    pattern: str | os.PathLike[str],
    *,
    format: str | None = None,
    columns: Sequence[str] | None = None,
    quoting: bool | None = None,
    encoding: str = "utf-8",
    on_bad_record: str = "error",
) -> Records:
    """Reads all records of a file or of the files of a glob. Blank lines are skipped.

    Args:
        pattern: a path, a glob, or 'package:NAME/FILE' (see `resolve_path`).
        format: 'jsonl' (one JSON object per line), 'csv', 'tsv', 'parquet' or 'text' (one record
          per line, with the field 'text'); None infers it from the suffix.
        columns: the field names of a CSV or TSV without a header line, or of 'text' (one name).
        quoting: whether double quotes enclose fields. None: in CSV they do, in TSV they are
          ordinary characters (a quoting reader would lose rows of MRPC).
        encoding: of the files; a byte-order mark is dropped.
        on_bad_record: 'error' stops at the first malformed record, 'skip' counts them in `.bad`.

    Raises:
        InputError: a missing file, no usable record, a malformed record (unless skipped), a wrong
          encoding, a damaged compressed file or one that inflates too much (see
          `untrusted.inflate`), or settings that do not fit the format.
    """
    bad = BadRecords(on_bad_record)
    records: list[Record] = []
    digest = hashlib.sha256()
    for path in find_files(pattern):
        name = os.fspath(path)
        kind = _format_of(name, format)
        if kind in ("jsonl", "parquet") and columns is not None:
            what = "JSON lines name their" if kind == "jsonl" else "Parquet names its"
            raise InputError(f"{name}: {what} fields, `columns` does not apply")
        if kind in ("jsonl", "text", "parquet") and quoting is not None:
            raise InputError(f"{name}: `quoting` applies to csv and tsv, this is {kind}")
        data = _read_bytes(path)
        digest.update(data)
        records += parse_records(
            data,
            name,
            kind,
            bad,
            columns=columns,
            quoting=quoting,
            encoding=encoding,
        )
    read = Records(records, bad, f"sha256:{digest.hexdigest()}")
    return non_empty(read, os.fspath(pattern))


def parse_records(
    data: bytes,
    name: str,
    format: str,
    bad: BadRecords,
    *,
    columns: Sequence[str] | None = None,
    quoting: bool | None = None,
    encoding: str = "utf-8",
) -> list[Record]:
    """Parses the decompressed bytes of one file; settings as for `read_records`.

    Args:
        name: the file's name, for messages.
        bad: receives every unusable record; raises InputError if its policy is 'error'.

    Raises:
        InputError: a wrong encoding, an invalid header line, settings that do not fit the format,
            or an unusable record if the policy is 'error'.
    """
    if format == "parquet":
        rows = parquet_rows(data, name)
        return [Record(fields, name, number) for number, fields in enumerate(rows, 1)]
    records = []
    text, clean = _decode(data, encoding, name, bad)
    for line, row, lines in _rows(text, format, columns, quoting, name, bad):
        # JSON can contain lone surrogates as escapes, even if every byte is valid text.
        if isinstance(row, dict) and (format == "jsonl" or not clean) and not is_text(row):
            row = (
                f"characters that are not {encoding} text; correct it or set {setting('encoding')}"
            )
        if isinstance(row, str):
            bad.report(f"{name}:{line}", row, lines)
        else:
            records.append(Record(row, name, line, lines))
    return records


def non_empty(records: Records, source: str) -> Records:
    """Returns `records` unchanged after checking that there is at least one.

    Args:
        source: where the records come from, for the message.

    Raises:
        InputError: `records` is empty.
    """
    if records:
        return records
    if records.bad.count:
        raise InputError(
            f"{source}: no usable record, {records.bad.count} bad ones; the first: "
            f"{records.bad.first}"
        )
    raise InputError(f"{source}: no records in it; name a file that has some")


def _format_of(name: str, format: str | None) -> str:
    if format is not None:
        check_choice(FORMATS, "Task", format=format)
        return format
    stem, suffix = os.path.splitext(name)
    if suffix in _COMPRESSED:
        suffix = os.path.splitext(stem)[1]
    if suffix not in _FORMAT_OF_SUFFIX:
        raise InputError(
            f"{name}: cannot infer the format from the name; set {setting('format')} to one of "
            f"{', '.join(FORMATS)}"
        )
    return _FORMAT_OF_SUFFIX[suffix]


def _read_bytes(path: epath.Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    suffix = path.suffix
    if suffix not in _COMPRESSED:
        return data
    try:
        return untrusted.inflate(data, suffix)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise InputError(
            f"{path}: not a whole {suffix} file ({error}); copy it again or correct its name"
        ) from error


def _decode(data: bytes, encoding: str, name: str, bad: BadRecords) -> tuple[str, bool]:
    """The text, and whether all bytes are valid in that encoding."""
    clean = True
    try:
        text = data.decode(encoding)
    except LookupError as error:
        raise InputError(f"encoding={encoding!r}: not an encoding that Python knows") from error
    except UnicodeDecodeError as error:
        before = data[: error.start].decode(encoding, "replace")
        line = len(tables.NEWLINE.findall(before)) + 1
        problem = (
            f"not {encoding} text ({error.reason}); set {setting('encoding')} to the file's own"
        )
        if bad.policy == "error":
            bad.report(f"{name}:{line}", problem)
        try:
            # Keeps all lines; invalid bytes become surrogates, which are reported later.
            text, clean = data.decode(encoding, "surrogateescape"), False
        except UnicodeDecodeError:
            raise InputError(f"{name}:{line}: {problem}") from error
    return text.removeprefix("\ufeff"), clean


def is_text(row: files.JsonObject) -> bool:
    """Whether all strings of a record can be written as UTF-8.

    Lone surrogates cannot, and would crash a tokenizer.
    """
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _rows(
    text: str,
    kind: str,
    columns: Sequence[str] | None,
    quoting: bool | None,
    name: str,
    bad: BadRecords,
) -> Iterator[tuple[int, Row, int]]:
    """(line, fields or what is wrong with them, number of lines) of each row."""
    quoted = kind in ("csv", "tsv") and (kind == "csv" if quoting is None else quoting)
    if not quoted:
        lines = tables.NEWLINE.split(text)
        bad.blank += sum(not line.strip() for line in lines) - (not lines[-1])
    if kind == "jsonl":
        return ((line, row, 1) for line, row in _json_rows(text))
    if kind == "text":
        names = tuple(columns or ("text",))
        if len(names) != 1:
            raise InputError(f"{name}: a plain line has one field, `columns` names {len(names)}")
        return ((line, {names[0]: cells}, 1) for line, cells in tables.lines(text))
    delimiter = "," if kind == "csv" else "\t"
    if quoted:
        every = tables.quoted_cells(text, delimiter)
        cells = [cell for cell in every if cell[1]]
        bad.blank += len(every) - len(cells)
    else:
        if quoting is None:
            tables.report_enclosed(text, delimiter, name)
        cells = ((line, row.split(delimiter), 1) for line, row in tables.lines(text))
    return tables.rows(iter(cells), columns, name)


def _json_rows(text: str) -> Iterator[tuple[int, Row]]:
    for number, line in tables.lines(text):
        try:
            # NaN is not JSON, but Python writes it for a missing value.
            row = files.parse_json(line, constant=lambda _: None)
        except ValueError as error:
            reason = getattr(error, "msg", str(error))
            if line.lstrip().startswith("["):
                reason = f"it starts an array; {reason}"
            yield number, f"not valid JSON ({reason}); write one JSON object per line"
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            kind = "an array" if isinstance(row, list) else "a bare value"
            yield number, f"{kind}, not a JSON object; write one JSON object per line"
