"""Computes statistics of recorded predictions with scikit-learn: classes, confusion, calibration.

A record is what `evaluation.record.record_predictions` returns. Texts are compared without outer
white space, as in `data.metrics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ptjax.errors import needs
from ptjax.files import JsonObject

BINS = 10
"""The number of equally wide bins of confidence in a reliability diagram."""
OTHER = "other text"
"""The column of a confusion matrix for predictions that are not labels."""


def statistics_of(record: JsonObject) -> JsonObject:
    """Computes the statistics of a record of N predictions.

    Returns:
        "accuracy" and its "standard_error"; "classes" and "averages" (see `class_scores`) and
        "confusion" (see `confusion`), both None for open text; "calibration" (see `calibrate`),
        None unless labels were ranked.
    """
    targets, predictions = (
        [text.strip() for text in record[name]] for name in ("targets", "predictions")
    )
    right = np.array([p == t for p, t in zip(predictions, targets, strict=True)])
    accuracy = float(right.mean())
    labels = record["labels"] and [label.strip() for label in record["labels"]]
    closed = labels is not None
    classes, averages = class_scores(targets, predictions, labels) if closed else (None, None)
    confidences = record["confidences"] if record["ranked"] else None
    return {
        "accuracy": accuracy,
        "standard_error": float(np.sqrt(accuracy * (1 - accuracy) / len(right))),
        "classes": classes,
        "averages": averages,
        "confusion": confusion(targets, predictions, labels) if closed else None,
        "calibration": None if confidences is None else calibrate(right, confidences),
    }


def class_scores(
    targets: Sequence[str], predictions: Sequence[str], labels: Sequence[str]
) -> tuple[list[JsonObject], list[JsonObject]]:
    """Computes precision, recall and F1 of each label; what is undefined is 0.

    Returns:
        a row for each label ("label", "precision", "recall", "f1", and "support", the number of
        examples with this target), and rows for the averages over labels: "macro" (unweighted) and
        "weighted" (by support).
    """
    with needs("report", "a report"):
        from sklearn.metrics import precision_recall_fscore_support  # slow to import

    zero: Any = 0.0  # its annotation knows only the default, 'warn'

    def compute(average: Any) -> Any:
        return precision_recall_fscore_support(
            targets, predictions, labels=list(labels), average=average, zero_division=zero
        )

    *columns, supports = compute(None)
    rows = [
        _row(label, values, support)
        for label, *values, support in zip(labels, *columns, supports, strict=True)
    ]
    total = sum(row["support"] for row in rows)
    return rows, [_row(name, compute(name)[:3], total) for name in ("macro", "weighted")]


def _row(label: str, values: Sequence[float], support: int) -> JsonObject:
    """A row; `values` are precision, recall and F1."""
    floats = map(float, values)
    named = dict(zip(("precision", "recall", "f1"), floats, strict=True))
    return {"label": label, **named, "support": int(support)}


def confusion(
    targets: Sequence[str], predictions: Sequence[str], labels: Sequence[str]
) -> JsonObject:
    """Counts the examples of each target and prediction.

    Returns:
        "rows", the labels; "columns", the labels and `OTHER` if there are predictions that are not
        labels; "counts", a row for each target with the number of each prediction.
    """
    with needs("report", "a report"):
        from sklearn.metrics import confusion_matrix  # slow to import

    ids = {label: number for number, label in enumerate(labels)}
    count = len(labels)
    given, wanted = ([ids.get(text, count) for text in texts] for texts in (predictions, targets))
    counts = confusion_matrix(wanted, given, labels=list(range(count + 1)))[:count]
    columns = [*labels, OTHER] if counts[:, count].any() else list(labels)
    return {
        "rows": list(labels),
        "columns": columns,
        "counts": counts[:, : len(columns)].tolist(),
    }


def calibrate(right: np.ndarray, confidences: Sequence[float]) -> JsonObject:
    """Compares the probability of predictions with the share of right ones, in `BINS` bins.

    Args:
        right: bool [N], whether each prediction is right.
        confidences: [N], the probability of each prediction.

    Returns:
        "bins", those with examples: "low", "high", "count", the mean "confidence", the share of
        right ones ("accuracy"); "ece", the expected calibration error: the mean over examples of
        the distance between the two in their bin (Guo et al. 2017); "confidence", the mean.
    """
    with needs("report", "a report"):
        from sklearn.calibration import calibration_curve  # slow to import

    given = np.clip(np.asarray(confidences, np.float64), 0, 1)
    shares, means = calibration_curve(right.astype(int), given, n_bins=BINS, pos_label=1)
    edges = np.linspace(0, 1, BINS + 1)
    counts = np.bincount(np.searchsorted(edges[1:-1], given), minlength=BINS)
    filled = np.flatnonzero(counts)
    distances = np.abs(shares - means)
    return {
        "bins": [
            {
                "low": float(edges[i]),
                "high": float(edges[i + 1]),
                "count": int(counts[i]),
                "confidence": float(mean),
                "accuracy": float(share),
            }
            for i, mean, share in zip(filled, means, shares, strict=True)
        ],
        "ece": float(np.sum(distances * counts[filled]) / len(given)),
        "confidence": float(given.mean()),
    }
