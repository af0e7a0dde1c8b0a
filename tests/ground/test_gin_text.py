"""A run from Python is written as a gin file, and read back as equal objects."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ptjax
from ptjax import cli, gin_text
from ptjax.errors import InputError
from ptjax.trainer.identity import describe

pytestmark = pytest.mark.usefixtures("own_process")
ONCE = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(text: str, *flags: str) -> None:
    """Reads it as a command reads the config.gin of a MODEL_DIR whose author is not trusted."""
    Path("config.gin").write_bytes(text.encode())
    arguments = cli.parse(cli.make_parser("x", ""), ["--gin_file=config.gin", *flags])
    cli.load_gin(arguments, of_run="config.gin")


def again(**arguments: Any) -> Any:
    """What comes back of arguments of `tune`, in a tuple if they are several."""
    read(gin_text.describe_call("ptjax.tune", arguments))
    found = cli.settings("ptjax.tune", *arguments)
    return next(iter(found.values())) if len(arguments) == 1 else tuple(found.values())


TEXTS = st.text(max_size=12)
NUMBERS = st.floats(0, 1e6, allow_nan=False)
COUNTS = st.integers(1, 10**6)
SCHEDULES = st.one_of(
    st.builds(optax.constant_schedule, NUMBERS),
    st.builds(optax.linear_schedule, NUMBERS, NUMBERS, COUNTS, COUNTS),
    st.builds(optax.polynomial_schedule, NUMBERS, NUMBERS, st.integers(1, 3), COUNTS),
    st.builds(optax.cosine_decay_schedule, NUMBERS, COUNTS, st.floats(0, 1)),
    st.builds(optax.exponential_decay, NUMBERS, COUNTS, st.floats(0.1, 1), COUNTS, st.booleans()),
    st.builds(optax.warmup_constant_schedule, NUMBERS, NUMBERS, COUNTS),
    st.builds(optax.warmup_cosine_decay_schedule, NUMBERS, NUMBERS, COUNTS, st.just(2 * 10**6)),
    st.builds(
        optax.warmup_exponential_decay_schedule, NUMBERS, NUMBERS, COUNTS, COUNTS, st.just(0.5)
    ),
    st.builds(optax.cosine_onecycle_schedule, st.integers(100, 10**6), NUMBERS),
    st.builds(optax.linear_onecycle_schedule, st.integers(100, 10**6), NUMBERS),
    st.builds(
        optax.piecewise_constant_schedule,
        NUMBERS,
        st.dictionaries(COUNTS, st.floats(0, 2), max_size=3),
    ),
)
RESTS = st.one_of(st.builds(ptjax.Uniform, NUMBERS), st.builds(ptjax.SampledVocabulary, COUNTS))
INITIALIZERS = st.one_of(
    RESTS,
    st.builds(
        ptjax.ClassLabels, st.none() | st.lists(TEXTS, min_size=1, max_size=3).map(tuple), RESTS
    ),
    st.builds(ptjax.FromText, TEXTS, RESTS),
    st.builds(ptjax.FrequentWords, COUNTS, RESTS),
    st.builds(ptjax.FromFile, st.sampled_from(["a b.safetensors", "~/x.npy"])),
)
SETTINGS = st.builds(
    ptjax.RunSettings,
    method=st.one_of(
        st.builds(
            ptjax.PromptTuning,
            COUNTS,
            initializer=st.none() | INITIALIZERS,
            attends_to_input=st.booleans(),
        ),
        st.just(ptjax.ModelTuning()),
    ),
    optimizer=st.builds(
        ptjax.Adafactor,
        learning_rate=NUMBERS,
        learning_rate_scale=st.sampled_from(["absolute", "embedding_rms"]),
        weight_decay=NUMBERS,
        step_offset=COUNTS,
    ),
    loss=st.builds(
        ptjax.Loss,
        label_smoothing=st.floats(0, 0.5),
        class_weights=st.none()
        | st.just("balanced")
        | st.dictionaries(TEXTS, st.floats(0.1, 9), max_size=3),
    ),
    schedule=st.builds(ptjax.TrainSchedule, COUNTS, COUNTS, COUNTS, st.none() | COUNTS, COUNTS),
    batching=st.builds(
        ptjax.Batching,
        batch_size=COUNTS.map(lambda n: 2 * n),
        microbatches=st.sampled_from([1, 2]),
        feature_lengths=st.none() | st.fixed_dictionaries({"inputs": COUNTS, "targets": COUNTS}),
        buckets=st.none() | st.just([(8, 4), (16, 4)]),
        pack=st.booleans(),
    ),
    evaluation=st.builds(
        ptjax.Evaluation,
        split=TEXTS,
        examples=st.none() | COUNTS,
        predict=st.sampled_from(["auto", "rank", "decode"]),
        hard_prompts=st.dictionaries(TEXTS, st.builds(ptjax.HardPrompt, TEXTS), max_size=3),
    ),
    seed=st.integers(0, 2**31),
)


@ONCE
@given(SETTINGS)
def test_settings_come_back_equal(made):
    read_again = again(settings=made)
    assert read_again == made
    assert describe(read_again, whole=True) == describe(made, whole=True)


@ONCE
@given(SCHEDULES, st.integers(0, 10**6))
def test_a_schedule_of_optax_comes_back_with_its_rates(schedule, step):
    read_again = again(settings=ptjax.RunSettings(optimizer=ptjax.Adafactor(schedule)))
    assert float(read_again.optimizer.learning_rate(step)) == float(schedule(step))


@ONCE
@given(
    st.dictionaries(TEXTS.map(str.strip), TEXTS.filter(str.strip), min_size=1, max_size=4),
    st.dictionaries(TEXTS, TEXTS, max_size=3),
    TEXTS,
)
def test_a_task_comes_back_equal_with_its_labels_in_their_order(verbalizer, splits, folder):
    task = ptjax.Task(
        name="a 'task'",
        inputs="{a}\n{b}",
        label="c",
        verbalizer=verbalizer,
        splits={f"s{name}": f"x{path}" for name, path in splits.items()},
        data_dir=folder,
        preprocess=ptjax.preprocessors.without_line_breaks,
    )
    read_again = again(task=task)
    # gin wraps the function of the preprocessing.
    assert dataclasses.replace(read_again, preprocess=task.preprocess) == task
    assert describe(read_again, whole=True) == describe(task, whole=True)
    assert read_again.labels == task.labels and list(read_again.splits) == list(task.splits)


def test_members_of_a_sweep_come_back_each_with_its_own():
    tasks = [ptjax.Task(name=name, inputs="{a}", targets=name) for name in "xy"]
    made = ptjax.sweep(
        seeds=[1, 2], initializers={"u": ptjax.Uniform(), "v": ptjax.Uniform(0.1)}, tasks=tasks
    )
    base = ptjax.RunSettings(method=ptjax.PromptTuning(initializer=ptjax.Uniform(0.2)))
    members, read_base, task = again(members=made, settings=base, task=tasks[1])
    assert members == made and list(members) == list(made)
    assert (read_base, task) == (base, tasks[1])


def test_a_backbone_is_loaded_with_the_same_arguments(backbone):
    given: dict[str, Any] = {
        "path": backbone.name,
        "scan_layers": True,
        "tokenizer": "package:nano",
    }
    tokenizer = ptjax.load_tokenizer("package:nano/spiece.model")
    loaded = ptjax.load_backbone(backbone.name, scan_layers=True, tokenizer=tokenizer)
    assert loaded.arguments == given | {"tokenizer": tokenizer}
    read(gin_text.describe_call("ptjax.tune", {"backbone": loaded, "model_dir": Path("runs/x")}))
    assert cli.macro("INITIAL_CHECKPOINT_PATH") == backbone.name
    assert cli.macro("MODEL_DIR") == "runs/x"
    found = cli.settings("ptjax.load_backbone", *given)
    assert found == given | {"tokenizer": tokenizer.name}
    assert cli.settings("ptjax.tune", "backbone")["backbone"].fingerprint == backbone.fingerprint


def mine(key: Any, length: int, context: Any) -> Any:
    raise NotImplementedError


class Own(ptjax.PromptTuning):
    """A user's own method."""


