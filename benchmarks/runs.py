"""Runs `python -m ptjax.train` and `.evaluate` for the studies beside this file, each run once."""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def train(model_dir: Path, gin_files: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`results.json` of a run in `model_dir`, which is trained, its command printed, if need be."""
    if not (model_dir / "results.json").exists():
        files = [f"--gin_file={name}" for name in gin_files]
        given = {"MODEL_DIR": str(model_dir.absolute())} | dict(settings)
        _run(["-m", "ptjax.train", *files, *_bindings(given)])
    return json.loads((model_dir / "results.json").read_text())


def evaluate(file: Path, model_dir: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `python -m ptjax.evaluate` says of the run in `model_dir`; kept in `file`."""
    if not file.exists():
        said = _run(["-m", "ptjax.evaluate", f"--model_dir={model_dir}", *_bindings(settings)])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(said)
    return json.loads(file.read_text())


def _bindings(settings: Mapping[str, Any]) -> list[str]:
    return [f"--gin.{name}={value!r}" for name, value in settings.items()]


def _run(command: Sequence[str]) -> bytes:
    """What the command prints; it is printed itself first."""
    print(shlex.join(["python", *command]), flush=True)
    return subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE).stdout


def show(values: Sequence[float]) -> str:
    """Mean, standard deviation and each value as cells of a Markdown table."""
    spread = f"{statistics.stdev(values):.3f}" if len(values) > 1 else ""
    each = ", ".join(f"{value:.3f}" for value in values)
    return f"{statistics.mean(values):.3f} | {spread} | {each}"
