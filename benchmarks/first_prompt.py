"""From 300 labelled rows to a saved prompt: ptjax beside Hugging Face PEFT, lines, minutes and F1.

    python benchmarks/first_prompt.py --data_dir=DIR --output_dir=DIR [--peft_python=PYTHON]
        [--install]

Two programs in `first_prompt_programs` do the same; the one with PEFT follows PEFT's guides (AdamW
with a linear schedule, an initial text, the best epoch on validation). Both read the same files
(300 rows of SST-2's train split, 100 others for validation, its validation split of 872 as the
test), tune 20 rows in as many steps of 32 examples, in float32, and save the prompt. PEFT's runs
with each learning rate of `RATES`. The one that is better on validation counts, and finding it is
free.

Lines are counted without blank ones, comments, docstrings, and lines that only this benchmark
needs, as ruff formats the files. Seconds are those of the whole process, with warm compile and file
caches: each program runs for one epoch before the clock. F1 is the mean of the two labels'. Its
standard error comes from 1,000 bootstrap samples of the test rows.

Backbones: ptjax-nano, and one with the shapes of T5 1.1 small, its vocabulary excepted, and random
weights, for time alone, with one learning rate.
With --install both are also installed into new environments, from pip's cache if it has them.

Writes OUTPUT_DIR/first_prompt.json. DATA_DIR is laid out as the tasks' gin files say.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
import random_checkpoints
from sklearn.metrics import f1_score

import ptjax
from ptjax.models.config import T5Config

HERE = Path(__file__).parent
TRAIN, VALIDATION, BATCH, EPOCHS = 300, 100, 32, 20
STEPS = EPOCHS * -(-TRAIN // BATCH)
RATES = (0.03, 0.3)
SMALL = T5Config(
    vocab_size=8192,  # ptjax-nano's, whose tokenizer it takes
    emb_dim=512,
    num_heads=6,
    num_encoder_layers=8,
    num_decoder_layers=8,
    head_dim=64,
    mlp_dim=1024,
)
PEFT = ("torch==2.13.0", "peft", "transformers", "scikit-learn", "sentencepiece")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, type=Path)
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--peft_python", default=sys.executable)
    parser.add_argument("--install", action="store_true")
    flags = parser.parse_args()
    machine.show()
    folder = flags.output_dir.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    files = write_splits(flags.data_dir / "sst2", folder)
    found: dict[str, Any] = {
        "rows": TRAIN,
        "steps": STEPS,
        "lines": {side: lines_of(program(side)) for side in ("ptjax", "peft")},
    }
    if flags.install:
        found["install_seconds"] = {
            "ptjax": install(folder / "env_ptjax", f"{HERE.parent}[report]"),
            "peft": install(folder / "env_peft", *PEFT),
        }
    for name, backbone, rates in (
        ("nano", nano(folder), RATES),
        ("small", small(folder), RATES[:1]),
    ):
        found[name] = compare(name, backbone, files, folder, rates, flags.peft_python)
        print(json.dumps({name: found[name]}, indent=2), flush=True)
    (folder / "first_prompt.json").write_text(json.dumps(found, indent=2) + "\n")


def program(side: str) -> Path:
    return HERE / "first_prompt_programs" / f"with_{side}.py"


def lines_of(path: Path) -> int:
    """The lines of code: without blank ones, comments, the docstring, and the benchmark's own."""
    text = path.read_text()
    (first, *_) = ast.parse(text).body
    docstring = range(first.lineno, (first.end_lineno or 0) + 1)
    return sum(
        number not in docstring
        and bool(line.strip())
        and not line.strip().startswith("#")
        and not line.endswith("# for the benchmark")
        for number, line in enumerate(text.splitlines(), 1)
    )


def write_splits(data: Path, folder: Path) -> list[str]:
    """Writes train, validation and test, and returns their paths."""
    header, *rows = (data / "train.tsv").read_text().splitlines()
    random.Random(0).shuffle(rows)
    parts = {"train": rows[:TRAIN], "validation": rows[TRAIN : TRAIN + VALIDATION]}
    for name, part in parts.items():
        (folder / f"{name}.tsv").write_text("\n".join([header, *part]) + "\n")
    shutil.copy(data / "validation.tsv", folder / "test.tsv")
    return [str(folder / f"{name}.tsv") for name in (*parts, "test")]


def nano(folder: Path) -> str:
    """ptjax-nano as a folder that both read."""
    path = folder / "nano"
    if not path.exists():
        shutil.copytree(Path(ptjax.__file__).parent / "assets" / "nano", path)
    return str(path)


def small(folder: Path) -> str:
    """Random weights of T5 1.1 small's shapes, with ptjax-nano's tokenizer."""
    path = random_checkpoints.written(folder, "Hugging Face", SMALL)
    for name in ("spiece.model", "tokenizer_config.json"):
        source = Path(nano(folder)) / name
        if source.exists():
            shutil.copy(source, path)
    return str(path)


def install(folder: Path, *what: str) -> float:
    """The seconds that a new environment with these packages takes."""
    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", *what]
    subprocess.run(pip, check=True)
    return time.perf_counter() - began


def run(command: list[str], folder: Path) -> tuple[float, str]:
    """The seconds of a program, and what it printed."""
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return seconds, done.stdout


def compare(
    name: str,
    backbone: str,
    files: list[str],
    folder: Path,
    rates: Sequence[float],
    peft_python: str,
) -> dict[str, Any]:
    """Seconds and F1 of both sides on a backbone, PEFT's with the better of its `rates`."""
    found: dict[str, Any] = {}
    for turn, epochs in (("warm-up", 1), ("measured", EPOCHS)):
        place = folder / f"runs_{name}" / turn
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        command = [sys.executable, str(program("ptjax")), backbone, *files, str(place / "ptjax")]
        seconds, _ = run([*command, str(epochs * STEPS // EPOCHS)], place)
        found["ptjax"] = {"seconds": seconds} | scores_of_report(place / "ptjax")
        sides = []
        for rate in rates:
            output = place / f"peft_{rate}"
            command = [peft_python, str(program("peft")), backbone, *files, str(output)]
            seconds, text = run([*command, str(epochs), str(rate)], place)
            validation = max(
                float(line.rsplit(" ", 1)[1])
                for line in text.splitlines()
                if "validation F1" in line
            )
            answers = json.loads((output / "answers.json").read_text())
            side = {"seconds": seconds, "rate": rate, "validation_f1": validation}
            sides.append(side | scores(*answers))
        found["peft"] = max(sides, key=lambda side: side["validation_f1"])
        found["peft_rates"] = sides
    found["seconds_ratio"] = found["ptjax"]["seconds"] / found["peft"]["seconds"]
    return found


def scores_of_report(model_dir: Path) -> dict[str, float]:
    """F1 of the predictions in a run's report.json."""
    (member,) = json.loads((model_dir / "report.json").read_text())["members"].values()
    return scores(member["targets"], member["predictions"])


def scores(expected: list[str], predicted: list[str]) -> dict[str, float]:
    """The mean F1 of the two labels, and its standard error by the bootstrap."""

    def f1(rows: Any) -> float:
        chosen = np.array(expected)[rows], np.array(predicted)[rows]
        return float(f1_score(*chosen, labels=["negative", "positive"], average="macro"))

    rng = np.random.default_rng(0)
    count = len(expected)
    samples = [f1(rng.integers(0, count, count)) for _ in range(1000)]
    return {"f1": f1(np.arange(count)), "standard_error": float(np.std(samples))}


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
