"""Turns records into inputs of a model, and reads which prompt a record names."""

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
    """How inputs for a prompt are formatted.

    Attributes:
        task: formats records and has the labels; None if inputs are already formatted.
        input_length, target_length: in tokens; None means the default.
    """

    task: Task | None
    input_length: int | None = None
    target_length: int | None = None


def prompt_of(record: Record, bank: PromptBank) -> int:
    """Returns the number of the prompt that a record names in its field `PROMPT_FIELD`.

    It is -1, the backbone alone, if the field is None or "none".

    Raises:
        InputError: the record lacks the field, or the bank has no such prompt; with file and line.
    """
    try:
        if PLAIN in record.fields:
            raise InputError("a plain text names no prompt of many; give records, or one --prompt")
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
    """Logs a warning if records have a field 'prompt' that is not used at all.

    It is used to name a prompt of a bank, or as a field of the task's template.

    Args:
        formats: the input format of each record.
        prompt_ids: the number of each record's prompt; None without a bank.

    Raises:
        InputError: with a bank, the template also uses the field 'prompt'.
    """
    unread = 0
    for record, input_format in zip(records, formats, strict=True):
        task = input_format.task
        template = "" if task is None or task.preprocess else task.inputs
        read = PROMPT_FIELD in (field.split(".")[0] for field in parse_template(template).fields)
        if read and prompt_ids is not None:
            raise InputError(
                f"{record.where}: the field '{PROMPT_FIELD}' names the prompt, but the template of "
                f"its task reads a field of that name too, {template!r}; use --prompt for it"
            )
        unread += PROMPT_FIELD in record.fields and not read
    if unread and prompt_ids is None:
        logging.warning(
            "%d of %d records have a field '%s', which is ignored without --prompts",
            unread,
            len(records),
            PROMPT_FIELD,
        )


def format_record(record: Record, task: Task | None) -> tuple[str, JsonObject]:
    """Formats the model's input for a record, and returns it with the record's fields.

    A plain line (see `PLAIN`) fills the template's only field, under whose name it is returned.

    Args:
        task: None if the input is already formatted, in the field `RAW_FIELD` or as a plain line.

    Raises:
        InputError: a field is missing or cannot be used; with file and line.
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


def task_of(metadata: Metadata, fallback: Task | None = None) -> Task | None:
    """Makes the task that a prompt was tuned for, from its metadata.

    Returns `fallback` if the metadata has no task. A `preprocess` function that both name is taken
    from `fallback`, because ptjax does not import custom functions by name.

    Raises:
        InputError: as in `Task.from_description`.
    """
    description = metadata.get("task")
    if not isinstance(description, dict):
        return fallback
    same = fallback and fallback.describe()["preprocess"] == description.get("preprocess")
    return Task.from_description(description, fallback.preprocess if fallback and same else None)
