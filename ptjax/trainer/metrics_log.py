"""`metrics.jsonl`: a row for every logged step and every evaluation; whole at any instant."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath

from ptjax import files
from ptjax.model_dir import ModelDir
from ptjax.sharding import processes
from ptjax.trainer.callbacks import Callback


class MetricsLog(Callback):
    """The rows of one run, in memory and in the file; each has its "step"."""

    def __init__(self) -> None:
        self._path = epath.Path()
        self._rows: list[dict[str, Any]] = []

    def on_start(self, model_dir: epath.Path, step: int) -> None:
        """Goes on after `step`; of a new run nothing is left of another one."""
        self._path = ModelDir(model_dir).metrics
        if not processes.first():
            return
        if step:
            self._resume(step)
        else:
            self._path.unlink(missing_ok=True)

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._append(step, metrics)

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._append(step, metrics)

    def _append(self, step: int, metrics: Mapping[str, float]) -> None:
        if processes.first():
            self._rows.append({"step": step, **metrics})
            self._write()

    def _resume(self, step: int) -> None:
        """Drops rows after `step`, which are written again, and lines that are not rows.

        Without damage the file is written with the next row only.
        """
        lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        rows = [row for row in map(_parse, lines) if row is not None]
        if len(rows) < len(lines):
            number = len(lines) - len(rows)
            logging.warning("%s: dropped %d damaged line(s)", self._path, number)
        self._rows = [row for row in rows if row["step"] <= step]
        if len(rows) < len(lines):
            self._write()

    def _write(self) -> None:
        text = "".join(json.dumps(row) + "\n" for row in self._rows)
        files.write_bytes(self._path, text.encode())


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = files.parse_json(line)
    except ValueError:  # also bytes that are no UTF-8, and what is nested too deep
        return None
    fits = isinstance(row, dict) and isinstance(row.get("step"), int)
    return row if fits else None
