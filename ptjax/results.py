"""The numbers of `results.json`."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping
from typing import Any

from ptjax.backbone import Backbone
from ptjax.errors import InputError
from ptjax.evaluation import HardPrompt
from ptjax.loop import Run
from ptjax.preparation import Subject

Tree = Any


class Scores:
    """The numbers of `results.json`, on the test split or else on the one selected on."""

    def __init__(
        self,
        backbone: Backbone,
        seed: int,
        hard_prompt: HardPrompt | None,
        others: Mapping[str, HardPrompt],
        subject: Subject,
    ) -> None:
        self.evaluator, self.train = subject.evaluator, subject.train
        self.backbone, self.seed = backbone, seed
        self.main, self.others = hard_prompt, others
        self.metric = self.evaluator.metric
        self.selected_on = self.evaluator.settings.split
        self.split = self.evaluator.reported_split
        self._hard_prompt = functools.cache(self._score_hard_prompt)

    def _score_hard_prompt(self, hard_prompt: HardPrompt) -> dict[str, float]:
        rewording = hard_prompt.rewording(self.train, self.seed)
        return self.evaluator(self.backbone.variables, self.split, rewording)

    def tuned(self, best: Tree, before: Tree, seed: int) -> dict[str, Any]:
        """Of variables with the best prompt, and with the prompt that it started from."""
        hard = None if self.main is None else self._hard_prompt(self.main)[self.metric]
        before_value = self.evaluator(before, self.split)[self.metric]
        return self._results(self.evaluator(best, self.split), before_value, hard, seed)

    def hard_prompt_only(self) -> dict[str, Any]:
        if self.main is None:
            raise InputError("method 'hard_prompt' needs a text: set tune.hard_prompt")
        metrics = self._hard_prompt(self.main)
        return self._results(metrics, None, metrics[self.metric], self.seed) | {"step": 0}

    def _results(
        self, metrics: dict[str, float], before: float | None, hard: float | None, seed: int
    ) -> dict[str, Any]:
        task = self.evaluator.task
        return {
            "task": task.name,
            "split": self.split,
            "metric": self.metric,
            "value": metrics[self.metric],
            "metrics": metrics,
            **({} if task.positive is None else {"positive_label": task.positive}),
            "seed": seed,
            "majority": self.evaluator.majority(self.train, self.split),
            "before": before,
            "hard_prompt": hard,
            "other_hard_prompts": {
                name: self._hard_prompt(other)[self.metric] for name, other in self.others.items()
            },
            "selected_on": self.selected_on,
        }


def of_bank(members: Mapping[str, dict[str, Any]], run: Run) -> dict[str, Any]:
    """The results of a bank: each member's, their average, and the best.

    The best is the one that was best on the split that selects, whatever the test says.
    """
    standings = dict(zip((m.name for m in run.members), run.progress.standings, strict=True))
    best = max(members, key=lambda name: standings[name].best_value or 0.0)
    return {
        "members": dict(members),
        "average": statistics.fmean(results["value"] for results in members.values()),
        "best": {"member": best, "value": members[best]["value"]},
        "failed": [name for name, standing in standings.items() if standing.failed],
    }
