"""`Task.from_records`: sources, labels, the held-out share, and what is refused or warned of."""

from __future__ import annotations

import datetime
import decimal
import doctest
import json
import logging
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from ptjax.data import division, labels, plain
from ptjax.data.division import divide
from ptjax.data.sources import read_records
from ptjax.data.tasks import Task
from ptjax.errors import InputError

TICKETS = [
    {"body": f"ticket {i}", "category": ("billing", "login", "other")[i % 3], "customer": i // 4}
    for i in range(40)
]
HOW = {"inputs": "{body}", "label": "category"}


def texts(task: Task, split: str) -> list[str]:
    return [example.inputs for example in task.load(split)]


def targets(task: Task, split: str = "train") -> list[str]:
    return [example.targets for example in task.load(split)]


@pytest.fixture
def logged(caplog):
    """The messages of a level so far."""
    caplog.set_level(logging.INFO, logger="absl")
    return lambda level=logging.WARNING: [
        record.getMessage() for record in caplog.records if record.levelno == level
    ]


# Sources


def write_tickets(folder, kind: str) -> str:
    path = folder / f"tickets.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TICKETS), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in TICKETS))
    else:
        comma = {"csv": ",", "tsv": "\t"}[kind]
        rows = [comma.join(map(str, row.values())) for row in TICKETS]
        path.write_text("\n".join([comma.join(TICKETS[0]), *rows]) + "\n")
    return str(path)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "tsv"])
def test_a_file_gives_the_task_of_its_records(tmp_path, kind):
    path = write_tickets(tmp_path, kind)
    task, of_list = Task.from_records(path, **HOW), Task.from_records(TICKETS, **HOW)
    assert (task.verbalizer, task.labels) == (of_list.verbalizer, of_list.labels)
    assert texts(task, "train") == texts(of_list, "train")
    assert targets(task) == targets(of_list)
    # A command can read the file, but not the list.
    assert task.splits == {"train": path} and "in_memory" not in task.describe()
    assert of_list.describe()["in_memory"] is True
    halves = Task.from_records(path, 0.5, **HOW), Task.from_records(TICKETS, 0.5, **HOW)
    assert texts(halves[0], "validation") == texts(halves[1], "validation")
    assert halves[0].in_memory


def test_iterables_and_tables_give_the_same_task(tmp_path):
    task = Task.from_records(TICKETS, **HOW)
    for source in (
        tuple(TICKETS),
        (row for row in TICKETS),
        pyarrow.Table.from_pylist(TICKETS),
        [row | {"customer": np.int64(row["customer"])} for row in TICKETS],
        {"train": TICKETS, "unused": [1]},
    ):
        assert Task.from_records(source, **HOW) == task
    assert Task.from_records(TICKETS[:-1], **HOW) != task
    assert Task.from_records([TICKETS[0] | {"customer": 5}, *TICKETS[1:]], **HOW) != task
    splits = {"train": TICKETS[:30], "dev": TICKETS[30:35], "test": TICKETS[35:]}
    assert Task.from_records(splits, **HOW) == Task.from_records(
        TICKETS[:30], TICKETS[30:35], TICKETS[35:], **HOW
    )


def test_the_records_are_copied():
    rows = [{"body": ["a", "b"], "category": str(i)} for i in range(2)]
    task = Task.from_records(rows, inputs="{body.0}", label="category")
    rows[0]["body"][0] = "changed"
    rows.clear()
    assert texts(task, "train") == ["a", "a"]


def test_values_of_other_libraries_become_plain(logged):
    row = {
        "text": np.str_("a"),
        "bytes": b"caf\xc3\xa9",
        "whole": np.int8(3),
        "real": np.float64(0.5),
        "nan": float("nan"),
        "truth": np.bool_(True),
        "day": datetime.date(2024, 5, 1),
        "moment": np.datetime64("2024-05-01T10:00"),
        "never": np.datetime64("NaT", "s"),
        "price": decimal.Decimal("1.50"),
        "list": np.array([[1, 2]]),
        "set": {"b", "a"},
        1: {"inner": (1, None)},
    }
    [fields] = plain.plain_rows([row], "t")
    assert fields == {
        "text": "a",
        "bytes": "café",
        "whole": 3,
        "real": 0.5,
        "nan": None,
        "truth": True,
        "day": "2024-05-01",
        "moment": "2024-05-01T10:00",
        "never": None,
        "price": "1.50",
        "list": [[1, 2]],
        "set": ["a", "b"],
        "1": {"inner": [1, None]},
    }
    assert json.loads(json.dumps(fields)) == fields
    assert plain.plain_rows([{"a": 1, "f": len}, {"a": 2, "f": 3}], "t") == [{"a": 1}, {"a": 2}]
    assert logged() == [
        "t: column 'f' holds values of type builtin_function_or_method, not text or numbers; it is "
        "left out"
    ]
    for module in (plain, labels, division):
        result = doctest.testmod(module)
        assert result.attempted and not result.failed


