"""Tuning on records that are in memory: resumed by content, described, and weighted by label."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
from conftest import WORDS, make_settings, tune
from etils import epath
from tiny import tiny_config

from ptjax.data.tasks import Task
from ptjax.errors import InputError
from ptjax.interop.prompt_file import load_prompt
from ptjax.settings import TrainSchedule
from ptjax.trainer.pretrain import pretrain
from ptjax.trainer.setup import set_up_members
from ptjax.trainer.sweep import MemberOverrides
from ptjax.training.loss import Loss

ONCE = TrainSchedule(train_steps=1, eval_period=1)


def rows(count: int = 40, first: str = "lovely"):
    """A generator: every call gives the same records, once. A quarter is negative."""
    for i in range(count):
        label = "negative" if i % 4 == 0 else "positive"
        yield {"body": f"{WORDS[label][i % 3]} {i}" if i else first, "kind": label}


def make_task(**changes) -> Task:
    return Task.from_records(rows(**changes), 0.2, inputs="review: {body}", label="kind")


@pytest.fixture(scope="module")
def run(backbone, tmp_path_factory):
    """(folder, results) of a run of one step."""
    directory = tmp_path_factory.mktemp("records")
    return directory, tune(directory, make_task(), backbone, schedule=ONCE)


def test_the_same_call_resumes_and_other_records_are_refused(run, backbone):
    directory, results = run
    assert tune(directory, make_task(), backbone, schedule=ONCE) == results
    other = r"on other data: the hash of split '\w+' of task kind = sha256:\w+, now sha256:\w+; "
    with pytest.raises(InputError, match=other):
        tune(directory, make_task(first="dull"), backbone, schedule=ONCE)


def test_the_prompt_formats_inputs_as_the_task_and_is_in_memory(run, own_process, call):
    path = run[0] / "prompts" / "best.safetensors"
    described = load_prompt(path).metadata["task"]
    assert described["in_memory"] is True
    task = Task.from_description(described)
    assert task.format_line("a text") == "review: a text"
    assert task.labels == ("negative", "positive")
    code, _, err = call("evaluate", f"--prompt={path}")
    assert code == 2 and err.splitlines()[-1].startswith(
        "error: the records of task kind were given in Python (Task.from_records) and are in no "
        "file; evaluate there, or write them to files"
    )


@pytest.mark.parametrize("batching", [{}, {"pack": True}, {"pack": True, "microbatches": 2}])
def test_balanced_class_weights_reach_the_batches(backbone, tmp_path, batching, caplog):
    caplog.set_level(logging.INFO, logger="absl")

    def loss_weights(loss: Loss) -> set[float]:
        settings = dataclasses.replace(make_settings(**batching), loss=loss)
        members = {"": MemberOverrides()}
        [setup] = set_up_members(backbone, make_task(), epath.Path(tmp_path), settings, members)
        return set(np.unique(setup.member.batches.batch(0)["decoder_loss_weights"]).tolist())

    # 8 of 32 are negative: 32 / (2 * 8), and 32 / (2 * 24).
    assert loss_weights(Loss(class_weights="balanced")) - {0} == {2, float(np.float32(2 / 3))}
    assert "kind: class weights negative 2, positive 0.667" in caplog.messages
    assert loss_weights(Loss()) - {0} == {1}


def test_pretraining_has_no_classes(tmp_path):
    with pytest.raises(InputError, match=r"pretrain: Loss\.class_weights is for tasks"):
        pretrain(tiny_config(), [], tmp_path, loss=Loss(class_weights="balanced"))
