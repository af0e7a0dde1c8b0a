"""Paths that users give by mistake or by need: empty ones, long names, read-only folders."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tune

from ptjax import cli, files
from ptjax.backbones.describe import describe
from ptjax.backbones.load import load_backbone
from ptjax.backbones.save import save_backbone
from ptjax.cli import output
from ptjax.data.tokenizer import load_tokenizer
from ptjax.errors import InputError
from ptjax.interop.peft import export_peft
from ptjax.interop.prompt_file import load_prompt, load_prompts, save_prompt
from ptjax.settings import TrainSchedule
from ptjax.trainer.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("own_process")
QUICK = "--gin_file=quickstart.gin"
SST2 = ("--gin_file=tasks/sst2.gin", "--gin_file=runs/prompt_tune.gin")
NANO = "--gin.INITIAL_CHECKPOINT_PATH='ptjax-nano'"


@pytest.fixture
def fails(call):
    """The error line of a command that ends with exit code 2 and leaves nothing behind."""

    def run(command: str, *arguments: str, left: Sequence[str] = ()) -> str:
        code, out, err = call(command, *arguments)
        assert (code, out) == (2, ""), err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert sorted(path.name for path in Path().iterdir()) == list(left)
        return err.removeprefix("error: ").rstrip("\n")

    return run


# A command with its flags, and the setting that is empty.
EMPTY_SETTINGS = [
    ("train", [QUICK, "--gin.MODEL_DIR=''"], "MODEL_DIR"),
    ("train", [QUICK, "--gin.MODEL_DIR='  '"], "MODEL_DIR"),
    ("train", [QUICK, "--gin.ptjax.tune.model_dir=''"], "ptjax.tune.model_dir"),
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
        lambda: pretrain(backbone, [], ""),
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


LONGEST = 255
"""The longest file name here, in bytes; 255 on nearly all file systems."""


def test_the_longest_name_that_a_folder_takes_is_written(tmp_path):
    assert os.pathconf(tmp_path, "PC_NAME_MAX") == LONGEST
    file = tmp_path / ("é" * (LONGEST // 2) + "x")
    files.write_bytes(file, b"1")
    output.check(str(file), force=True)
    output.write(str(file), "2")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["2"]


TOO_LONG = [
    ("infer", ["--prompt=none", "--backbone=gone", "a text"], "o" * 256),
    ("evaluate", ["--prompt=none", "--backbone=gone"], "sub/" + "é" * 128),
    ("export", ["gone", "--to=npy"], "o" * 300 + "/file"),
]


@pytest.mark.parametrize(("command", "flags", "name"), TOO_LONG)
def test_a_longer_name_is_refused_before_any_work(fails, command, flags, name):
    save_prompt("gone", np.ones((2, 2), np.float32), {})
    count = max(len(part.encode()) for part in name.split("/"))
    assert fails(command, *flags, f"--output={name}", left=["gone"]) == (
        f"--output={name}: a name of {count} bytes is longer than the {LONGEST} that "
        f"{Path.cwd()} allows; choose a shorter one"
    )


def test_a_folder_of_a_longer_name_is_refused_too(fails, backbone):
    save_prompt("p", np.ones((2, 16), np.float32), {})
    flags = ("p", "--to=huggingface", f"--backbone={backbone.name}", f"--output={'o' * 256}")
    assert "a name of 256 bytes is longer than the 255 that" in fails("export", *flags, left=["p"])


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below a folder: its content and when it was written."""
    return {
        str(path): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


ONE_STEP = TrainSchedule(train_steps=1, eval_period=1)


@pytest.fixture(scope="module")
def read_only(backbone, task, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A run of one step that takes no lock any more, and its results.

    Permissions would not stop root; that `run.lock` is a folder stops everybody alike.
    """
    folder = tmp_path_factory.mktemp("finished")
    results = tune(folder, task, backbone, schedule=ONE_STEP)
    (folder / "run.lock").mkdir()
    return folder, results


def test_a_finished_run_that_cannot_be_written_to_is_finished(read_only, task, backbone, caplog):
    folder, results = read_only
    before = tree(folder)
    with caplog.at_level("INFO", logger="absl"):
        assert tune(folder, task, backbone, schedule=ONE_STEP) == results
    assert f"{folder}: the run has finished, at step 1" in caplog.messages
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": dataclasses.replace(ONE_STEP, train_steps=2)}, "it cannot be written to"),
        ({"schedule": ONE_STEP, "seed": 4}, r"holds a run with RunSettings\.seed = 3, now 4"),
    ],
)
def test_what_is_left_to_do_there_is_refused(read_only, task, backbone, changes, said):
    folder, before = read_only[0], tree(read_only[0])
    with pytest.raises(InputError, match=said):
        tune(folder, task, backbone, **changes)
    assert tree(folder) == before


def test_a_run_that_cannot_be_written_to_and_has_no_results_is_refused_at_once(
    task, backbone, tmp_path
):
    (tmp_path / "run.lock").mkdir()
    broken = dataclasses.replace(task, data_dir="gone")
    with pytest.raises(InputError, match=f"MODEL_DIR = {tmp_path}: it cannot be written to"):
        tune(tmp_path, broken, backbone)


def test_a_dry_run_writes_nothing_beside_a_run(read_only, task, backbone):
    folder, before = read_only[0], tree(read_only[0])
    assert tune(folder, task, backbone, schedule=ONE_STEP, dry_run=True) == {}
    assert tree(folder) == before
