"""Multitask prompts: one shared prompt times a low-rank matrix for each task."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from conftest import make_settings, outcome, stopped_by_sigterm
from safetensors.numpy import load_file, save_file

import ptjax
from ptjax.errors import InputError
from ptjax.methods.base import InitContext
from ptjax.methods.initializers import Uniform
from ptjax.methods.multitask import MultitaskPromptTuning
from ptjax.trainer.identity import describe
from ptjax.training.freeze import make_freeze

KEY = jax.random.key(0)
P, D, T, R = 3, 16, 2, 2
SHARED, COLS, ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"


@pytest.fixture(scope="module")
def context(backbone) -> InitContext:
    return InitContext(backbone.embedding, backbone.tokenizer, None, list, backbone.config)


@pytest.fixture(scope="module")
def several() -> ptjax.MultitaskPrompts:
    """Two tasks' prompts."""
    rng = np.random.default_rng(0)
    arrays = (rng.normal(size=size).astype(np.float32) for size in ((P, D), (T, P, R), (T, R, D)))
    return ptjax.MultitaskPrompts(*arrays, {"backbone_name": "me/t5"})


@pytest.fixture
def folder(several, tmp_path):
    several.save(tmp_path / "peft")
    return tmp_path / "peft"


def made(method: MultitaskPromptTuning, context: InitContext) -> dict[str, np.ndarray]:
    arrays = method.init(KEY, context)["multitask_prompt"]
    return {name: np.asarray(array) for name, array in arrays.items()}


def test_without_a_start_it_is_the_initialisers_prompt(context) -> None:
    """Exactly with rank 1; with others the matrix is 1 to the square of their noise."""
    plain = MultitaskPromptTuning(P, initializer=Uniform())
    one = made(plain, context)
    np.testing.assert_array_equal(plain.matrix(one), one["shared"])
    assert 0 < np.abs(one["shared"]).max() <= 0.5
    method = MultitaskPromptTuning(P, rank=2)
    factors = made(method, context)
    product = factors["cols"] @ factors["rows"]
    assert 0 < np.abs(product - 1).max() < 0.01
    np.testing.assert_allclose(method.matrix(factors), factors["shared"] * product, rtol=1e-6)


def test_it_starts_from_a_task_the_average_or_the_shared_prompt(context, folder, several) -> None:
    method = functools.partial(MultitaskPromptTuning, P, rank=R, start=folder)
    of_task = made(method(start_task=1), context)
    np.testing.assert_array_equal(method().matrix(of_task), several.prompt(1).prompt)
    average = made(method(start_task="average"), context)
    for name, array in (("cols", several.cols), ("rows", several.rows)):
        np.testing.assert_array_equal(average[name], array.mean(axis=0))
    shared = made(method(), context)
    np.testing.assert_array_equal(shared["shared"], several.shared)
    assert np.abs(shared["cols"] @ shared["rows"] - 1).max() < 0.01


def test_it_starts_from_an_ordinary_prompt(context, several, tmp_path) -> None:
    path = tmp_path / "prompt.safetensors"
    several.prompt(0).save(path)
    method = MultitaskPromptTuning(P, start=path, freeze_shared=True)
    arrays = made(method, context)
    np.testing.assert_array_equal(method.matrix(arrays), several.prompt(0).prompt)


def test_the_shared_prompt_trains_or_is_frozen(folder) -> None:
    variables = {"params": {"w": 0}, "multitask_prompt": {"shared": 0, "cols": 0, "rows": 0}}
    for freeze in (False, True):
        method = MultitaskPromptTuning(P, start=folder, freeze_shared=freeze)
        assert make_freeze(variables, method.freeze_rules()) == {
            "params": {"w": True},
            "multitask_prompt": {"shared": freeze, "cols": False, "rows": False},
        }


def test_exports_join_to_a_file_of_several_tasks(context, folder, backbone, several) -> None:
    """Each export is an ordinary prompt, which holds its factors."""
    parts = []
    for task in range(T):
        method = MultitaskPromptTuning(P, R, start=folder, start_task=task, freeze_shared=True)
        arrays = made(method, context)
        trained = {"multitask_prompt": {name: arrays[name] for name in ("cols", "rows")}}
        path = folder.parent / f"{task}.safetensors"
        method.save(path, trained, {"step": 4, "backbone_name": "me/t5"}, backbone)
        prompt = ptjax.load_prompt(path)
        np.testing.assert_array_equal(prompt.prompt, several.prompt(task).prompt)
        assert prompt.metadata["step"] == 4
        assert method.load(path, backbone)["prompt"]["prompt"].shape == (P, D)
        parts.append(ptjax.load_multitask(path))
    joined = ptjax.MultitaskPrompts.join(parts)
    assert joined.metadata == {"backbone_name": "me/t5"}
    joined.save(folder.parent / "joined")
    again = ptjax.load_multitask(folder.parent / "joined")
    for name in ("shared", "cols", "rows"):
        np.testing.assert_array_equal(getattr(again, name), getattr(several, name))
    assert repr(again) == "<MultitaskPrompts [3, 16] of 2 tasks, rank 2>"
    own = {"multitask_prompt": arrays | {"shared": 2 * several.shared}}
    MultitaskPromptTuning(P, R).save(path, own, {}, backbone)
    with pytest.raises(InputError, match="part 1 has another shared prompt than part 0; train"):
        ptjax.MultitaskPrompts.join([parts[0], ptjax.load_multitask(path)])


