"""SST-2 on the backbone that ptjax ships: hard prompt, prompt tuning, model tuning.

    python benchmarks/sst2.py --data_dir=DIR --output_dir=DIR

Every run is a `python -m ptjax.train` of its own, printed before it starts; a run that finished is
not run again. DATA_DIR holds `sst2/{train,validation,test}.tsv`, laid out as in GLUE, but with
labels in the test split. The table is of that split; the step is chosen on validation.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import runs

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, type=os.path.abspath)
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    flags = parser.parse_args()
    values: dict[str, list[float]] = {}
    trained: dict[str, int] = {}
    majority = 0.0
    for method in METHODS:
        run, settings = METHODS[method]
        seeds = 1 if run == "hard_prompt" and "SHOTS" not in settings else flags.seeds
        for seed in range(seeds):
            number = list(METHODS).index(method)
            given = {"DATA_DIR": flags.data_dir, "RANDOM_SEED": seed} | COMMON | settings
            model_dir = flags.output_dir / f"{number}_{run}" / str(seed)
            results = runs.train(model_dir, ["tasks/sst2.gin", f"runs/{run}.gin"], given)
            key = "hard_prompt" if "hard" in method else "value"
            values.setdefault(method, []).append(results[key])
            trained[method] = results["trainable_parameters"]
            majority = results["majority"]
            if method.startswith("prompt tuning"):
                values.setdefault(f"{method}, untrained", []).append(results["before"])
    print("\n| SST-2, test accuracy | trained | mean | std | seeds |\n|---|--:|--:|--:|---|")
    print(f"| always the majority | 0 | {majority:.3f} | | |")
    for method, found in values.items():
        print(f"| {method} | {trained.get(method, 0):,} | {runs.show(found)} |")


if __name__ == "__main__":
    main()
