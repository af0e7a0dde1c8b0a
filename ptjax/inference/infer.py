"""`predict` and `infer`: predictions for texts and records, formatted as a prompt was trained."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Unpack, cast

from absl import logging

from ptjax.backbones.load import Backbone
from ptjax.data.sources import OnBadRecord, find_files
from ptjax.data.tasks import Task
from ptjax.errors import InputError, check_arguments, kind_of
from ptjax.files import JsonObject, PathLike
from ptjax.inference.bank import PromptBank, PromptIds
from ptjax.inference.generate import Settings
from ptjax.inference.inputs import Reading, read_inputs, records_in_memory
from ptjax.inference.predict import Prediction, predict_texts
from ptjax.inference.prompts import Prompt, PromptLike, load_any, open_prompt
from ptjax.inference.requests import Request, check_left_out, make_format, make_requests
from ptjax.output import check as check_output
from ptjax.output import json_lines, prefixed, write
from ptjax.sharding import processes


class Answering(Settings, total=False):
    """How answers are computed; see `predict`."""

    decode: bool
    max_new_tokens: int | None
    batch_size: int


class Options(Reading, Answering, total=False):
    """The settings of `infer`: how files are read, and how answers are computed."""


def predict(
    backbone: Backbone,
    inputs: Iterable[str | Mapping[str, Any]],
    prompt: PromptLike = None,
    *,
    prompt_ids: PromptIds = None,
    decode: bool = False,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    raw: bool = False,
    task: Task | None = None,
    allow_mismatch: bool = False,
    **settings: Unpack[Settings],
) -> list[Prediction]:
    """Predicts for each input, as `python -m ptjax.infer` does, and returns predictions in order.

    The prompt's metadata say how: inputs are formatted by the template of its task, cut to its
    length and tokenised as in training. Where the task has a closed set of labels, they are ranked
    by likelihood; otherwise a text is generated.

    Examples:
        >>> predict(backbone, ["I was charged twice"], run.prompt)  # doctest: +SKIP
        [Prediction(text='billing', score=-0.119, probabilities={'billing': 0.888, 'other': 0.112})]

    Args:
        inputs: texts, each of which fills the only field of the template, or records (dicts): a
            list, a generator, a DataFrame, a `datasets.Dataset`. [] has no predictions.
        prompt: what `load_prompt` or `load_adapter` returns, such as `run.prompt` and
            `run.adapter`; a path or name that one of them takes, such as a MODEL_DIR; an array
            [P, D]; a bank of `make_bank`; or None for the backbone alone.
        prompt_ids: with a bank, the prompt of each input, by name or number. Default: the field
            "prompt" of each record names it (None or "none": the backbone alone).
        decode: generate, even where a closed set of labels is known.
        max_new_tokens: the maximum length of generated texts; default: the target length that the
            prompt was tuned with, or 64.
        batch_size: the number of inputs that are computed at once.
        raw: inputs are formatted already: texts, or the field "inputs" of each record.
        task: formats the inputs and has the labels, instead of the task in a prompt's metadata. A
            prompt without a task in them reads inputs as they are, unless it is given.
        allow_mismatch: only warn if a prompt was tuned on another backbone or tokenizer.
        settings: num_beams, alpha, temperature, top_p and seed, as for `ptjax.generate`.

    Raises:
        InputError: an input cannot be used (the message has its number, from 1), the prompt does
            not fit the backbone, a bank does not have a prompt of that name, or a setting of
            generation is set although all labels are ranked.
    """
    check_arguments("predict", settings, Settings.__optional_keys__)
    opened = open_prompt(backbone, prompt, allow_mismatch=allow_mismatch)
    if task is not None and not isinstance(task, Task):
        raise InputError(f"predict needs a ptjax.Task as task, got {kind_of(task)}")
    requests = make_requests(
        records_in_memory(inputs, "predict"),
        opened,
        functools.partial(make_format, task=task),
        prompt_ids=prompt_ids,
        raw=raw,
    )
    how = {"decode": decode, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    return predict_requests(backbone, requests, opened, **cast("Answering", how | settings))


def infer(
    backbone: Backbone,
    source: PathLike | Iterable[str | Mapping[str, Any]],
    prompt: PromptLike = None,
    *,
    output: PathLike | None = None,
    force: bool = False,
    prefix: str = "",
    raw: bool = False,
    task: Task | None = None,
    on_bad_record: OnBadRecord = "error",
    allow_mismatch: bool = False,
    **options: Unpack[Options],
) -> list[JsonObject]:
    """Predicts for the records of files, as `python -m ptjax.infer` does; see `predict`.

    With a bank, the field "prompt" of every record names the prompt that it is read with.

    Examples:
        >>> infer(backbone, "new.jsonl", run.prompt, output="answers.jsonl")  # doctest: +SKIP

    Args:
        source: the path or glob of JSON lines, CSV, TSV, Parquet or plain lines (.txt), or inputs
            in memory as for `predict`.
        prompt, raw, task, allow_mismatch: as for `predict`.
        output: a path to write the rows to, as JSON lines, in one atomic write.
        force: overwrite `output` if it exists.
        prefix: prepended to the names of the fields that are added to each record.
        on_bad_record: 'skip' leaves out records that cannot be used, and counts them in a warning.
        options: decode, max_new_tokens, batch_size and the settings of generation, as for
            `predict`; for files format, columns, quoting and encoding, as for `ptjax.Task`.

    Returns:
        A row for each record, in order: the record's own fields, "inputs" (what the model read),
        "prediction", "score" and, where labels were ranked, "probabilities".

    Raises:
        InputError: as for `predict`, a record cannot be used (the message has its file and line),
            no record is left, or `output` cannot or must not be written.
    """
    check_arguments("infer", options, Options.__optional_keys__)
    of_files = {k: v for k, v in options.items() if k in Reading.__optional_keys__}
    how = cast("Answering", {k: v for k, v in options.items() if k not in of_files})
    if output is not None:
        files = find_files(source) if isinstance(source, str | os.PathLike) else ()
        check_output(output, force=force, inputs=files)
    loaded = load_any(prompt)
    records = read_inputs(source, on_bad_record=on_bad_record, **cast("Reading", of_files))
    format_of = functools.partial(make_format, task=task)
    requests = make_requests(records, loaded, format_of, raw=raw, prefix=prefix)
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else "inputs"
    check_left_out(requests, records.bad, name)
    rows = answer(backbone, requests, loaded, prefix, allow_mismatch=allow_mismatch, **how)
    if output is not None:
        write_rows(output, rows)
    return rows


def answer(
    backbone: Backbone,
    requests: Sequence[Request],
    prompt: Prompt,
    prefix: str = "",
    *,
    allow_mismatch: bool = False,
    **options: Unpack[Answering],
) -> list[JsonObject]:
    """Predicts for requests, and returns a row for each; arguments and rows as for `infer`.

    Args:
        requests: the result of `make_requests` with the same prompt.
    """
    opened = open_prompt(backbone, prompt, allow_mismatch=allow_mismatch)
    predictions = predict_requests(backbone, requests, opened, **options)
    return [row_of(*pair, prefix) for pair in zip(requests, predictions, strict=True)]


def predict_requests(
    backbone: Backbone, requests: Sequence[Request], prompt: Prompt, **options: Unpack[Answering]
) -> list[Prediction]:
    """Predicts for requests.

    Args:
        requests: the result of `make_requests`.
        prompt: the result of `open_prompt` for the same prompt.
    """
    return predict_texts(
        backbone,
        [request.text for request in requests],
        [request.input_format for request in requests],
        prompt,
        [request.prompt_id for request in requests] if isinstance(prompt, PromptBank) else None,
        **options,
    )


def row_of(request: Request, prediction: Prediction, prefix: str) -> JsonObject:
    """Makes the JSON object for an input: the record's fields, and those of the prediction.

    Args:
        prefix: prepended to the names of the prediction's fields.
    """
    new = {"inputs": request.text, "prediction": prediction.text, "score": prediction.score}
    if prediction.probabilities is not None:
        new["probabilities"] = prediction.probabilities
    return request.fields | prefixed(new, prefix)


def write_rows(path: PathLike, rows: Sequence[JsonObject]) -> None:
    """Writes the rows of `infer` as JSON lines, on the first process."""
    if processes.first():
        write(path, json_lines(rows))
        logging.info("wrote %s predictions to %s", f"{len(rows):,}", path)
