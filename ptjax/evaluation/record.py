"""Records the predictions for a split, with the worst of them: the data of a report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike

from ptjax.backbones.describe import nearest_tokens
from ptjax.backbones.load import Backbone
from ptjax.data.metrics import as_number
from ptjax.evaluation.evaluator import Evaluator
from ptjax.files import JsonObject
from ptjax.inference.labels import label_probabilities
from ptjax.sharding import processes

MISTAKES = 20
"""The number of mistakes whose texts are recorded."""
LONGEST_TEXT = 2000
"""Characters of an input that are recorded."""
_DISTANCES = ("pearson", "spearman")
"""Metrics that are undefined for a single example: their mistakes are the most distant numbers."""


def record_predictions(
    evaluator: Evaluator,
    split: str,
    predictions: Sequence[str],
    scores: np.ndarray | None = None,
) -> JsonObject:
    """Collects what a report says of the predictions for a split, as JSON values.

    Args:
        predictions: a text for each of the N examples of `split`.
        scores: the log-likelihoods that `Evaluator.predict_with_scores` returns; None if unknown.

    Returns:
        "labels" of the task, None for open text; "targets" and "predictions", texts [N];
        "confidences" [N], the probability of each prediction (None if unknown); "ranked", whether
        that is its share among the labels, or False for the probability of a generated text;
        "mistakes": the `MISTAKES` worst wrong predictions, the most confident first. For open text
        the lowest value of the task's metric comes first, and "measured_by" is its name.
    """
    examples, labels = evaluator.examples(split), evaluator.task.labels
    targets = [example.targets for example in examples]
    confidences = None if scores is None else _confidences(scores, ranked=evaluator.ranks)
    measured_by = None if labels is not None else evaluator.task.metrics[0]
    values = _values(evaluator, split, predictions, measured_by)
    order = np.lexsort((-np.asarray(confidences or [0.0] * len(targets)), values))
    wrong = [int(i) for i in order if values[i] < 1][:MISTAKES]
    return {
        "labels": None if labels is None else list(labels),
        "ranked": evaluator.ranks,
        "targets": targets,
        "predictions": list(predictions),
        "confidences": confidences,
        "measured_by": measured_by,
        "mistakes": [
            {
                "inputs": examples[i].inputs[:LONGEST_TEXT],
                "target": targets[i],
                "prediction": predictions[i],
                "confidence": None if confidences is None else confidences[i],
                "value": None if measured_by is None else float(values[i]),
            }
            for i in wrong
        ],
    }


def nearest_to_rows(
    backbone: Backbone, prompt: ArrayLike | None
) -> list[list[tuple[str, float]]] | None:
    """Finds the tokens nearest to each row of a prompt, with their cosine; see `nearest_tokens`.

    If a run has several processes, all of them must call it.

    Args:
        prompt: [P, D]; None gives None.
    """
    if prompt is None:
        return None
    rows, embedding = (
        processes.on_host(array).astype(np.float32) for array in (prompt, backbone.embedding)
    )
    nearest = nearest_tokens(rows, embedding, backbone.tokenizer)
    return [[(token, round(cosine, 4)) for token, cosine in row] for row in nearest]


def _confidences(scores: np.ndarray, *, ranked: bool) -> list[float]:
    """The probability of each prediction, rounded to what float32 scores can tell."""
    shares = label_probabilities(scores).max(axis=1) if ranked else np.exp(scores.astype(float))
    return [round(float(share), 6) for share in shares]


def _values(
    evaluator: Evaluator, split: str, predictions: Sequence[str], metric: str | None
) -> np.ndarray:
    """How good each prediction is, [N]: 1 is right. Without a metric, 1 or 0."""
    pairs = list(zip(predictions, evaluator.examples(split), strict=True))
    if metric is None:
        return np.array([float(p.strip() == x.targets.strip()) for p, x in pairs])
    if metric not in _DISTANCES:
        return np.array([evaluator.task.evaluate([p], [x])[metric] for p, x in pairs])
    distances = np.array([abs(as_number(p) - as_number(x.targets)) for p, x in pairs])
    return np.where(distances > 0, -distances, 1.0)