def test_parquet_is_a_format_of_task_files(tmp_path):
    path = write_tickets(tmp_path, "parquet")
    records = read_records(path)
    assert [record.fields for record in records] == TICKETS
    assert (records[4].where, records[4].lines) == (f"{path}:5", 1)
    assert [r.fields for r in read_records(f"{tmp_path}/*.parquet", format="parquet")] == TICKETS
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "tickets.parquet").read_bytes()[:-20])
    with pytest.raises(InputError, match=r"cut\.parquet: cannot be read as Parquet \("):
        read_records(tmp_path / "cut.parquet")
    for wrong, value in (("columns", ["a"]), ("quoting", True)):
        with pytest.raises(InputError, match=f"`{wrong}`"):
            read_records(path, **{wrong: value})


def test_a_small_parquet_file_that_expands_without_end_is_refused(tmp_path, monkeypatch):
    table = pyarrow.table({"text": ["x" * 10_000] * 2_000})  # 20 MB in a few kB
    path = tmp_path / "bomb.parquet"
    pyarrow.parquet.write_table(table, path)
    assert path.stat().st_size < 50_000 and len(read_records(path)) == 2_000
    monkeypatch.setattr("ptjax.untrusted.MIN_INFLATED", 1 << 20)
    with pytest.raises(InputError, match=r"bomb\.parquet: .* bytes expand to more than"):
        read_records(path)


# Labels


@pytest.mark.parametrize(
    ("values", "texts_of_labels", "of_records"),
    [
        (["b", " a ", "a"], ("a", "b"), ["b", "a", "a"]),
        ([2, 10, 1], ("1", "2", "10"), ["2", "10", "1"]),
        ([2.0, 1.0], ("1", "2"), ["2", "1"]),
        ([1.0, 2, 1], ("1", "2"), ["1", "2", "1"]),
        ([True, False], ("false", "true"), ["true", "false"]),
        ([0.5, 1.5], ("0.5", "1.5"), ["0.5", "1.5"]),
    ],
)
def test_labels_imply_the_verbalizer(values, texts_of_labels, of_records, logged):
    task = Task.from_records([{"x": f"t{i}", "y": v} for i, v in enumerate(values)],
                             inputs="{x}", label="y")  # fmt: skip
    assert task.labels == texts_of_labels
    assert targets(task) == of_records
    first = logged(logging.INFO)[0]
    assert first.startswith(f"y: {len(texts_of_labels)} labels from the data: ")
    assert ("words learn better" in first) == all(text.isdigit() for text in texts_of_labels)


def test_a_given_verbalizer_wins_and_open_targets_need_no_label():
    words = {"billing": "money", "login": "access", "other": "rest"}
    task = Task.from_records(TICKETS, verbalizer=words, name="tickets", **HOW)
    assert targets(task)[:3] == ["money", "access", "rest"] and task.name == "tickets"
    task = Task.from_records(
        TICKETS, inputs="{body}", targets="it is {category}", metrics="accuracy"
    )
    assert targets(task)[0] == "it is billing"
    assert task.labels is None and task.name == "records"


def test_other_spellings_of_a_label_in_validation():
    """A column of integers with a gap is one of floats."""
    rows = [{"x": f"t{i}", "y": i % 2} for i in range(4)]
    task = Task.from_records(rows, [{"x": "v", "y": 1.0}], inputs="{x}", label="y")
    assert targets(task, "validation") == ["1"]


def test_several_labels_a_row_become_sorted_words(logged):
    rows = [{"x": f"t{i}", "y": y} for i, y in enumerate([["b", "a", "b"], ["a"], [], ("c",)])]
    task = Task.from_records(rows, rows[:1], inputs="{x}", label="y")
    assert targets(task) == ["a, b", "a", "none", "c"]
    assert targets(task, "validation") == ["a, b"] and task.labels is None
    assert "y, split train: 4 records: a (2), b (1), c (1)" in logged(logging.INFO)
    again = Task.from_records(
        rows, inputs="{x}", label="y", verbalizer={"a": "z", "b": "q", "c": "c"}
    )
    assert targets(again) == ["q, z", "z", "none", "c"]
    with pytest.raises(InputError, match="'none' is a label, and also the target of an empty list"):
        Task.from_records([*rows, {"x": "n", "y": ["none"]}], inputs="{x}", label="y")


