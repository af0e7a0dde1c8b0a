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

from ptjax.model_dir import ModelDir


def train(model_dir: Path, gin_files: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`results.json` of a `python -m ptjax.train` in `model_dir`."""
    results = ModelDir(model_dir).results
    if not results.exists():
        _run("train", gin_files, {"MODEL_DIR": str(model_dir.absolute())} | dict(settings))
    return json.loads(results.read_text())


def pretrain(
    model_dir: Path, gin_files: Sequence[str], settings: Mapping[str, Any], steps: int
) -> Path:
    """The backbone that a `python -m ptjax.pretrain` of so many steps leaves in `model_dir`."""
    if steps not in ModelDir(model_dir).checkpoint_steps():  # written behind the weights
        given = {"MODEL_DIR": str(model_dir.absolute()), "TRAIN_STEPS": steps}
        _run("pretrain", gin_files, given | dict(settings))
    return Path(ModelDir(model_dir).best_model)


def evaluate(
    file: Path, gin_files: Sequence[str], settings: Mapping[str, Any], *flags: str
) -> dict[str, Any]:
    """What `python -m ptjax.evaluate` says with these flags; kept in `file`."""
    if not file.exists():
        said = _run("evaluate", gin_files, settings, *flags)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(said)
    return json.loads(file.read_text())


def _run(command: str, gin_files: Sequence[str], settings: Mapping[str, Any], *flags: str) -> bytes:
    """What a `python -m ptjax.COMMAND` prints; it is printed itself first."""
    files = [f"--gin_file={name}" for name in gin_files]
    bindings = [f"--gin.{name}={value!r}" for name, value in settings.items()]
    words = ["-m", f"ptjax.{command}", *flags, *files, *bindings]
    print(shlex.join(["python", *words]), flush=True)
    return subprocess.run([sys.executable, *words], check=True, stdout=subprocess.PIPE).stdout


def show(values: Sequence[float]) -> str:
    """Mean, standard deviation and each value as cells of a Markdown table."""
    spread = f"{statistics.stdev(values):.3f}" if len(values) > 1 else ""
    each = ", ".join(f"{value:.3f}" for value in values)
    return f"{statistics.mean(values):.3f} | {spread} | {each}"
