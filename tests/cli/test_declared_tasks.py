"""Tasks, lengths and tokenizers that gin files and flags name, and names that nobody knows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import save_tiny, tiny_config

from ptjax import cli
from ptjax.backbones.load import load_backbone
from ptjax.data.tasks import Task
from ptjax.data.vocabularies import missing_tokenizer
from ptjax.errors import InputError, near
from ptjax.inference import generate
from ptjax.inference.predict import rank
from ptjax.interop.prompt_file import save_prompt
from ptjax.trainer import tune

pytestmark = pytest.mark.usefixtures("own_process")
HEADER = "from __gin__ import dynamic_registration\nimport ptjax\n"
MOOD = """
{scope}ptjax.Task.name = '{name}'
{scope}ptjax.Task.data_dir = %DATA_DIR
{scope}ptjax.Task.splits = {{'test': 'test.jsonl'}}
{scope}ptjax.Task.inputs = '{name}: {{text}}'
{scope}ptjax.Task.label = 'label'
{scope}ptjax.Task.verbalizer = {{'0': 'good', '1': 'bad'}}
"""
LENGTHS = "TASK_FEATURE_LENGTHS = {'inputs': 5, 'targets': 4}\n"
DATA = "--gin.DATA_DIR='.'"


@pytest.fixture
def place(backbone) -> str:
    """The flag of a backbone; around it a bare prompt x.npy, a task's gin file, its test split."""
    np.save("x.npy", np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32))
    Path("mood.gin").write_text(HEADER + MOOD.format(scope="", name="mood") + LENGTHS)
    scoped = "".join(MOOD.format(scope=f"{name}/", name=name) for name in ("kind", "tone"))
    Path("two.gin").write_text(HEADER + scoped)
    rows = [json.dumps({"text": f"text {i} " * 9, "label": i % 2}) + "\n" for i in range(4)]
    Path("test.jsonl").write_text("".join(rows))
    return f"--backbone={backbone.name}"


@pytest.fixture
def row(call):
    """The first row of an infer, and what it says."""

    def run(*flags: str) -> tuple[dict, str]:
        code, out, err = call("infer", *flags)
        assert code == 0, err
        return json.loads(out.splitlines()[0]), err

    return run


def test_case_4_3_infer_takes_template_labels_and_lengths_of_a_tasks_file(row, place):
    found, err = row("--gin_file=mood.gin", "--prompt=x.npy", place, "a text of some length, cut")
    assert found["inputs"] == "mood: a text of some length, cut"
    assert set(found["probabilities"]) == {"good", "bad"} and found["prediction"] in ("good", "bad")
    assert "1 of 1 texts were cut to 5 tokens" in err
    found, _ = row("--gin_file=mood.gin", "--prompt=none", place, "x")
    assert found["inputs"] == "mood: x"


def test_case_4_3_evaluate_takes_the_task_of_a_tasks_file(call, place):
    Path("prompts").mkdir()
    for name in ("a", "b"):
        shutil.copy("x.npy", f"prompts/{name}.npy")
    for flags in (["--prompts=prompts"], ["--prompt=x.npy"], ["--prompt=none"]):
        code, out, err = call("evaluate", "--gin_file=mood.gin", *flags, place, DATA)
        assert code == 0 and json.loads(out)["task"] == "mood", err
        assert json.loads(out)["examples"] == 4
    code, _, err = call("evaluate", "--gin_file=mood.gin", "--prompts=prompts", place)
    assert code == 2 and "the macro DATA_DIR" in err and "--gin.DATA_DIR=\"'PATH'\"" in err


def test_case_4_3_several_tasks_are_listed(call, row, place):
    flags = ["--gin_file=two.gin", "--prompt=x.npy", place]
    for command in (["infer", "x"], ["evaluate", DATA]):
        code, _, err = call(*command, *flags)
        assert code == 2 and err.endswith(
            "error: which task? The gin files declare 2: @kind/ptjax.Task() is kind, "
            "@tone/ptjax.Task() is tone; choose one with "
            "--gin.ptjax.tune.task=@kind/ptjax.Task()\n"
        )
    found, _ = row(*flags, "x", "--gin.ptjax.tune.task=@tone/ptjax.Task()")
    assert found["inputs"] == "tone: x"
    found, _ = row(*flags, "x", "--raw")
    assert found["inputs"] == "x" and "probabilities" not in found


