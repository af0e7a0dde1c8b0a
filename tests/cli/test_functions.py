"""`ptjax.predict`, `infer` and `evaluate` give what the commands give; what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from tiny_prompts import RECORDS, save_prompts, write_mood

import ptjax
from ptjax.data.tasks import Task
from ptjax.errors import InputError
from ptjax.files import JsonObject
from ptjax.inference.predict import Prediction

pytestmark = pytest.mark.usefixtures("own_process")

EVALUATION = "--gin.ptjax.RunSettings.evaluation=@ptjax.Evaluation()"
TEXTS = ["one two", "three four five six", "x"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return save_prompts(tmp_path_factory.mktemp("functions"))


@pytest.fixture(scope="module")
def backbone(place) -> Any:
    return ptjax.load_backbone(place / "backbone")


@pytest.fixture(scope="module")
def bank(place) -> Any:
    return ptjax.make_bank(ptjax.load_prompts(place / "mixed"))


@pytest.fixture
def rows_of(call):
    """The rows that the command `infer` writes."""

    def run(*flags: object) -> list[JsonObject]:
        code, out, err = call("infer", *flags)
        assert code == 0, err
        return [json.loads(line) for line in out.splitlines()]

    return run


def write_jsonl(path: str, rows: list[JsonObject]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_row(prediction: Prediction) -> JsonObject:
    row: JsonObject = {"prediction": prediction.text, "score": prediction.score}
    return row | ({"probabilities": prediction.probabilities} if prediction.probabilities else {})


# As the commands


@pytest.mark.parametrize(
    ("flags", "how"),
    [
        ((), {}),
        (("--decode", "--num_beams=2", "--max_new_tokens=3"),
         {"decode": True, "num_beams": 2, "max_new_tokens": 3}),
        (("--decode", "--temperature=2.5", "--top_p=0.9", "--seed=5"),
         {"decode": True, "temperature": 2.5, "top_p": 0.9, "seed": 5}),
    ],
)  # fmt: skip
def test_records_of_several_prompts_are_answered_as_by_the_command(
    rows_of, place, backbone, bank, flags, how
):
    """To the last bit: batches are the same."""
    write_jsonl("mixed.jsonl", RECORDS)
    many = (f"--prompts={place / 'mixed'}", "--input=mixed.jsonl", "--batch_size=4")
    expected = rows_of(*many, *flags)
    assert ptjax.infer(backbone, "mixed.jsonl", bank, batch_size=4, **how) == expected
    assert ptjax.infer(backbone, iter(RECORDS), bank, batch_size=4, **how) == expected
    named = ptjax.predict(backbone, RECORDS, bank, batch_size=4, **how)
    ids = [record["prompt"] for record in RECORDS]
    others = [{**record, "prompt": "none"} for record in RECORDS]
    chosen = ptjax.predict(backbone, others, bank, prompt_ids=ids, batch_size=4, **how)
    own = ("prediction", "score", "probabilities")
    for row, *found in zip(expected, named, chosen, strict=True):
        assert [as_row(one) for one in found] == [{k: row[k] for k in own if k in row}] * 2


def test_texts_are_answered_as_by_the_command(rows_of, place, backbone):
    prompt = place / "mixed" / "kind.safetensors"
    expected = rows_of(f"--prompt={prompt}", *TEXTS)
    assert [row["inputs"] for row in expected] == [f"kind: {text}" for text in TEXTS]
    assert ptjax.infer(backbone, TEXTS, prompt) == expected
    found = ptjax.predict(backbone, TEXTS, prompt)
    assert [{**row, **as_row(one)} for row, one in zip(expected, found, strict=True)] == expected
    assert set(found[0].probabilities or ()) == {"book", "film", "play"}


def test_every_kind_of_file_is_read_as_by_the_command(rows_of, place, backbone):
    prompt = place / "mixed" / "kind.safetensors"
    Path("a.txt").write_text("one\n\ntwo\n")
    Path("a.csv").write_text('one,1\n"two, three",2\n')
    write_jsonl("a.jsonl", [{"text": "one"}, {"other": 1}])
    of_csv: JsonObject = {"columns": ["text", "n"], "prefix": "p_"}
    skipped: JsonObject = {"on_bad_record": "skip"}
    for name, flags, options in (
        ("a.txt", (), {}),
        ("a.csv", ("--columns=text,n", "--prefix=p_"), of_csv),
        ("a.jsonl", ("--on_bad_record=skip",), skipped),
    ):
        expected = rows_of(f"--prompt={prompt}", f"--input={name}", *flags)
        assert ptjax.infer(backbone, name, prompt, **options) == expected


def test_the_output_is_the_file_that_the_command_writes(call, place, backbone):
    prompt = place / "mixed" / "mood" / "best.safetensors"
    write_jsonl("in.jsonl", [{"text": "é one"}, {"text": "two"}])
    code, _, err = call("infer", f"--prompt={prompt}", "--input=in.jsonl", "--output=theirs.jsonl")
    assert code == 0, err
    rows = ptjax.infer(backbone, "in.jsonl", prompt, output=Path("ours.jsonl"))
    assert Path("ours.jsonl").read_bytes() == Path("theirs.jsonl").read_bytes()
    assert rows == [json.loads(line) for line in Path("ours.jsonl").read_text().splitlines()]
    with pytest.raises(InputError, match=r"ours\.jsonl already exists; .* \(force=True\)"):
        ptjax.infer(backbone, "in.jsonl", prompt, output="ours.jsonl")
    ptjax.infer(backbone, ["x"], prompt, output="ours.jsonl", force=True)
    assert len(Path("ours.jsonl").read_text().splitlines()) == 1
    with pytest.raises(InputError, match=r"this is the input in\.jsonl"):
        ptjax.infer(backbone, "in.jsonl", prompt, output="in.jsonl", force=True)


# Prompts and tasks in every form


def test_a_prompt_may_be_given_in_every_form(place, backbone, bank):
    path = place / "mixed" / "kind.safetensors"
    loaded = ptjax.load_prompt(path)
    task = Task.from_description(loaded.metadata["task"])
    expected = ptjax.predict(backbone, TEXTS, path)
    run = ptjax.Run(epath.Path("run"), {"value": 1.0})  # its MODEL_DIR, and its prompt
    shutil.copytree(place / "mixed" / "copy", run.model_dir)
    shutil.copy(path, run.model_dir / "prompts" / "best.safetensors")
    for prompt in (str(path), loaded, "run", run.model_dir, run.prompt):
        assert ptjax.predict(backbone, TEXTS, prompt) == expected
    # An array does not say how its inputs are written; the labels are as short as the length.
    assert ptjax.predict(backbone, TEXTS, loaded.prompt, task=task) == expected
    with pytest.raises(
        InputError, match=r"inputs:1: a plain text names no prompt of many; .*prompt_ids"
    ):
        ptjax.predict(backbone, TEXTS, bank)
    many = ptjax.predict(backbone, TEXTS, bank, prompt_ids=["kind"] * 3)
    assert [one.text for one in many] == [one.text for one in expected]
    given, wanted = ([one.score for one in found] for found in (many, expected))
    assert given == pytest.approx(wanted, abs=1e-4)  # a bank pads its prompts


def test_a_given_task_replaces_the_one_of_the_prompt(place, backbone):
    path = place / "mixed" / "kind.safetensors"
    task = Task(name="t", inputs="{a} {b}", label="l", verbalizer={"1": "yes", "2": "no"})
    [found] = ptjax.predict(backbone, [{"a": "x", "b": "y"}], path, task=task)
    assert set(found.probabilities or ()) == {"yes", "no"}
    [row] = ptjax.infer(backbone, [{"a": "x", "b": "y"}], path, task=task)
    assert row["inputs"] == "x y" and row["score"] == found.score


def test_without_a_task_inputs_are_read_as_they_are(place, backbone):
    alone = ptjax.predict(backbone, ["one"], max_new_tokens=3)
    assert alone == ptjax.predict(backbone, [{"inputs": "one"}], max_new_tokens=3)
    assert alone[0].text == ptjax.generate(backbone, ["one"], max_new_tokens=3)[0]
    path = place / "mixed" / "mood" / "best.safetensors"
    [raw] = ptjax.predict(backbone, ["mood: one"], path, raw=True)
    assert [raw] == ptjax.predict(backbone, ["one"], path)


def test_nothing_to_predict(place, backbone, bank):
    assert ptjax.predict(backbone, [], bank, prompt_ids=[]) == []
    assert ptjax.predict(backbone, []) == []


# What is refused


class Holder:
    """As a `Run`, whose prompt is a `PromptFile`."""

    def __init__(self, prompt: Any) -> None:
        self.prompt = prompt


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("I was charged twice", r"predict needs a list of inputs, not one string: write \[text\]"),
        ({"text": "a"}, r"predict needs a list of inputs, not one record: write \[record\]"),
        (b"a", r"predict needs a list of texts or records \(dicts\), got bytes"),
        (None, r"predict needs a list of texts or records \(dicts\), got NoneType"),
        (["a", 3.5], r"inputs:2: float, neither a text nor a record"),
        ([None], r"inputs:1: NoneType, neither a text nor a record"),
        (["a", "\ud800"], r"inputs:2: characters that are not UTF-8 text"),
        ([{"txt": "a"}], r"inputs:1: task kind: .*'text'.*its inputs are 'kind: \{text\}'"),
    ],
)
def test_inputs_that_are_none_are_refused(place, backbone, inputs, message):
    with pytest.raises(InputError, match=message):
        ptjax.predict(backbone, inputs, place / "mixed" / "kind.safetensors")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda prompt: Holder(prompt), "a Holder is not a prompt: .*; pass its .prompt"),
        (lambda prompt: {"a": prompt}, "a dict is not a prompt: .* with ptjax.make_bank"),
        (lambda prompt: ptjax.HardPrompt("x"), "a HardPrompt .*; ptjax.evaluate scores it"),
        (lambda prompt: [[1.0]], r"a list is not a prompt: give an array \[P, D\]"),
        (lambda prompt: np.ones(16, np.float32), r"a prompt is a matrix \[P, 16\], this is \[16\]"),
        (lambda prompt: "gone", "no prompt at gone: the path does not exist"),
    ],
)
@pytest.mark.parametrize("function", [ptjax.predict, ptjax.infer, ptjax.generate])
def test_what_is_no_prompt_is_refused(place, backbone, function, make, message):
    prompt = ptjax.load_prompt(place / "mixed" / "kind.safetensors")
    with pytest.raises(InputError, match=message):
        function(backbone, ["a"], make(prompt))


def test_settings_that_mean_nothing_are_refused(place, backbone, bank):
    path = place / "mixed" / "kind.safetensors"
    misspelt: JsonObject = {"num_beam": 2}
    for function in (ptjax.predict, ptjax.infer):
        with pytest.raises(TypeError, match=r"no argument 'num_beam'; did you mean num_beams\?"):
            function(backbone, ["a"], path, **misspelt)
        with pytest.raises(InputError, match=r"closed set .* need --decode \(decode=True\)"):
            function(backbone, ["a"], path, num_beams=2)
        with pytest.raises(InputError, match="batch_size must be >= 1, got 0"):
            function(backbone, ["a"], path, batch_size=0)
    with pytest.raises(InputError, match="top_p must be > 0 and <= 1, got 2"):
        ptjax.predict(backbone, ["a"], path, top_p=2)
    with pytest.raises(InputError, match="encoding applies to files, but the inputs are in none"):
        ptjax.infer(backbone, ["a"], path, encoding="latin-1")
    with pytest.raises(InputError, match=r"inputs: no records in it"):
        ptjax.infer(backbone, [], path)
    with pytest.raises(InputError, match="prompt_ids choose from a bank"):
        ptjax.predict(backbone, ["a"], path, prompt_ids=["kind"])
    with pytest.raises(InputError, match=r"inputs:1: the record has a field 'score'"):
        ptjax.infer(backbone, [{"text": "a", "score": 1}], path)
    ptjax.predict(backbone, [{"text": "a", "score": 1}], path)  # it adds no fields


# evaluate


@pytest.fixture
def scores_of(call, tmp_path):
    """What the command `evaluate` prints for the task `mood`."""
    gin_file = write_mood(tmp_path)

    def run(*flags: object) -> JsonObject:
        code, out, err = call("evaluate", gin_file, *flags)
        assert code == 0, err
        return json.loads(out)

    return run


@pytest.fixture
def mood(tmp_path) -> Task:
    """The task that `write_mood` declares."""
    verbalizer = {"0": "good", "1": "bad"}
    splits = {"test": str(tmp_path / "test.jsonl"), "train": str(tmp_path / "test.jsonl")}
    return Task(
        name="mood", inputs="mood: {text}", splits=splits, label="label", verbalizer=verbalizer
    )


def test_a_prompt_is_scored_as_by_the_command(scores_of, place, backbone, mood):
    path = place / "seeds" / "prompts" / "seed_1" / "best.safetensors"
    expected = scores_of(f"--prompt={path}", "--output=theirs.jsonl", "--prefix=p_")
    found = ptjax.evaluate(backbone, mood, path, output="ours.jsonl", prefix="p_")
    assert found == expected and list(found) == list(expected)
    assert Path("ours.jsonl").read_bytes() == Path("theirs.jsonl").read_bytes()
    loaded = ptjax.evaluate(backbone, mood, ptjax.load_prompt(path))
    assert loaded == expected | {"prompt": None}
    five = (EVALUATION, "--gin.Evaluation.examples=5", "--split=test")
    some = scores_of(f"--prompt={path}", *five)
    assert ptjax.evaluate(backbone, mood, path, examples=5, split="test") == some
    assert some["examples"] == 5


def test_a_bank_a_hard_prompt_and_the_backbone_alone_are_scored_too(
    scores_of, place, backbone, mood
):
    directory = place / "seeds" / "prompts"
    expected = scores_of(f"--prompts={directory}", "--output=theirs.jsonl")
    bank = ptjax.make_bank(ptjax.load_prompts(directory))
    found = ptjax.evaluate(backbone, mood, bank, output="ours.jsonl")
    assert found | {"prompts": str(directory)} == expected
    assert Path("ours.jsonl").read_bytes() == Path("theirs.jsonl").read_bytes()
    on, decode = f"--backbone={place / 'backbone'}", "--gin.ptjax.Evaluation.predict='decode'"
    expected = scores_of("--prompt=none", on, EVALUATION, decode)
    assert ptjax.evaluate(backbone, mood, predict="decode") == expected
    train = f"{{'test': '{mood.splits['test']}', 'train': '{mood.splits['test']}'}}"
    flags = ("--hard_prompt=Good or bad?", "--shots=2", f"--gin.ptjax.Task.splits={train}")
    hard = ptjax.HardPrompt("Good or bad?", shots=2)
    given: JsonObject = {"seed": 4, "feature_lengths": {"inputs": 30}}
    lengths = "--gin.ptjax.Batching.feature_lengths={'inputs': 30}"
    expected = scores_of(on, *flags, "--gin.ptjax.RunSettings.seed=4", lengths)
    assert ptjax.evaluate(backbone, mood, hard, **given) == expected
    assert expected["hard_prompt"] == "Good or bad?" and expected["shots"] == 2


def test_records_in_memory_are_scored(place, backbone, scores_of, mood):
    records = [json.loads(line) for line in Path(str(mood.splits["test"])).read_text().splitlines()]
    verbalizer = {"0": "good", "1": "bad"}
    task = Task.from_records(
        records, test=records, inputs="mood: {text}", label="label", verbalizer=verbalizer,
        name="mood",
    )  # fmt: skip
    path = place / "seeds" / "prompts" / "seed_1" / "best.safetensors"
    Path("test").write_text("")  # the name of a split is not that of a file
    found = ptjax.evaluate(backbone, task, path, output="test", force=True)
    assert found == ptjax.evaluate(backbone, mood, path)
    assert len(Path("test").read_text().splitlines()) == 12


def test_evaluate_says_what_is_wrong(place, backbone, bank, mood, scores_of):
    path = place / "seeds" / "prompts" / "seed_1" / "best.safetensors"
    data = str(mood.splits["test"])
    misspelt: JsonObject = {"outputs": "x"}
    refused: list[tuple[Any, JsonObject, str]] = [
        (("mood",), {}, "evaluate needs a ptjax.Task to score on, got str"),
        ((mood, path), {"split": "dev"}, "task mood: no split 'dev'"),
        ((mood, path), {"examples": 0}, "EVAL_EXAMPLES must be >= 1"),
        ((mood, path), {"predict": "guess"}, "Evaluation.predict must be one of"),
        ((mood, bank), {}, "prompts are scored together only on one task"),
        ((mood, path), {"output": data, "force": True}, f"this is the input {data}"),
        ((mood, path), {"output": data}, "already exists"),
        ((mood, {"a": path}), {}, "a dict is not a prompt"),
    ]
    for arguments, options, message in refused:
        with pytest.raises(InputError, match=message):
            ptjax.evaluate(backbone, *arguments, **options)
    with pytest.raises(TypeError, match=r"no argument 'outputs'; did you mean output\?"):
        ptjax.evaluate(backbone, mood, path, **misspelt)
    assert not Path("x").exists()


# Predictions as text


def test_a_prediction_shows_its_likeliest_labels():
    values = (0.1, 0.04, 0.5, 0.2, 0.06, 0.07, 0.03)
    shares = dict(zip("abcdefg", values, strict=True))
    assert repr(Prediction("c", -0.69314, shares)) == (
        "Prediction(text='c', score=-0.6931, probabilities={'c': 0.5, 'd': 0.2, 'a': 0.1, "
        "'f': 0.07, 'e': 0.06, ...})"
    )
    assert repr(Prediction("it's", -12.0)) == 'Prediction(text="it\'s", score=-12)'
