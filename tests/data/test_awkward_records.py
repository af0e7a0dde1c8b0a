"""What users' data files hold that a plain reader takes for something else."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging

import pytest
from conftest import make_settings, tune
from etils import epath
from letters import LETTERS

from ptjax import train
from ptjax.data import metrics
from ptjax.data.catalogue import squad
from ptjax.data.examples import Example
from ptjax.data.preprocess import tokenize_examples
from ptjax.data.sources import read_records
from ptjax.data.tasks import Task
from ptjax.data.tokenizer import load_tokenizer
from ptjax.errors import InputError
from ptjax.evaluation.evaluator import Evaluator, check_cut, report_examples, report_lost
from ptjax.settings import Evaluation
from ptjax.trainer.setup import set_up_members
from ptjax.trainer.sweep import MemberOverrides

OPEN = {"name": "t", "inputs": "{text}", "targets": "{target}"}
LABELS = {"name": "t", "inputs": "{text}", "label": "label"}
MRPC = {"0": "different", "1": "paraphrase"}


def warnings_of(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# CSV and TSV


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("stray", [[500], [2, 3, 700], [999], [1001]])
def test_case_3_1_a_stray_quote_loses_its_own_line_alone(tmp_path, stray, newline):
    """1,002 lines, a third of them with proper quotes; which are lost is known exactly."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator=newline)
    writer.writerows(
        [i, f'"said" {i}, twice' if i % 3 == 0 else f"plain {i}"] for i in range(2, 1003)
    )
    lines = ["id,text", *stream.getvalue().split(newline)[:-1]]
    for number in stray:
        lines[number] = f'{number + 1},"opened only'
    path = tmp_path / "a.csv"
    path.write_bytes("".join(line + newline for line in lines).encode())
    records = read_records(path, on_bad_record="skip")
    assert records.bad.count == records.bad.lines == len(stray)
    wanted = [i for i in range(2, 1003) if i - 1 not in stray]
    assert [int(record.fields["id"]) for record in records] == wanted
    assert [record.line for record in records] == wanted
    assert records[0].fields["text"] == ('"said" 3, twice' if 1 in stray else "plain 2")
    with pytest.raises(InputError, match=rf"a\.csv:{stray[0] + 1}: bad quoting") as refused:
        read_records(path)
    for set_it in (
        "--gin.ptjax.Task.quoting=False (infer: --quoting=false)",
        "--gin.ptjax.Task.on_bad_record=\"'skip'\" (infer: --on_bad_record=skip)",
    ):
        assert set_it in str(refused.value)


def test_case_3_1_the_lines_of_a_record_that_spans_several_are_counted(tmp_path, caplog):
    rows = ["text,label", '"a\nb",1', '"c\nd\ne",1,2', "f,1", '"g', "h,1", '"i\nj",2']
    (tmp_path / "train.csv").write_text("\n".join(rows) + "\n")
    records = read_records(tmp_path / "train.csv", on_bad_record="skip")
    assert [record.fields["text"] for record in records] == ["a\nb", "f", "h", "i\nj"]
    assert (records.bad.count, records.bad.lines) == (2, 4)
    task = Task(
        **LABELS,
        verbalizer={"1": "yes"},
        splits={"train": "train.csv"},
        data_dir=str(tmp_path),
        on_bad_record="skip",
    )
    examples = task.load("train")  # without the unknown label, 2, of two lines
    assert (examples.bad.count, examples.bad.lines) == (3, 6)
    report_examples(task, "train", examples)
    assert any("left out 3 of 6 records (6 lines); the first: " in w for w in warnings_of(caplog))


def test_case_3_6_a_tsv_whose_quotes_only_enclose_is_said(tmp_path, caplog):
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
    writer.writerow(["text", "label"])
    writer.writerows([f'"word {i}" she said' if i % 2 else f"plain {i}", 1] for i in range(40))
    path = tmp_path / "pandas.tsv"
    path.write_text(stream.getvalue())
    raw = read_records(path)
    assert raw[1].fields["text"] == '"""word 1"" she said"'
    [said] = warnings_of(caplog)
    assert (
        "double quotes only enclose fields, 20 of them" in said
        and "--gin.ptjax.Task.quoting=True (infer: --quoting=true)" in said
    )
    caplog.clear()
    assert read_records(path, quoting=True)[1].fields["text"] == '"word 1" she said'
    assert read_records(path, quoting=False)[1].fields == raw[1].fields
    assert not warnings_of(caplog)


