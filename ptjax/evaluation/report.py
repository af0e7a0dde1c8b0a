"""Writes the report of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping

from etils import epath

from ptjax import files
from ptjax.errors import InputError, check_path
from ptjax.files import JsonObject, Metadata, PathLike
from ptjax.model_dir import ModelDir
from ptjax.reports.content import as_json, make_content
from ptjax.reports.files import write_page

_OF_SPLIT = ("majority", "before", "hard_prompts")
"""Entries of `results.json` that say nothing about another split."""


def check_report(folder: PathLike, *, force: bool = False) -> None:
    """Raises InputError if a report cannot or must not be written to `folder`.

    Args:
        force: whether the report there may be replaced.
    """
    check_path("--report", folder)
    directory = epath.Path(folder).expanduser()
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--report={folder}: it is a file; name a folder")
    if (report := ModelDir(directory).report_data).exists() and not force:
        raise InputError(f"{report} already exists; overwrite it with --force")


def write_report(
    folder: PathLike,
    scores: Metadata,
    records: Mapping[str, JsonObject],
) -> None:
    """Writes `report.json` and, if the libraries for it are installed, `report.html`.

    Args:
        folder: where to; it is created if needed. If it is the folder of the run that made the
            prompts, the run's results add the settings and, of the same split, the baselines.
        scores: the result of `ptjax.evaluate`.
        records: the recorded predictions by the prompt's name; "" if there is only one.
    """
    directory = epath.Path(folder).expanduser()
    trained = ModelDir(directory).read_results() or {}
    results = _results(scores, trained if _made_by(trained, scores) else {})
    content = make_content(results, records)
    files.write_bytes(ModelDir(directory).report_data, as_json(content).encode())
    write_page(directory)


def _made_by(trained: JsonObject, scores: Metadata) -> bool:
    """Whether the scores are of what the run with these results has tuned."""
    if "members" in scores or "members" in trained:
        members = trained.get("members")
        return isinstance(members, dict) and {*members} == {*scores.get("members", ())}
    if trained.get("task") != scores["task"] or "hard_prompt" in scores:
        return False
    settings = trained.get("settings")
    method = settings.get("method") if isinstance(settings, dict) else None
    if isinstance(method, dict) and method.get("is") == "ModelTuning":
        return scores.get("prompt") is None
    return scores.get("step") is not None and scores.get("step") == trained.get("step")


def _results(scores: Metadata, trained: JsonObject) -> JsonObject:
    """The scores in the layout of `results.json`, with what the run's own results add."""
    if "members" not in scores:
        return _merged(trained, scores)
    metric, shared = scores["metric"], {k: scores[k] for k in ("task", "split", "metric")}
    own = trained.get("members") or {}
    members = {
        name: _merged(own.get(name) or {}, {**shared, "value": metrics[metric], "metrics": metrics})
        for name, metrics in scores["members"].items()
    }
    best = (trained.get("best") or {}).get("member")
    if best not in members:
        best = scores["best"]["name"]
    rest = {k: v for k, v in scores.items() if k not in ("members", "average", "best", "ensemble")}
    return {
        **trained,
        **rest,
        "members": members,
        "average": scores["average"][metric],
        "best": {"member": best, "value": members[best]["value"]},
    }


def _merged(trained: JsonObject, scores: Metadata) -> JsonObject:
    """Results of a run, replaced by new scores; without its baselines if those are of another
    split."""
    same = all(trained.get(name) == scores[name] for name in ("task", "split", "metric"))
    kept = {name: x for name, x in trained.items() if same or name not in _OF_SPLIT}
    known = {name: value for name, value in scores.items() if value is not None}
    return kept | known
