"""Checks of `report.json` and `results.json`, which may come from others, before they are shown."""

from __future__ import annotations

import sys

from ptjax.files import JsonObject


def is_sound(content: JsonObject) -> bool:
    """Whether a content has the parts that text and page rely on."""
    results, records = content.get("results"), content.get("members")
    return (
        isinstance(results, dict)
        and _are_results(results)
        and isinstance(records, dict)
        and all(isinstance(each, dict) and _is_record(each) for each in records.values())
    )


def _are_results(results: JsonObject) -> bool:
    """Whether these are the results of a run, or of a sweep with all its members."""
    if not all(isinstance(results.get(x), dict | None) for x in ("settings", "versions", "costs")):
        return False
    if not all(x is None or _is_number(x) for x in (results.get("costs") or {}).values()):
        return False
    if not all(_is_number(results.get(x, 0)) for x in ("seconds", "trainable_parameters")):
        return False
    if "members" not in results:
        return _are_scores(results)
    members, best = results["members"], results.get("best")
    return (
        isinstance(members, dict)
        and all(isinstance(each, dict) and _are_scores(each) for each in members.values())
        and isinstance(best, dict)
        and best.get("member") in members
    )


def _are_scores(scores: JsonObject) -> bool:
    """Whether these are the scores of one prompt."""
    hard = scores.get("hard_prompts", {})
    step = scores.get("step")
    return (
        _is_number(scores.get("value"))
        and all(_is_number(scores.get(name, 0)) for name in ("before", "majority"))
        and isinstance(hard, dict)
        and all(map(_is_number, hard.values()))
        and (step is None or (_is_number(step) and isinstance(step, int)))
    )


def _is_record(record: JsonObject) -> bool:
    """Whether this is what `record_predictions` returns."""
    targets, predictions = record.get("targets"), record.get("predictions")
    labels, confidences = record.get("labels"), record.get("confidences")
    if not (isinstance(targets, list) and isinstance(predictions, list) and targets):
        return False
    if not (_are_texts(targets) and _are_texts(predictions) and len(targets) == len(predictions)):
        return False
    if not isinstance(record.get("ranked"), bool):
        return False
    if confidences is not None and not (
        isinstance(confidences, list)
        and all(map(_is_number, confidences))
        and len(confidences) == len(targets)
    ):
        return False
    if labels is not None and not (_are_texts(labels) and labels):
        return False
    if not isinstance(record.get("measured_by"), str | None):
        return False
    mistakes, rows = record.get("mistakes"), record.get("prompt_rows", [])
    return (
        isinstance(mistakes, list)
        and all(map(_is_mistake, mistakes))
        and (rows is None or (isinstance(rows, list) and all(map(_is_row, rows))))
    )


def _is_mistake(mistake: object) -> bool:
    return (
        isinstance(mistake, dict)
        and all(isinstance(mistake.get(x), str) for x in ("inputs", "target", "prediction"))
        and all(
            mistake.get(x, 0) is None or _is_number(mistake.get(x)) for x in ("confidence", "value")
        )
    )


def _is_row(row: object) -> bool:
    return isinstance(row, list) and all(
        isinstance(pair, list)
        and len(pair) == 2
        and isinstance(pair[0], str)
        and _is_number(pair[1])
        for pair in row
    )


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _is_number(value: object) -> bool:
    """Whether this is a float, or a whole number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) <= sys.float_info.max
