"""Runs ptjax's commands for the studies beside this file, each run once."""

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
    """`results.json` of a `python -m ptjax.train` in `model_dir`."""
    if not (model_dir / "results.json").exists():
        _run("train", model_dir, gin_files, settings)
    return json.loads((model_dir / "results.json").read_text())


def pretrain(
    model_dir: Path, gin_files: Sequence[str], settings: Mapping[str, Any], steps: int
) -> Path:
    """The backbone that a `python -m ptjax.pretrain` of so many steps leaves in `model_dir`."""
    if not (model_dir / "checkpoints" / str(steps)).exists():  # written behind the weights
        _run("pretrain", model_dir, gin_files, {"TRAIN_STEPS": steps} | dict(settings))
    return model_dir / "models" / "best"


def _run(
    command: str, model_dir: Path, gin_files: Sequence[str], settings: Mapping[str, Any]
) -> None:
    """`python -m ptjax.COMMAND`, printed before it starts."""
    files = [f"--gin_file={name}" for name in gin_files]
    given = {"MODEL_DIR": str(model_dir.absolute())} | dict(settings)
    bindings = [f"--gin.{name}={value!r}" for name, value in given.items()]
    words = ["-m", f"ptjax.{command}", *files, *bindings]
    print(shlex.join(["python", *words]), flush=True)
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)


def show(values: Sequence[float]) -> str:
    """Mean, standard deviation and each value as cells of a Markdown table."""
    spread = f"{statistics.stdev(values):.3f}" if len(values) > 1 else ""
    each = ", ".join(f"{value:.3f}" for value in values)
    return f"{statistics.mean(values):.3f} | {spread} | {each}"
