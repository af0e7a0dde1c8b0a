"""SST-2 on the backbone that ptjax ships: hard prompt, prompt tuning, model tuning.

    python benchmarks/sst2.py --data_dir=DIR --output_dir=DIR

Every run is a `python -m ptjax.train` of its own, printed before it starts; a run that finished is
not run again. DATA_DIR holds `sst2/{train,validation,test}.tsv`, laid out as in GLUE, but with
labels in the test split. The table is of that split; the step is chosen on validation.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

COMMON = {
    "INITIAL_CHECKPOINT_PATH": "ptjax-nano",
    "tasks.Task.inputs": "{sentence}",
    "TASK_FEATURE_LENGTHS": {"inputs": 64, "targets": 4},
    "DROPOUT_RATE": 0.0,
}
TRAINED = {"TRAIN_STEPS": 1000, "EVAL_PERIOD": 100}
METHODS = {  # gin file of runs/, settings; a hard prompt without examples knows no seed
    "hard prompt: an instruction": (
        "hard_prompt",
        {"HARD_PROMPT": "Is the following sentence positive or negative?"},
    ),
    "hard prompt: the name used in pre-training": ("hard_prompt", {"HARD_PROMPT": "sentiment:"}),
    "hard prompt: the name, 2 examples in context": (
        "hard_prompt",
        {"HARD_PROMPT": "sentiment:", "SHOTS": 2},
    ),
    "prompt tuning, P = 20": (
        "prompt_tune",
        {"PROMPT_LENGTH": 20, "LEARNING_RATE": 0.03, "LEARNING_RATE_SCALE": "embedding_rms"}
        | TRAINED,
    ),
    "model tuning": ("model_tune", TRAINED),
}


def commands(flags: argparse.Namespace, method: str) -> Iterator[tuple[Path, list[str]]]:
    """MODEL_DIR and command of each seed."""
    run, settings = METHODS[method]
    seeds = range(1 if run == "hard_prompt" and "SHOTS" not in settings else flags.seeds)
    for seed in seeds:
        number = list(METHODS).index(method)
        model_dir = Path(flags.output_dir).absolute() / f"{number}_{run}" / str(seed)
        given = {"MODEL_DIR": str(model_dir), "DATA_DIR": flags.data_dir, "RANDOM_SEED": seed}
        bindings = [f"--gin.{k}={v!r}" for k, v in (given | COMMON | settings).items()]
        files = ["--gin_file=tasks/sst2.gin", f"--gin_file=runs/{run}.gin"]
        yield model_dir, ["-m", "ptjax.train", *files, *bindings]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, type=os.path.abspath)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    flags = parser.parse_args()
    values: dict[str, list[float]] = {}
    trained: dict[str, int] = {}
    majority = 0.0
    for method in METHODS:
        for model_dir, command in commands(flags, method):
            if not (model_dir / "results.json").exists():
                print(shlex.join(["python", *command]), flush=True)
                subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            results = json.loads((model_dir / "results.json").read_text())
            key = "hard_prompt" if "hard" in method else "value"
            values.setdefault(method, []).append(results[key])
            trained[method] = results["trainable_parameters"]
            majority = results["majority"]
            if method.startswith("prompt tuning"):
                values.setdefault(f"{method}, untrained", []).append(results["before"])
    print("\n| SST-2, test accuracy | trained | mean | std | seeds |\n|---|--:|--:|--:|---|")
    print(f"| always the majority | 0 | {majority:.3f} | | |")
    for method, found in values.items():
        spread = f"{statistics.stdev(found):.3f}" if len(found) > 1 else ""
        each = ", ".join(f"{value:.3f}" for value in found)
        mean = statistics.mean(found)
        print(f"| {method} | {trained.get(method, 0):,} | {mean:.3f} | {spread} | {each} |")


if __name__ == "__main__":
    main()
