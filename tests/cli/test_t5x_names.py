"""Command lines and gin files that were written for T5X: honoured, or told what to write."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptjax import cli
from ptjax.cli import gin_files, t5x_names

pytestmark = pytest.mark.usefixtures("own_process")
PAGE = Path(__file__).parents[2] / "docs" / "from_prompt_tuning.md"
QUICK = "--gin_file=quickstart.gin"
# Written for this test in the form of T5X's finetune.gin.
RUN = """\
# BATCH_SIZE = 1 in a comment is none
from __gin__ import dynamic_registration

import __main__ as train_script
import seqio
from t5x import partitioning

MIXTURE_OR_TASK_NAME = 'glue_sst2_v002'
TRAIN_STEPS = 1150000
USE_CACHED_TASKS = False
include 'prompt_tuning/configs/prompts/from_class_labels.gin'
partitioning.PjitPartitioner:
  num_partitions = 2
train_script.train:
  eval_period = 500
train/utils.DatasetConfig:
  # a comment

  batch_size = %SIZE
"""


@pytest.fixture
def fails(call):
    def run(*arguments: str, command: str = "train") -> str:
        code, out, err = call(command, *arguments)
        assert (code, out) == (2, "") and err.count("\n") == 1, err
        return err.removeprefix("error: ").rstrip("\n")

    return run


def load(*flags: str) -> None:
    cli.load_gin(cli.parse(cli.make_parser("x", ""), flags))


def test_case_4_5_the_page_shows_the_tables_of_the_code():
    page = PAGE.read_text("utf-8")
    assert t5x_names.markdown(t5x_names.SETTINGS) in page
    assert t5x_names.markdown(t5x_names.FLAGS) in page


def test_case_4_5_a_gin_file_of_t5x_is_named_with_our_names(fails):
    Path("run.gin").write_text(RUN)
    said = fails("--gin_file=run.gin")
    assert said.startswith(
        "run.gin:4: this is T5X's gin file (it imports __main__), and ptjax has its own: "
        "--gin_file=tasks/NAME.gin --gin_file=runs/prompt_tune.gin. Instead of what it "
        "binds ptjax has: "
    )
    for told in (
        "TRAIN_STEPS: steps of this run: TRAIN_STEPS = 50000; ",
        "MIXTURE_OR_TASK_NAME: a task's gin file, tasks/*.gin, which declares ptjax.Task; ",
        "prompts/from_class_labels.gin: prompts/class_labels.gin, CLASS_LABELS: the default",
        "PjitPartitioner.num_partitions: MESH = '4x2' on 8 devices (data x model)",
        "train.eval_period: EVAL_PERIOD",
        "DatasetConfig.batch_size: BATCH_SIZE",
    ):
        assert told in said
    assert (
        "BATCH_SIZE:" not in said
        and "BATCH_SIZE," not in said
        and said.endswith("(docs/from_prompt_tuning.md)")
    )


@pytest.mark.parametrize(
    "line",
    ["import seqio", "from t5x import utils", "from prompt_tuning import prompts",
     "from flaxformer.architectures.t5 import t5_architecture", "import t5.models"],
)  # fmt: skip
def test_case_4_5_also_where_it_is_included(fails, line):
    Path("inner.gin").write_text(f"{line}\n")
    Path("outer.gin").write_text("include 'inner.gin'\n")
    assert fails("--gin_file=outer.gin").startswith("inner.gin:1: this is T5X's gin file (it im")


def test_case_4_5_our_own_files_are_none_of_t5x():
    files = [*Path(gin_files.gin_configs()).rglob("*.gin")]
    assert len(files) > 40
    for file in files:
        t5x_names.check_gin_file(file.read_text(), str(file))


def test_case_4_5_names_of_t5x_files_are_known(fails):
    said = fails("--gin_file=prompt_tuning/configs/runs/prompt_finetune.gin")
    ours = "python -m ptjax.train, with --gin_file=runs/prompt_tune.gin"
    assert f"it is T5X's; ptjax has instead: {ours}" in said
    assert "docs/from_prompt_tuning.md" in fails("--gin_file=t5x/examples/t5/t5_1_1/xl.gin")


UNKNOWN = {
    "--process_count=2": "--process_count is T5X's; ptjax has instead: --num_processes",
    "--process_index=0": "ptjax has instead: --process_id",
    "--initialization_timeout=9": "ptjax has instead: --initialization_timeout_seconds",
    "--run_mode=train": "the mode is the command",
    "--seqio_additional_cache_dirs=x": "ptjax caches no tasks",
    "--multiprocess_gpu": "Slurm and Open MPI are recognised",
    "--gin.MIXTURE_OR_TASK_NAME='super_glue_boolq_v102'": "a task's gin file, tasks/*.gin, which "
    "declares ptjax.Task, of this task --gin_file=tasks/boolq.gin",
    "--gin.MIXTURE_OR_TASK_NAME='taskless_x'": "which declares ptjax.Task",
    "--gin.USE_CACHED_TASKS=True": "leave it out (USE_CACHED_TASKS = False is accepted, "
    "True is not)",
    "--gin.PROMPT_REGEX=['.*']": "ptjax.RunSettings.method = @ptjax.PromptTuning()",
    "--gin.LOSS_NORMALIZING_FACTOR=233472": "ptjax.Loss.per_token = True",
    "--gin.CHECKPOINT_PATH='x'": "--backbone=PATH",
    "--gin.EVAL_STEPS=20": "EVAL_EXAMPLES",
    "--gin.partitioning.PjitPartitioner.num_partitions=2": "partitioning.PjitPartitioner."
    "num_partitions is T5X's; ptjax has instead: MESH = '4x2'",
    # Arguments that T5X's own gin files and command lines bind, in any scope.
    "--gin.utils.DatasetConfig.batch_size=8": "has instead: BATCH_SIZE",
    "--gin.train_eval/utils.DatasetConfig.pack=True": "has instead: PACK",
    "--gin.train_script.train.eval_period=9": "has instead: EVAL_PERIOD",
    "--gin.trainer.Trainer.num_microbatches=2": "has instead: MICROBATCHES",
    "--gin.utils.SaveCheckpointConfig.period=2": "has instead: EVAL_PERIOD",
    "--gin.utils.DatasetConfig.split='train'": "what docs/from_prompt_tuning.md lists",
}


@pytest.mark.parametrize("flag", UNKNOWN)
def test_case_4_6_flags_and_macros_of_t5x_tell_ours(fails, flag):
    said = fails(QUICK, flag)
    assert UNKNOWN[flag] in said and "T5X's" in said


def test_case_4_6_what_means_the_same_here_is_accepted():
    load(QUICK)
    config = cli.config_text()
    same = ("USE_CACHED_TASKS=False", "USE_HARDWARE_RNG=False", "JSON_WRITE_N_RESULTS=None")
    same += ("LOSS_NORMALIZING_FACTOR=None", "PROMPT_REGEX=['.*/prompt/.*']")
    assert len(same) == len(t5x_names.ACCEPTED)
    load(QUICK, *(f"--gin.{one}" for one in same), "--alsologtostderr", "--logtostderr")
    assert cli.config_text() == config


def test_case_4_6_tfds_data_dir_is_the_folder_of_tasks_that_read_tfds(fails):
    lines = "from __gin__ import dynamic_registration\nimport ptjax\n"
    lines += "ptjax.Task.data_dir = %DATA_DIR\nSPLITS = {'train': 'tfds:glue/sst2'}\n"
    Path("tfds.gin").write_text(lines + "ptjax.Task.splits = %SPLITS\n")
    load("--gin_file=tfds.gin", "--tfds_data_dir=/data/tfds")
    assert cli.settings("ptjax.Task", "data_dir") == {"data_dir": "/data/tfds"}
    said = fails(QUICK, "--tfds_data_dir=/data/tfds")
    assert said.startswith("--tfds_data_dir=/data/tfds: no task here reads TFDS")
    assert "--gin.DATA_DIR" in said
