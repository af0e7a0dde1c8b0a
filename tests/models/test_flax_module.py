"""A Flax module of T5X's form as the backbone equals ptjax's own T5, and what it lacks is refused.

`t5x_style.Transformer` stands in for T5X's network: the same protocol, the same names.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FIXTURES, tune
from flax import linen as nn
from t5_ids import T5_IDS
from t5x_style import Transformer

import ptjax
from ptjax.backbones.describe import fingerprints_of
from ptjax.backbones.load import Backbone, load_backbone
from ptjax.backbones.open import open_backbone
from ptjax.backbones.save import save_backbone
from ptjax.errors import InputError
from ptjax.evaluation.evaluator import Evaluator
from ptjax.inference.labels import Labels, rank
from ptjax.methods.model_tuning import ModelTuning
from ptjax.models.decoding import decode
from ptjax.models.module_family import ModuleFamily
from ptjax.models.prompted import with_prompt
from ptjax.settings import Evaluation, TrainSchedule
from ptjax.training.freeze import flatten_paths
from ptjax.training.optimizer import Adafactor

NAMES = ("t5_1_1_tiny_legacy", "t5_1_1_tiny_orbax", "t5_1_0_tiny_legacy")
# Float32 sums in another order, through four layers; logits are up to 6.
TOLERANCE = 3e-5


@functools.cache
def pair(name: str) -> tuple[Backbone, Backbone]:
    """The fixture as ptjax's own T5, and through the stand-in."""
    own = load_backbone(FIXTURES / name, dtype="float32")
    family = ptjax.flax_module(Transformer(own.config))
    return own, load_backbone(FIXTURES / name, dtype="float32", family=family)


def make_batch(backbone: Any) -> dict[str, np.ndarray]:
    """Three rows of 9, 5 and 2 tokens, one of which has the id of padding inside its text."""
    rng = np.random.default_rng(0)
    inputs, targets = (rng.integers(2, backbone.config.vocab_size, (3, n)) for n in (9, 5))
    lengths = np.array([9, 5, 2])
    inputs[np.arange(9) >= lengths[:, None]] = 0
    inputs[0, 3] = 0
    return {
        "encoder_input_tokens": inputs.astype(np.int32),
        "encoder_lengths": lengths.astype(np.int32),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1].astype(np.int32),
        "decoder_target_tokens": targets.astype(np.int32),
    }


def make_prompt(backbone: Any, length: int = 4) -> np.ndarray:
    shape = length, backbone.config.emb_dim
    return np.random.default_rng(length).normal(size=shape).astype(np.float32)


def close(ours: Any, theirs: Any) -> None:
    assert np.std(np.asarray(ours)) > 0
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_the_prompts_gradient_are_those_of_ptjax(name):
    ours, module = pair(name)
    batch, prompt = make_batch(ours), make_prompt(ours)
    for one in (None, prompt):
        close(*(ptjax.forward(backbone, batch, one) for backbone in (ours, module)))
    (loss, gradient), (other, of_module) = (
        ptjax.loss_and_prompt_gradient(backbone, batch, prompt) for backbone in (ours, module)
    )
    np.testing.assert_allclose(loss, other, rtol=1e-6)
    close(gradient, of_module)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_beams_and_ranks_are_those_of_ptjax(name):
    batch, labels = make_batch(pair(name)[0]), np.array([[7, 8, 1], [9, 1, 0], [1, 0, 0]], np.int32)
    inputs = jnp.asarray(batch["encoder_input_tokens"]), jnp.asarray(batch["encoder_lengths"])

    @functools.partial(jax.jit, static_argnums=0)
    def answers(apply_fn: Any, variables: Any) -> Any:
        settings = {"ids": T5_IDS, "max_length": 6}
        sets = Labels(jnp.asarray(labels), jnp.array([3, 2, 1]))
        return (
            decode(apply_fn, variables, *inputs, **settings),
            decode(apply_fn, variables, *inputs, **settings, num_beams=3),
            rank(apply_fn, variables, *inputs, sets, ids=T5_IDS),
        )

    (greedy, beams, ranks), (greedy_too, beams_too, ranks_too) = (
        answers(x.apply_fn, with_prompt(x.variables, make_prompt(x))) for x in pair(name)
    )
    for (tokens, scores), (other, of_module) in ((greedy, greedy_too), (beams, beams_too)):
        np.testing.assert_array_equal(tokens, other)
        close(scores, of_module)
    assert len(np.unique(greedy[0])) > 3
    close(ranks, ranks_too)


def test_each_row_takes_its_prompt_of_a_bank():
    ours, module = pair(NAMES[0])
    batch, prompts = make_batch(ours), {"long": make_prompt(ours, 5), "short": make_prompt(ours, 3)}
    chosen = ["short", None, "long"]
    bank = ptjax.make_bank(prompts)
    logits = np.asarray(ptjax.forward(module, batch, bank, prompt_ids=chosen))
    close(logits, ptjax.forward(ours, batch, bank, prompt_ids=chosen))
    blind = types.SimpleNamespace(prompt=make_prompt(ours), attends_to_input=False, metadata=None)
    bank = ptjax.make_bank(prompts | {"blind": blind})
    with pytest.raises(
        InputError, match=r"SEES_INPUT = False is not supported by a custom Flax module"
    ):
        ptjax.forward(module, batch, bank, prompt_ids=chosen)


