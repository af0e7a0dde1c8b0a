"""`evaluate --hard_prompt`: a text in front of the inputs, on the backbone alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptjax.data.hard_prompt import HardPrompt
from ptjax.evaluation.evaluator import Evaluator
from ptjax.settings import Evaluation

pytestmark = pytest.mark.usefixtures("own_process")
GIN = """
from __gin__ import dynamic_registration
import ptjax
ptjax.Task.name = 'words'
ptjax.Task.data_dir = %DATA_DIR
ptjax.Task.splits = {'train': 'train.jsonl', 'test': 'test.jsonl'}
ptjax.Task.inputs = 'text: {text}'
ptjax.Task.label = 'label'
ptjax.Task.verbalizer = {'positive': 'positive', 'negative': 'negative'}
ptjax.RunSettings.evaluation = @ptjax.Evaluation()
ptjax.Evaluation.examples = 8
ptjax.RunSettings.seed = %RANDOM_SEED
RANDOM_SEED = 0
TASK_FEATURE_LENGTHS = {'inputs': 48, 'targets': 4}
"""


@pytest.fixture
def flags(backbone, task) -> list[str]:
    Path("words.gin").write_text(GIN)
    data = f"--gin.DATA_DIR='{task.data_dir}'"
    return ["--gin_file=words.gin", data, f"--backbone={backbone.name}"]


@pytest.mark.parametrize("shots", [0, 2])
def test_it_is_scored_with_its_examples_in_context(call, flags, backbone, task, shots):
    text = "Is it good or bad? {inputs} It is"
    asked = [f"--hard_prompt={text}", f"--shots={shots}", "--gin.RANDOM_SEED=5"]
    code, out, err = call("evaluate", *flags, *asked, "--output=rows.jsonl")
    assert code == 0, err
    said = json.loads(out)
    assert (said["hard_prompt"], said["shots"], said["prompt"]) == (text, shots, None)
    settings = Evaluation(examples=8)
    evaluator = Evaluator(
        task, backbone, backbone.tokenizer, {"inputs": 48, "targets": 4}, settings
    )
    rewording = HardPrompt(text, shots).rewording(task.load("train"), 5)
    expected = evaluator.predict(backbone.variables, "test", rewording)
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in rows] == expected
    assert said["metrics"] == evaluator.score(expected, "test")


def test_it_is_the_only_prompt(call, flags):
    for more in ("--prompt=none", "--prompts=dir"):
        code, _, err = call("evaluate", *flags, "--hard_prompt=x", more)
        flag = more.partition("=")[0]
        assert code == 2 and f"--hard_prompt and {flag} are mutually exclusive" in err
    code, _, err = call("evaluate", *flags, "--prompt=none", "--shots=2")
    assert code == 2 and "--shots belongs to a hard prompt: add --hard_prompt=TEXT" in err
    code, _, err = call("evaluate", *flags, "--hard_prompt=x", "--shots=-1")
    assert code == 2 and "HardPrompt.shots must be >= 0, got -1" in err
