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
    "ptjax.Task.inputs": "{sentence}",
    "TASK_FEATURE_LENGTHS": {"inputs": 64, "targets": 4},
    "DROPOUT_RATE": 0.0,
}
TRAINED = {"TRAIN_STEPS": 1000, "EVAL_PERIOD": 100}
HARD_PROMPTS = {  # text, shots; without examples in context it knows no seed
    "hard prompt: an instruction": ("Is the following sentence positive or negative?", 0),
    "hard prompt: the name used in pre-training": ("sentiment:", 0),
    "hard prompt: the name, 2 examples in context": ("sentiment:", 2),
}
METHODS = {  # gin file of runs/, settings
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
    common = {"DATA_DIR": flags.data_dir} | COMMON
    for number, (name, (text, shots)) in enumerate(HARD_PROMPTS.items()):
        for seed in range(flags.seeds if shots else 1):
            file = flags.output_dir / f"hard_prompt_{number}" / f"{seed}.json"
            files = ["tasks/sst2.gin", "runs/prompt_tune.gin"]
            asked = [f"--hard_prompt={text}", f"--shots={shots}"]
            given = {"RANDOM_SEED": seed} | common
            values.setdefault(name, []).append(runs.evaluate(file, files, given, *asked)["value"])
    for method, (run, settings) in METHODS.items():
        for seed in range(flags.seeds):
            given = {"RANDOM_SEED": seed} | common | settings
            model_dir = flags.output_dir / run / str(seed)
            results = runs.train(model_dir, ["tasks/sst2.gin", f"runs/{run}.gin"], given)
            values.setdefault(method, []).append(results["value"])
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
