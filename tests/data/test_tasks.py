"""Tasks: records to text, labels, splits, errors with file and line, descriptions, scores."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from ptjax.data.catalogue import super_glue
from ptjax.data.tasks import Task
from ptjax.errors import InputError

YES_NO = {
    "name": "t",
    "inputs": "text: {text}",
    "label": "label",
    "verbalizer": {"0": "no", "1": "yes"},
}


@pytest.fixture
def write(tmp_path):
    """Writes records as JSON lines and returns a task's settings for them."""

    def write_records(*records, split="train", **settings):
        lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        return {
            **YES_NO,
            "splits": {split: f"{split}.jsonl"},
            "data_dir": str(tmp_path),
            **settings,
        }

    return write_records


def _pairs(examples):
    return [(example.inputs, example.targets) for example in examples]


def test_examples_have_text_fields_and_place(write, tmp_path):
    task = Task(**write({"text": "a", "label": 1}, "", {"text": "b", "label": "0", "x": [1]}))
    examples = task.load("train")
    assert _pairs(examples) == [("text: a", "yes"), ("text: b", "no")]
    assert examples[1].fields == {"text": "b", "label": "0", "x": [1]}
    assert (examples[1].file, examples[1].line) == (f"{tmp_path}/train.jsonl", 3)
    assert task.labels == ("no", "yes")


@pytest.mark.parametrize(
    ("verbalizer", "values"),
    [
        ({"False": "no", "True": "yes"}, [True, "True"]),
        ({"false": "no", "true": "yes"}, [True, "true"]),
        ({False: "no", True: "yes"}, [True, "True"]),
        ({0: "no", 1: "yes"}, [1, "1", " 1 "]),
        ({"neg": "no", "pos": "yes", "positive": "yes"}, ["pos", "positive"]),
        ({1.5: "no", 2.5: "yes"}, [2.5, "2.5"]),
    ],
)
def test_label_values_are_compared_as_text(write, verbalizer, values):
    records = [{"text": "a", "label": value} for value in values]
    task = Task(**write(*records, verbalizer=verbalizer))
    assert [example.targets for example in task.load("train")] == ["yes"] * len(values)
    assert task.labels == ("no", "yes")


@pytest.mark.parametrize("value", [True, 2, "yes", "", 1.0])
def test_a_label_outside_the_verbalizer(write, value):
    task = Task(**write({"text": "a", "label": 0}, {"text": "a", "label": value}))
    with pytest.raises(
        InputError, match=r"task t: split 'train': .*train\.jsonl:2: the label"
    ) as e:
        task.load("train")
    assert f"the label {value!r} in field 'label' is not in the verbalizer ('0', '1')" in str(
        e.value
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"label": 1}, r"no field 'text' \(fields: label\)"),
        ({"text": "a"}, r"no field 'label' \(fields: text\)"),
        ({"text": None, "label": 1}, "the field 'text' is null"),
        ({"text": ["a"], "label": 1}, "the field 'text' is a list"),
        ({"text": "a", "label": [1]}, "the field 'label' is a list"),
        ('{"text": ', "not valid JSON"),
    ],
)
def test_a_bad_record_is_an_error_or_is_counted(write, record, message):
    good = {"text": "a", "label": 1}
    settings = write(good, record, good)
    with pytest.raises(InputError, match=r"task t: split 'train': .*train\.jsonl:2: " + message):
        Task(**settings).load("train")
    examples = Task(**settings, on_bad_record="skip").load("train")
    assert len(examples) == 2
    assert examples.bad.count == 1
    with pytest.raises(InputError, match=r"no usable record, 2 bad ones; the first: .*:1: "):
        Task(**write(record, record), on_bad_record="skip").load("train")


def test_bad_files_and_bad_fields_are_counted_together(write):
    good = {"text": "a", "label": 1}
    task = Task(**write("{", good, {"text": "a"}, "[]"), on_bad_record="skip")
    examples = task.load("train")
    assert (len(examples), examples.bad.count) == (1, 3)
    assert "train.jsonl:1: not valid JSON" in str(examples.bad.first)


def test_splits(write, tmp_path):
    task = Task(**write({"text": "a", "label": 1}))
    with pytest.raises(InputError, match=r"task t: no split 'test' \(splits: train\)"):
        task.load("test")
    missing = Task(**{**write({"text": "a", "label": 1}), "splits": {"test": "nope.jsonl"}})
    with pytest.raises(InputError, match=r"split 'test': no records at .*nope\.jsonl: the path"):
        missing.load("test")
    absolute = {"train": str(tmp_path / "train.jsonl"), "test": "trai*.jsonl"}
    task = Task(**{**write({"text": "a", "label": 1}), "splits": absolute})
    assert _pairs(task.load("train")) == _pairs(task.load("test")) == [("text: a", "yes")]


