"""Requests: inputs as the model reads them, each with its prompt and with the fields of its record.

They are made before a backbone is loaded, so that a bad record is reported in a second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from absl import logging

from ptjax.data.sources import BadRecords, Records, non_empty
from ptjax.data.tasks import Task
from ptjax.errors import InputError
from ptjax.files import JsonObject, Metadata
from ptjax.inference.bank import PromptBank, PromptIds, choose_prompts
from ptjax.inference.prompts import Prompt
from ptjax.inference.records import (
    InputFormat,
    check_prompt_fields,
    format_record,
    prompt_of,
    recorded_lengths,
    task_of,
)
from ptjax.output import check_fields, prefixed

FormatOf = Callable[[Metadata], InputFormat]
"""Makes the input format of a prompt from its metadata; {} means the backbone alone."""

ADDED = ("inputs", "prediction", "score", "probabilities")
"""The fields that `infer` adds to a record."""


@dataclasses.dataclass(frozen=True)
class Request:
    """An input to predict for.

    Attributes:
        text: the model's input, formatted by the template.
        fields: the fields of the input's record, which are copied to the output.
        input_format: the template and lengths of the prompt for this input.
        prompt_id: with a bank, the index of the prompt for this input, or -1 for the backbone
            alone; without a bank, 0.
    """

    text: str
    fields: JsonObject
    input_format: InputFormat
    prompt_id: int


def metadata_of(prompt: Prompt) -> list[JsonObject]:
    """Returns the metadata of a prompt, or of every prompt of a bank.

    For a bank, {} comes last, where the number -1 finds it: it is that of the backbone alone.
    """
    if isinstance(prompt, PromptBank):
        return [metadata or {} for metadata in (*prompt.metadata, None)]
    return [{} if prompt is None else prompt.metadata]


def make_format(metadata: Metadata, task: Task | None = None) -> InputFormat:
    """Makes the input format that a prompt's metadata describe.

    Args:
        task: used instead of the task in the metadata.

    Raises:
        InputError: as for `Task.from_description`.
    """
    task, lengths = task_of(metadata) if task is None else task, recorded_lengths(metadata)
    return InputFormat(task, lengths.get("inputs"), lengths.get("targets"))


def make_requests(
    records: Records,
    prompt: Prompt,
    format_of: FormatOf,
    *,
    prompt_ids: PromptIds = None,
    raw: bool = False,
    prefix: str | None = None,
) -> list[Request]:
    """Formats inputs, in order. Leaves out those that `records.bad` skips, and counts them there.

    Args:
        prompt: a prompt, a bank or None; not yet checked against a backbone.
        format_of: called once for each prompt that an input is read with.
        prompt_ids: with a bank, the prompt of each record; default: its field 'prompt' names it.
        raw: inputs are formatted already: plain lines, or the field 'inputs' of each record.
        prefix: prepended to the names of the fields `ADDED`, which must not replace fields of a
            record; None adds none.

    Raises:
        InputError: a record cannot be used; the message has its file and line.
    """
    bad, bank = records.bad, prompt if isinstance(prompt, PromptBank) else None
    ids = choose_prompts(prompt, prompt_ids, len(records)) if prompt_ids is not None else None
    of_prompts = metadata_of(prompt)
    formats: dict[int, InputFormat] = {}
    kept, requests = [], []
    for i, record in enumerate(records):
        try:
            number = 0 if ids is None else int(ids[i])
            if bank is not None and ids is None:
                number = prompt_of(record, bank)
            if number not in formats:
                formats[number] = format_of(of_prompts[number])
            text, fields = format_record(record, None if raw else formats[number].task)
            if prefix is not None:
                check_fields(fields, prefixed(_unknown(text), prefix), record.where)
        except InputError as error:
            if bad.policy == "error":
                raise
            bad.report(record.where, str(error).removeprefix(f"{record.where}: "))
            continue
        kept.append(record)
        requests.append(Request(text, fields, formats[number], number))
    if ids is None:
        numbers = None if bank is None else [request.prompt_id for request in requests]
        check_prompt_fields(kept, [request.input_format for request in requests], numbers)
    return requests


def check_left_out(requests: Sequence[Request], bad: BadRecords, source: str) -> None:
    """Warns if records were left out.

    Args:
        source: where the records are from, for the message.

    Raises:
        InputError: no request is left.
    """
    if not requests:
        non_empty(Records([], bad), source)
    if bad.count:
        total = len(requests) + bad.count
        logging.warning("left out %d of %d records; the first: %s", bad.count, total, bad.first)


def _unknown(text: str) -> JsonObject:
    """The fields `ADDED` of an input before its prediction is known."""
    return dict.fromkeys(ADDED) | {"inputs": text}
