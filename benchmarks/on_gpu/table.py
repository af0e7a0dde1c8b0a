"""Prints the results of the parts of `run.sh` as Markdown tables.

    python benchmarks/on_gpu/table.py FOLDER gpu|rehearsal PART...

The exit code is 1 if a part is not complete.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def show(found: dict[str, Any]) -> str:
    """A part as a heading and a table, with a column for every key that occurs in its rows."""
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
    """A value as the text of a table cell."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "NO"
        case float():
            return f"{value:.4g}"
        case _:
            return str(value).replace("|", "/").replace("\n", " ")[:120]


def main(folder: str, kind: str, *parts: str) -> int:
    complete = True
    for part in parts:
        file = Path(folder, f"{kind}_{part}.json")
        if file.exists():
            found = json.loads(file.read_text())
            complete &= found["status"] == "complete"
            print(show(found), end="\n\n")
        else:
            complete = False
            print(f"### {part}: left no results\n")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
