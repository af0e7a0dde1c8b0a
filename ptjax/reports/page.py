"""The page about one run, as HTML."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence

from ptjax.files import JsonObject
from ptjax.reports import figures
from ptjax.reports.content import Member
from ptjax.reports.costs import costs_of
from ptjax.reports.curves import training_figures
from ptjax.reports.markup import (
    definitions,
    escape,
    flat,
    meter,
    number,
    shorten,
    table,
    tag,
)
from ptjax.reports.members import members_section
from ptjax.reports.wording import compared, error_of, how_to_add, names_of, scored_on, tendency

_SHOWN_ROWS = 30
"""The number of prompt rows shown at first; the others are folded."""
_BESIDE = 8
"""The columns of a confusion matrix up to which the calibration is beside it."""


def page_of(
    path: str, results: JsonObject, members: Sequence[Member], rows: Sequence[JsonObject]
) -> str:
    """Returns the body of a page, HTML.

    Args:
        path: the run's folder.
        results: the content of `results.json`.
        members: the best one first, as from `members_of`.
        rows: the rows of `metrics.jsonl`.
    """
    best = members[0]
    sections = [_header(path, results, best), _tiles(results, best)]
    if best.record is None:
        text = tag("h2", "Predictions are missing") + tag("p", escape(how_to_add(path)), "lead")
        sections.append(tag("section", text, "missing"))
    if len(members) > 1:
        sections.append(members_section(members, rows))
    sections.append(_training(best, rows, whole=len(members) == 1))
    sections += [_classes(best), _confusion_and_calibration(best), _mistakes(best)]
    sections += [_prompt_rows(best), _costs(results), _settings(results), _footer(results)]
    return "\n".join(filter(None, sections))


def _header(path: str, results: JsonObject, best: Member) -> str:
    tuned, _ = names_of(results)
    name = posixpath.basename(str(path).rstrip("/")) or str(path)
    over = name + (f" \u203a {best.name}" if best.name else "")
    title = f"{best.results.get('task')}: {tuned}"
    lead = f"{scored_on(best)}. Backbone {results.get('backbone')}."
    return tag(
        "header",
        tag("p", escape(over), "over") + tag("h1", escape(title)) + tag("p", escape(lead), "lead"),
    )


def _tiles(results: JsonObject, best: Member) -> str:
    """The numbers to see first, and the figure of the baselines."""
    values, own = compared(best, results), best.results
    (name, value), *baselines = values.items()
    error = error_of(best)
    shown = [
        (f"{own.get('metric')}, {name}", number(value), "first"),
        *((f"best baseline: {n}", number(x), "") for n, x in _highest(baselines)),
    ]
    if error is not None:
        shown.insert(1, ("standard error", f"\u00b1 {number(error)}", ""))
    if best.statistics is not None and best.statistics["averages"]:
        shown.append(("macro F1", number(best.statistics["averages"][0]["f1"]), ""))
    if best.statistics is not None and best.statistics["calibration"] is not None:
        ece = best.statistics["calibration"]["ece"]
        shown.append(("calibration error (ECE)", number(ece), ""))
    if own.get("step") is not None:
        of = results.get("trained_steps")
        shown.append(("best step" + (f" of {number(of)}" if of else ""), number(own["step"]), ""))
    tiles = "\n".join(
        tag("div", tag("strong", escape(x)) + tag("span", escape(n)), f"tile {class_}".strip())
        for n, x, class_ in shown
    )
    html = tag("div", tiles, "tiles")
    if baselines:
        label = f"{own.get('metric')} beside its baselines"
        figure = tag("figure", figures.bars(label, values, name), "wide")
        html += tag("section", tag("h2", "Against the baselines") + figure)
    return html


def _highest(values: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    return [max(values, key=lambda pair: pair[1])] if values else []


def _training(best: Member, rows: Sequence[JsonObject], *, whole: bool) -> str:
    drawn = training_figures([("", rows, best)])
    if not drawn:
        return ""
    of = "" if whole else f" of {best.name}"
    split = best.results.get("selected_on")
    text = f"The step with the highest value on the split {split} is kept." if split else ""
    return tag(
        "section", tag("h2", escape(f"Training{of}")) + tag("p", escape(text), "note") + drawn
    )


def _classes(member: Member) -> str:
    if member.statistics is None or not member.statistics["classes"]:
        return ""

    def cells(row: JsonObject, name: str) -> list[str]:
        return [name, *(meter(row[key]) for key in ("precision", "recall", "f1"))]

    rows = [
        [*cells(row, tag("span", escape(row["label"]), "label")), number(row["support"])]
        for row in member.statistics["classes"]
    ]
    for row in member.statistics["averages"]:
        name = tag("span", escape(f"{row['label']} average"), "average")
        rows.append([*cells(row, name), number(row["support"])])
    head = ["class", "precision", "recall", "F1", "support"]
    return tag("section", tag("h2", "Per class") + table(head, rows, "classes"))


def _confusion_and_calibration(member: Member) -> str:
    statistics = member.statistics
    if statistics is None or not statistics["confusion"]:
        return ""
    confusion = figures.confusion("Confusion matrix", statistics["confusion"])
    note = tag("p", "Each row is shaded by its shares.", "note")
    parts = [tag("section", tag("h2", "Confusion") + note + tag("figure", confusion))]
    if (calibration := statistics["calibration"]) is not None:
        text = f"Expected calibration error {number(calibration['ece'])}. "
        text += tendency(calibration, statistics["accuracy"])
        drawn = figures.reliability("Reliability diagram", calibration)
        parts.append(
            tag(
                "section",
                tag("h2", "Calibration") + tag("p", escape(text), "note") + tag("figure", drawn),
            )
        )
    beside = len(statistics["confusion"]["columns"]) <= _BESIDE
    return tag("div", "\n".join(parts), "pair") if beside else "\n".join(parts)


def _mistakes(member: Member) -> str:
    if member.record is None:
        return ""
    mistakes, measured_by = member.record["mistakes"], member.record.get("measured_by")
    title = "Worst predictions" if measured_by else "Most confident mistakes"
    if not mistakes:
        return tag("section", tag("h2", title) + tag("p", "Every prediction is right.", "note"))
    head = ["input", "expected", "predicted", *([measured_by] if measured_by else [])]
    known = member.record["confidences"] is not None
    rows = []
    for mistake in mistakes:
        row = [
            tag("div", escape(mistake["inputs"]), "text"),
            tag("span", escape(mistake["target"]), "label right"),
            tag("span", escape(mistake["prediction"]), "label wrong"),
        ]
        row += [number(mistake["value"])] if measured_by else []
        rows.append(row + ([number(mistake["confidence"])] if known else []))
    note = f"The first {len(mistakes)}: " if measured_by else f"{len(mistakes)} wrong predictions, "
    note += f"lowest {measured_by} first." if measured_by else "highest probability first."
    html = table([*head, *(["probability"] if known else [])], rows, texts=3)
    return tag("section", tag("h2", title) + tag("p", escape(note), "note") + html)


def _prompt_rows(member: Member) -> str:
    rows = (member.record or {}).get("prompt_rows")
    if not rows:
        return ""

    def item(index: int, row: Sequence[tuple[str, float]]) -> str:
        tokens = (
            tag("span", f"{_piece(token)} " + tag("small", f"{float(cosine):.2f}"))
            for token, cosine in row
        )
        return tag("li", tag("b", str(index)) + " ".join(tokens))

    items = [item(index, row) for index, row in enumerate(rows)]
    html = tag("ol", "\n".join(items[:_SHOWN_ROWS]), "rows")
    if len(items) > _SHOWN_ROWS:
        rest = tag("ol", "\n".join(items[_SHOWN_ROWS:]), "rows")
        html += tag("details", tag("summary", f"{len(items) - _SHOWN_ROWS} more rows") + rest)
    note = "The vocabulary's tokens nearest to each row of the prompt, with their cosine."
    return tag("section", tag("h2", "Prompt rows") + tag("p", note, "note") + html)


def _piece(token: str) -> str:
    """A token; SentencePiece's mark of a word's start is paler."""
    return escape(shorten(token, 24)).replace("\u2581", tag("i", "\u2581"))


def _costs(results: JsonObject) -> str:
    costs = costs_of(results)
    return tag("section", tag("h2", "Costs") + definitions(costs)) if costs else ""


def _settings(results: JsonObject) -> str:
    facts = {
        "backbone": results.get("backbone"),
        "fingerprint": results.get("fingerprint"),
        "frozen parameters": _number(results.get("frozen_parameters")),
        "prompt": results.get("prompt"),
        "hard prompt": results.get("hard_prompt"),
    }
    html = tag("h2", "Run") + definitions(facts)
    if isinstance(versions := results.get("versions"), dict):
        html += tag("h3", "Versions", style="margin-top: 18px") + definitions(versions)
    if isinstance(settings := results.get("settings"), dict):
        values = {
            name.removesuffix(".is"): value
            for name, value in flat(settings).items()
            if name != "is"
        }
        html += tag("h3", "Settings", style="margin-top: 18px") + definitions(values)
    return tag("section", html)


def _number(value: object) -> str | None:
    return None if value is None else number(value)


def _footer(results: JsonObject) -> str:
    version = (results.get("versions") or {}).get("ptjax", "")
    return tag("footer", escape(f"ptjax {version}".strip()))