def test_a_limit_is_spread_over_the_split(write):
    records = [{"text": str(i), "label": i // 50} for i in range(100)]
    task = Task(**write(*records))
    examples = task.load("train", limit=10)
    assert [example.fields["text"] for example in examples] == [str(i) for i in range(0, 100, 10)]
    assert sum(example.targets == "yes" for example in examples) == 5
    assert len(task.load("train", limit=100)) == len(task.load("train", limit=1000)) == 100
    assert len(task.load("train", limit=99)) == 99
    with pytest.raises(InputError, match="a limit of 0"):
        task.load("train", limit=0)


def test_target_templates_have_no_closed_label_set(write):
    settings = write({"text": "a", "answer": {"text": "b"}}, label=None, verbalizer=None)
    task = Task(**settings, targets="{answer.text}!", metrics="exact_match")
    assert task.labels is None
    assert task.metrics == ("exact_match",)
    assert _pairs(task.load("train")) == [("text: a", "b!")]


def test_settings_of_the_source_reach_it(tmp_path):
    (tmp_path / "a.data").write_bytes('1|é\t"x\n'.replace("|", "\t").encode("latin-1"))
    task = Task(
        name="t", inputs="{b} {c}", label="a", verbalizer={"1": "yes"}, data_dir=str(tmp_path),
        splits={"train": "a.data"}, format="tsv", columns=["a", "b", "c"], quoting=False,
        encoding="latin-1",
    )  # fmt: skip
    assert _pairs(task.load("train")) == [('é "x', "yes")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inputs": "text: {text"}, "inputs='text: {text': expected '}'"),
        ({"inputs": "text"}, "names no field"),
        ({"targets": "{a"}, "targets='{a'"),
        ({"targets": "{a}"}, "either `label` and `verbalizer`, or `targets`"),
        ({"verbalizer": None}, "either `label` and `verbalizer`, or `targets`"),
        ({"label": None}, "set `label`"),
        ({"verbalizer": {1: "a", "1": "b"}}, "two keys of the verbalizer"),
        ({"verbalizer": {"0": "a", "1": " "}}, "the verbalizer's text for '1' is ' '"),
        ({"verbalizer": {"0": "a", "1": 1}}, "the verbalizer's text for '1' is 1"),
        ({"metrics": ()}, "no metric"),
        ({"metrics": ("acuracy",)}, "no metric is called 'acuracy'; did you mean accuracy"),
        ({"positive_label": "maybe"}, "positive_label='maybe' is not a text of its verbalizer ("),
        ({"metrics": "group_exact_match"}, "needs `group`"),
        ({"metrics": "f1", "verbalizer": {"0": "a", "1": "b", "2": "c"}}, "takes two labels"),
        (
            {"metrics": "mean_f1", "verbalizer": None, "label": None, "targets": "{a}"},
            "mean_f1 needs `verbalizer`",
        ),
        (
            {
                "metrics": "referent_accuracy",
                "verbalizer": None,
                "label": None,
                "targets": "{a}",
            },
            "referent_accuracy needs `label`",
        ),
        ({"on_bad_record": "ignore"}, "on_bad_record must be one of 'error', 'skip', got 'ignore'"),
    ],
)
def test_contradictions_are_found_at_construction(settings, message):
    with pytest.raises(InputError) as error:
        Task(**{**YES_NO, **settings})
    assert message in str(error.value)


def test_preprocess_makes_several_examples_and_train_has_its_own(write):
    def words(record):
        return [{**record, "text": word} for word in record["text"].split()]

    def first_word(record):
        return words(record)[:1]

    settings = write({"text": "a b", "label": 1}, preprocess=words, train_preprocess=first_word)
    settings["splits"]["validation"] = "train.jsonl"
    task = Task(**settings)
    assert _pairs(task.load("validation")) == [("text: a", "yes"), ("text: b", "yes")]
    assert _pairs(task.load("train")) == [("text: a", "yes")]
    with pytest.raises(InputError, match=r":1: .*words cannot use it \(KeyError: 'text'\)"):
        Task(**write({"label": 1}, preprocess=words)).load("train")
    with pytest.raises(InputError, match=r"no record makes an example .*train\.jsonl:1"):
        Task(**write({"text": "a", "label": 1}, preprocess=lambda record: ())).load("train")


def test_scores_come_from_the_declared_metrics(write):
    records = [{"text": t, "label": i % 2, "q": t} for i, t in enumerate("aabb")]
    task = Task(**write(*records), metrics=("accuracy", "f1", "group_exact_match"), group="q")
    examples = task.load("train")
    scores = task.evaluate(["no", "yes", "yes", "yes"], examples)
    assert scores == pytest.approx({"accuracy": 3 / 4, "f1": 4 / 5, "group_exact_match": 1 / 2})
    assert list(scores) == ["accuracy", "f1", "group_exact_match"]
    with pytest.raises(ValueError, match="1 predictions for 4 examples"):
        task.evaluate(["no"], examples)
    with pytest.raises(ValueError, match="0 predictions for 0 examples"):
        task.evaluate([], [])
    with pytest.raises(InputError, match=r"no field 'nope'.*which its metrics need"):
        Task(**write(*records), metrics="group_exact_match", group="nope").evaluate(
            ["no"] * 4, examples
        )


def test_answers_are_compared_with_all_of_them(write):
    settings = write(
        {"text": "a", "answers": ["Paris", "the capital"]},
        label=None, verbalizer=None, targets="{text}", metrics=("exact_match", "squad_f1"),
    )  # fmt: skip
    task = Task(**settings, answers="answers")
    scores = task.evaluate(["capital"], task.load("train"))
    assert scores == {"exact_match": 1.0, "squad_f1": 1.0}
    scores = Task(**settings).evaluate(["capital"], task.load("train"))
    assert scores == {"exact_match": 0.0, "squad_f1": 0.0}


@pytest.mark.parametrize("answer", ["Paris", 1912, ["Rome", 1912]])
def test_one_answer_need_not_be_a_list_nor_a_text(write, answer):
    settings = write(
        {"text": "a", "answer": answer},
        label=None, verbalizer=None, targets="{text}", metrics=("exact_match", "squad_f1"),
    )  # fmt: skip
    task = Task(**settings, answers="answer")
    right = str(answer[-1] if isinstance(answer, list) else answer)
    scores = task.evaluate([right], task.load("train"))
    assert scores == {"exact_match": 1.0, "squad_f1": 1.0}
    assert task.evaluate([right[0]], task.load("train")) == {"exact_match": 0.0, "squad_f1": 0.0}


def test_a_described_task_formats_and_scores_alike(write):
    task = Task(**write({"text": "a", "label": True}, verbalizer={False: "no", True: "yes"}))
    description = json.loads(json.dumps(task.describe()))
    described = Task.from_description({**description, "of_a_later_version": 1})
    assert described.describe() == description
    assert described.format_inputs({"text": "b"}) == described.format_line("b") == "text: b"
    assert described.evaluate(["yes"], task.load("train")) == {"accuracy": 1.0}
    with pytest.raises(InputError, match=r"no split 'train' \(splits: none\)"):
        described.load("train")
    with pytest.raises(InputError, match=r"task t: no field 'text'.*its inputs are 'text: {text}'"):
        described.format_inputs({"sentence": "b"})
    for key in ("name", "inputs"):
        with pytest.raises(InputError, match=f"lacks '{key}'"):
            Task.from_description({**description, key: None})


def test_lines_need_a_template_of_one_field():
    task = Task(**{**YES_NO, "inputs": "a: {a} b: {b}"})
    with pytest.raises(InputError, match="cannot fill the fields a, b; give JSON lines"):
        task.format_line("x")
    assert task.format_inputs({"a": 1, "b": 2}) == "a: 1 b: 2"


def test_a_described_preprocess_is_looked_up_and_never_imported():
    settings: dict[str, Any] = {"name": "wsc", "inputs": "{marked_text}", "targets": "{referent}"}
    record = {
        "text": "Mark told Pete he lied .",
        "target": {"span1_text": "Mark", "span2_text": "he", "span2_index": 3},
    }
    task = Task(**settings, preprocess=super_glue.wsc)
    described = Task.from_description(json.loads(json.dumps(task.describe())))
    assert described.preprocess is super_glue.wsc
    assert described.format_inputs(record) == "Mark told Pete *he* lied ."

    hostile = {**task.describe(), "preprocess": "os.system"}
    with pytest.raises(InputError, match=r"os\.system, which is not part of ptjax"):
        Task.from_description(hostile)
    own = Task.from_description(hostile, preprocess=lambda r: [{"marked_text": r["text"]}])
    assert own.format_inputs({"text": "x"}) == "x"
    several = Task.from_description(hostile, preprocess=lambda r: [r, r])
    with pytest.raises(InputError, match="makes 2 examples"):
        several.format_inputs({"marked_text": "x"})


@hypothesis.given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_goes_through_unchanged(text):
    assert Task(**YES_NO).format_inputs({"text": text}) == f"text: {text}"


def test_tfds_sources(monkeypatch):
    from ptjax.data import tasks
    from ptjax.data.sources import Record, Records

    asked = []

    def read(source, *, split, data_dir):
        asked.append((source, split, data_dir))
        return Records([Record({"text": "a", "label": 1}, source, 1)])

    monkeypatch.setattr(tasks, "read_tfds", read)
    task = Task(**YES_NO, splits={"validation": "tfds:glue/sst2:2.0.0"}, data_dir="/tfds")
    assert _pairs(task.load("validation")) == [("text: a", "yes")]
    assert asked == [("tfds:glue/sst2:2.0.0", "validation", "/tfds")]


def test_held_out_examples_leave_train_and_make_validation(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(f'{{"text": "t{i}"}}\n' for i in range(10)))
    task = Task(
        name="t",
        data_dir=str(tmp_path),
        splits={"train": "train.jsonl"},
        inputs="{text}",
        targets="{text}",
        held_out=3,
    )
    train, held = ([e.inputs for e in task.load(s)] for s in ("train", "validation"))
    assert held == ["t0", "t3", "t6"]
    assert train == ["t1", "t2", "t4", "t5", "t7", "t8", "t9"]
    with pytest.raises(InputError, match="held_out"):
        dataclasses.replace(task, held_out=10).load("train")
    with pytest.raises(InputError, match="held_out"):
        dataclasses.replace(task, splits={"train": "a", "validation": "b"})