@pytest.mark.parametrize("text_of", [lambda family: family.module, lambda family: None])
def test_a_t5x_model_is_taken_for_its_module(text_of):
    family = pair(NAMES[0])[1].family
    model = types.SimpleNamespace(module=text_of(family))
    if model.module is None:
        with pytest.raises(
            InputError, match="SimpleNamespace is neither a Flax module nor has one"
        ):
            ptjax.flax_module(model)
    else:
        assert ptjax.flax_module(model).module is family.module


class Twice(Transformer):
    def encode(self, encoder_input_tokens: Any, enable_dropout: bool = True) -> Any:
        self.token_embedder(encoder_input_tokens)
        return super().encode(encoder_input_tokens, enable_dropout)


class Never(Transformer):
    def encode(self, encoder_input_tokens: Any, enable_dropout: bool = True) -> Any:
        return self.token_embedder.embedding[encoder_input_tokens]


class Shorter(Transformer):
    def encode(self, encoder_input_tokens: Any, enable_dropout: bool = True) -> Any:
        return super().encode(encoder_input_tokens, enable_dropout)[:, 1:]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Twice, "Twice.encode called its embedder 'token_embedder' 2 times instead of once"),
        (Never, "Never.encode called its embedder 'token_embedder' 0 times instead of once"),
        (
            Shorter,
            r"Shorter.encode of tokens \[3, 13\] embedded \[3, 13\] and returned \[3, 12, 32\]",
        ),
    ],
)
def test_a_prompt_is_never_missing_without_a_word(kind, message):
    ours, module = pair(NAMES[0])
    apply_fn = ModuleFamily(kind(ours.config)).build(module.config)
    batch = make_batch(ours)
    variables = with_prompt(module.variables, make_prompt(ours))
    with pytest.raises(InputError, match=message):
        jax.eval_shape(
            functools.partial(apply_fn, method="encode"),
            variables,
            batch["encoder_input_tokens"],
            encoder_lengths=batch["encoder_lengths"],
        )


class Forgetful(Transformer):
    def decode(self, *arguments: Any, decode: bool = False, **settings: Any) -> Any:
        return super().decode(*arguments, **settings)


class NoDecoder(nn.Module):
    def encode(self, encoder_input_tokens: Any, enable_dropout: bool = True) -> Any: ...


def test_what_is_no_such_module_is_refused():
    ours, module = pair(NAMES[0])
    with pytest.raises(InputError, match="NoDecoder has no method 'decode'"):
        ptjax.flax_module(NoDecoder())
    family = ptjax.flax_module(Transformer(ours.config), embedder="embed")
    with pytest.raises(InputError, match=r"embed/embedding is missing; name the module .*embedder"):
        load_backbone(FIXTURES / NAMES[0], family=family)
    wider = ptjax.flax_module(Transformer(pair(NAMES[2])[0].config))
    with pytest.raises(InputError, match=r"parameter decoder/\S+ (is missing|has shape)"):
        load_backbone(FIXTURES / NAMES[0], family=wider)
    apply_fn = ModuleFamily(Forgetful(ours.config)).build(module.config)
    batch = make_batch(ours)
    tokens, lengths = map(jnp.asarray, (batch["encoder_input_tokens"], batch["encoder_lengths"]))
    with pytest.raises(InputError, match=r"Forgetful.decode\(decode=True\) keeps nothing in"):
        jax.eval_shape(
            lambda: decode(
                apply_fn, module.variables, tokens, lengths, ids=T5_IDS, max_length=3, num_beams=2
            )
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp": True}, "FSDP = True"),
        ({"quantize": "int8"}, "QUANTIZE"),
        ({"attention": "fused"}, "ATTENTION = 'fused'"),
        ({"scan_layers": True}, "SCAN_LAYERS = True"),
        ({"remat": "full"}, "REMAT"),
    ],
)
def test_what_only_ptjax_s_own_network_can_do_is_refused_by_name(settings, message):
    family = pair(NAMES[0])[1].family
    with pytest.raises(InputError, match=f"^{message} is not supported by a custom Flax module"):
        load_backbone(FIXTURES / NAMES[0], family=family, **settings)
    # What a gin file binds for any backbone says nothing.
    plain = {"fsdp": False, "quantize": None, "scan_layers": False, "remat": "none"}
    plain["attention"] = "auto"
    opened = plain | dict.fromkeys(settings) | plain
    del opened["fsdp"], opened["quantize"], opened["attention"]
    assert open_backbone(FIXTURES / NAMES[0], family=family, **opened).config.vocab_size == 256