PLAIN = ptjax.RunSettings()
UNSAID = {
    "ptjax.RunSettings.method": (
        dataclasses.replace(PLAIN, method=Own()),
        f"an object of the class {__name__}.Own",
    ),
    "ptjax.PromptTuning.initializer": (
        dataclasses.replace(PLAIN, method=ptjax.PromptTuning(initializer=mine)),
        f"the function {__name__}.mine",
    ),
    "ptjax.Adafactor.learning_rate": (
        dataclasses.replace(PLAIN, optimizer=ptjax.Adafactor(lambda step: 0.1)),
        f"the function {__name__}.<lambda>",
    ),
    "ptjax.Adafactor.clipping_threshold": (
        dataclasses.replace(PLAIN, optimizer=ptjax.Adafactor(clipping_threshold=math.inf)),
        "the number inf",
    ),
    "ptjax.Loss.class_weights": (
        dataclasses.replace(PLAIN, loss=ptjax.Loss(class_weights={"a": np.float64(2), "b": 1e308})),
        None,
    ),
}


class Narrow:
    """A user's own initialiser, an object that is called."""

    def __call__(self, key: Any, length: int, context: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("initializer", "what"),
    [
        (Narrow(), f"an object of the class {__name__}.Narrow"),
        (functools.partial(mine, length=3), "an object of the class functools.partial"),
    ],
)
def test_an_object_that_is_called_like_a_function_is_left_out_too(initializer, what):
    made = dataclasses.replace(PLAIN, method=ptjax.PromptTuning(initializer=initializer))
    text = gin_text.describe_call("ptjax.tune", {"settings": made, "model_dir": "x"})
    assert gin_text.left_out(text) == {"ptjax.PromptTuning.initializer": what}


