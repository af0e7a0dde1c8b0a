"""The content of `report.json`: how it is made, read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from etils import epath

from ptjax import files
from ptjax.errors import InputError
from ptjax.files import JsonObject
from ptjax.model_dir import ModelDir
from ptjax.reports.checks import is_sound
from ptjax.reports.libraries import missing_libraries
from ptjax.reports.statistics import statistics_of

FORMAT = 1
"""The version of the layout of `report.json`."""


class Member(NamedTuple):
    """What a report says of a run, or of one member of a sweep.

    Attributes:
        name: the member's name; "" in an ordinary run.
        results: its part of `results.json`.
        record: its recorded predictions, with "prompt_rows"; None without a record.
        statistics: see `statistics_of`; None without a record.
    """

    name: str
    results: JsonObject
    record: JsonObject | None
    statistics: JsonObject | None


def make_content(results: JsonObject, records: Mapping[str, JsonObject]) -> JsonObject:
    """Makes the content of `report.json`, with the statistics if their libraries are installed.

    Args:
        results: the content of `results.json`.
        records: the recorded predictions by name of a member; "" is the name in an ordinary run.
    """
    installed = missing_libraries() is None
    return {
        "format": FORMAT,
        "results": results,
        "members": {
            name: record | {"statistics": statistics_of(record) if installed else None}
            for name, record in records.items()
        },
    }


def as_json(content: JsonObject) -> str:
    """Returns the text of `report.json`."""
    return json.dumps(content, indent=2) + "\n"


def read_content(model_dir: epath.Path) -> JsonObject | None:
    """Reads `report.json`, or makes a content without predictions from `results.json`.

    Returns None if the folder has neither.

    Raises:
        InputError: a file is damaged, or of a later version of ptjax.
    """
    run = ModelDir(model_dir)
    path = run.report_data if run.report_data.exists() else run.results
    if not path.exists():
        return None
    content = files.read_object(path)
    if path == run.results:
        content = {"format": FORMAT, "results": content, "members": {}}
    if content.get("format") != FORMAT:
        raise InputError(
            f"{path}: its format is {content.get('format')!r}, and this version of ptjax reads "
            f"{FORMAT}; update ptjax"
        )
    if not is_sound(content):
        raise InputError(f"{path}: not what ptjax writes there; evaluate the run again")
    return content


def members_of(content: JsonObject) -> list[Member]:
    """Lists the members of a run: the best of a sweep first, the others in their order."""
    results, records = content["results"], content["members"]
    by_name = results.get("members")
    parts = by_name if isinstance(by_name, dict) else {"": results}
    best = results["best"]["member"] if isinstance(by_name, dict) else ""
    members = []
    for name in sorted(parts, key=lambda name: name != best):
        record = records.get(name)
        # Computed again: those in the file may be missing, and the file may come from others.
        statistics = None if record is None else statistics_of(record)
        members.append(Member(name, parts[name], record, statistics))
    return members


def read_rows(model_dir: epath.Path) -> list[JsonObject]:
    """Reads the rows of `metrics.jsonl`, without damaged lines; [] without the file."""
    path = ModelDir(model_dir).metrics
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            row = files.parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
