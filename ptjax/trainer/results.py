"""Computes the content of `results.json`, and the records for `report.json`."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping

from ptjax.backbones.load import Backbone
from ptjax.data.hard_prompt import HardPrompt
from ptjax.evaluation.record import nearest_to_rows, record_predictions
from ptjax.files import JsonObject
from ptjax.settings import RunSettings
from ptjax.trainer.identity import describe, versions
from ptjax.trainer.loop import TrainingLoop
from ptjax.trainer.task_data import TaskData
from ptjax.trees import Tree


class Scores:
    """Scores tuned variables on one task, and baselines to compare them with, for `results.json`.

    The baselines are: always the majority label, the variables before training, and the hard
    prompts of the settings. All scores are on the test split or, if the task has none, on the split
    that selects exports.
    """

    def __init__(self, backbone: Backbone, settings: RunSettings, data: TaskData) -> None:
        self.evaluator, self.train = data.evaluator, data.train
        self.backbone, self.settings = backbone, settings
        self.metric = self.evaluator.metric
        self.split = self.evaluator.reported_split
        self._hard_prompt = functools.cache(self._score_hard_prompt)

    def _counts(self) -> dict[str, int]:
        """The number of examples in each split that the run uses."""
        splits = (self.evaluator.settings.split, self.split)
        return {"train": len(self.train)} | {s: len(self.evaluator.examples(s)) for s in splits}

    def _score_hard_prompt(self, hard_prompt: HardPrompt) -> dict[str, float]:
        rewording = hard_prompt.rewording(self.train, self.settings.seed)
        return self.evaluator(self.backbone.variables, self.split, rewording)

    def tuned(self, best: Tree, before: Tree, seed: int) -> tuple[JsonObject, JsonObject]:
        """Scores a member and the baselines.

        Returns the member's parts of `results.json` and of `report.json`.

        Args:
            best: all variables of the network, the trained ones from the member's best export.
            before: all variables of the network as they were at step 0, before training.
            seed: the member's seed. It is copied to the result and has no other effect.
        """
        task, hard_prompts = self.evaluator.task, self.settings.evaluation.hard_prompts
        before_value = self.evaluator(before, self.split)[self.metric]
        predictions, scores = self.evaluator.predict_with_scores(best, self.split)
        metrics = self.evaluator.score(predictions, self.split)
        record = record_predictions(self.evaluator, self.split, predictions, scores)
        record["prompt_rows"] = nearest_to_rows(self.backbone, best.get("prompt", {}).get("prompt"))
        results = {
            "task": task.name,
            "split": self.split,
            "metric": self.metric,
            "value": metrics[self.metric],
            "metrics": metrics,
            **({} if task.positive is None else {"positive_label": task.positive}),
            "seed": seed,
            "majority": self.evaluator.majority(self.train, self.split),
            "before": before_value,
            "hard_prompts": {
                name: self._hard_prompt(hard_prompt)[self.metric]
                for name, hard_prompt in hard_prompts.items()
            },
            "selected_on": self.evaluator.settings.split,
            "examples": self._counts(),
        }
        return results, record


def describe_run(backbone: Backbone, settings: RunSettings, seconds: float) -> JsonObject:
    """Returns the part of `results.json` that records how the scores were obtained.

    It has the settings, the backbone's name and fingerprint, the duration, and the versions of the
    libraries.

    Args:
        seconds: the duration of the run, summed over its restarts.
    """
    return {
        "settings": describe(settings, whole=True),
        "backbone": backbone.name,
        "fingerprint": backbone.fingerprint,
        "seconds": round(seconds, 3),
        "versions": versions(),
    }


def of_sweep(members: Mapping[str, JsonObject], run: TrainingLoop) -> JsonObject:
    """Combines the members' results into those of a sweep, for `results.json`.

    Args:
        members: maps the name of each member with an export to its results (`Scores.tuned`).
        run: the finished run.

    Returns:
        "members" as given; "average", the mean of their "value"; "best", the name and value of the
        member with the highest validation (not test) score; "failed", the names of failed members.
    """
    progress = dict(zip((m.name for m in run.members), run.progress.members, strict=True))
    best = max(members, key=lambda name: progress[name].best_value or 0.0)
    return {
        "members": dict(members),
        "average": statistics.fmean(results["value"] for results in members.values()),
        "best": {"member": best, "value": members[best]["value"]},
        "failed": [name for name, member in progress.items() if member.failed],
    }
