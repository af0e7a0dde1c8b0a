"""What frozen kernels in int8 cost a prompt, and what they save.

    python benchmarks/int8.py --data_dir=DIR --output_dir=DIR

SST-2 on the shipped backbone with the recipe of `sees_input.py`, in bfloat16: prompts that were
tuned on its kernels as they are and on int8 ones, each scored on both, accuracy on the test split.
Then the bytes of the frozen weights, counted from shapes. Every run is a `python -m ptjax.train` or
`python -m ptjax.evaluate` of its own, printed before it starts; one that finished is not run again.
DATA_DIR is laid out as the task's gin file says.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import jax
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
HELD = {DTYPE: None, "int8": "int8"}  # QUANTIZE


def held_bytes(config: T5Config, quantized: str | None) -> int:
    """What the frozen weights take, scales included; nothing is computed."""
    held = {
        path: jax.eval_shape(quantize_kernel, leaf)
        if quantized and T5_FAMILY.is_quantized(path)
        else leaf
        for path, leaf in flatten_paths(weight_shapes(config, DTYPE)).items()
    }
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held))


def accuracy(flags: argparse.Namespace, tuned: str, scored: str, seed: int) -> float:
    """Test accuracy of a prompt that was tuned on one backbone, on that or on the other one."""
    settings = COMMON | {
        "INITIAL_CHECKPOINT_PATH": flags.backbone,
        "DATA_DIR": flags.data_dir,
        "ptjax.Task.inputs": TASKS["sst2"]["inputs"],
        "TASK_FEATURE_LENGTHS": LENGTHS["sst2"],
        "TRAIN_STEPS": STEPS,
        "RANDOM_SEED": seed,
        "QUANTIZE": HELD[tuned],
        "ptjax.load_backbone.dtype": DTYPE,
    }
    model_dir = flags.output_dir / tuned / str(seed)
    own = runs.train(model_dir, ["tasks/sst2.gin", "runs/prompt_tune.gin"], settings)
    if scored == tuned:
        return own["value"]
    file = flags.output_dir / f"{tuned}_on_{scored}" / f"{seed}.json"
    return runs.evaluate(file, [], {"QUANTIZE": HELD[scored]}, f"--model_dir={model_dir}")["value"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, type=os.path.abspath)
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--backbone", default="ptjax-nano", help="what load_backbone takes")
    parser.add_argument("--seeds", type=int, default=3)
    flags = parser.parse_args()
    rows = []
    for tuned in HELD:
        for scored in HELD:
            values = [accuracy(flags, tuned, scored, seed) for seed in range(flags.seeds)]
            rows.append(f"| {tuned} | {scored} | {runs.show(values)} |")
    print("\n| tuned on | test accuracy on | mean | std | seeds |\n|---|---|--:|--:|---|")
    print("\n".join(rows))
    configs = {flags.backbone: open_backbone(flags.backbone).config}
    configs |= {f"T5 1.1 {size.upper()}": t5_1_1(size) for size in ("xl", "xxl")}
    print(f"\n| frozen weights, MB | {' | '.join(HELD)} | ratio |\n|---|--:|--:|--:|")
    for name, config in configs.items():
        plain, rounded = (held_bytes(config, quantized) / 1e6 for quantized in HELD.values())
        print(f"| {name} | {plain:,.1f} | {rounded:,.1f} | {rounded / plain:.2f} |")


if __name__ == "__main__":
    main()