@pytest.mark.parametrize(
    "texts",
    [
        ['He said "no" twice', '"all of it"'],
        ['"first" and "last"', '"""doubled"""'],
        ['"opened only', "plain"],
        ['"'],
        ["no quotes"],
    ],
)
def test_case_3_6_plain_quotes_stay_as_they_are(tmp_path, caplog, texts):
    path = tmp_path / "mrpc.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{text}\t1\n" for text in texts))
    assert [record.fields["text"] for record in read_records(path)] == texts
    assert not warnings_of(caplog)


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_case_3_9_the_index_column_of_pandas_is_left_out(tmp_path, caplog, suffix, delimiter):
    rows = [["", "text", "label"], ["0", "a", "1"], ["1", "b", "0"], ["2", "too short"]]
    path = tmp_path / f"a.{suffix}"
    path.write_text("".join(delimiter.join(row) + "\n" for row in rows))
    records = read_records(path, on_bad_record="skip")
    assert [r.fields for r in records] == [
        {"text": "a", "label": "1"},
        {"text": "b", "label": "0"},
    ]
    assert warnings_of(caplog) == [f"{path}:1: the first column has no name and is ignored"]
    assert "2 columns instead of 3 (text, label)" in (records.bad.first or "")


@pytest.mark.parametrize("newline", ["\r", "\n", "\r\n"])
@pytest.mark.parametrize(
    ("name", "lines", "fields"),
    [
        ("a.jsonl", ['{"t": "x"}', "", '{"t": "y"}'], [{"t": "x"}, {"t": "y"}]),
        ("a.tsv", ["t\tu", "x\t1", "y\t2"], [{"t": "x", "u": "1"}, {"t": "y", "u": "2"}]),
        ("a.csv", ["t,u", "x,1", "y,2"], [{"t": "x", "u": "1"}, {"t": "y", "u": "2"}]),
        ("a.txt", ["x", "y\u2028z"], [{"text": "x"}, {"text": "y\u2028z"}]),
    ],
)
def test_case_3_10_every_format_takes_every_line_end(tmp_path, newline, name, lines, fields):
    path = tmp_path / name
    path.write_bytes((newline.join(lines) + newline).encode())
    records = read_records(path)
    assert [record.fields for record in records] == fields
    assert records[-1].line == len(lines)
    bad = tmp_path / f"bad_{name}"
    bad.write_bytes((newline.join(lines) + newline).encode() + b"\xff")
    with pytest.raises(InputError, match=rf"bad_{name}:{len(lines) + 1}: not utf-8"):
        read_records(bad)


# Values


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "null"])
def test_case_3_5_a_value_that_json_lacks_is_refused_like_null(tmp_path, value):
    (tmp_path / "a.jsonl").write_text(f'{{"text": {value}, "target": "x", "unread": NaN}}\n')
    task = Task(**OPEN, splits={"train": "a.jsonl"}, data_dir=str(tmp_path))
    with pytest.raises(InputError, match=r"a\.jsonl:1: the field 'text' is null \(or NaN\)"):
        task.load("train")
    [record] = read_records(tmp_path / "a.jsonl")
    assert json.dumps(record.fields, allow_nan=False)  # what is written again is JSON


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, [float("nan")], [None]])
def test_case_3_5_numbers_that_are_none_are_refused_wherever_they_come_from(value):
    """As TFDS and the answers of an example may hold them."""
    task = Task(**OPEN, answers="answers", metrics="exact_match")
    fields = {"text": "a", "target": "b", "answers": value}
    with pytest.raises(InputError, match=r"the field 'answers' is (nan|inf|null)"):
        task.evaluate(["b"], [Example("a", "b", fields, "f", 1)])
    if not isinstance(value, list):
        with pytest.raises(InputError, match=r"the field 'text' is (nan|inf|null)"):
            task.format_inputs({"text": value})