def test_case_4_3_an_unknown_scope_lists_what_there_is(call, place):
    flags = ["--gin_file=two.gin", "--prompt=x.npy", place]
    code, _, err = call("infer", "x", *flags, "--gin.ptjax.tune.task=@mood/ptjax.Task()")
    assert code == 2 and err.endswith("no gin file has the scope mood; there are kind, tone\n")
    code, _, err = call("infer", "x", *flags, "--gin.ptjax.tune.task=@tome/ptjax.Task()")
    assert code == 2 and err.endswith("no gin file has the scope tome; did you mean tone?\n")


def test_case_4_3_what_one_task_leaves_to_another_is_said(row, place):
    """Files of two tasks: the later one wins, where it says something."""
    other = MOOD.format(scope="", name="other").replace("mood", "other")
    Path("more.gin").write_text(
        HEADER + other + "ptjax.Task.group = 'g'\nptjax.Task.held_out = 2\n"
    )
    flags = ("--prompt=x.npy", place, "x")
    found, err = row("--gin_file=more.gin", "--gin_file=mood.gin", *flags)
    assert found["inputs"] == "mood: x"
    assert (
        "mood.gin declares the task mood, but an earlier gin file declares the task other, whose "
        "Task.group, Task.held_out it keeps; " in err
    )
    # One that leaves nothing, and the same task twice.
    Path("bare.gin").write_text(HEADER + MOOD.format(scope="", name="bare"))
    for files in (("bare.gin", "mood.gin"), ("more.gin", "more.gin")):
        assert "declares the task" not in row(*(f"--gin_file={f}" for f in files), *flags)[1]


def test_case_4_3_a_prompt_picks_its_own_of_several_tasks(call, place, backbone):
    task = Task(name="tone", inputs="own: {text}", label="label", verbalizer={"0": "a", "1": "b"})
    metadata = {"task": task.describe(), "backbone_fingerprint": backbone.fingerprint}
    save_prompt("tone.safetensors", np.load("x.npy"), metadata)
    flags = ("--gin_file=two.gin", "--prompt=tone.safetensors", place)
    code, out, err = call("evaluate", *flags, DATA)
    assert code == 0 and json.loads(out)["task"] == "tone", err
    # What the prompt was tuned with stands above the file's template.
    code, out, err = call("infer", *flags, "x")
    assert json.loads(out)["inputs"] == "own: x", err


def test_case_4_3_an_unscoped_basis_is_no_task(row, place):
    basis = "ptjax.Task.label = 'label'\nptjax.Task.verbalizer = {'0': 'good', '1': 'bad'}\n"
    own = "one/ptjax.Task.name = 'one'\none/ptjax.Task.inputs = 'one: {text}'\n"
    Path("one.gin").write_text(HEADER + basis + own)
    assert row("--gin_file=one.gin", "--prompt=x.npy", place, "x")[0]["inputs"] == "one: x"


def test_case_4_3_tasks_of_a_pretraining_are_not_how_inputs_look(row, place):
    lines = "ptjax.TaskComponent.task = @mood/ptjax.Task()\n"
    Path("pre.gin").write_text(HEADER + lines + MOOD.format(scope="mood/", name="mood"))
    assert row("--gin_file=pre.gin", "--prompt=x.npy", place, "x")[0]["inputs"] == "x"


# Tokenizers


