"""`evaluate`: scores a prompt, several prompts, a hard prompt or a backbone alone on a task."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Unpack

from ptjax.backbones.load import Backbone
from ptjax.data.batching import FEATURE_LENGTHS
from ptjax.data.examples import Example
from ptjax.data.hard_prompt import HardPrompt
from ptjax.data.memory import RecordsInMemory
from ptjax.data.tasks import Task
from ptjax.errors import InputError, check_arguments
from ptjax.evaluation.evaluator import Evaluator, reported_split
from ptjax.evaluation.record import nearest_to_rows, record_predictions
from ptjax.evaluation.report import check_report, write_report
from ptjax.files import JsonObject, PathLike
from ptjax.inference.bank import PromptBank
from ptjax.inference.generate import tokenizer_of
from ptjax.inference.model import bind
from ptjax.inference.prompts import Prompt, PromptLike, load_any, open_prompt
from ptjax.inference.records import recorded_lengths
from ptjax.interop.prompt_file import PromptFile
from ptjax.methods.adapter import Adapter
from ptjax.methods.base import run_with
from ptjax.output import Writing, check_fields, json_lines, prefixed, write
from ptjax.output import check as check_output
from ptjax.settings import Evaluation, Predict
from ptjax.sharding import processes


def evaluate(
    backbone: Backbone,
    task: Task,
    prompt: PromptLike | HardPrompt = None,
    *,
    split: str | None = None,
    examples: int | None = None,
    predict: Predict = "auto",
    batch_size: int = 64,
    feature_lengths: Mapping[str, int] | None = None,
    seed: int = 0,
    allow_mismatch: bool = False,
    report: PathLike | None = None,
    **writing: Unpack[Writing],
) -> JsonObject:
    """Scores a prompt on a split of a task, as `python -m ptjax.evaluate` does.

    Every example counts exactly once. With a bank, every prompt is scored, and the ensembles of
    all, in one forward pass. If a run has several processes, all of them must call it.

    Examples:
        >>> evaluate(backbone, task, run.prompt)["metrics"]  # doctest: +SKIP
        {'accuracy': 0.94}

    Args:
        prompt: as for `ptjax.forward`; or a `ptjax.HardPrompt`, scored with the backbone alone.
        split: a split of the task; default: "test" if the task has it, else "validation".
        examples: score at most this many, evenly spread over the split; default: all.
        predict: "rank" compares the likelihoods of a closed set of labels, "decode" generates
            greedily; "auto" ranks if the task has a closed set.
        batch_size: the number of examples that are computed at once.
        feature_lengths: the maximum numbers of tokens, {"inputs": T, "targets": L}, if a prompt's
            metadata lack them; default: 512 and 16.
        seed: determines which training examples are the shots of a hard prompt.
        allow_mismatch: only warn if a prompt was tuned on another backbone or tokenizer.
        report: a folder for `report.json` and `report.html`; that of the prompt's own run adds its
            settings, baselines and curves. An existing report is replaced only with `force`.
        writing: output (a path: one JSON line for each example, with its record's fields,
            "inputs", "targets" and "prediction"), force and prefix, as for `ptjax.infer`.

    Returns:
        What the command prints: "task", "split", "examples" (their number), "metric", "backbone"
        and the scores: "value", of "metric", and "metrics"; in addition "prompt" (its path) and
        "step", or "hard_prompt" and "shots". For a bank: "members", "average", "best", "ensemble".

    Raises:
        InputError: the prompt does not fit the backbone, the task does not have the split, a record
            cannot be used, prompts of a bank were tuned for different tasks or lengths, or
            `output` cannot or must not be written.
    """
    check_arguments("evaluate", writing, Writing.__optional_keys__)
    if not isinstance(task, Task):
        raise InputError(f"evaluate needs a ptjax.Task to score on, got {type(task).__name__}")
    _check_places(report, **writing)
    hard_prompt = prompt if isinstance(prompt, HardPrompt) else None
    loaded = None if isinstance(prompt, HardPrompt) else load_any(prompt)
    metadata = metadata_of(loaded)
    opened = open_prompt(backbone, loaded, allow_mismatch=allow_mismatch)
    evaluator = Evaluator(
        task,
        backbone,
        tokenizer_of(backbone),
        {**FEATURE_LENGTHS, **(feature_lengths or {}), **recorded_lengths(metadata)},
        Evaluation(examples=examples, predict=predict, batch_size=batch_size),
        isinstance(opened, PromptBank) or opened is None or opened.attends_to_input,
        run_with(opened.method, backbone) if isinstance(opened, Adapter) else None,
    )
    split = split or reported_split(task)
    check_rows(evaluator, split, many=isinstance(opened, PromptBank), **writing)
    if isinstance(opened, PromptBank):
        scores, predictions, records = evaluate_bank(evaluator, opened, split)
    else:
        rewording = rewording_of(hard_prompt, task, seed)
        scores, predictions, records = evaluate_prompt(evaluator, opened, split, rewording)
    write_rows(evaluator.examples(split), predictions, **writing)
    source = {"backbone": backbone.name} | _origin(prompt, opened)
    scores = _described(evaluator, split) | scores | source
    if report is not None and processes.first():
        write_report(report, scores, records)
    return scores


def _check_places(report: PathLike | None, **writing: Unpack[Writing]) -> None:
    """InputError if the report or the output cannot or must not be written."""
    force = writing.get("force", False)
    if (path := writing.get("output")) is not None:
        check_output(path, force=force)
    if report is not None:
        check_report(report, force=force)


def _origin(prompt: PromptLike | HardPrompt, opened: Prompt) -> JsonObject:
    """Where what is scored comes from, by the names in the result of `evaluate`."""
    if isinstance(opened, PromptBank):
        return {}
    path = os.fspath(prompt) if isinstance(prompt, str | os.PathLike) else None
    source: JsonObject = {"prompt": path, "step": metadata_of(opened).get("step")}
    if isinstance(prompt, HardPrompt):
        source |= {"hard_prompt": prompt.text, "shots": prompt.shots}
    return source


def _described(evaluator: Evaluator, split: str) -> JsonObject:
    """What is scored, by the names in the result of `evaluate`."""
    task = evaluator.task
    return {
        "task": task.name,
        "split": split,
        "examples": len(evaluator.examples(split)),
        "metric": evaluator.metric,
        **({} if task.positive is None else {"positive_label": task.positive}),
    }


def metadata_of(prompt: Prompt) -> JsonObject:
    """Returns a prompt's metadata, a bank's `shared_metadata`, or {} without a prompt."""
    if prompt is None:
        return {}
    return shared_metadata(prompt) if isinstance(prompt, PromptBank) else prompt.metadata


def added(example: Example, predictions: JsonObject, prefix: str) -> JsonObject:
    """Returns the fields that the output adds to an example's record: its texts and predictions.

    Args:
        predictions: the fields with predictions, by name.
        prefix: prepended to the names of all added fields.
    """
    return prefixed({"inputs": example.inputs, "targets": example.targets} | predictions, prefix)


def check_rows(evaluator: Evaluator, split: str, *, many: bool, **writing: Unpack[Writing]) -> None:
    """Checks, before anything is scored, that the output can be written without loss of data.

    Args:
        many: whether a bank of prompts is scored; its predictions are other fields than those of a
            single prompt.
        writing: as for `evaluate`.

    Raises:
        InputError: the path is a data file of the split, exists (without `force`) or cannot be
            written, or a field of a record would be replaced by a new one.
    """
    task, examples = evaluator.task, evaluator.examples(split)
    if (path := writing.get("output")) is None:
        return
    # The examples of records in memory name no files.
    source = task.splits.get(split, task.splits.get("train"))
    in_files = () if isinstance(source, RecordsInMemory) else examples
    files = dict.fromkeys(example.file for example in in_files)
    check_output(path, force=writing.get("force", False), inputs=files)
    names = ("predictions", "majority_vote", "mean_likelihood") if many else ("prediction",)
    for example in examples:
        new = added(example, dict.fromkeys(names), writing.get("prefix", ""))
        check_fields(example.fields, new, f"{example.file}:{example.line}")


def write_rows(
    examples: Sequence[Example], predictions: Sequence[JsonObject], **writing: Unpack[Writing]
) -> None:
    """Writes a JSON line for each example, on the first process, if `writing` names an output."""
    path = writing.get("output")
    if path is not None and processes.first():
        prefix, pairs = writing.get("prefix", ""), zip(examples, predictions, strict=True)
        write(path, json_lines(x.fields | added(x, of_x, prefix) for x, of_x in pairs))


def rewording_of(
    hard_prompt: HardPrompt | None, task: Task, seed: int
) -> Callable[[str], str] | None:
    """Returns a function that adds the hard prompt and its shots to the text of an input.

    Returns None without a hard prompt. Shots are training examples, with their targets, that
    come before the input.

    Args:
        task: the task; its split "train" is loaded if the hard prompt has shots.
        seed: determines which training examples are the shots.
    """
    if hard_prompt is None:
        return None
    return hard_prompt.rewording(task.load("train") if hard_prompt.shots else (), seed)


def evaluate_prompt(
    evaluator: Evaluator,
    prompt: PromptFile | Adapter | None,
    split: str,
    rewording: Callable[[str], str] | None = None,
) -> tuple[JsonObject, list[JsonObject], dict[str, JsonObject]]:
    """Scores a prompt, or the backbone alone, on a split.

    If a run has several processes, all of them must call it.

    Args:
        prompt: None for the backbone alone.
        rewording: adds a hard prompt to the text of an input; None leaves inputs unchanged.

    Returns:
        (scores, a row {"prediction": text} for each example, {"": a record for a report}). In the
        scores, "metrics" maps the names of metrics to values, and "value" is the value of
        `evaluator.metric`.
    """
    variables = bind(evaluator.backbone, prompt, evaluator.apply_fn).variables
    predictions, likelihoods = evaluator.predict_with_scores(variables, split, rewording)
    metrics = evaluator.score(predictions, split)
    scores = {"value": metrics[evaluator.metric], "metrics": metrics}
    record = record_predictions(evaluator, split, predictions, likelihoods)
    record["prompt_rows"] = nearest_to_rows(evaluator.backbone, getattr(prompt, "prompt", None))
    return scores, [{"prediction": prediction} for prediction in predictions], {"": record}


def evaluate_bank(
    evaluator: Evaluator, bank: PromptBank, split: str
) -> tuple[JsonObject, list[JsonObject], dict[str, JsonObject]]:
    """Scores each prompt of a bank, and the ensembles of all, on a split.

    Returns:
        (scores, rows, records). The scores are the result of `Evaluator.score_ensemble`. There is a
        row for each example: "predictions" maps each prompt's name to its text, "majority_vote" and
        (only if labels are ranked) "mean_likelihood" are the texts that the ensembles predict. A
        record is for a report: one by each prompt's name, without probabilities.
    """
    predictions = evaluator.predict_bank(bank, split)
    together = {"majority_vote": predictions.majority_vote}
    if predictions.mean_likelihood is not None:
        together["mean_likelihood"] = predictions.mean_likelihood
    rows = [
        {"predictions": dict(zip(bank.names, members, strict=True))}
        | {way: texts[i] for way, texts in together.items()}
        for i, members in enumerate(zip(*predictions.members, strict=True))
    ]
    records = {
        name: record_predictions(evaluator, split, members)
        for name, members in zip(bank.names, predictions.members, strict=True)
    }
    return evaluator.score_ensemble(predictions, split, bank.names), rows, records


def shared_metadata(bank: PromptBank) -> JsonObject:
    """Returns the metadata that all prompts of a bank agree on.

    The keys are "task" (only its name), "input_length", "target_length" and "backbone_name". The
    last is the first prompt's and is not compared. For the others, a prompt that does not record
    the key is ignored; a key that no prompt records is left out.

    Raises:
        InputError: two prompts were tuned for different tasks or lengths; the message names both.
    """
    shared: JsonObject = {}
    first: dict[str, str] = {}
    for name, of_prompt in zip(bank.names, bank.metadata, strict=True):
        metadata = of_prompt or {}
        task = metadata.get("task")
        shared.setdefault("backbone_name", metadata.get("backbone_name"))
        for key, value in (
            ("task", task.get("name") if isinstance(task, dict) else None),
            ("input_length", metadata.get("input_length")),
            ("target_length", metadata.get("target_length")),
        ):
            if value is None:
                continue
            if shared.setdefault(key, value) != value:
                raise InputError(
                    f"prompt {name!r} has the {key.replace('_', ' ')} {value!r}, prompt "
                    f"{first[key]!r} {shared[key]!r}; prompts are scored together only on one "
                    "task with the same lengths; move one to another directory"
                )
            first.setdefault(key, name)
    return shared
