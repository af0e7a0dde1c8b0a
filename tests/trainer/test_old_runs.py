"""MODEL_DIRs and prompts of commit 324cea1, whose gin files named modules of ptjax."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import FIXTURES

from ptjax.cli import old_config
from ptjax.cli.gin_mistakes import PUBLIC_NAMES
from ptjax.data.catalogue import super_glue
from ptjax.data.tasks import Task
from ptjax.interop.prompt_file import load_prompt

pytestmark = pytest.mark.usefixtures("own_process")
RECORD = json.dumps(
    {"idx": 9, "passage": {"text": "It is <b>2</b>.<br>", "questions": [
        {"idx": 0, "question": "Is it?", "answers": [{"text": "yes"}]}]}}
)  # fmt: skip


@pytest.fixture
def runs(own_process: None) -> Path:
    """The fixture as the current folder, in which its relative paths hold."""
    shutil.copytree(FIXTURES / "runs_324cea1", ".", dirs_exist_ok=True)
    Path("asked.jsonl").write_text(RECORD + "\n")
    return Path()


@pytest.mark.parametrize("kind", ["prompt", "model"])
def test_evaluate_gives_the_scores_of_then(call, runs, kind):
    code, out, err = call("evaluate", f"--model_dir={kind}")
    assert code == 0, err
    then, now = json.loads(Path(kind, "results.json").read_text()), json.loads(out)
    assert now["metrics"] == then["metrics"] and now["split"] == then["split"]
    assert now["task"] == "multirc"


@pytest.mark.parametrize("kind", ["prompt", "model"])
def test_infer_prepares_records_as_then(call, runs, kind):
    code, out, err = call("infer", f"--model_dir={kind}", "--input=asked.jsonl")
    assert code == 0, err
    assert json.loads(out)["inputs"] == "question: Is it? answer: yes paragraph: It is 2. "
    assert set(json.loads(out)["probabilities"]) == {"False", "True"}


def test_the_prompt_is_exported_and_alone_knows_its_task(call, runs):
    code, _, err = call("export", "--model_dir=prompt", "--to=npy", "--output=p.npy")
    assert code == 0, err
    file = load_prompt("prompt/prompts/best.safetensors")
    np.testing.assert_array_equal(np.load("p.npy"), file.prompt)
    assert file.metadata["task"]["preprocess"] == "ptjax.data.catalogue.super_glue.multirc"
    task = Task.from_description(file.metadata["task"])
    assert task.preprocess is super_glue.multirc
    assert task.describe()["preprocess"] == "ptjax.preprocessors.multirc"
    flags = ("--prompt=prompt/prompts/best.safetensors", "--input=asked.jsonl")
    code, out, err = call("infer", *flags)
    assert code == 0 and "question: Is it? answer: yes" in out, err


def test_such_a_run_is_not_resumed(call, runs):
    before = {path: path.read_bytes() for path in Path("prompt").rglob("*") if path.is_file()}
    old = "--gin_file=prompt/config.gin"
    code, _, err = call("train", old)
    assert code == 2 and err.count("\n") == 1
    assert err.startswith("error: prompt/config.gin:") and PUBLIC_NAMES in err
    flags = [
        "--gin_file=tasks/multirc.gin",
        "--gin_file=runs/prompt_tune.gin",
        "--gin.MODEL_DIR='prompt'",
        "--gin.DATA_DIR='data'",
        "--gin.INITIAL_CHECKPOINT_PATH='backbone'",
        "--gin.PROMPT_LENGTH=3",
        "--gin.BATCH_SIZE=8",
        "--gin.TRAIN_STEPS=2",
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 128, 'targets': 8}",
    ]
    code, out, err = call("train", *flags)
    assert (code, out) == (2, ""), err
    assert "prompt holds a run of another ptjax (an older version), whose" in err.splitlines()[-1]
    after = {path: path.read_bytes() for path in Path("prompt").rglob("*") if path.is_file()}
    assert after == before


HEAD = "from __gin__ import dynamic_registration\nimport ptjax\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "from ptjax import backbone\nbackbone.load_backbone.path = %P\nP = 'x'\n",
            "P = 'x'\nptjax.load_backbone.path = %P\n",
        ),
        (  # what is gone is left out, and with it the macros that only it used
            "from ptjax import loop\nfrom ptjax import tuning\nloop.Pace.keep = %K\nK = 3\n"
            "tuning.tune.pace = @loop.Pace()\ntuning.tune.method = 'model_tuning'\n",
            "",
        ),
        (
            "from ptjax.data import tasks\nfrom ptjax.data.catalogue import reviews\n"
            "a/tasks.Task.preprocess = @reviews.sentences\n"
            "a/tasks.Task.verbalizer = {'b': 'x', 'a': 'y'}\n",
            "a/ptjax.Task.preprocess = @ptjax.preprocessors.sentences\n"
            "a/ptjax.Task.verbalizer = {'b': 'x', 'a': 'y'}\n",
        ),
        (  # through other macros, and what is a part of the settings now
            "from ptjax import evaluation\nfrom ptjax import tuning\nA = %B\nB = (1, -2.5)\n"
            "tuning.tune.feature_lengths = {'inputs': %A}\n"
            "tuning.tune.evaluation = @evaluation.Evaluation()\n",
            "A = %B\nB = (1, -2.5)\nptjax.Batching.feature_lengths = {'inputs': %A}\n"
            "ptjax.RunSettings.evaluation = @ptjax.Evaluation()\n",
        ),
        (  # not ptjax's: left to `trust.check`
            "import mine\nfrom ptjax.data import tasks\ntasks.Task.preprocess = @mine.f\n"
            "mine.f.x = 1\n",
            "import mine\nptjax.Task.preprocess = @mine.f\nmine.f.x = 1\n",
        ),
    ],
)  # fmt: skip
def test_what_is_left_of_an_old_file(old, new):
    text = "from __gin__ import dynamic_registration\n" + old
    assert old_config.line_of_module(text) is not None
    assert old_config.translate(text) == HEAD + new
    assert old_config.line_of_module(HEAD + new) is None


def test_an_old_file_of_a_stranger_still_runs_nothing(call, runs):
    Path("evil.py").write_text("open('flag', 'w')\n")
    config = Path("prompt/config.gin")
    for line in ("import evil", "include 'x.gin'", "A = @os.system()"):
        head = "from __gin__ import dynamic_registration\nfrom ptjax import loop\n"
        config.write_text(f"{head}{line}\nloop.Pace.keep = 1\n")
        code, _, err = call("infer", "--model_dir=prompt", "x")
        if line == "A = @os.system()":  # a macro that nothing uses is left out
            assert "os" not in old_config.translate(config.read_text())
            continue
        assert code == 2 and "--trust_config" in err and err.count("\n") == 1, err
    assert not Path("flag").exists()
