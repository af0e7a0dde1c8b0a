"""Paths that users give without meaning to: empty ones, long names, folders that are read-only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import tune

from ptjax import cli
from ptjax.backbone import load_backbone, save_backbone
from ptjax.data.tokenizer import load_tokenizer
from ptjax.errors import InputError
from ptjax.inspection import describe
from ptjax.interop.peft import export_peft
from ptjax.interop.prompt_file import load_prompt, load_prompts, save_prompt
from ptjax.pretraining import pretrain

pytestmark = pytest.mark.usefixtures("own_process")
QUICK = "--gin_file=quickstart.gin"
SST2 = ("--gin_file=tasks/sst2.gin", "--gin_file=runs/prompt_tune.gin")
NANO = "--gin.INITIAL_CHECKPOINT_PATH='ptjax-nano'"


@pytest.fixture
def fails(call):
    """The error line of a command that ends with exit code 2 and leaves nothing behind."""

    def run(command: str, *arguments: str) -> str:
        code, out, err = call(command, *arguments)
        assert (code, out) == (2, ""), err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert list(Path().iterdir()) == []
        return err.removeprefix("error: ").rstrip("\n")

    return run


# The command and its flags, the setting that is empty.
EMPTY_SETTINGS = [
    ("train", [QUICK, "--gin.MODEL_DIR=''"], "MODEL_DIR"),
    ("train", [QUICK, "--gin.MODEL_DIR='  '"], "MODEL_DIR"),
    ("train", [QUICK, "--gin.tuning.tune.model_dir=''"], "tuning.tune.model_dir"),
    ("train", [QUICK, "--gin.INITIAL_CHECKPOINT_PATH=''"], "INITIAL_CHECKPOINT_PATH"),
    ("train", [*SST2, NANO, "--gin.MODEL_DIR='m'", "--gin.DATA_DIR=''"], "DATA_DIR"),
    ("train", [*SST2, NANO, "--gin.MODEL_DIR='m'", "--gin.DATA_DIR='d'", "--gin.TOKENIZER=''"],
     "TOKENIZER"),
    ("evaluate", [QUICK, "--prompt=none", "--gin.INITIAL_CHECKPOINT_PATH=''"],
     "INITIAL_CHECKPOINT_PATH"),
    ("evaluate", [QUICK, "--gin.MODEL_DIR=''"], "MODEL_DIR"),
    ("pretrain", ["--gin_file=runs/pretrain_nano.gin", "--gin.MODEL_DIR='m'", "--gin.DATA_DIR='d'",
                  "--gin.CORPUS_DIR=''"], "CORPUS_DIR"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "flags", "setting"), EMPTY_SETTINGS)
def test_an_empty_path_of_a_gin_file_is_refused_before_anything_is_loaded(
    fails, command, flags, setting
):
    assert fails(command, *flags) == (
        f"command line: {setting} is empty; set --gin.{setting}=\"'PATH'\" ('.' is the current "
        "folder)"
    )


def test_an_empty_path_in_a_file_is_told_with_its_place(call):
    Path("bad.gin").write_text("include 'quickstart.gin'\nMODEL_DIR = ''\n")
    code, _, err = call("train", "--gin_file=bad.gin")
    assert code == 2 and err.startswith("error: bad.gin:2: MODEL_DIR is empty; set --gin.MODEL_DIR")


def test_a_data_folder_may_be_empty_where_no_data_is_read():
    parser = cli.make_parser("x", "")
    arguments = cli.parse(parser, [*SST2, NANO, "--gin.DATA_DIR=''"])
    cli.load_gin(arguments, defaults={"MODEL_DIR": None, "DATA_DIR": ""})
    assert cli.macro("DATA_DIR") == ""


EMPTY_FLAGS = [
    ("evaluate", "--model_dir"), ("evaluate", "--output"), ("evaluate", "--prompt"),
    ("evaluate", "--gin_file"), ("evaluate", "--split"), ("infer", "--model_dir"),
    ("infer", "--input"), ("infer", "--prompts"), ("infer", "--backbone"), ("infer", "--tokenizer"),
    ("export", "--output"), ("train", "--tfds_data_dir"), ("train", "--coordinator_address"),
    ("inspect", "--backbone"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "flag"), EMPTY_FLAGS)
@pytest.mark.parametrize("form", ["{}=", "{} "])
def test_an_empty_flag_is_refused(fails, command, flag, form):
    needed = {"infer": ["a text"], "export": ["p", "--to=npy", "--output=o"], "inspect": ["p"]}
    line = fails(command, *needed.get(command, []), *form.format(flag).split(" "))
    assert line == f"{flag} is empty; give it a value or leave it out (see --help)"


def test_flags_that_may_be_empty_still_may():
    parser = cli.make_parser("x", "")
    assert cli.parse(parser, ["--gin_search_paths=", "--gin_bindings="]).gin_search_paths == ""


def test_a_setting_without_a_value_is_told_how_it_is_written(fails):
    assert fails("train", QUICK, "--gin.MODEL_DIR=") == (
        "--gin.MODEL_DIR needs a value: --gin.MODEL_DIR=\"'PATH'\" (see --help)"
    )
    assert fails("train", QUICK, "--gin.TRAIN_STEPS=") == (
        "--gin.TRAIN_STEPS needs a value: --gin.TRAIN_STEPS=VALUE (see --help)"
    )


def test_functions_refuse_empty_paths_too(backbone: Any, task: Any) -> None:
    prompt = load_tokenizer("package:nano/spiece.model")
    matrix = backbone.variables["params"]["token_embedder"]["embedding"][:3]
    for call in (
        lambda: tune("", task, backbone),
        lambda: pretrain("", [], backbone=backbone),
        lambda: load_backbone(""),
        lambda: save_backbone("", backbone.config, backbone.variables["params"]),
        lambda: load_tokenizer(" "),
        lambda: prompt.save(""),
        lambda: load_prompt(""),
        lambda: load_prompts(""),
        lambda: save_prompt("", matrix, {}),
        lambda: export_peft("", matrix, num_heads=2, num_layers=1),
        lambda: describe(""),
    ):
        with pytest.raises(InputError, match=r"is empty; name a path \('\.' is the current folder"):
            call()
    assert list(Path().iterdir()) == []