def test_counts_are_logged_and_an_imbalance_is_a_warning(logged):
    def rows(many):
        return [{"x": f"t{i}", "y": "rare" if i < 3 else "usual"} for i in range(many + 3)]

    Task.from_records(rows(30), inputs="{x}", label="y")
    assert logged() == []
    assert logged(logging.INFO)[-1] == "y, split train: 33 records: usual (30), rare (3)"
    Task.from_records(rows(31), inputs="{x}", label="y")
    [warning] = logged()
    assert warning.startswith("y: 'usual' has 31 records in train and 'rare' 3, a ratio of 10:1;")


# The share that is held out


def test_a_share_is_stratified_and_the_same_for_the_same_seed():
    rows = [{"x": f"t{i}", "y": "rare" if i % 10 == 0 else "usual"} for i in range(200)]
    how = {"inputs": "{x}", "label": "y"}
    task = Task.from_records(rows, 0.1, **how)
    held_out, train = targets(task, "validation"), targets(task)
    assert (held_out.count("rare"), held_out.count("usual")) == (2, 18)
    assert (train.count("rare"), train.count("usual")) == (18, 162)
    assert sorted(texts(task, "train") + texts(task, "validation")) == sorted(
        row["x"] for row in rows
    )
    assert Task.from_records(iter(rows), 0.1, **how) == task
    assert texts(Task.from_records(rows, 0.1, **how, seed=1), "validation") != texts(
        task, "validation"
    )


def test_a_group_and_equal_inputs_stay_on_one_side(logged):
    task = Task.from_records(TICKETS, 0.25, **HOW, group="customer")
    customers = [{e.fields["customer"] for e in task.load(s)} for s in ("train", "validation")]
    assert customers[1] and not customers[0] & customers[1]
    assert 6 <= len(task.load("validation")) <= 12  # a quarter of 40, in groups of 4
    twice = [row | {"body": row["body"].lower()} for row in TICKETS for _ in range(2)]
    task = Task.from_records(twice, 0.25, **HOW)
    assert len(task.load("validation")) == 18  # of 28, 26 and 26 records, in pairs
    assert not set(texts(task, "train")) & set(texts(task, "validation"))
    assert logged() == []


def test_groups_that_share_an_input_stay_on_one_side_together(logged):
    """Also through a third group, and with records that have no group."""
    rows = [
        {"body": f"{category} {customer}", "category": category, "customer": customer}
        for customer in range(24)
        for category in ("billing", "login", "other")
    ]
    for first in range(0, 24, 3):  # three customers: the second shares an input with either other
        for customer, body in ((0, "a"), (1, "a"), (1, "b"), (2, "b"), (None, "a")):
            who = None if customer is None else first + customer
            rows.append({"body": f"{body} {first}", "category": "billing", "customer": who})
    task = Task.from_records(rows, 0.25, **HOW, group="customer")
    train, held_out = (task.load(split) for split in ("train", "validation"))
    assert not {e.inputs for e in train} & {e.inputs for e in held_out}
    customers = [
        {e.fields["customer"] for e in examples} - {None} for examples in (train, held_out)
    ]
    assert not customers[0] & customers[1] and len(customers[1]) == 6
    # Two of the eight triples: a quarter of every label.
    assert Counter(targets(task, "validation")) == {"billing": 16, "login": 6, "other": 6}
    assert logged() == []
    assert Task.from_records(iter(rows), 0.25, **HOW, group="customer") == task


@pytest.mark.parametrize(
    ("counts", "share", "held_out"),
    [
        ({"a": 10, "b": 10}, 0.1, {"a": 1, "b": 1}),
        ({"a": 4, "b": 4, "c": 4, "d": 4, "e": 4}, 0.1, {"of": 2}),  # 0.4 of each
        ({"a": 1, "b": 99}, 0.9, {"b": 89}),  # the only one of a stays in train, 89.1 of b
        ({"a": 2, "b": 2}, 0.9, {"a": 1, "b": 1}),
    ],
)
def test_the_largest_remainders_are_rounded_up(counts, share, held_out):
    of_records = [(label,) for label, number in counts.items() for _ in range(number)]
    chosen = divide(of_records, range(len(of_records)), share, seed=5)
    got = [label for (label,), held in zip(of_records, chosen, strict=True) if held]
    if "of" in held_out:
        assert len(got) == len(set(got)) == held_out["of"]
    else:
        assert {label: got.count(label) for label in got} == held_out


