"""A report as plain text, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from ptjax.files import JsonObject
from ptjax.reports.content import Member
from ptjax.reports.costs import costs_of
from ptjax.reports.markup import columns, number, shorten
from ptjax.reports.wording import compared, error_of, how_to_add, scored_on, tendency

_CLASSES = 30
"""The number of classes that have a line."""
_CONFUSED = 12
"""The number of classes up to which a confusion matrix is a table."""


def text_of(path: str, results: JsonObject, members: Sequence[Member]) -> str:
    """Formats a report: scores and costs, and of the best its classes, confusion and calibration.

    Args:
        path: the run's folder.
        results: the content of `results.json`.
        members: the best one first, as from `members_of`.
    """
    best = members[0]
    parts = [f"{best.results.get('task')}: {scored_on(best)}"]
    if len(members) > 1:
        parts.append(_members(members))
        parts.append(f"the best on the validation split, {shorten(best.name, 60)}:")
    parts.append(_scores(best, results))
    if costs := costs_of(results):
        parts.append(columns([*map(list, costs.items())], texts=2))
    if best.record is None or best.statistics is None:
        return "\n\n".join([*parts, how_to_add(path)]) + "\n"
    statistics = best.statistics
    if statistics["classes"]:
        parts.append(_classes(statistics))
        parts.append(_confusion(statistics["confusion"]))
    elif best.record["mistakes"]:
        parts.append(_worst(best.record))
    if (calibration := statistics["calibration"]) is not None:
        text = f"expected calibration error {number(calibration['ece'])}. "
        parts.append(text + tendency(calibration, statistics["accuracy"]))
    return "\n\n".join(parts) + "\n"


def _scores(member: Member, results: JsonObject) -> str:
    """The value with its standard error, the step, and the baselines."""
    rows = [[shorten(name, 60), number(x)] for name, x in compared(member, results).items()]
    if rows and (error := error_of(member)) is not None:
        rows[0][1] += f" \u00b1 {number(error)}"
    if (step := member.results.get("step")) is not None:
        rows.append(["best step", number(step)])
    return columns(rows, texts=2) if rows else ""


def _members(members: Sequence[Member]) -> str:
    rows = [["member", "value", "before", "step"]]
    rows += [
        [shorten(m.name, 40), *(number(m.results.get(x)) for x in ("value", "before", "step"))]
        for m in sorted(members, key=lambda member: -member.results["value"])
    ]
    return columns(rows)


def _classes(statistics: JsonObject) -> str:
    def cells(row: JsonObject, name: str) -> list[str]:
        values = (f"{row[key]:.3f}" for key in ("precision", "recall", "f1"))
        return [shorten(name, 40), *values, number(row["support"])]

    classes = statistics["classes"]
    rows = [["class", "precision", "recall", "F1", "support"]]
    rows += [cells(row, row["label"]) for row in classes[:_CLASSES]]
    if len(classes) > _CLASSES:
        rows.append([f"... {len(classes) - _CLASSES} more", "", "", "", ""])
    rows += [cells(row, f"{row['label']} average") for row in statistics["averages"]]
    return columns(rows)


def _confusion(confusion: JsonObject) -> str:
    names, counts = confusion["columns"], confusion["counts"]
    if len(names) <= _CONFUSED:
        rows = [["expected \\ predicted", *(shorten(name, 14) for name in names)]]
        for name, row in zip(confusion["rows"], counts, strict=True):
            rows.append([shorten(name, 24), *map(number, row)])
        return columns(rows)
    pairs = [
        (count, expected, names[column])
        for expected, row in zip(confusion["rows"], counts, strict=True)
        for column, count in enumerate(row)
        if count and names[column] != expected
    ]
    rows = [["confused most frequently", "with", "times"]]
    for count, expected, predicted in sorted(pairs, key=lambda pair: -pair[0])[:_CONFUSED]:
        rows.append([shorten(expected, 30), shorten(predicted, 30), number(count)])
    return columns(rows, texts=2)


def _worst(record: JsonObject) -> str:
    rows = [["expected", "predicted", str(record["measured_by"])]]
    for mistake in record["mistakes"][:5]:
        texts = (shorten(mistake[name], 40) for name in ("target", "prediction"))
        rows.append([*texts, number(mistake["value"])])
    return "the worst predictions:\n" + columns(rows, texts=2)
