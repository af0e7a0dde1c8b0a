"""Records as inputs: which prompt one names, a field of the name prompt, what the model reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from ptjax.data.sources import Record
from ptjax.data.tasks import Task
from ptjax.errors import InputError
from ptjax.inference.bank import make_bank
from ptjax.inference.records import (
    PLAIN,
    InputFormat,
    check_prompt_fields,
    format_record,
    prompt_of,
    task_of,
)

BANK = make_bank({"first": np.ones((2, 4)), "second": np.ones((3, 4))})
TASK = Task(name="t", inputs="say: {text}", label="l", verbalizer={"0": "no", "1": "yes"})


def record(**fields: Any) -> Record:
    return Record(fields, "x.jsonl", 7)


def plain(line: str) -> Record:
    return Record({PLAIN: line}, "x.txt", 7)


def shout(fields: Any) -> Any:
    yield fields | {"text": fields["text"].upper()}


@pytest.mark.parametrize(
    ("name", "number"), [("first", 0), ("second", 1), ("none", -1), (None, -1)]
)
def test_a_record_names_its_prompt(name, number):
    assert prompt_of(record(prompt=name, text="a"), BANK) == number


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (plain("first"), r"x\.txt:7: a plain text names no prompt of many; give records, or one"),
        (record(text="a"), r"x\.jsonl:7: no field 'prompt', which names one of the prompts \('no"),
        (record(prompt=0), r"x\.jsonl:7: the field 'prompt' is 0, not a prompt's name"),
        (record(prompt="frist"), r"x\.jsonl:7: no prompt is called 'frist'; did you mean first"),
    ],
)
def test_a_record_that_names_no_prompt_is_told_with_its_line(given, message):
    with pytest.raises(InputError, match=message):
        prompt_of(given, BANK)


# A field 'prompt' names a prompt, or fills the template, or is of no use


def said_of(caplog, records: list[Record], task: Task | None, prompt_ids: Any = None) -> list[str]:
    caplog.clear()
    check_prompt_fields(records, [InputFormat(task)] * len(records), prompt_ids)
    return [line.getMessage() for line in caplog.records]


def test_a_field_prompt_that_nothing_reads_is_said(caplog):
    records = [record(prompt="first", text="a"), record(text="b"), record(prompt=None, text="c")]
    ignored = "2 of 3 records have a field 'prompt', which is ignored without --prompts (a bank)"
    changed = dataclasses.replace(TASK, preprocess=shout)  # which fields it reads is not known
    for task in (TASK, None, changed):
        assert said_of(caplog, records, task) == [ignored]
        assert said_of(caplog, records, task, [0, 1, -1]) == []
        assert said_of(caplog, [record(text="b")], task) == []
    assert said_of(caplog, [], TASK) == []


@pytest.mark.parametrize("inputs", ["{prompt} {text}", "{prompt.inner}"])
def test_a_template_may_read_a_field_prompt_but_not_beside_a_bank(caplog, inputs):
    reads = dataclasses.replace(TASK, inputs=inputs)
    records = [record(prompt="first", text="a")]
    assert said_of(caplog, records, reads) == []
    with pytest.raises(InputError, match=r"x\.jsonl:7: the field 'prompt' names the prompt, but"):
        check_prompt_fields(records, [InputFormat(reads)], [0])


def test_every_record_has_a_format():
    with pytest.raises(ValueError, match="shorter"):
        check_prompt_fields([record(text="a")], [], None)


# What the model reads


def test_a_record_is_written_by_its_task_or_taken_as_it_is():
    assert format_record(record(text="a"), TASK) == ("say: a", {"text": "a"})
    assert format_record(plain("a b"), TASK) == ("say: a b", {"text": "a b"})
    written = record(inputs="as it is", id=3)
    assert format_record(written, None) == ("as it is", {"inputs": "as it is", "id": 3})
    assert format_record(plain("as it is"), None) == ("as it is", {})


@pytest.mark.parametrize(
    ("given", "task", "message"),
    [
        (record(text="a"), None, r"x\.jsonl:7: no text in the field 'inputs', which is used unch"),
        (record(inputs=3), None, r"x\.jsonl:7: no text in the field 'inputs'"),
        (record(label="a"), TASK, r"x\.jsonl:7: task t: .*text.*; its inputs are 'say: \{text\}'"),
        (plain("a"), dataclasses.replace(TASK, inputs="{a} {b}"), r"x\.txt:7: .* the fields a, b"),
    ],
)
def test_a_record_that_cannot_be_written_is_told_with_its_line(given, task, message):
    with pytest.raises(InputError, match=message):
        format_record(given, task)


def test_the_task_of_a_prompt_is_the_one_it_records():
    other = dataclasses.replace(TASK, name="other", preprocess=shout)
    recorded = task_of({"task": TASK.describe()}, other)
    assert recorded == TASK and recorded.preprocess is None
    assert task_of({"task": TASK.describe()}) == TASK
    # A function is not recorded, only its name: it is that of the task that the user gives.
    named = task_of({"task": other.describe()}, dataclasses.replace(other, name="given"))
    assert named == other and named.preprocess is shout
    # A header of another's need not have every key.
    short = {"name": "t", "inputs": "{x}", "targets": "{y}"}
    for given in (None, TASK, other):
        recorded = task_of({"task": short}, given)
        assert recorded and (recorded.inputs, recorded.preprocess) == ("{x}", None)
    for nothing in ({}, {"task": None}, {"task": "sst2"}):
        assert task_of(nothing, TASK) is TASK
        assert task_of(nothing) is None
