"""Prints what the parts of `run.sh` found as Markdown tables.

    python benchmarks/on_gpu/table.py FOLDER PART...

Ends with 1 if a part is not complete.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def show(found: dict[str, Any]) -> str:
    """A part as a heading and a table; a column for everything that a row of it has."""
    rows = found["rows"]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [
        f"### {found['part']}: {found['status']}",
        f"{found['devices']} x {found['device']}, jax {found['versions']['jax']}, {found['date']}",
        "",
    ]
    if rows:
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(cell(row.get(c)) for c in columns)} |" for row in rows]
    return "\n".join(lines)


def cell(value: Any) -> str:
    """A value in a table's cell."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "NO"
        case float():
            return f"{value:.4g}"
        case _:
            return str(value).replace("|", "/").replace("\n", " ")[:120]


def main(folder: str, *parts: str) -> int:
    complete = True
    for part in parts:
        # A folder is of rehearsals or of results.
        files = sorted(Path(folder).glob(f"*_{part}.json"))
        for file in files:
            found = json.loads(file.read_text())
            complete &= found["status"] == "complete"
            print(show(found), end="\n\n")
        if not files:
            complete = False
            print(f"### {part}: left no results\n")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