# What is refused, and what is a warning


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": []}, "train is empty: it has no records"),
        ({"train": TICKETS[::3]}, "all 14 records of train have the label 'billing'; training "),
        (
            {"label": "catgory"},
            "train has no column 'catgory', which label names; did you mean category? "
            "(columns: body, category, customer)",
        ),
        (
            {"inputs": "{subject}: {body}"},
            "train has no column 'subject', which inputs names (columns: body, category, customer)",
        ),
        ({"group": "client"}, "train has no column 'client', which group names"),
        ({"targets": "{x}", "label": None}, "train has no column 'x', which targets names"),
        ({"inputs": "body"}, "inputs='body' is a column; write '{body}'"),
        ({"inputs": "{body"}, "inputs='{body': expected '}'"),
        ({"label": None}, "give label, the column with the label, or targets for open text"),
        ({"validation": [{"body": "a"}]}, "validation has no column 'category'"),
        (
            {"validation": [{"body": "a", "category": "refund"}]},
            "validation has labels that train lacks: refund (1); the first is validation:1 "
            "(labels: billing, login, other)",
        ),
        (
            {"verbalizer": {"billing": "b", "login": "l"}},
            "train has labels that the verbalizer lacks: other (13); the first is train:3",
        ),
        (
            {"train": [*TICKETS, {"body": None, "category": "login"}, {"body": "a"}]},
            "2 of 42 records of train cannot be used; the first, train:41: the field 'body' is "
            "null (or NaN); correct or drop them, or give on_bad_record='skip'",
        ),
        (
            {"train": [*TICKETS, {"body": "\ud800", "category": "login"}]},
            "the first, train:41: characters that are not text",
        ),
        ({"validation": 1.0}, "validation=1.0 must be a share of train, such as 0.1, or records"),
        ({"validation": True}, "validation is a bool; give a list of dicts"),
        ({"validation": 0.001}, "validation=0.001 of 40 records in 40 groups holds out none"),
        ({"train": {"body": ["a"]}}, "train is a dict of body; give a list of records"),
        ({"train": ["a"]}, "train:1: a str, not a record"),
        ({"train": len}, "train is a builtin_function_or_method; give a list of dicts"),
        (
            {"train": {"train": TICKETS, "dev": TICKETS}, "validation": 0.5},
            "validation=0.5, but train has a validation split; drop one",
        ),
        (
            {"train": {"train": TICKETS, "dev": TICKETS}, "validation": TICKETS},
            "validation is given twice, also as 'dev' of train; drop one",
        ),
        ({"preprocess": len}, "from_records takes no preprocess; prepare the records first"),
        ({"metric": "f1"}, "from_records has no setting 'metric'; did you mean metrics?"),
        ({"columns": ["a"]}, "columns applies to files, and train is not one; drop it"),
        ({"metrics": "acc"}, "no metric is called 'acc'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(given, message):
    with pytest.raises(InputError) as error:
        Task.from_records(**{"train": TICKETS, **HOW} | given)
    text = str(error.value)
    assert text.startswith("task ") and "\n" not in text
    assert message in text


def test_records_that_do_not_fit_can_be_skipped():
    bad = [{"body": None, "category": "login"}, {"body": "a"}, {"body": "b", "category": "  "}]
    for validation in (None, 0.25):
        task = Task.from_records([*bad, *TICKETS], validation, on_bad_record="skip", **HOW)
        examples = task.load("train")
        assert (len(examples), examples.bad.count) == (40 if validation is None else 30, 3)


def test_what_is_in_train_too_is_counted(logged):
    validation = [*TICKETS[:3], {"body": "new", "category": "login", "customer": 9}]
    Task.from_records(TICKETS, validation, **HOW, group="customer")
    assert logged() == [
        "category: 3 of 4 records of validation have the same input as a record of train, which "
        "flatters their score",
        "category: 4 of 4 records of validation share their customer with records of train",
        "category: validation has only 4 records; accuracies on them differ by up to 0.25 by "
        "chance (one standard error), so the best step is little more than a guess",
    ]


def test_a_task_without_validation_says_how_to_get_one():
    with pytest.raises(InputError, match=r"no split 'validation' \(splits: train\); .*held_out"):
        Task.from_records(TICKETS, **HOW).load("validation")