@pytest.mark.parametrize("name", UNSAID)
def test_what_a_gin_file_cannot_say_is_a_comment_that_train_repeats(name):
    made, what = UNSAID[name]
    text = gin_text.describe_call("ptjax.tune", {"settings": made, "model_dir": "x"})
    assert gin_text.left_out(text) == ({} if what is None else {name: what})
    read(text)
    if what is None:  # numbers of NumPy are numbers
        assert cli.settings("ptjax.tune", "settings")["settings"] == made
        return
    with pytest.raises(InputError, match=r"config.gin: the run was started from Python, and ptjax"):
        cli.bound(ptjax.tune, given=["backbone", "task"])
    value = {"method": "@ptjax.PromptTuning()", "initializer": "None"}.get(name.split(".")[2], 0.5)
    read(text, f"--gin.{name}={value}")  # it may be set anew
    cli.bound(ptjax.tune, given=["backbone", "task"])


def test_an_object_that_would_be_another_one_without_it_is_left_out_as_a_whole(backbone):
    def own(fields: dict[str, Any]) -> list[dict[str, Any]]:
        return [fields]

    task = ptjax.Task(name="t", inputs="{a}", targets="{b}", preprocess=own)
    made = dataclasses.replace(backbone, arguments={})
    text = gin_text.describe_call("ptjax.tune", {"backbone": made, "task": task})
    assert gin_text.left_out(text) == {
        "ptjax.tune.backbone": "a backbone that load_backbone did not load",
        "ptjax.tune.task": f"a task whose preprocess is the function {__name__}.{own.__qualname__}",
    }
    read(text)
    assert cli.settings("ptjax.tune", "task", "backbone") == {}


def test_arrays_are_left_out_and_numbers_of_jax_are_not():
    rate = jnp.float32(0.25)
    schedule = optax.constant_schedule(rate)
    made = ptjax.RunSettings(optimizer=ptjax.Adafactor(schedule))
    assert float(again(settings=made).optimizer.learning_rate(3)) == 0.25
    text = gin_text.describe_call("ptjax.tune", {"members": {"a": np.zeros((2, 3))}})
    assert gin_text.left_out(text) == {"ptjax.tune.members": "an array of shape (2, 3)"}
