"""All methods side by side on the backbone that ptjax ships: accuracy, sizes, memory and time.

    python benchmarks/methods.py --data_dir=DIR --output_dir=DIR [--results=FILE] [--steps=300]
        [--seeds=3] [--methods=lora,ia3] [--tasks=sst2,mrpc] [--show]

Every run is a `python -m ptjax.train` of its own, printed before it starts. What it found goes to
the results file; a run that is there, or has finished in OUTPUT_DIR, is not run again. The seeds
are the outer loop, so an interrupted study has every method. The table, of what has finished, is
printed at the end, also if a run fails; --show prints it and runs nothing. DATA_DIR is laid out as
the tasks' gin files say.

Accuracy is that of the test split; the step is chosen on validation. Learning rates are those of
the gin files, where these are not in units of one backbone's embedding. What a step costs comes
from `results.json`; examples a second are the median over the logged steps of all seeds.
`methods_beside_peft.py` compares two of the methods with PEFT's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import runs

RESULTS = Path(__file__).parent / "results" / "methods.json"
KEPT = ("metrics", "majority", "trainable_parameters", "costs", "versions")
"""What the results file has of a `results.json`."""
EVALUATIONS = 6
COMMON = {
    "INITIAL_CHECKPOINT_PATH": "ptjax-nano",
    "PROMPT_LENGTH": 20,
    "DROPOUT_RATE": 0.0,
    "ptjax.Task.metrics": ("accuracy",),  # MRPC's other one, F1, would choose the step
    "ptjax.TrainSchedule.keep": 1,
}
TASKS = {
    "sst2": {
        "TASK_FEATURE_LENGTHS": {"inputs": 64, "targets": 4},
        "ptjax.Task.inputs": "{sentence}",
    },
    "mrpc": {"TASK_FEATURE_LENGTHS": {"inputs": 128, "targets": 8}},
}
OF_EMBEDDING = {"LEARNING_RATE": 0.03, "LEARNING_RATE_SCALE": "embedding_rms"}
"""The paper's rate on a backbone whose embedding is not T5's."""


@dataclasses.dataclass(frozen=True)
class Way:
    """A method as the table has it.

    Attributes:
        title: its row.
        run: its gin file in runs/.
        settings: what it sets beside that file.
    """

    title: str
    run: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


METHODS = {
    "prompt": Way("prompt tuning", "prompt_tune", OF_EMBEDDING),
    "unseeing": Way(
        "prompt tuning, SEES_INPUT = False", "prompt_tune", OF_EMBEDDING | {"SEES_INPUT": False}
    ),
    "residual": Way("residual prompt tuning", "residual"),
    "p_tuning": Way("P-tuning, MLP", "p_tune"),
    "multitask": Way("multitask prompt, one task", "multitask"),
    "per_layer": Way("per-layer prompts", "per_layer", OF_EMBEDDING),
    "prefix": Way("prefix tuning", "prefix_tune"),
    "lora": Way("LoRA, rank 8, q and v", "lora"),
    "ia3": Way("IA3", "ia3"),
    "bitfit": Way("BitFit (norm scales)", "bitfit"),
    "model": Way("model tuning", "model_tune"),
}
COLUMNS = {  # of the costs in results.json; the unit and its divisor
    "export_bytes": ("export, kB", 1e3),
    "optimizer_bytes": ("optimizer, kB", 1e3),
    "checkpoint_bytes": ("checkpoint, kB", 1e3),
    "flops_per_step": ("GFLOP a step", 1e9),
    "step_bytes": ("memory of a step, MB", 1e6),
    "examples_per_second": ("examples/s", 1),
}
Found = dict[str, dict[str, dict[int, dict[str, Any]]]]
"""What is kept of `results.json`, by task, method and seed."""


def gin_files(task: str, method: str) -> list[str]:
    return [f"tasks/{task}.gin", f"runs/{METHODS[method].run}.gin"]


def settings_of(task: str, method: str, seed: int, steps: int, data_dir: str) -> dict[str, Any]:
    """What a run sets beside its gin files and MODEL_DIR."""
    schedule = {"TRAIN_STEPS": steps, "EVAL_PERIOD": max(1, steps // EVALUATIONS)}
    about = {"RANDOM_SEED": seed, "DATA_DIR": data_dir} | schedule
    # Rates are logged often, so that their median is not that of a few.
    log = {"ptjax.TrainSchedule.log_period": min(25, schedule["EVAL_PERIOD"])}
    return COMMON | TASKS[task] | METHODS[method].settings | about | log


def model_dir(output_dir: Path, task: str, method: str, steps: int, seed: int) -> Path:
    return output_dir / f"{task}_{steps}_steps" / method / str(seed)


def read(file: Path, steps: int) -> Found:
    """The results of earlier runs, none if there is no such file.

    Raises:
        SystemExit: they are of runs of another number of steps.
    """
    if not file.exists():
        return {}
    before = json.loads(file.read_text())
    if before["steps"] != steps:
        raise SystemExit(f"{file} has runs of {before['steps']} steps; give another --results")
    return {
        task: {
            method: {int(seed): one for seed, one in by_seed.items()}
            for method, by_seed in of_task.items()
        }
        for task, of_task in before["results"].items()
    }


def write(file: Path, steps: int, found: Found) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({"steps": steps, "results": found}, indent=2) + "\n")
    os.replace(partial, file)


def table(task: str, found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
    """The results of one task in Markdown, by method and seed."""
    heads = ["accuracy", "std", "seeds", "trained", *(title for title, _ in COLUMNS.values())]
    first = next(iter(next(iter(found.values())).values()))
    lines = [
        f"| {task} | {' | '.join(heads)} |",
        f"|---|--:|--:|---|{'--:|' * (len(heads) - 3)}",
        f"| always the majority | {first['majority']:.3f} {'|' * len(heads)}",
    ]
    for method, by_seed in found.items():
        results = list(by_seed.values())
        cells = [
            METHODS[method].title,
            runs.show([one["metrics"]["accuracy"] for one in results]),
            f"{results[0]['trainable_parameters']:,}",
            *(cost([one["costs"][name] for one in results], name) for name in COLUMNS),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cost(values: Sequence[float | None], name: str) -> str:
    """The median of the seeds' costs, in the column's unit; empty if no run knows it."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    value = statistics.median(known) / COLUMNS[name][1]
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def report(flags: argparse.Namespace, found: Found) -> None:
    """Prints the tables of what has finished, of those that the flags name."""
    for task in flags.tasks:
        methods = {name: found.get(task, {}).get(name, {}) for name in flags.methods}
        chosen = {
            name: {seed: by_seed[seed] for seed in sorted(by_seed)[: flags.seeds]}
            for name, by_seed in methods.items()
            if by_seed
        }
        if chosen:
            print(f"\n{table(task, chosen)}", flush=True)


