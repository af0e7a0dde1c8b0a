"""Formats records as inputs of a model, and reads which prompt a record names."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from absl import logging

from ptjax.data.sources import Record
from ptjax.data.tasks import Task
from ptjax.data.templates import parse_template
from ptjax.errors import InputError
from ptjax.files import JsonObject, Metadata
from ptjax.inference.bank import PromptBank
from ptjax.interop.prompt_file import NO_PROMPT

RAW_FIELD = "inputs"
"""The field of a record that holds an already formatted input."""

PROMPT_FIELD = "prompt"
"""The field in which a record names one of a bank's prompts."""

PLAIN = "\0line"
"""The only field of a record made from a plain line; no file has a field of this name."""


@dataclasses.dataclass(frozen=True)
class InputFormat:
    """How to format the inputs of a prompt, and the maximum lengths of inputs and targets.

    Attributes:
        task: formats records and has the labels; None if inputs are already formatted.
        input_length, target_length: the maximum number of tokens of an input, and of a label or
            generated text. None means `INPUT_LENGTH`, and `LABEL_LENGTH` or `MAX_NEW_TOKENS`.
    """

    task: Task | None
    input_length: int | None = None
    target_length: int | None = None


def prompt_of(record: Record, bank: PromptBank) -> int:
    """Returns the number of the prompt that a record names in its field `PROMPT_FIELD`.

    Returns -1, which means the backbone alone, if the field is None or "none".

    Raises:
        InputError: the record lacks the field, or the bank has no such prompt. The message has the
            file and line.
    """
    try:
        if PLAIN in record.fields:
            raise InputError(
                "a plain text names no prompt of many; give records, or one --prompt "
                "(in Python prompt_ids)"
            )
        if PROMPT_FIELD not in record.fields:
            raise InputError(
                f"no field '{PROMPT_FIELD}', which names one of the prompts ('{NO_PROMPT}' for the "
                "backbone alone)"
            )
        name = record.fields[PROMPT_FIELD]
        if not isinstance(name, str | None):
            raise InputError(f"the field '{PROMPT_FIELD}' is {name!r}, not a prompt's name")
        return bank.id_of(name)
    except InputError as error:
        raise InputError(f"{record.where}: {error}") from None


def check_prompt_fields(
    records: Sequence[Record], formats: Sequence[InputFormat], prompt_ids: Sequence[int] | None
) -> None:
    """Logs a warning if records have a field 'prompt' that nothing uses.

    The field can be used in two ways: to choose a prompt of a bank, or in the task's template.

    Args:
        formats: the input format of each record.
        prompt_ids: the number of each record's prompt; None without a bank.

    Raises:
        InputError: both uses at once: there is a bank, and the template has the field 'prompt'.
    """
    unread = 0
    for record, input_format in zip(records, formats, strict=True):
        task = input_format.task
        template = "" if task is None or task.preprocess else task.inputs
        read = PROMPT_FIELD in (field.split(".")[0] for field in parse_template(template).fields)
        if read and prompt_ids is not None:
            raise InputError(
                f"{record.where}: the field '{PROMPT_FIELD}' names the prompt, but the template of "
                f"its task reads a field of that name too, {template!r}; use --prompt for it "
                "(in Python prompt_ids)"
            )
        unread += PROMPT_FIELD in record.fields and not read
    if unread and prompt_ids is None:
        logging.warning(
            "%d of %d records have a field '%s', which is ignored without --prompts (a bank)",
            unread,
            len(records),
            PROMPT_FIELD,
        )


def format_record(record: Record, task: Task | None) -> tuple[str, JsonObject]:
    """Formats a record; returns (the model's input, the record's fields by name).

    A record may be a plain line of text without fields (see `PLAIN`). The line then fills the only
    field of the task's template, and the returned fields are that one.

    Args:
        task: its template formats the record. If None, the model's input is the field `RAW_FIELD`
            unchanged, or the plain line; the fields returned for a plain line are then empty.

    Raises:
        InputError: a field is missing or cannot be used. The message has the file and line.
    """
    fields = record.fields
    plain = PLAIN in fields
    try:
        if task is None:
            name = PLAIN if plain else RAW_FIELD
            if not isinstance(fields.get(name), str):
                raise InputError(f"no text in the field '{RAW_FIELD}', which is used unchanged")
            return fields[name], {} if plain else fields
        if plain:
            line = fields[PLAIN]
            text = task.format_line(line)
            return text, {parse_template(task.inputs).fields[0]: line}
        return task.format_inputs(fields), fields
    except InputError as error:
        raise InputError(f"{record.where}: {error}") from error


def recorded_lengths(metadata: Metadata) -> dict[str, int]:
    """Returns the maximum lengths that a prompt's metadata record: "inputs", "targets" or both."""
    sides = {"inputs": "input_length", "targets": "target_length"}
    return {
        side: metadata[key] for side, key in sides.items() if isinstance(metadata.get(key), int)
    }


def task_of(metadata: Metadata, fallback: Task | None = None) -> Task | None:
    """Makes the task that a prompt was tuned for, from its metadata.

    Returns `fallback` if the metadata has no task. ptjax does not import custom functions by name,
    so a `preprocess` function is taken from `fallback` if both tasks name the same one.

    Raises:
        InputError: as for `Task.from_description`.
    """
    description = metadata.get("task")
    if not isinstance(description, dict):
        return fallback
    same = fallback and fallback.describe()["preprocess"] == description.get("preprocess")
    return Task.from_description(description, fallback.preprocess if fallback and same else None)
