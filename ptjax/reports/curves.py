"""Curves from the rows of `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Sequence

from ptjax.files import JsonObject
from ptjax.reports.content import Member
from ptjax.reports.figures import OTHERS, Series, curves
from ptjax.reports.markup import tag

MOST = 1 + len(OTHERS)
"""The number of curves in a figure."""
_TITLES = {"train/loss": "Training loss", "train/learning_rate": "Learning rate"}


def series_of(rows: Sequence[JsonObject], metric: str, member: str = "", name: str = "") -> Series:
    """Collects a metric by step.

    Args:
        metric: the name of the values in `metrics.jsonl`, such as "train/loss".
        member: of a sweep; "" is an ordinary run.
        name: what a legend shows.
    """
    key = f"{metric}/{member}" if member else metric
    points = {row["step"]: float(row[key]) for row in rows if isinstance(row.get(key), int | float)}
    return Series(name, list(points), list(points.values()))


def training_figures(runs: Sequence[tuple[str, Sequence[JsonObject], Member]], of: str = "") -> str:
    """Draws validation metric, loss and learning rate by step; "" without any values.

    Args:
        runs: the name, the rows of `metrics.jsonl` and the member of each curve.
        of: what the curves are of, where a page has more than one such row of figures.
    """
    figures = []
    metric = runs[0][2].results.get("metric")
    for key, title in {f"validation/{metric}": f"Validation {metric}", **_TITLES}.items():
        series = [series_of(rows, key, m.name, name) for name, rows, m in runs[:MOST]]
        series = [each for each in series if each.steps]
        if not series:
            continue
        best = None
        if len(runs) == 1 and key.startswith("validation/"):
            values = dict(zip(series[0].steps, series[0].values, strict=True))
            step = runs[0][2].results.get("step")
            best = (step, values[step]) if step in values else None
        heading = tag("figcaption", tag("strong", title))
        zero = key == "train/learning_rate"
        drawn = curves(f"{title}{of} by step", series, best, from_zero=zero)
        figures.append(tag("figure", heading + drawn))
    return tag("div", "\n".join(figures), "grid") if figures else ""
