"""A comparison of the runs in several folders, as text and as a page."""

from __future__ import annotations

from collections.abc import Sequence

from ptjax.files import JsonObject
from ptjax.reports.content import Member
from ptjax.reports.costs import COSTS, costs_of
from ptjax.reports.curves import training_figures
from ptjax.reports.markup import (
    columns,
    escape,
    flat,
    meter,
    number,
    shorten,
    table,
    tag,
)
from ptjax.reports.members import ece, macro_f1, unique_names, value_of, values_figure
from ptjax.reports.wording import compared

Run = tuple[str, JsonObject, list[Member], Sequence[JsonObject]]
"""A run's folder, the content of `results.json`, its members and the rows of `metrics.jsonl`."""

_HEAD = ("run", "task", "split", "metric", "value", "best baseline", "macro F1", "ECE")
_HEAD += ("best step",)
_TEXTS = 4


def comparison_text(runs: Sequence[Run]) -> str:
    """Formats tables with a line for each run, and the settings in which they differ."""
    text = columns([_HEAD, *(list(map(_plain, row)) for row in _cells(runs))], texts=_TEXTS)
    if costs := _costs(runs):
        text += "\n\n" + columns(costs)
    if differences := _differences(runs):
        names = _names(runs)
        rows = [["setting", *names]] + [
            [name, *(shorten(value, 30) for value in values)] for name, values in differences
        ]
        text += "\n\n" + columns(rows, texts=1 + len(names))
    return text + "\n"


def comparison_page(runs: Sequence[Run]) -> str:
    """Returns the body of the page that compares runs, HTML."""
    names = _names(runs)
    best = [members[0] for _, _, members, _ in runs]
    title = tag("h1", escape(f"{len(runs)} runs compared"))
    tasks = ", ".join(dict.fromkeys(str(member.results.get("task")) for member in best))
    parts = [tag("header", tag("p", escape(tasks), "over") + title)]
    metrics = {tuple(map(m.results.get, ("task", "split", "metric"))) for m in best}
    cells = [[escape(cell) for cell in row] for row in _cells(runs)]
    first = tag("h2", "Scores")
    if len(metrics) > 1:
        warning = "These runs have different tasks, splits or metrics: compare with care."
        first += tag("p", warning, "note")
    values = {
        name: float(member.results["value"]) for name, member in zip(names, best, strict=True)
    }
    parts.append(
        tag(
            "section",
            first
            + values_figure(values, max(values, key=lambda name: values[name]))
            + table(_HEAD, cells, texts=_TEXTS),
        )
    )
    if costs := _costs(runs):
        head, *rows = costs
        cells = [[*map(escape, row)] for row in rows]
        parts.append(tag("section", tag("h2", "Costs") + table(head, cells)))
    drawn = training_figures(
        [(name, rows, members[0]) for name, (_, _, members, rows) in zip(names, runs, strict=True)]
    )
    if drawn:
        parts.append(tag("section", tag("h2", "Training") + drawn))
    parts += [_classes(names, best), _settings(names, runs)]
    return "\n".join(filter(None, parts))


def _names(runs: Sequence[Run]) -> list[str]:
    names = unique_names([path for path, *_ in runs])
    return [
        name + (f" \u203a {members[0].name}" if members[0].name else "")
        for name, (_, _, members, _) in zip(names, runs, strict=True)
    ]


def _cells(runs: Sequence[Run]) -> list[list[str]]:
    """The cells of the table, as text."""
    rows = []
    for name, (_, results, members, _) in zip(_names(runs), runs, strict=True):
        best = members[0]
        baselines = list(compared(best, results).values())[1:]
        rows.append(
            [
                name,
                *(str(best.results.get(key)) for key in ("task", "split", "metric")),
                value_of(best),
                number(max(baselines, default=None)),
                *map(number, (macro_f1(best), ece(best), best.results.get("step"))),
            ]
        )
    return rows


def _costs(runs: Sequence[Run]) -> list[list[str]]:
    """A row of titles and a row for each run, as text; [] if no run has recorded a cost."""
    costs = [costs_of(results) for _, results, *_ in runs]
    titles = [title for title, _ in COSTS.values() if any(title in each for each in costs)]
    rows = [
        [name, *(each.get(title, "\u2013") for title in titles)]
        for name, each in zip(_names(runs), costs, strict=True)
    ]
    return [["run", *titles], *rows] if titles else []


def _plain(cell: str) -> str:
    return shorten(cell, 40)


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings in which the runs differ, the backbone and the seed among them."""
    flattened = []
    for _, results, members, _ in runs:
        settings = results.get("settings")
        own = flat(settings) if isinstance(settings, dict) else {}
        own |= {"backbone": results.get("backbone"), "seed": members[0].results.get("seed")}
        flattened.append(own)
    names = dict.fromkeys(name for each in flattened for name in each)
    differences = []
    for name in names:
        values = ["\u2013" if each.get(name) is None else str(each[name]) for each in flattened]
        if len(set(values)) > 1:
            differences.append((name, values))
    return differences


def _classes(names: Sequence[str], best: Sequence[Member]) -> str:
    """The F1 of each class in every run, if all have the same classes."""
    rows = [member.statistics["classes"] if member.statistics else None for member in best]
    labels = [tuple(row["label"] for row in each) if each else () for each in rows]
    if len(set(labels)) > 1 or not labels[0]:
        return ""
    cells = [
        [tag("span", escape(label), "label"), *(meter(each[i]["f1"]) for each in rows if each)]
        for i, label in enumerate(labels[0])
    ]
    return tag("section", tag("h2", "F1 per class") + table(["class", *names], cells, "classes"))


def _settings(names: Sequence[str], runs: Sequence[Run]) -> str:
    cells = [[escape(name), *map(escape, values)] for name, values in _differences(runs)]
    if not cells:
        return ""
    html = table(["setting", *names], cells, texts=1 + len(names))
    return tag("section", tag("h2", "Settings that differ") + html)
