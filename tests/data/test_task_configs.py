"""Every declaration in gin_configs/tasks parses, builds, and reads the files it was written for."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from pathlib import Path

import gin
import pytest
from markers import SHARED

from ptjax.data import tasks
from ptjax.data.sources import read_records

CONFIGS = Path(__file__).parents[2] / "gin_configs" / "tasks"
DATA = SHARED / "data"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.gin"))

# Examples per split of the sets that ship with ptjax.
OWN = {
    "sentiment": {"train": 800, "validation": 200, "test": 200},
    "tickets": {"train": 480, "validation": 150, "test": 180},
}
# Examples per split. WSC's training set holds the true ones of its 554 records.
COUNTS = {
    "sst2": {"train": 67_349, "validation": 872, "test": 1_821},
    "imdb": {"train": 25_000, "test": 25_000},
    "ag_news": {"train": 10_001, "test": 7_600},
    "mrpc": {"train": 4_076, "test": 1_725},
    "qqp": {"train": 10_000, "validation": 10_000},
    "cb": {"train": 250, "validation": 56},
    "rte": {"train": 2_490, "validation": 277},
    "wic": {"train": 5_428, "validation": 638},
    "copa": {"train": 400, "validation": 100},
    "wsc": {"train": 259, "validation": 104},
    "multirc": {"train": 27_243, "validation": 4_848},
    "boolq": {"validation": 3_270},
    "record": {},
}


def _build(name: str, data_dir: Path | str) -> tasks.Task:
    gin.clear_config()
    gin.parse_config_files_and_bindings(
        [str(CONFIGS / f"{name}.gin")], [f"DATA_DIR = '{data_dir}'"]
    )
    try:
        return gin.get_configurable(tasks.Task)()
    finally:
        gin.clear_config()


@pytest.mark.parametrize("name", NAMES)
def test_every_task_builds_and_its_description_formats_alike(name, tmp_path):
    task = _build(name, tmp_path)
    assert task.name == name
    assert task.data_dir == (f"package:{name}" if name in OWN else str(tmp_path))
    assert {"train"} <= set(task.splits) <= {"train", "validation", "test"}
    described = tasks.Task.from_description(json.loads(json.dumps(task.describe())))
    assert described.describe() == task.describe()
    assert described.labels == task.labels


@pytest.mark.parametrize("name", OWN)
def test_the_projects_own_sets(name):
    task = _build(name, "")
    assert {split: len(task.load(split)) for split in task.splits} == OWN[name]
    for split, size in OWN[name].items():
        counts = collections.Counter(example.targets for example in task.load(split))
        assert set(counts) == set(task.verbalizer.values())
        assert set(counts.values()) == {size // len(counts)}


def _five_words_on(text: str) -> set[tuple[str, ...]]:
    words = re.sub(r"[^a-z0-9' ]", " ", text.lower()).split()
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def test_no_ticket_repeats_another():
    """The counts in its README. A text in two splits would make the test score too good."""
    records = [r.fields for s in OWN["tickets"] for r in read_records(f"package:tickets/{s}.jsonl")]
    runs = collections.Counter(run for r in records for run in _five_words_on(r["body"]))
    assert len({r["body"].lower() for r in records}) == len(records) == 810
    assert [run for run, times in runs.items() if times > 1] == []
    cells = collections.Counter((r["category"], r["topic"]) for r in records)
    assert len(cells) == 3 * 5 and set(cells.values()) == {54}


def test_counts_are_stated_for_every_task():
    assert set(COUNTS) == set(NAMES) - set(OWN)


@pytest.mark.shared
@pytest.mark.parametrize("name", sorted(COUNTS))
def test_every_split_that_exists_loads_whole(name):
    task = dataclasses.replace(_build(name, DATA), held_out=0)
    existing = {s: file for s, file in task.splits.items() if (DATA / file).exists()}
    counts = {}
    for split in existing:
        examples = task.load(split)
        counts[split] = len(examples)
        assert examples.bad.count == 0
        if task.labels:
            assert {example.targets for example in examples} == set(task.labels)
        scores = task.evaluate([example.targets for example in examples], examples)
        perfect = dict.fromkeys(task.metrics, 1.0)
        if name == "wsc":  # naming the candidate is right only where it is the referent
            right = sum(example.fields["label"] for example in examples)
            perfect["referent_accuracy"] = right / len(examples)
        assert scores == pytest.approx(perfect)
    assert counts == COUNTS[name]


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "split", "index", "inputs", "targets"),
    [
        (
            "cb",
            "train",
            0,
            "hypothesis: the language was peeled down premise: It was a complex language. Not "
            "written down but handed down. One might say it was peeled down.",
            "entailment",
        ),
        (
            "copa",
            "validation",
            0,
            "choice1: The toilet filled with water. choice2: Water flowed from the spout. "
            "premise: The man turned on the faucet. question: effect",
            "choice2",
        ),
        (
            "wic",
            "train",
            2,
            "sentence1: Run rogue. sentence2: She ran 10 miles that day. word: run",
            "False",
        ),
        (
            "wsc",
            "validation",
            0,
            "Bernard , who had not told the government official that he was less than 21 when he "
            "filed for a homestead claim, did not consider that he had done anything dishonest. "
            "Still, anyone who knew that he was 19 years old could take his claim away from "
            "*him* .",
            "anyone",
        ),
    ],
)
def test_examples_read_as_t5_writes_them(name, split, index, inputs, targets):
    example = _build(name, DATA).load(split)[index]
    assert (example.inputs, example.targets) == (inputs, targets)


@pytest.mark.shared
def test_record_on_fewglue_has_one_training_example_per_answer():
    task = _build("record", DATA)
    folder = DATA / "few_glue_32dev" / "ReCoRD"
    files = {"train": str(folder / "train.jsonl"), "validation": str(folder / "train.jsonl")}
    task = tasks.Task(**{**vars(task), "splits": files})
    train, validation = task.load("train"), task.load("validation")
    assert len(train) == sum(len(example.fields["answers"]) for example in validation)
    assert all("@highlight" not in example.inputs for example in validation)
    assert task.evaluate([e.targets for e in validation], validation)["exact_match"] == 1.0