def test_case_3_4_no_answer_rightly_none_is_right(tmp_path):
    records = [
        {"question": "q", "context": "c", "answers": {"text": ["the sea", "sea"], "start": [0, 4]}},
        {"question": "r", "context": "d", "answers": {"text": [], "start": []}},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    task = Task(
        name="squad",
        inputs="question: {question} context: {context}",
        targets="{answer}",
        answers="answers",
        metrics=("squad_f1", "exact_match"),
        preprocess=squad,
        splits={"train": "a.jsonl"},
        data_dir=str(tmp_path),
    )
    examples = task.load("train")
    assert [example.targets for example in examples] == ["the sea", ""]
    assert task.evaluate(["Sea!", ""], examples) == {"squad_f1": 1.0, "exact_match": 1.0}
    assert task.evaluate(["Sea!", "x"], examples) == {"squad_f1": 0.5, "exact_match": 0.5}
    again = Task.from_description(task.describe())
    assert again.format_inputs({"question": "q", "context": "c"}) == "question: q context: c"


def test_case_3_4_nested_answers_are_usable_or_named():
    fields = {"text": "a", "answers": {"text": ["x", "y"], "start": [1]}}
    settings = {"name": "t", "inputs": "{answers.text.1} {text}", "targets": "{text}"}
    assert Task(**settings).format_inputs(fields) == "y a"
    for inputs, message in (
        ("{answers}", r"'answers' is an object; .*, such as \{answers.text\}, \{answers.start\}"),
        ("{answers.text}", r"'answers.text' is a list; .*, such as \{answers.text.0\}"),
        ("{answers.text.2}", r"no field 'answers.text.2': the list has 2 entries"),
        ("{answers.none}", r"no field 'answers.none' \(fields: text, answers\)"),
    ):
        with pytest.raises(InputError, match=message):
            Task(**settings | {"inputs": inputs}).format_inputs(fields)
    # Both the metric's answers and their nested form.
    task = Task(**OPEN, answers="answers.text", metrics="exact_match")
    assert task.evaluate(["y"], [Example("a", "x", fields, "f", 1)]) == {"exact_match": 1.0}


# What the vocabulary cannot write, what does not fit


def examples_of(*pairs: tuple[str, str]) -> list[Example]:
    return [Example(inputs, targets, {}, "f", i) for i, (inputs, targets) in enumerate(pairs)]


def test_case_3_2_targets_that_do_not_come_back_are_counted(caplog):
    tokenizer = load_tokenizer("package:nano")
    examples = examples_of(
        ("a", "plain text"), ("a", "two  spaces"), ("a", "a\nline"), ("a", "plain text"),
        ("a", "ﬁne"), ("a", "two  spaces"),
    )  # fmt: skip
    source = tokenize_examples(examples, tokenizer, 32, 32)
    report_lost(Task(**OPEN), examples, source, tokenizer)
    [said] = warnings_of(caplog)
    assert "t: 4 of 6 targets cannot be written" in said
    assert "'two  spaces' comes back as 'two spaces'" in said
    caplog.clear()
    # Bytes write everything; labels are refused before.
    tokenizer = load_tokenizer("byt5")
    source = tokenize_examples(examples, tokenizer, 32, 32)
    report_lost(Task(**OPEN), examples, source, tokenizer)
    labelled = Task(**LABELS, verbalizer=MRPC)
    tokenizer = load_tokenizer("package:nano")
    source = tokenize_examples(examples, tokenizer, 32, 32)
    report_lost(labelled, examples, source, tokenizer)
    # What was cut is another matter.
    examples = examples_of(("a", "plain text " * 20))
    source = tokenize_examples(examples, tokenizer, 32, 8)
    report_lost(Task(**OPEN), examples, source, tokenizer)
    assert not warnings_of(caplog)


def test_case_3_2_inputs_with_unknown_pieces_are_counted(caplog):
    tokenizer = load_tokenizer("package:nano")
    unknown = next(c for c in "東𝔊ก䷀" if tokenizer.unk_id in tokenizer.encode(c))
    examples = examples_of(("plain", "x"), (f"so {unknown} and {unknown}", "x"), (unknown, "x"))
    source = tokenize_examples(examples, tokenizer, 32, 32)
    assert [tokenizer.unk_id in source.inputs[i] for i in range(3)] == [False, True, True]
    report_lost(Task(**OPEN), examples, source, tokenizer)
    [said] = warnings_of(caplog)
    assert said.startswith("t: 2 of 3 inputs hold characters") and said.endswith(f" ({unknown})")


@pytest.mark.parametrize("side", ["inputs", "targets"])
def test_case_3_13_lengths_that_cut_nearly_everything_are_refused(side):
    for long, refused in ((10, True), (9, False)):
        texts = ["abcdefgh"] * long + ["a"] * (10 - long)
        pairs = [(text, "a") if side == "inputs" else ("a", text) for text in texts]
        lengths = {"inputs": 32, "targets": 32} | {side: 4}
        examples = examples_of(*pairs)
        source = tokenize_examples(examples, LETTERS, lengths["inputs"], lengths["targets"])
        if not refused:
            check_cut(source, lengths, "x")
            continue
        with pytest.raises(
            InputError, match=rf"x: 10 of 10 {side} are longer .* TASK_FEATURE_LENGTHS\['{side}'\]"
        ):
            check_cut(source, lengths, "x")


def test_case_3_13_a_run_refuses_them(backbone, task, tmp_path):
    lengths = {"inputs": 3, "targets": 4}
    with pytest.raises(InputError, match=r"words, split train: 48 of 48 inputs are longer than 3"):
        tune(tmp_path, task, backbone, feature_lengths=lengths)
    assert not (tmp_path / "metrics.jsonl").exists()


# Metrics


def test_case_3_3_the_positive_label_is_a_setting_and_is_said(backbone, task, caplog):
    caplog.set_level(logging.INFO, logger="absl")
    settings = {**LABELS, "verbalizer": MRPC, "metrics": ("f1",)}
    assert Task(**settings).positive == "paraphrase"
    assert Task(**settings, positive_label="different").positive == "different"
    assert Task(**LABELS, verbalizer=MRPC).positive is None
    examples = examples_of(("a", "paraphrase"), ("b", "paraphrase"), ("c", "different"))
    predictions = ["paraphrase", "different", "different"]
    for label, value in {"paraphrase": 2 / 3, "different": 2 / 3}.items():
        own = Task(**settings, positive_label=label)
        assert own.evaluate(predictions, examples) == {"f1": pytest.approx(value)}
        assert Task.from_description(own.describe()).positive == label
    always = ["paraphrase"] * 3
    for label, value in {"paraphrase": 4 / 5, "different": 0.0}.items():
        own = Task(**settings, positive_label=label)
        assert own.evaluate(always, examples) == {"f1": pytest.approx(value)}
    Evaluator(
        Task(**settings), backbone, backbone.tokenizer, {"inputs": 8, "targets": 8}, Evaluation()
    )
    assert "t: f1 is F1 of 'paraphrase' (Task.positive_label)" in caplog.messages
    results = {"metric": "f1", "positive_label": "paraphrase"}
    assert train.named_metric(results) == "f1 of 'paraphrase'"
    assert train.named_metric(results | {"metric": "mean"}) == "mean (f1 of 'paraphrase')"
    assert train.named_metric({"metric": "accuracy"}) == "accuracy"


def refuses_a_metric(name: str) -> None:
    with pytest.raises(InputError) as raised:
        Task(**LABELS, verbalizer=MRPC, metrics=name)
    assert f"no metric is called '{name}'; there are" in str(raised.value)
    for known in metrics.METRICS:
        assert known in str(raised.value)
    assert "did you mean" not in str(raised.value)


@pytest.mark.parametrize("name", ["wer", "mlqa", "chrf", ""])
def test_case_3_11_an_unknown_metric_lists_what_there_is(name):
    refuses_a_metric(name)
    with pytest.raises(InputError, match=r"'squadf1'; did you mean squad_f1\?$"):
        Task(**LABELS, verbalizer=MRPC, metrics="squadf1")


def test_case_3_12_mlqas_metric_is_not_taken_for_another():
    refuses_a_metric("mlqa")


# A bank


def test_case_3_14_two_references_to_one_task_are_one_task(backbone, task, tmp_path, monkeypatch):
    """gin makes a new, equal one of each; members that share one are an ensemble."""
    loads, load = [], Task.load

    def counted(self, split, limit=None):
        loads.append((self.name, split))
        return load(self, split, limit)

    monkeypatch.setattr(Task, "load", counted)
    other = dataclasses.replace(task, name="other", inputs="{text}")
    tasks = [type(task)(**vars(task)), type(task)(**vars(task)), other]
    members = {f"m{i}": MemberOverrides(seed=i, task=own) for i, own in enumerate(tasks)}
    folder = epath.Path(tmp_path)
    setups = set_up_members(backbone, task, folder, make_settings(), members)
    assert setups[0].data is setups[1].data is not setups[2].data
    for name in ("words", "other"):
        assert [loads.count((name, s)) for s in ("train", "validation", "test")] == [1, 1, 1]
