"""What strangers pass by mistake, and the line that says what to give; what a cell shows them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_settings

import ptjax
from ptjax.errors import InputError, check_at_least

pytestmark = pytest.mark.usefixtures("own_process")
SETTINGS = make_settings()


class Silent(ptjax.Callback):
    pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"backbone": "ptjax-nano"},
            "the backbone is 'ptjax-nano', which is not loaded; give "
            "ptjax.load_backbone('ptjax-nano')",
        ),
        ({"backbone": 3}, "the backbone is an int; give the result of ptjax.load_backbone"),
        (
            {"task": [{"text": "a"}]},
            "tune needs a ptjax.Task to train on, got a list; make one with ptjax.Task."
            "from_records",
        ),
        ({"settings": {"steps": 3}}, "tune needs ptjax.RunSettings as settings, got a dict"),
        (
            {"members": ["a"]},
            "members is a list; give a dict of name to MemberOverrides, such as ptjax.sweep makes",
        ),
        ({"members": {"a": 1}}, "member 'a' is an int; give ptjax.MemberOverrides"),
        ({"members": {1: ptjax.MemberOverrides()}}, "invalid name of a member: 1; use letters"),
        ({"callbacks": Silent()}, "callbacks is <test_wrong_arguments.Silent object"),
        ({"callbacks": [ptjax.Callback]}, "callbacks is [<class 'ptjax"),
        ({"callbacks": [print]}, "callbacks is [<built-in function print>]; give a list of obj"),
        ({"steps": 0}, "tune.steps must be >= 1, got 0"),
        ({"steps": 1e4}, "tune.steps must be a whole number, got 10000.0"),
        ({"steps": 0, "settings": None}, "tune.steps must be >= 1, got 0"),
    ],
)
def test_tune_says_what_an_argument_should_be(backbone, task, given, message):
    arguments: Any = {"backbone": backbone, "task": task, "settings": SETTINGS} | given
    with pytest.raises(InputError) as raised:
        ptjax.tune(arguments.pop("backbone"), arguments.pop("task"), "run", **arguments)
    assert str(raised.value).startswith(message)


def test_every_function_with_a_backbone_says_that_a_name_is_not_one(task):
    name: Any = "ptjax-nano"
    for call in (
        lambda: ptjax.predict(name, ["a"]),
        lambda: ptjax.infer(name, ["a"]),
        lambda: ptjax.generate(name, ["a"]),
        lambda: ptjax.evaluate(name, task),
        lambda: ptjax.suggest_settings(name, task),
        lambda: ptjax.forward(name, {"inputs": np.ones((1, 2))}),
        lambda: ptjax.loss_and_prompt_gradient(name, {}, np.ones((1, 2))),
    ):
        with pytest.raises(InputError, match="the backbone is 'ptjax-nano', which is not loaded"):
            call()


def test_suggestions_and_predictions_need_a_task(backbone):
    wrong: Any = [{"text": "a"}]
    with pytest.raises(InputError, match=r"suggest_settings needs a ptjax\.Task, got a list"):
        ptjax.suggest_settings(backbone, wrong)
    with pytest.raises(InputError, match=r"predict needs a ptjax\.Task as task, got a list"):
        ptjax.predict(backbone, ["a"], task=wrong)


@pytest.mark.parametrize("part", ["optimizer", "loss", "schedule", "batching", "evaluation"])
def test_settings_of_another_kind_are_refused_by_name(part):
    values: Any = {part: optax.sgd(0.1) if part == "optimizer" else "a"}
    with pytest.raises(InputError, match=rf"RunSettings\.{part} is an? \w+; give a ptjax\.\w+$"):
        ptjax.RunSettings(**values)


def test_numbers_that_are_texts_or_not_whole_are_refused():
    text: Any = "8"
    with pytest.raises(InputError, match=r"^Evaluation\.batch_size must be a number, got '8'$"):
        ptjax.Evaluation(batch_size=text)
    whole: Any = 100.0
    with pytest.raises(InputError, match=r"TrainSchedule\.eval_period must be a whole number, go"):
        ptjax.TrainSchedule(eval_period=whole)
    check_at_least(1, a=np.int64(1), b=np.float32(2), c=None, d=jnp.ones(()))
    ptjax.TrainSchedule(train_steps=np.int64(3))  # pyright: ignore[reportArgumentType]


def test_what_a_cell_shows_is_a_line(backbone, task):
    count = sum(x.size for x in _leaves(backbone.variables["params"]))
    width = backbone.config.emb_dim
    assert repr(backbone) == f"<Backbone {backbone.name}: {count:,} parameters, width {width}>"
    run = ptjax.tune(backbone, task, "run", SETTINGS, steps=3)
    value = run.results["value"]
    assert repr(run) == f"<Run run: finished at step 3, accuracy {value:.3f} on test>"
    assert repr(run.prompt) == (f"<PromptFile [4, {width}], task words, tuned on {backbone.name}>")
    bank = ptjax.make_bank({"a": run.prompt, "b": np.ones((2, width), np.float32)})
    assert repr(bank) == "<PromptBank of 2: a, b>"
    assert repr(ptjax.Run(run.model_dir, {})) == "<Run run: dry>"
    early = ptjax.Run(run.model_dir, {"finished": False, "trained_steps": 2})
    assert repr(early) == "<Run run: interrupted at step 2>"
    with pytest.raises(InputError, match="run: interrupted at step 2; the same call of tune resu"):
        early.report()


def _leaves(tree: Any) -> list[Any]:
    return [x for v in tree.values() for x in _leaves(v)] if isinstance(tree, dict) else [tree]