def names_of(known: Mapping[str, Any], given: str) -> list[str]:
    """The names in a list with commas; argparse reports those that are not `known`."""
    names = given.split(",")
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
    return names


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, type=os.path.abspath)
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS.name}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    for flag, known in (("--methods", METHODS), ("--tasks", TASKS)):
        default = ",".join(known)
        names = lambda given, known=known: names_of(known, given)  # noqa: E731
        parser.add_argument(flag, type=names, default=default, help=f"default: {default}")
    parser.add_argument("--show", action="store_true", help="run nothing, print what has finished")
    return parser.parse_args(arguments)


def main() -> None:
    flags = parse()
    found = read(flags.results, flags.steps)
    try:
        for seed in range(0 if flags.show else flags.seeds):
            for task in flags.tasks:
                for method in flags.methods:
                    by_seed = found.setdefault(task, {}).setdefault(method, {})
                    if seed in by_seed:
                        continue
                    folder = model_dir(flags.output_dir, task, method, flags.steps, seed)
                    given = settings_of(task, method, seed, flags.steps, flags.data_dir)
                    one = runs.train(folder, gin_files(task, method), given)
                    by_seed[seed] = {name: one[name] for name in KEPT}
                    write(flags.results, flags.steps, found)
    finally:
        report(flags, found)


if __name__ == "__main__":
    main()
