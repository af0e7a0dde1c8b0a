"""A weight that is NaN or infinite is named where it first matters; no NaN leaves as a score."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tune
from letters import make_backbone
from t5_ids import decode

from ptjax.backbones import damage
from ptjax.backbones.load import load_backbone
from ptjax.backbones.save import save_backbone
from ptjax.errors import InputError, TrainingError
from ptjax.evaluation.evaluator import Evaluator
from ptjax.inference import predict
from ptjax.inference.generate import generate
from ptjax.inference.prompt_kv import precompute_prompt_kv
from ptjax.interop.prompt_file import PromptFile, load_prompt, save_prompt
from ptjax.interop.safetensors_file import open_safetensors, save_safetensors, to_header
from ptjax.methods.model_tuning import ModelTuning
from ptjax.methods.prompt_tuning import PromptTuning
from ptjax.models.t5 import Encoded
from ptjax.settings import Evaluation
from ptjax.trees import flatten_paths, unflatten_paths

QUERY = "decoder/layers_1/self_attention/query/kernel"
MIDDLE = "encoder/layers_0/mlp/wo/kernel"


def with_entry(params: Any, path: str, value: float) -> dict[str, Any]:
    """The parameters with one entry of one of them at `value`."""
    flat = dict(flatten_paths(params))
    flat[path] = flat[path].at[(0,) * flat[path].ndim].set(value)
    return unflatten_paths(flat)


def damaged(backbone: Any, path: str = MIDDLE, value: float = np.nan) -> Any:
    variables = {"params": with_entry(backbone.variables["params"], path, value)}
    if isinstance(backbone, types.SimpleNamespace):
        return types.SimpleNamespace(**vars(backbone) | {"variables": variables})
    return dataclasses.replace(backbone, variables=variables)


@pytest.fixture(scope="module")
def letters(tiny) -> Any:
    return make_backbone(tiny)


WAYS = {
    "rank": lambda backbone: predict.rank(backbone, ["abc", "b"], [["xy", "z"], ["a"]]),
    "greedy": lambda backbone: generate(backbone, ["abc", "b"], max_new_tokens=4),
    "beams": lambda backbone: generate(backbone, ["abc", "b"], max_new_tokens=4, num_beams=2),
}


@pytest.mark.parametrize("way", WAYS)
def test_case_1_11_what_is_predicted_names_the_damaged_weight(letters, way):
    assert WAYS[way](letters)
    for path, value, what in ((MIDDLE, np.nan, "NaN"), (QUERY, np.inf, "infinity")):
        with pytest.raises(InputError, match=rf"tiny has {what} in {path} \(1 of .* is damaged"):
            WAYS[way](damaged(letters, path, value))


def test_case_1_11_a_label_whose_logit_is_minus_infinity_is_no_score(letters, monkeypatch):
    def likelihoods(*args, **settings):
        return np.array([0, 0]), np.array([[-1.0, -np.inf], [-1.0, -2.0]], np.float32)

    monkeypatch.setattr(predict, "predict_labels", likelihoods)
    with pytest.raises(damage.NotFiniteError, match="the score of a label is not finite"):
        predict.rank(letters, ["a", "b"], ["x", "y"])
    # Of a smaller set -inf is no label at all.
    found = predict.rank(letters, ["a", "b"], [["x"], ["x", "y"]])
    assert [p.probabilities["x"] for p in found] == [1.0, pytest.approx(np.e / (np.e + 1))]


@pytest.mark.parametrize("predict", ["rank", "decode"])
def test_case_1_11_an_evaluation_names_the_damaged_weight(backbone, task, predict):
    bad = damaged(backbone)
    settings = Evaluation(predict=predict, batch_size=16)
    evaluator = Evaluator(task, bad, bad.tokenizer, {"inputs": 64, "targets": 4}, settings)
    with pytest.raises(InputError, match=rf"NaN in {MIDDLE}"):
        evaluator(bad.variables, "validation")


def test_case_1_11_a_search_that_meets_a_nan_late_has_no_score():
    """Also where something was finished before: the search went wrong."""

    class Late:
        def __call__(self, variables, *args, method, **inputs):
            if method == "encode":
                return Encoded(None, jnp.ones((2, 3), int))
            if method == "init_cache":
                empty = jnp.zeros((2, args[1], 1, 1))
                return [{"self_key": empty, "self_value": empty}]
            _, cache, position, _ = args
            logits = jnp.log(jnp.array([0.1, 0.5, 0.2, 0.2]))
            logits = jnp.where(position < 2, logits, jnp.nan)
            return jnp.broadcast_to(logits, (4, 1, 4)), cache

    tokens = jnp.full((2, 3), 5, jnp.int32)
    _, scores = decode(Late(), {}, tokens, max_length=6, num_beams=2, alpha=5.0)
    assert np.isnan(scores).all()


def test_case_1_11_int8_does_not_hide_a_nan(tmp_path, backbone):
    for value in (np.nan, np.inf):
        params = with_entry(backbone.variables["params"], MIDDLE, value)
        folder = tmp_path / str(value)
        save_backbone(folder, backbone.config, params, tokenizer=backbone.tokenizer)
        loaded = load_backbone(folder, quantize="int8")
        with pytest.raises(InputError, match=f"in {MIDDLE} "):
            predict.rank(loaded, ["a text"], ["positive", "negative"])


def test_case_1_11_a_layer_of_a_stack_is_named():
    stacked = jnp.zeros((3, 4, 2)).at[1, 0, 0].set(np.nan)
    params = {"encoder": {"layers": {"mlp": {"wo": {"kernel": stacked}}}}}
    with pytest.raises(InputError, match=r"x has NaN in encoder/layers_1/mlp/wo/kernel \(1 of 8 "):
        damage.check_weights(params, "x")
    damage.check_weights({"scale": jnp.ones(3)}, "x")


@pytest.mark.parametrize("method", [PromptTuning(length=4), ModelTuning()])
def test_case_1_11_step_1_blames_the_backbone(backbone, task, tmp_path, method):
    with pytest.raises(InputError, match=rf"has NaN in {MIDDLE}") as raised:
        tune(tmp_path, task, damaged(backbone), method=method)
    assert "learning rate" not in str(raised.value)
    assert not (tmp_path / "results.json").exists() and not (tmp_path / "prompts").exists()


@dataclasses.dataclass(frozen=True)
class Infinite:
    """An initial prompt that is not finite."""

    def __call__(self, key, length, context):
        return np.full((length, context.embedding.shape[1]), np.inf, np.float32)


def test_case_1_11_step_1_blames_no_learning_rate(backbone, task, tmp_path):
    with pytest.raises(TrainingError, match="the learning rate is not the cause") as raised:
        tune(tmp_path, task, backbone, initializer=Infinite())
    assert "smaller learning rate" not in str(raised.value)


def test_case_1_11_a_prompt_without_scores_is_not_exported(backbone, task, tmp_path, monkeypatch):
    evaluate, calls = Evaluator.__call__, []

    def spoilt(self, variables, split, rewording=None):
        calls.append(split)
        if len(calls) == 2:
            raise damage.NotFiniteError("no score")
        return evaluate(self, variables, split, rewording)

    monkeypatch.setattr(Evaluator, "__call__", spoilt)
    with pytest.raises(TrainingError, match=r"a score on .* near 6 is not finite; .* step 3 is"):
        tune(tmp_path, task, backbone)
    exports = {path.name for path in (tmp_path / "prompts").iterdir()}
    assert exports == {"3.safetensors", "best.safetensors"}


def test_case_1_11_states_of_a_damaged_backbone_are_not_compiled(letters, tiny):
    prompt = PromptFile(np.asarray(tiny.prompt), {"sees_input": False})
    assert precompute_prompt_kv(letters, prompt).states is not None
    with pytest.raises(InputError, match=rf"tiny has NaN in {MIDDLE}"):
        precompute_prompt_kv(damaged(letters), prompt)


@pytest.mark.parametrize("name", ["encoder_keys", "encoder_values", "decoder_keys"])
def test_case_1_11_compiled_states_that_are_not_finite_are_refused(letters, tiny, tmp_path, name):
    prompt = PromptFile(np.asarray(tiny.prompt), {"sees_input": False})
    compiled = precompute_prompt_kv(letters, prompt)
    file = tmp_path / "prompt.safetensors"
    save_prompt(file, compiled.prompt, compiled.metadata, compiled.states)
    assert load_prompt(file).states is not None
    arrays = {key: array.read_all() for key, array in open_safetensors(file)[0].items()}
    arrays[name] = arrays[name].copy()
    arrays[name][1, 0, 0, 0] = np.nan
    layout = {key: (array.shape, array.dtype.name) for key, array in arrays.items()}
    save_safetensors(file, arrays.items(), layout, metadata=to_header(compiled.metadata))
    with pytest.raises(InputError, match=f"{name.split('_')[0]}_keys or .* is not finite"):
        load_prompt(file)
