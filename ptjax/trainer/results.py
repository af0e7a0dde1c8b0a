"""Computes the content of `results.json`."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping

from ptjax.backbones.load import Backbone
from ptjax.data.hard_prompt import HardPrompt
from ptjax.files import JsonObject
from ptjax.settings import RunSettings
from ptjax.trainer.identity import describe, versions
from ptjax.trainer.loop import TrainingLoop
from ptjax.trainer.task_data import TaskData
from ptjax.trees import Tree


class Scores:
    """Scores the variables and baselines of a task for `results.json`.

    All scores are on the test split or, if the task has none, on the split that selects.
    """

    def __init__(self, backbone: Backbone, settings: RunSettings, data: TaskData) -> None:
        self.evaluator, self.train = data.evaluator, data.train
        self.backbone, self.settings = backbone, settings
        self.metric = self.evaluator.metric
        self.split = self.evaluator.reported_split
        self._hard_prompt = functools.cache(self._score_hard_prompt)

    def _score_hard_prompt(self, hard_prompt: HardPrompt) -> dict[str, float]:
        rewording = hard_prompt.rewording(self.train, self.settings.seed)
        return self.evaluator(self.backbone.variables, self.split, rewording)

    def tuned(self, best: Tree, before: Tree, seed: int) -> JsonObject:
        """Scores a member; returns its part of `results.json`, the baselines included.

        Args:
            best: the backbone's variables, with the trained ones of the best export.
            before: the backbone's variables, with the member's own as they were at step 0.
            seed: the member's seed, which is only recorded.
        """
        task, hard_prompts = self.evaluator.task, self.settings.evaluation.hard_prompts
        before_value = self.evaluator(before, self.split)[self.metric]
        metrics = self.evaluator(best, self.split)
        return {
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
        }


def describe_run(backbone: Backbone, settings: RunSettings, seconds: float) -> JsonObject:
    """The part of `results.json` that records how the scores were obtained.

    These are the settings, the backbone, the duration in seconds and the library versions.
    """
    return {
        "settings": describe(settings, whole=True),
        "backbone": backbone.name,
        "fingerprint": backbone.fingerprint,
        "seconds": round(seconds, 3),
        "versions": versions(),
    }


def of_sweep(members: Mapping[str, JsonObject], run: TrainingLoop) -> JsonObject:
    """The results of a sweep: each member's, their average, the best member, and failed members.

    The best member is selected on the validation split, not on the test split.

    Args:
        members: by name, the results (`Scores.tuned`) of the members that have an export.
        run: the finished run.
    """
    progress = dict(zip((m.name for m in run.members), run.progress.members, strict=True))
    best = max(members, key=lambda name: progress[name].best_value or 0.0)
    return {
        "members": dict(members),
        "average": statistics.fmean(results["value"] for results in members.values()),
        "best": {"member": best, "value": members[best]["value"]},
        "failed": [name for name, member in progress.items() if member.failed],
    }
