"""What a prompt loses that does not see its input: accuracy by steps, on the shipped backbone.

    python benchmarks/sees_input.py --data_dir=DIR --output_dir=DIR

SST-2, IMDb (cut to 128 tokens) and AG News, three seeds, 1,000 steps of 32 examples, P = 20; at
most 2,000 test examples. Every run is a `python -m ptjax.train` of its own, printed before it
starts; one that finished is not run again. DATA_DIR is laid out as the tasks' gin files say.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path

import runs

TASKS = {  # gin file of tasks/, the template that suits the shipped backbone, input length
    "sst2": ("{sentence}", 64),
    "imdb": ("{text}", 128),
    "ag_news": ("{text}", 128),
}
COMMON = {
    "INITIAL_CHECKPOINT_PATH": "ptjax-nano",
    "PROMPT_LENGTH": 20,
    "LEARNING_RATE": 0.03,
    "LEARNING_RATE_SCALE": "embedding_rms",
    "DROPOUT_RATE": 0.0,
    "TRAIN_STEPS": 1000,
    "EVAL_PERIOD": 100,
    "EVAL_EXAMPLES": 2000,
}
CURVE = (100, 200, 400, 600, 800, 1000)


def curve(model_dir: Path) -> dict[int, float]:
    """Validation accuracy by step."""
    rows = map(json.loads, (model_dir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["validation/accuracy"] for row in rows if "validation/accuracy" in row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, type=os.path.abspath)
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    flags = parser.parse_args()
    tests, curves = [], []
    for task, (template, length) in TASKS.items():
        for sees_input in (True, False):
            values, found = [], []
            for seed in range(flags.seeds):
                model_dir = flags.output_dir / f"{task}_{sees_input}" / str(seed)
                settings = COMMON | {
                    "DATA_DIR": flags.data_dir,
                    "tasks.Task.inputs": template,
                    "TASK_FEATURE_LENGTHS": {"inputs": length, "targets": 4},
                    "SEES_INPUT": sees_input,
                    "RANDOM_SEED": seed,
                }
                files = [f"tasks/{task}.gin", "runs/prompt_tune.gin"]
                values.append(runs.train(model_dir, files, settings)["value"])
                found.append(curve(model_dir))
            tests.append(f"| {task} | {sees_input} | {runs.show(values)} |")
            means = [statistics.mean(one[step] for one in found) for step in CURVE]
            curves.append(f"| {task} | {sees_input} | {' | '.join(f'{x:.3f}' for x in means)} |")
    print("\n| test accuracy | sees_input | mean | std | seeds |\n|---|---|--:|--:|---|")
    print("\n".join(tests))
    print(f"\n| validation, mean of the seeds | sees_input | {' | '.join(map(str, CURVE))} |")
    print("|---|---|" + "--:|" * len(CURVE))
    print("\n".join(curves))


if __name__ == "__main__":
    main()
