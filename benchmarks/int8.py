"""What frozen kernels in int8, and products in int8, cost a prompt, and what they save.

    python benchmarks/int8.py --data_dir=DIR --output_dir=DIR

SST-2 and IMDb on the shipped backbone with the recipe of `sees_input.py`. Prompts are tuned in
bfloat16 and on each kind of int8 kernels, and scored there; those of bfloat16 are scored on int8
kernels too. Differences to bfloat16 are of the same examples (SST-2: validation and test; IMDb:
test), with the mean over the seeds for each; the standard error is that of the mean over examples.
Then the bytes of the frozen weights, counted from shapes. Every run is a `python -m ptjax.train` or
`python -m ptjax.evaluate` of its own, printed before it starts; one that finished is not run again.
DATA_DIR is laid out as the tasks' gin files say.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import jax
import numpy as np
import runs
from prompt_step import t5_1_1
from real_batches import TASKS
from sees_input import COMMON, LENGTHS, STEPS

from ptjax.backbones.open import open_backbone
from ptjax.models.config import T5Config
from ptjax.models.t5_family import T5_FAMILY
from ptjax.sharding.quantize import quantize_kernel, weight_shapes
from ptjax.trees import flatten_paths

DTYPE = "bfloat16"
HELD = {  # QUANTIZE
    DTYPE: None,
    "int8": "int8",
    "int8_products": "int8_products",
    "int8_products_but_wo": "int8_products_but_wo",
}
SPLITS = {"sst2": ("validation", "test"), "imdb": ("test",)}
ALLOWED = 0.005
"""How much of the accuracy a kind may lose, beside one standard error."""


def held_bytes(config: T5Config, quantized: str | None) -> int:
    """What the frozen weights take, scales included; nothing is computed."""
    held = {
        path: jax.eval_shape(quantize_kernel, leaf)
        if quantized and T5_FAMILY.is_quantized(path)
        else leaf
        for path, leaf in flatten_paths(weight_shapes(config, DTYPE)).items()
    }
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held))


def correct(flags: argparse.Namespace, task: str, tuned: str, scored: str, seed: int) -> list[bool]:
    """Which examples a prompt that was tuned on one kind of kernels gets right on another."""
    settings = COMMON | {
        "INITIAL_CHECKPOINT_PATH": flags.backbone,
        "DATA_DIR": flags.data_dir,
        "ptjax.Task.inputs": TASKS[task]["inputs"],
        "ptjax.Task.verbalizer": TASKS[task]["verbalizer"],
        "TASK_FEATURE_LENGTHS": LENGTHS[task],
        "TRAIN_STEPS": flags.steps,
        "RANDOM_SEED": seed,
        "QUANTIZE": HELD[tuned],
        "ptjax.load_backbone.dtype": DTYPE,
    }
    model_dir = flags.output_dir / task / tuned / str(seed)
    runs.train(model_dir, [f"tasks/{task}.gin", "runs/prompt_tune.gin"], settings)
    found = []
    for split in SPLITS[task]:
        file = model_dir / f"{split}_on_{scored}.json"
        rows = file.with_suffix(".jsonl")
        where = (f"--model_dir={model_dir}", f"--split={split}", f"--output={rows}", "--force")
        runs.evaluate(file, [], {"QUANTIZE": HELD[scored]}, *where)
        with open(rows, encoding="utf-8") as lines:
            found += [row["prediction"] == row["targets"] for row in map(json.loads, lines)]
    return found


def compare(flags: argparse.Namespace, task: str, tuned: str, scored: str) -> str:
    """A row of the table: accuracy of each seed, and the difference to bfloat16."""

    def all_seeds(tuned: str, scored: str) -> np.ndarray:
        return np.array(
            [correct(flags, task, tuned, scored, seed) for seed in range(flags.seeds)], float
        )

    plain, rounded = all_seeds(DTYPE, DTYPE), all_seeds(tuned, scored)
    paired = (rounded - plain).mean(axis=0)
    mean, error = paired.mean(), paired.std(ddof=1) / np.sqrt(paired.size)
    verdict = "" if tuned == scored == DTYPE else f"{100 * mean:+.2f} | {100 * error:.2f}"
    if verdict and mean < -(ALLOWED + error):
        verdict += ", too low"
    accuracies = runs.show(rounded.mean(axis=1).tolist())
    return f"| {task} | {tuned} | {scored} | {accuracies} | {verdict or ' | '} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, type=os.path.abspath)
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--backbone", default="ptjax-nano", help="what load_backbone takes")
    parser.add_argument("--tasks", default=list(SPLITS), type=lambda text: text.split(","))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=3)
    flags = parser.parse_args()
    pairs = [(DTYPE, scored) for scored in HELD] + [(kind, kind) for kind in HELD if HELD[kind]]
    rows = [compare(flags, task, *pair) for task in flags.tasks for pair in pairs]
    print("\n| task | tuned on | scored on | mean | std | seeds | difference, points | its error |")
    print("|---|---|---|--:|--:|---|--:|--:|")
    print("\n".join(rows))
    configs = {flags.backbone: open_backbone(flags.backbone).config}
    configs |= {f"T5 1.1 {size.upper()}": t5_1_1(size) for size in ("xl", "xxl")}
    print(f"\n| frozen weights, MB | {DTYPE} | int8 | ratio |\n|---|--:|--:|--:|")
    for name, config in configs.items():
        plain, rounded = (held_bytes(config, quantized) / 1e6 for quantized in (None, "int8"))
        print(f"| {name} | {plain:,.1f} | {rounded:,.1f} | {rounded / plain:.2f} |")


if __name__ == "__main__":
    main()
