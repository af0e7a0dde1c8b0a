"""Runs `python -m ptjax.train` for the studies beside this file, each run once."""

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
        bindings = [f"--gin.{name}={value!r}" for name, value in given.items()]
        command = ["-m", "ptjax.train", *files, *bindings]
        print(shlex.join(["python", *command]), flush=True)
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return json.loads((model_dir / "results.json").read_text())


def show(values: Sequence[float]) -> str:
    """Mean, standard deviation and each value as cells of a Markdown table."""
    spread = f"{statistics.stdev(values):.3f}" if len(values) > 1 else ""
    each = ", ".join(f"{value:.3f}" for value in values)
    return f"{statistics.mean(values):.3f} | {spread} | {each}"
