"""`metrics.jsonl`: a row for every logged step and every evaluation; every write is atomic."""

from __future__ import annotations

import json
from collections.abc import Mapping

from absl import logging
from etils import epath

from ptjax import files
from ptjax.files import JsonObject
from ptjax.model_dir import ModelDir
from ptjax.sharding import processes
from ptjax.trainer.callbacks import Callback


class MetricsLog(Callback):
    """Writes `metrics.jsonl`, on the first process: each row has "step" and the metrics."""

    def __init__(self) -> None:
        self._path = epath.Path()
        self._rows: list[JsonObject] = []

    def on_start(self, model_dir: epath.Path, step: int) -> None:
        """Reads the existing rows up to `step`, to continue after them; at step 0 removes the file.

        Rows after `step` are dropped when the next row is written; damaged lines are dropped now.
        """
        self._path = ModelDir(model_dir).metrics
        if not processes.first():
            return
        if step:
            self._resume(step)
        else:
            self._path.unlink(missing_ok=True)

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a row."""
        self._append(step, metrics)

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a row."""
        self._append(step, metrics)

    def _append(self, step: int, metrics: Mapping[str, float]) -> None:
        if processes.first():
            self._rows.append({"step": step, **metrics})
            self._write()

    def _resume(self, step: int) -> None:
        """Drops rows after `step`, which the resumed run writes again, and damaged lines.

        The file itself is written now only if it had damaged lines, else with the next row.
        """
        lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        rows = read_rows(self._path)
        if len(rows) < len(lines):
            number = len(lines) - len(rows)
            logging.warning("%s: dropped %d damaged line(s)", self._path, number)
        self._rows = [row for row in rows if row["step"] <= step]
        if len(rows) < len(lines):
            self._write()

    def _write(self) -> None:
        text = "".join(json.dumps(row) + "\n" for row in self._rows)
        files.write_bytes(self._path, text.encode())


def read_rows(path: epath.Path) -> list[JsonObject]:
    """Reads the rows of a `metrics.jsonl`, without damaged lines; none if it does not exist."""
    lines = path.read_bytes().splitlines() if path.exists() else ()
    return [row for row in map(_parse, lines) if row is not None]


def _parse(line: bytes) -> JsonObject | None:
    """A row; None if the line is damaged."""
    try:
        row = files.parse_json(line)
    except ValueError:  # also if it is not UTF-8, or nested too deeply
        return None
    fits = isinstance(row, dict) and isinstance(row.get("step"), int)
    return row if fits else None
