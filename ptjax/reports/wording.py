"""The words for a run's parts that text, page and comparison share."""

from __future__ import annotations

from ptjax.files import JsonObject
from ptjax.reports.content import Member

_PROMPTS = ("PromptTuning", "PTuning", "ResidualPromptTuning", "MultitaskPromptTuning")
_TUNED: dict[str, tuple[str, str]]
_TUNED = dict.fromkeys(_PROMPTS, ("tuned prompt", "untrained prompt"))
_TUNED |= {"ModelTuning": ("tuned model", "the backbone, untuned")}


def names_of(results: JsonObject) -> tuple[str, str]:
    """Returns how to call what was scored, and the same before training."""
    settings = results.get("settings")
    if not isinstance(settings, dict):
        if "hard_prompt" in results:
            return "hard prompt", ""
        tuned = results.get("step") is not None or "members" in results
        return ("prompt" if tuned or results.get("prompt") else "backbone"), ""
    method = str((settings.get("method") or {}).get("is"))
    return _TUNED.get(method, (f"tuned ({method})", "before training"))


def compared(member: Member, results: JsonObject) -> dict[str, float]:
    """Returns the values of what was scored and of its baselines, by name; the scored one first.

    Args:
        results: the content of `results.json`, which has the settings.
    """
    tuned, before = names_of(results)
    own = member.results
    values = {tuned: own.get("value"), before: own.get("before")}
    values["majority label"] = own.get("majority")
    for name, value in (own.get("hard_prompts") or {}).items():
        values[f"hard prompt: {name}"] = value
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def scored_on(member: Member) -> str:
    """Returns "METRIC on the split SPLIT, N examples"."""
    results, record = member.results, member.record
    count = len(record["targets"]) if record else results.get("examples")
    text = f"{results.get('metric')} on the split {results.get('split')}"
    return f"{text}, {count:,} examples" if isinstance(count, int) else text


def error_of(member: Member) -> float | None:
    """Returns the standard error of the member's value; None if it is not an accuracy."""
    if member.statistics is None or member.results.get("metric") != "accuracy":
        return None
    return member.statistics["standard_error"]


def how_to_add(path: str) -> str:
    """Returns what to do about a run whose predictions are not recorded."""
    return (
        "the predictions of this run are not recorded (an older version of ptjax made it); "
        f"python -m ptjax.evaluate --model_dir={path} --report={path} adds them"
    )


def tendency(calibration: JsonObject, accuracy: float) -> str:
    """Returns a sentence on whether probabilities are too high or too low."""
    gap = calibration["confidence"] - accuracy
    if abs(gap) < 0.02:
        return "On average, probabilities match the share of right predictions."
    how = "overconfident: probabilities are" if gap > 0 else "underconfident: probabilities are"
    where = "above" if gap > 0 else "below"
    return f"The model is {how} {abs(gap):.2f} {where} the share of right predictions, on average."