def test_prompts_that_see_no_input_and_packed_rows_are_refused_by_name():
    ours, module = pair(NAMES[0])
    with pytest.raises(InputError, match="SEES_INPUT = False is not supported"):
        module.make_apply_fn(False)
    tokens = jnp.asarray(make_batch(ours)["encoder_input_tokens"])
    with pytest.raises(InputError, match="PACK = True is not supported"):
        module.apply_fn(module.variables, tokens, tokens, tokens, tokens)


def test_dropout_is_the_module_s_own_and_can_be_switched_off():
    ours, module = pair(NAMES[0])
    batch = {name: jnp.asarray(rows) for name, rows in make_batch(ours).items()}

    def states(dropout_rate: float, seed: int) -> np.ndarray:
        config = dataclasses.replace(module.config, dropout_rate=dropout_rate)
        encode = functools.partial(module.family.build(config), method="encode", train=True)
        tokens, lengths = batch["encoder_input_tokens"], batch["encoder_lengths"]
        rngs = {"dropout": jax.random.key(seed)}
        run = jax.jit(
            lambda rngs: encode(module.variables, tokens, encoder_lengths=lengths, rngs=rngs)
        )
        return np.asarray(run(rngs).states)

    off = states(0.0, 0)
    np.testing.assert_array_equal(off, states(0.0, 1))
    dropped = [states(0.1, seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert min(np.abs(dropped[0] - other).max() for other in (dropped[2], off)) > 0.1


def test_weights_under_their_own_names_come_back(tmp_path):
    _, module = pair(NAMES[0])
    params = module.variables["params"]
    save_backbone(tmp_path, module.config, params, dtype="float32", family=module.family)
    again = load_backbone(tmp_path, dtype="float32", family=module.family)
    jax.tree.map(np.testing.assert_array_equal, again.variables, module.variables)
    assert again.fingerprints == module.fingerprints
    opened = open_backbone(tmp_path, family=module.family)
    assert fingerprints_of(opened) == module.fingerprints
    assert set(opened.arrays) == set(flatten_paths(params))
    with pytest.raises(InputError, match="holds no backbone that ptjax knows"):
        load_backbone(tmp_path)  # T5 is read under T5X's or Hugging Face's names alone
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"neither a T5X .* nor model.safetensors under its own"):
        load_backbone(tmp_path / "empty", family=module.family)


@pytest.mark.slow
def test_a_run_trains_scores_and_exports_as_that_of_ptjax(tmp_path, backbone, task):
    """Hugging Face's names come in too, for the module's are T5X's."""
    results, losses, texts = [], [], []
    for name, family in (("t5", None), ("own", ptjax.flax_module(Transformer(backbone.config)))):
        frozen = load_backbone(backbone.name, dropout_rate=0.0, family=family)
        results.append(tune(tmp_path / name, task, frozen))
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([row["train/loss"] for row in rows if "train/loss" in row])
        prompt = ptjax.load_prompt(tmp_path / name / "prompts" / "best.safetensors")
        texts.append(ptjax.generate(frozen, ["text: lovely"], prompt, max_new_tokens=4))
    # Twelve steps of Adafactor, which amplifies float32's rounding.
    np.testing.assert_allclose(*losses, rtol=1e-3)
    assert losses[0][-1] < losses[0][0]
    counts = ("trainable_parameters", "frozen_parameters", "step")
    assert [results[0][name] for name in counts] == [results[1][name] for name in counts]
    assert results[0]["value"] == results[1]["value"]
    assert len(texts[0]) == len(texts[1]) == 1


@pytest.mark.slow
def test_model_tuning_exports_a_model_that_loads_back(tmp_path, backbone, task):
    """A whole run; the same command then returns the same results, and notices a cut export."""
    family = ptjax.flax_module(Transformer(backbone.config))
    start = load_backbone(backbone.name, family=family)
    settings = {
        "method": ModelTuning(),
        "optimizer": Adafactor(learning_rate=1e-2, multiply_by_parameter_scale=True),
        "schedule": TrainSchedule(train_steps=2, eval_period=1),
    }
    results = tune(tmp_path, task, start, **settings)
    assert results["frozen_parameters"] == 0
    best = tmp_path / "models" / "best"
    tuned = load_backbone(best, family=family)
    before = flatten_paths(start.variables["params"])
    after = flatten_paths(tuned.variables["params"])
    assert set(after) == set(before)
    unmoved = [path for path in after if np.array_equal(after[path], before[path])]
    assert not unmoved
    assert tuned.fingerprint != start.fingerprint
    lengths = {"inputs": 32, "targets": 4}
    evaluator = Evaluator(task, tuned, tuned.tokenizer, lengths, Evaluation(batch_size=16))
    assert evaluator(tuned.variables, "test") == results["metrics"]
    assert tune(tmp_path, task, start, **settings) == results
    ModelTuning().read_metadata(best)
    weights = best / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"best/model\.safetensors: .*"):
        ModelTuning().read_metadata(best)
