"""A small run made by hand, as `report.json` and `results.json` record it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from ptjax.reports.content import as_json, make_content

EVIL = "<script>alert('x')</script>"
LABELS = ["good", "bad", "$x_1$ so-so"]
# (target, prediction, probability): what the tests compute by hand.
PREDICTIONS = [
    ("good", "good", 0.95),
    ("good", "good", 0.85),
    ("good", "bad", 0.95),
    ("bad", "bad", 0.55),
    ("bad", "good", 0.55),
    ("$x_1$ so-so", EVIL, 0.35),
    ("$x_1$ so-so", "$x_1$ so-so", 0.35),
    ("good", "good", 0.85),
]
RESULTS: dict[str, Any] = {
    "task": f"words {EVIL}",
    "split": "test",
    "metric": "accuracy",
    "value": 0.625,
    "metrics": {"accuracy": 0.625},
    "seed": 3,
    "majority": 0.5,
    "before": 0.25,
    "hard_prompts": {"asked $politely$": 0.375},
    "selected_on": "validation",
    "step": 20,
    "trained_steps": 40,
    "trainable_parameters": 64,
    "frozen_parameters": 1000,
    "settings": {"is": "RunSettings", "method": {"is": "PromptTuning", "length": 4}},
    "backbone": "tiny",
    "fingerprint": "v2:0123",
    "costs": {
        "optimizer_bytes": 272,
        "checkpoint_bytes": 528,
        "flops_per_step": 13_790_543_872,
        "step_bytes": 166_264_832,
        "export_bytes": 999_500,
        "examples_per_second": 1234.56,
    },
    "seconds": 75.2,
    "versions": {"ptjax": "0.1.0", "jax": "0.10.2"},
}
ROWS: list[dict[str, Any]] = [
    {"step": 10, "train/loss": 2.0, "train/learning_rate": 0.3, "validation/accuracy": 0.5},
    {"step": 20, "train/loss": 1.0, "train/learning_rate": 0.3, "validation/accuracy": 0.75},
    {"step": 40, "train/loss": 0.5, "train/learning_rate": 0.3, "validation/accuracy": 0.625},
]


def make_record(**changes: Any) -> dict[str, Any]:
    """What `record_predictions` returns for `PREDICTIONS`, with `changes`."""
    targets, predictions, confidences = map(list, zip(*PREDICTIONS, strict=True))
    wrong = [row for row in PREDICTIONS if row[0] != row[1]]
    return {
        "labels": list(LABELS),
        "ranked": True,
        "targets": targets,
        "predictions": predictions,
        "confidences": confidences,
        "measured_by": None,
        "mistakes": [
            {
                "inputs": f"text {EVIL} \x00 of $\\frac{{a}}$",
                "target": target,
                "prediction": prediction,
                "confidence": confidence,
                "value": None,
            }
            for target, prediction, confidence in sorted(wrong, key=lambda row: -row[2])
        ],
        "prompt_rows": [[["\u2581good", 0.91], [EVIL, 0.5], ["$a$", 0.25]]] * 40,
        **changes,
    }


def make_sweep(count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results and records of a sweep; its best member of the validation split is the first."""
    shared = {"settings", "backbone", "costs", "seconds", "versions", "trained_steps"}
    own = {name: x for name, x in RESULTS.items() if name not in shared}
    members = {f"seed_{i}": own | {"value": 0.625 + i / 100, "seed": i} for i in range(count)}
    results = {name: RESULTS[name] for name in sorted(shared)}
    results |= {"members": members, "best": {"member": "seed_0", "value": 0.625}, "failed": []}
    return results, {name: make_record() for name in members}


def save_run(
    folder: Path,
    records: dict[str, Any] | None = None,
    results: dict[str, Any] | None = None,
    rows: list[dict[str, Any]] = ROWS,
) -> Path:
    """Writes what `tune` writes of a finished run; without `records` as older versions did."""
    folder.mkdir(parents=True, exist_ok=True)
    results = copy.deepcopy(RESULTS if results is None else results)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if records is not None:
        (folder / "report.json").write_text(as_json(make_content(results, records)))
    return folder
