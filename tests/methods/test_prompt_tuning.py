"""Prompt tuning: the prompt it starts from, what it trains, its files."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from ptjax.errors import InputError
from ptjax.interop.prompt_file import save_prompt
from ptjax.methods.base import InitContext
from ptjax.methods.from_file import FromFile
from ptjax.methods.initializers import ClassLabels, SampledVocabulary, Uniform
from ptjax.methods.prompt_tuning import PromptTuning
from ptjax.training.freeze import make_freeze

KEY = jax.random.key(0)


@pytest.fixture
def context(backbone) -> InitContext:
    return InitContext(backbone.embedding, backbone.tokenizer, None, list, backbone.config)


def initial(method: PromptTuning, context: InitContext) -> np.ndarray:
    return method.init(KEY, context)["prompt"]["prompt"]


def test_the_papers_prompt_is_the_default() -> None:
    method = PromptTuning()
    assert (method.length, method.attends_to_input) == (100, True)
    assert (method.name, method.collection, method.exports) == ("prompt_tuning", "prompt", "prompt")


@pytest.mark.parametrize("length", [0, -1])
def test_a_prompt_has_a_row(length) -> None:
    PromptTuning(1)
    with pytest.raises(InputError, match=rf"^PROMPT_LENGTH must be >= 1, got {length}$"):
        PromptTuning(length)


def test_a_closed_label_set_starts_from_its_labels_others_from_common_tokens(context) -> None:
    closed = dataclasses.replace(context, labels=("positive", "no"))
    np.testing.assert_array_equal(initial(PromptTuning(5), closed), ClassLabels()(KEY, 5, closed))
    np.testing.assert_array_equal(
        initial(PromptTuning(5), context), SampledVocabulary()(KEY, 5, context)
    )
    chosen = initial(PromptTuning(5, Uniform(0.01)), closed)
    assert 0 < np.abs(chosen).max() <= 0.01


def test_the_first_prompt_is_float32_on_the_host(context) -> None:
    half = dataclasses.replace(context, embedding=context.embedding.astype("bfloat16"))
    for initializer in (None, lambda key, length, _: jax.numpy.ones((length, 16), "bfloat16")):
        made = initial(PromptTuning(3, initializer), half)
        assert isinstance(made, np.ndarray) and made.dtype == np.float32 and made.shape == (3, 16)


def test_an_initialiser_of_another_shape_is_refused_by_name(context) -> None:
    method = PromptTuning(3, lambda key, length, _: np.zeros((length + 1, 16)))
    wanted = r"has shape \(4, 16\), but the run needs \(3, 16\); change PROMPT_LENGTH or the init"
    with pytest.raises(InputError, match=f"^the initial prompt {wanted}"):
        method.init(KEY, context)
    member = dataclasses.replace(context, member="seed_1")
    with pytest.raises(InputError, match=f"^the initial prompt of seed_1 {wanted}"):
        method.init(KEY, member)


def test_a_prompt_of_another_width_is_refused(context, tmp_path) -> None:
    path = tmp_path / "narrow.safetensors"
    save_prompt(path, np.zeros((3, 15), np.float32), {})
    with pytest.raises(InputError, match=r"15\).*but the run needs \(3, 16\)"):
        PromptTuning(3, FromFile(str(path))).init(KEY, context)


def test_the_prompt_trains_and_the_backbone_does_not() -> None:
    variables = {"params": {"encoder": {"w": 0}, "decoder": {"w": 0}}, "prompt": {"prompt": 0}}
    assert make_freeze(variables, PromptTuning().freeze_rules()) == {
        "params": {"encoder": {"w": True}, "decoder": {"w": True}},
        "prompt": {"prompt": False},
    }


def test_a_prompt_takes_positions_only_if_it_attends_to_the_input() -> None:
    assert PromptTuning(7).extra_positions() == 7
    assert PromptTuning(7, attends_to_input=False).extra_positions() == 0


@pytest.mark.parametrize("attends", [True, False])
def test_an_export_gives_the_prompt_and_its_metadata_back(backbone, tmp_path, attends) -> None:
    method, path = PromptTuning(2, attends_to_input=attends), tmp_path / "best.safetensors"
    prompt = np.arange(32, dtype=np.float32).reshape(2, 16)
    metadata = {"step": 3, **method.describe()}
    method.save(path, {"prompt": {"prompt": prompt}}, metadata, backbone)
    read = method.read_metadata(path)
    assert (read["step"], read["sees_input"]) == (3, attends)
    loaded = method.load(path, backbone)
    assert jax.tree.map(np.shape, loaded) == {"prompt": {"prompt": (2, 16)}}
    np.testing.assert_array_equal(loaded["prompt"]["prompt"], prompt)
    with pytest.raises(InputError, match="no_such"):
        method.read_metadata(tmp_path / "no_such.safetensors")


def test_rows_of_a_batch_and_members_of_a_sweep_may_have_prompts_of_their_own() -> None:
    assert PromptTuning().supports_rows
    assert PromptTuning().supports_sweep