@pytest.fixture(scope="module")
def mute(tmp_path_factory) -> Path:
    """A backbone without a tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("mute"), tiny_config(8192))


def test_case_4_4_the_flag_names_the_tokenizer_everywhere(call, mute, place):
    vocabulary = "--tokenizer=package:nano/spiece.model"
    flags = ("--prompt=x.npy", f"--backbone={mute}")
    commands = (
        ("infer", *flags, "x"),
        ("infer", *flags, "x", "--gin_file=mood.gin"),
        ("evaluate", *flags, "--gin_file=mood.gin", DATA),
    )
    for command in commands:
        code, _, err = call(*command)
        assert code == 2 and err.splitlines()[-1] == (
            f"error: {mute} has no tokenizer; name a *.model file, a folder, a hub id or byt5 "
            "with --tokenizer=PATH, --gin.TOKENIZER=\"'PATH'\" or load_backbone(tokenizer=PATH)"
        )
        code, out, err = call(*command, vocabulary)
        assert code == 0 and out, err
    code, out, err = call("inspect", "x.npy", f"--backbone={mute}", vocabulary, "--json")
    pieces = {piece for line in json.loads(out)["nearest_tokens"] for piece, _ in line}
    assert code == 0 and not any(piece.startswith("<0") for piece in pieces), err
    code, out, err = call("inspect", mute, vocabulary, "--json")
    assert json.loads(out)["tokenizer"].endswith("nano/spiece.model"), err


def test_case_4_4_training_has_a_macro(call, mute, place):
    flags = ["--gin_file=quickstart.gin", "--gin.MODEL_DIR='run'", "--gin.MESH=None"]
    flags += [f"--gin.INITIAL_CHECKPOINT_PATH='{mute}'"]
    code, _, err = call("train", *flags, "--dry_run")
    assert code == 2 and "has no tokenizer; " in err and "--gin.TOKENIZER=\"'PATH'\"" in err
    flags.append("--gin.TOKENIZER='package:nano/spiece.model'")
    for file in ("quickstart.gin", "runs/lm_adapt.gin"):
        flags[0] = f"--gin_file={file}"
        arguments = cli.parse(cli.make_parser("x", ""), flags)
        cli.load_gin(arguments, defaults={"CORPUS_DIR": "", "CORPUS_FILES": {}})
        assert cli.bound(load_backbone)().tokenizer.name.endswith("nano/spiece.model")


@pytest.mark.parametrize(
    ("rows", "source"),
    [
        (32128, "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"),
        (250112, "gs://t5-data/vocabs/mc4.250000.100extra/sentencepiece.model"),
        (384, "byt5"),
    ],
)
def test_case_4_4_the_released_t5s_are_told_by_their_rows(rows, source):
    said = str(missing_tokenizer("t5", rows))
    assert f"with {rows:,} embedding rows it may be a " in said and said.endswith(
        f"PATH = {source}"
    )
    assert "embedding rows" not in str(missing_tokenizer("t5", 8192))


def test_case_4_4_one_wording_wherever_a_tokenizer_is_missing(t5_1_1, task):
    """A T5X checkpoint has no vocabulary beside it."""
    with pytest.raises(InputError) as error:
        generate.generate(t5_1_1, ["a"])
    wording = str(missing_tokenizer(t5_1_1.name, t5_1_1.config.vocab_size))
    assert str(error.value) == wording
    with pytest.raises(InputError) as error:
        rank(t5_1_1, ["a"], ["b", "c"])
    assert str(error.value) == wording
    with pytest.raises(InputError) as error:
        tune.tune(t5_1_1, task, "run")
    assert str(error.value) == wording


# Names that nobody knows


def test_no_suggestion_without_likeness():
    assert near("acuracy", ["f1", "accuracy"]) == "; did you mean accuracy?"
    assert near("rouge", ["group_exact_match", "f1"]) == "; there are group_exact_match, f1"
    assert near("rouge", []) == near("rouge", ["f1"], listed=False) == ""
    assert near("--nope", ["--top_p", "--help"], listed=False) == ""
    many = near("x", [f"prompt_{i:03}" for i in range(500)])
    assert len(many) < 400 and many.endswith(", ... (500 in all)")


def test_case_3_11_an_unknown_metric_lists_what_there_is():
    with pytest.raises(InputError, match=r"called 'wer'; there are accuracy, mean_f1, f1, .*gr"):
        Task(name="t", inputs="{a}", targets="{b}", metrics="wer")
    with pytest.raises(InputError, match="called 'rouge'; did you mean rougeL"):
        Task(name="t", inputs="{a}", targets="{b}", metrics="rouge")


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        (
            "--gin.ptjax.tune.zzz=1",
            "ptjax.tune has no parameter zzz; there are backbone, task, model_",
        ),
        ("--gin.ptjax.qqq.seed=1", "ptjax has no qqq; there are "),
        ("--gin_file=xyz.gin", "; there are quickstart.gin, models/*.gin, prompts/*.gin, runs/*"),
        ("--gin_file=tasks/qqqqqq.gin", "; there are tasks/ag_news.gin, tasks/boolq.gin, "),
    ],
)
def test_unknown_names_list_what_there_is(call, flag, said):
    code, _, err = call("train", "--gin_file=quickstart.gin", flag)
    assert code == 2 and said in err and "did you mean" not in err