def test_the_identity_is_what_the_start_holds(folder) -> None:
    method = functools.partial(MultitaskPromptTuning, P, rank=R, start_task=0)
    before = describe(method(start=folder))
    moved = shutil.copytree(folder, folder.with_name("moved"))
    assert describe(method(start=moved)) == before
    several = ptjax.load_multitask(folder)
    dataclasses.replace(several, cols=several.cols + 1).save(moved)
    changed = describe(method(start=moved))
    assert {name for name in before if before[name] != changed[name]} == {"start"}


def test_half_of_pefts_two_prompts_is_read_with_a_warning(folder, several, caplog) -> None:
    doubled = ptjax.MultitaskPrompts(
        np.concatenate([several.shared, several.shared + 1]),
        np.concatenate([several.cols, several.cols + 1], axis=1),
        several.rows,
    )
    doubled.save(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"num_virtual_tokens": P, "num_transformer_submodules": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = ptjax.load_multitask(folder)
    np.testing.assert_array_equal(found.prompt(1).prompt, several.prompt(1).prompt)
    assert "a second half before the decoder's input, which is left out" in caplog.text


def test_what_does_not_fit_is_refused(context, folder, several, tmp_path) -> None:
    method = functools.partial(MultitaskPromptTuning, P, start=folder)
    for start, said in (
        (method(rank=1, start_task=0), r"its factors have rank 2; set Multitask.*\.rank to it$"),
        (method(rank=R, start_task=2), r"start_task = 2: .* has the tasks 0 to 1, and 'average'$"),
        (
            MultitaskPromptTuning(4, start=folder),
            r"shared prompt has shape \[3, 16\], but the run needs \[4, 16\]; set --gin.PROMPT_L",
        ),
    ):
        with pytest.raises(InputError, match=said):
            start.init(KEY, context)
    path = tmp_path / "prompt.safetensors"
    several.prompt(0).save(path)
    with pytest.raises(InputError, match=r"is an ordinary prompt, without factors; leave out"):
        MultitaskPromptTuning(P, start=path, start_task=0).init(KEY, context)
    with pytest.raises(InputError, match=r"holds no multitask prompts; load_prompt reads"):
        ptjax.load_multitask(path)
    with pytest.raises(
        InputError, match=r"freeze_shared = True needs MultitaskPromptTuning\.start"
    ):
        MultitaskPromptTuning(freeze_shared=True)
    with pytest.raises(InputError, match=r"start_task = 0 needs MultitaskPromptTuning\.start"):
        MultitaskPromptTuning(start_task=0)
    with pytest.raises(InputError, match=r"^MultitaskPromptTuning\.rank must be >= 1, got 0$"):
        MultitaskPromptTuning(rank=0)
    with pytest.raises(InputError, match=r"^task 2 of multitask prompts of 2 tasks$"):
        several.prompt(2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({ROWS: np.ones((T, R, D + 1))}, r"factors do not fit together: .*rows \[2, 2, 17\]$"),
        ({ROWS: np.ones((T + 1, R, D))}, r"factors do not fit together: .*rows \[3, 2, 16\]$"),
        ({COLS: np.ones((P, R))}, r"factors do not fit together: .*cols \[3, 2\], rows"),
        ({COLS: np.ones((T, P, 0)), ROWS: np.ones((T, 0, D))}, r"factors do not fit together"),
        ({SHARED: np.ones(P)}, r"factors do not fit together: shared \[3\]"),
        ({SHARED: np.full((P, D), np.nan)}, r"prompt_embeddings is not finite$"),
        ({SHARED: np.ones((P + 1, D)), COLS: np.ones((T, P + 1, R))}, r"has 4 rows, but .* 3 "),
    ],
)
def test_damaged_factors_are_refused(folder, changes, said) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file) | {name: np.float32(x) for name, x in changes.items()}
    save_file(tensors, file)
    with pytest.raises(InputError, match=said):
        ptjax.load_multitask(folder)


@pytest.mark.slow
def test_the_second_stage_trains_the_factors_alone_and_resumes_bitwise(
    folder, several, backbone, task, tmp_path
) -> None:
    method = MultitaskPromptTuning(P, R, start=folder, start_task=0, freeze_shared=True)

    def train(name: str, callbacks: Any = ()) -> Any:
        schedule = ptjax.TrainSchedule(train_steps=3, eval_period=3, log_period=1)
        settings = make_settings(method=method, schedule=schedule)
        return ptjax.tune(backbone, task, tmp_path / name, settings, callbacks=callbacks)

    whole = train("whole")
    assert whole.results["trainable_parameters"] == P * R + R * D
    found = ptjax.load_multitask(whole.model_dir)
    np.testing.assert_array_equal(found.shared, several.shared)
    for name in ("cols", "rows"):
        assert np.abs(getattr(found, name)[0] - getattr(several, name)[0]).min() > 0
    assert stopped_by_sigterm(2, functools.partial(train, "stopped")) == 143
    shutil.move(folder, folder.with_name("moved"))
    method = dataclasses.replace(method, start=folder.with_name("moved"))
    assert train("stopped").finished
    resumed, straight = (outcome(tmp_path / name) for name in ("stopped", "whole"))
    assert resumed["prompts"] == straight["prompts"]
