"""`metrics.jsonl`: a row for every logged step and every evaluation; whole at any instant."""

from __future__ import annotations

import json
from typing import Any

from absl import logging
from etils import epath

from ptjax import files


class MetricsLog:
    """The rows of one run, in memory and in the file; each has its "step"."""

    def __init__(self, path: epath.Path) -> None:
        self.path = path
        self._rows: list[dict[str, Any]] = []

    def append(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self._write()

    def clear(self) -> None:
        """A new run: nothing is left of another one."""
        self._rows = []
        self.path.unlink(missing_ok=True)

    def resume(self, step: int) -> None:
        """Goes on after `step`: later rows are written again, lines that are no rows are dropped.

        Without damage the file is written with the next row only.
        """
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        rows = [row for row in map(_parse, lines) if row is not None]
        if len(rows) < len(lines):
            number = len(lines) - len(rows)
            logging.warning("%s: dropped %d damaged line(s)", self.path, number)
        self._rows = [row for row in rows if row["step"] <= step]
        if len(rows) < len(lines):
            self._write()

    def _write(self) -> None:
        text = "".join(json.dumps(row) + "\n" for row in self._rows)
        files.write_bytes(self.path, text.encode())


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = files.parse_json(line)
    except ValueError:  # also bytes that are no UTF-8, and what is nested too deep
        return None
    fits = isinstance(row, dict) and isinstance(row.get("step"), int)
    return row if fits else None
