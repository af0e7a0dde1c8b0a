"""What a prompt loses that does not see its input: accuracy by steps and by time.

    python benchmarks/sees_input.py --data_dir=DIR --output_dir=DIR

SST-2, IMDb (cut to 128 tokens) and AG News on the shipped backbone, three seeds, steps of 32
examples, P = 20; at most 2,000 test examples. A prompt that sees its input has 1,000 steps; one
that does not has as many, and then the steps that it makes in the same time. Those follow from the
time of a step both ways, in turns, over the epoch's own batches; it is measured first and kept in
OUTPUT_DIR/time.json. Every run is a `python -m ptjax.train` of its own, printed before it starts;
one that finished is not run again. Writes OUTPUT_DIR/sees_input.png, accuracy over time. DATA_DIR
is laid out as the tasks' gin files say.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
import runs
from packing import Steps, survey
from prompt_step import make_step
from real_batches import TASKS, bucket, make_task

from ptjax.backbones.load import load_backbone
from ptjax.data.preprocess import tokenize_examples
from ptjax.model_dir import ModelDir

LENGTHS = {  # of inputs and targets
    "sst2": {"inputs": 64, "targets": 4},
    "imdb": {"inputs": 128, "targets": 4},
    "ag_news": {"inputs": 128, "targets": 4},
}
STEPS, PROMPT, BATCH = 1000, 20, 32
COMMON = {
    "PROMPT_LENGTH": PROMPT,
    "BATCH_SIZE": BATCH,
    "LEARNING_RATE": 0.03,
    "LEARNING_RATE_SCALE": "embedding_rms",
    "DROPOUT_RATE": 0.0,
    "EVAL_PERIOD": 100,
    "EVAL_EXAMPLES": 2000,
}
CURVE = (100, 200, 400, 600, 800, 1000)


def time_ratio(flags: argparse.Namespace, task: str) -> float:
    """Time of an epoch's steps with a prompt that sees its input, over that with one that does not.

    The median over turns in which every shape is timed both ways.
    """
    backbone = load_backbone(flags.backbone, dtype="float32")
    examples = make_task(task, flags.data_dir).load("train")
    source = tokenize_examples(examples, backbone.tokenizer, *LENGTHS[task].values())
    epoch = survey(bucket(source, BATCH, 0), PROMPT, attends_to_input=True)
    shape = PROMPT, backbone.config.emb_dim
    prompt = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    made = (
        make_step(backbone.config, backbone.variables["params"], prompt, sees)
        for sees in (True, False)
    )
    both = [Steps(one, epoch.batches) for one in made]
    ratios = []
    for turn in range(flags.rounds):
        for shape in epoch.counts:
            for steps in both:
                steps.turn(shape, 0.5)
        seeing, unseeing = (
            sum(count * steps.seconds[shape][turn] for shape, count in epoch.counts.items())
            for steps in both
        )
        ratios.append(seeing / unseeing)
    return statistics.median(ratios)


def measured_ratios(flags: argparse.Namespace) -> dict[str, float]:
    """`time_ratio` of every task, measured once."""
    file = flags.output_dir / "time.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for task in flags.tasks:
        if task not in found:
            found[task] = time_ratio(flags, task)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found))
    return found


def curve(model_dir: Path) -> dict[int, float]:
    """Validation accuracy by step."""
    rows = map(json.loads, ModelDir(model_dir).metrics.read_text().splitlines())
    return {row["step"]: row["validation/accuracy"] for row in rows if "validation/accuracy" in row}


def train(
    flags: argparse.Namespace,
    task: str,
    attends_to_input: bool,
    steps: int,
    gin_files: Sequence[str] = (),
) -> tuple[list[float], list[dict[int, float]]]:
    """Test accuracy and validation curve of every seed; `gin_files` stand behind the recipe."""
    values, curves = [], []
    for seed in range(flags.seeds):
        settings: dict[str, Any] = COMMON | {
            "INITIAL_CHECKPOINT_PATH": flags.backbone,
            "DATA_DIR": flags.data_dir,
            "ptjax.Task.inputs": TASKS[task]["inputs"],
            "ptjax.Task.verbalizer": TASKS[task]["verbalizer"],
            "TASK_FEATURE_LENGTHS": LENGTHS[task],
            "SEES_INPUT": attends_to_input,
            "TRAIN_STEPS": steps,
            "RANDOM_SEED": seed,
        }
        model_dir = flags.output_dir / f"{task}_{attends_to_input}_{steps}" / str(seed)
        files = [f"tasks/{task}.gin", "runs/prompt_tune.gin", *gin_files]
        values.append(runs.train(model_dir, files, settings)["value"])
        curves.append(curve(model_dir))
    return values, curves


def draw(file: Path, curves: dict[tuple[str, bool], dict[int, float]], ratios: Any) -> None:
    """Validation accuracy, mean of the seeds, over time (in steps of a seeing prompt)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(task for task, _ in curves))
    size = 1 + 3 * len(tasks), 3
    figure, axes = pyplot.subplots(1, len(tasks), squeeze=False, figsize=size, layout="constrained")
    for (task, attends_to_input), points in curves.items():
        axis = axes[0][tasks.index(task)]
        pace = 1.0 if attends_to_input else ratios[task]
        label = "sees its input" if attends_to_input else "does not"
        axis.plot([step / pace for step in points], list(points.values()), ".-", label=label)
        axis.set_title(task)
        axis.set_xlabel("time, in steps of the former")
    axes[0][0].set_ylabel("validation accuracy")
    axes[0][0].legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, type=os.path.abspath)
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--backbone", default="ptjax-nano", help="what load_backbone takes")
    parser.add_argument("--tasks", default=list(LENGTHS), type=lambda text: text.split(","))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5, help="turns of the time measurement")
    flags = parser.parse_args()
    machine.require("matplotlib")
    machine.show()
    ratios = measured_ratios(flags)
    tests, curves = [], {}
    for task in flags.tasks:
        longer = max(STEPS, 100 * round(STEPS * ratios[task] / 100))
        for attends_to_input, steps in ((True, STEPS), (False, STEPS), (False, longer)):
            values, found = train(flags, task, attends_to_input, steps)
            tests.append(f"| {task} | {attends_to_input} | {steps:,} | {runs.show(values)} |")
            means = {step: statistics.mean(one[step] for one in found) for step in found[0]}
            curves[task, attends_to_input] = means
    print("\n| task | time of a step, seeing / not |\n|---|--:|")
    print("\n".join(f"| {task} | {ratios[task]:.2f} |" for task in flags.tasks))
    print("\n| test accuracy | sees_input | steps | mean | std | seeds |")
    print("|---|---|--:|--:|--:|---|")
    print("\n".join(tests))
    print(f"\n| validation, mean of the seeds | sees_input | {' | '.join(map(str, CURVE))} |")
    print("|---|---|" + "--:|" * len(CURVE))
    for (task, attends_to_input), points in curves.items():
        row = " | ".join(f"{points[step]:.3f}" for step in CURVE)
        print(f"| {task} | {attends_to_input} | {row} |")
    draw(flags.output_dir / "sees_input.png", curves, ratios)


if __name__ == "__main__":
    main()
