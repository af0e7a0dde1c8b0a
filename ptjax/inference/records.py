"""Records as inputs of a model: how a prompt's inputs are written, which prompt a record names."""

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
"""The field of a record that holds an input which is formatted already."""

PROMPT_FIELD = "prompt"
"""The field in which a record names its prompt, one of a bank."""

PLAIN = "\0line"
"""The only field of a record that is a plain line; no file has a field of this name."""


@dataclasses.dataclass(frozen=True)
class InputFormat:
    """How the inputs of a prompt are written.

    Attributes:
        task: formats records and knows the labels; None where inputs are formatted already.
        input_length, target_length: in tokens; None where nothing sets them.
    """

    task: Task | None
    input_length: int | None = None
    target_length: int | None = None


def prompt_of(record: Record, bank: PromptBank) -> int:
    """The number of the prompt that a record names, -1 for none.

    Raises:
        InputError: it names none, or one that the bank lacks; with file and line.
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
    """Warns about a field 'prompt' that neither names a prompt nor is part of a template.

    Args:
        formats: the input format of each record.
        prompt_ids: the prompt of each record; None without a bank.

    Raises:
        InputError: the field would be both.
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
    """(the model's input, the record's fields).

    A plain line (see `PLAIN`) fills the template's only field.

    Args:
        task: None where the inputs are formatted already.

    Raises:
        InputError: a field is missing; with file and line.
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
    """The task that a prompt was tuned for, from its metadata; `fallback` where it names none.

    A custom `preprocess` function is taken from `fallback`.
    """
    description = metadata.get("task")
    if not isinstance(description, dict):
        return fallback
    same = fallback is not None and fallback.describe()["preprocess"] == description["preprocess"]
    return Task.from_description(description, fallback.preprocess if fallback and same else None)
