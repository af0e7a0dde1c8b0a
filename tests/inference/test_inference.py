"""Inference from Python: logits, gradients, texts, label likelihoods, and what is compiled."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from letters import LETTERS, make_backbone, random_texts, text_source
from t5_ids import decode

from ptjax.data.batch import shift_right
from ptjax.errors import InputError
from ptjax.inference import forward, generate, prompts
from ptjax.inference.prompts import check_prompt
from ptjax.interop.prompt_file import PromptFile
from ptjax.sharding.arrays import replicated
from ptjax.sharding.meshes import make_mesh
from ptjax.training.loss import Loss


@pytest.fixture(scope="module")
def backbone(tiny):
    return make_backbone(tiny)


def test_forward_is_the_model_without_dropout(backbone, tiny, tiny_batch):
    apply_fn = tiny.jitted()
    names = ("encoder_input_tokens", "decoder_input_tokens")
    batch = [tiny_batch[name] for name in names]
    plain = forward.forward(backbone, tiny_batch)
    assert plain.dtype == jnp.float32
    np.testing.assert_allclose(plain, apply_fn(backbone.variables, *batch), atol=1e-6)
    expected = apply_fn(tiny.variables, *batch)
    assert not np.allclose(plain, expected, atol=1e-2)
    held = types.SimpleNamespace(prompt=np.asarray(tiny.prompt))
    for prompt in (tiny.prompt, held):
        np.testing.assert_allclose(
            forward.forward(backbone, tiny_batch, prompt), expected, atol=1e-6
        )


def test_loss_and_gradient_are_t5x_defaults(backbone, tiny, tiny_batch):
    def loss(prompt, weights):
        variables = backbone.variables | {"prompt": {"prompt": prompt}}
        logits = tiny.jitted()(
            variables, tiny_batch["encoder_input_tokens"], tiny_batch["decoder_input_tokens"]
        )
        return Loss(z_loss=1e-4)(
            logits, jnp.asarray(tiny_batch["decoder_target_tokens"]), jnp.asarray(weights)
        )

    weighted = dict(tiny_batch)
    weighted["decoder_loss_weights"] = tiny_batch["decoder_loss_weights"] * np.float32(0.5)
    unweighted = dict(tiny_batch)
    weights = unweighted.pop("decoder_loss_weights")
    unsaid: Any = tiny_batch | {"decoder_loss_weights": None}
    cases = ((tiny_batch, 1.0), (weighted, 0.5), (unweighted, 1.0), (unsaid, 1.0))
    for batch, scale in cases:
        value, gradient = forward.loss_and_prompt_gradient(backbone, batch, tiny.prompt)
        expected = jax.value_and_grad(loss)(tiny.prompt, weights * scale)
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        np.testing.assert_allclose(gradient, expected[1], atol=1e-4)
        assert gradient.shape == tiny.prompt.shape
        assert np.abs(gradient).max() > 0


def test_bad_prompts_and_batches_are_named(backbone, tiny, tiny_batch):
    with pytest.raises(InputError, match=r"\[5, 8\] does not fit \S*tiny, whose width is 16"):
        forward.forward(backbone, tiny_batch, tiny.prompt[:, :8])
    with pytest.raises(InputError, match=r"a matrix \[P, 16\], this is \[16\]"):
        generate.generate(backbone, ["a"], tiny.prompt[0])
    with pytest.raises(InputError, match="no 'decoder_input_tokens'"):
        forward.forward(backbone, {"encoder_input_tokens": np.ones((1, 2))})
    with pytest.raises(InputError, match="needs a prompt"):
        forward.loss_and_prompt_gradient(backbone, tiny_batch, None)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("encoder_input_tokens", np.full((8, 3), 64), "ids from 64 to 64, tiny has 64"),
        ("decoder_target_tokens", np.full((8, 6), -100), "ids from -100 to -100"),
        ("encoder_input_tokens", np.ones(8), r"encoder_input_tokens has shape \[8\]"),
        ("decoder_input_tokens", np.ones((1, 6)), r"decoder_input_tokens has shape \[1, 6\]"),
        ("decoder_input_tokens", np.ones((8, 1)), "must have the same shape"),
        ("decoder_target_tokens", np.ones((8, 1)), "must have the same shape"),
        ("decoder_loss_weights", np.ones((8, 1)), "must have the same shape"),
        ("encoder_lengths", np.ones(7), r"encoder_lengths \[1, .* must be 8 numbers from 0 to 12"),
        ("encoder_lengths", np.full(8, 13), "must be 8 numbers from 0 to 12, one for each row"),
        ("encoder_lengths", np.full(8, -1), "must be 8 numbers from 0 to 12"),
    ],
)
def test_what_jax_would_clip_or_broadcast_is_refused(
    backbone, tiny, tiny_batch, name, value, message
):
    with pytest.raises(InputError, match=message):
        forward.loss_and_prompt_gradient(backbone, tiny_batch | {name: value}, tiny.prompt)


def test_a_row_ends_where_its_padding_begins_or_where_its_length_says(backbone, tiny_batch):
    lengths = tiny_batch["encoder_lengths"]
    unsaid = {name: x for name, x in tiny_batch.items() if name != "encoder_lengths"}
    expected = forward.forward(backbone, tiny_batch)
    np.testing.assert_array_equal(forward.forward(backbone, unsaid), expected)
    shorter = forward.forward(backbone, tiny_batch | {"encoder_lengths": np.minimum(lengths, 5)})
    cut = tiny_batch["encoder_input_tokens"].copy()
    cut[:, 5:] = 0
    # The same rows with padding behind them, of which nothing depends.
    np.testing.assert_array_equal(
        shorter, forward.forward(backbone, unsaid | {"encoder_input_tokens": cut})
    )
    assert np.abs(shorter - expected).max() > 1e-2


def test_padding_in_front_needs_lengths(backbone, tiny_batch):
    turned = {name: x for name, x in tiny_batch.items() if name != "encoder_lengths"}
    turned["encoder_input_tokens"] = tiny_batch["encoder_input_tokens"][:, ::-1]
    message = "row 1 of encoder_input_tokens begins with the padding id 0 and has text after it"
    with pytest.raises(InputError, match=message):
        forward.forward(backbone, turned)
    said = forward.forward(backbone, turned | {"encoder_lengths": np.full(8, 12)})
    assert np.isfinite(said).all()
    # A row of padding alone has no text that could be lost.
    turned["encoder_input_tokens"] = np.zeros((8, 12), np.int32)
    assert np.isfinite(forward.forward(backbone, turned)).all()


def test_a_loaded_prompt_without_a_fingerprint_is_said_once(
    backbone, tiny, tiny_batch, caplog, monkeypatch
):
    monkeypatch.setattr(prompts, "WARNED", set())
    bare = PromptFile(np.asarray(tiny.prompt), {})
    forward.forward(backbone, tiny_batch, check_prompt(backbone, bare))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    forward.forward(backbone, tiny_batch, bare)
    assert caplog.text.count("does not say which backbone") == 1


def test_a_prompt_may_live_on_another_mesh(backbone, tiny, tiny_batch):
    elsewhere = jax.device_put(tiny.prompt, replicated(make_mesh()))
    variables = jax.device_put(backbone.variables, jax.devices()[0])
    placed: Any = types.SimpleNamespace(**{**vars(backbone), "variables": variables})
    np.testing.assert_array_equal(
        forward.forward(placed, tiny_batch, elsewhere),
        forward.forward(placed, tiny_batch, tiny.prompt),
    )


def test_a_missing_tokenizer_names_the_argument(backbone):
    mute = types.SimpleNamespace(**{**vars(backbone), "tokenizer": None})
    with pytest.raises(InputError, match=r"load_backbone\(tokenizer=PATH\)"):
        generate.generate(mute, ["a"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "num_beams must be >= 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"temperature": -1.0}, r"0 \(greedy\) or a finite number >= 1e-30, got -1\.0"),
        ({"top_p": 0.0}, r"top_p must be > 0 and <= 1, got 0\.0"),
        ({"top_p": 1.5}, r"top_p must be > 0 and <= 1, got 1\.5"),
        ({"num_beams": 2, "temperature": 1.0}, "a beam search does not sample"),
        ({"input_length": 1}, "a length of 1 tokens has no room for text and its end"),
        ({"temperature": float("nan")}, "got nan"),
        ({"temperature": float("inf")}, "got inf"),
        ({"temperature": 1e-40}, "got 1e-40"),  # over which every logit is -inf in float32
        ({"top_p": float("nan")}, "got nan"),
        ({"num_beams": 2, "alpha": -0.5}, r"alpha must be a finite number >= 0, got -0\.5"),
        ({"num_beams": 2, "alpha": float("nan")}, "got nan"),
        ({"num_beams": 2, "alpha": float("inf")}, "got inf"),
    ],
)
def test_impossible_settings_are_refused(backbone, settings, message):
    with pytest.raises(InputError, match=message):
        generate.generate(backbone, ["a"], **settings)


def test_settings_at_their_limits_are_possible():
    for settings in (
        {"temperature": 1e-30},
        {"temperature": 0.3, "top_p": 1e-3},
        {"num_beams": 1, "temperature": 1e30},
        {"num_beams": 2, "alpha": 0.0},
    ):
        assert dataclasses.asdict(generate.Decoding(**settings)).items() >= settings.items()


def test_a_cold_sample_is_the_greedy_text(backbone, tiny):
    """Log-likelihoods divided by a small temperature leave the likeliest token alone."""
    texts, settings = random_texts(4), {"prompt": tiny.prompt, "max_new_tokens": 4}
    greedy = generate.generate(backbone, texts, **settings)
    assert generate.generate(backbone, texts, temperature=1e-4, **settings) == greedy


def test_generate_answers_every_text_in_order_whatever_the_batch(backbone, tiny):
    texts = random_texts(11)
    settings = {"prompt": tiny.prompt, "max_new_tokens": 6}
    together, scores = generate.generate_with_scores(backbone, texts, batch_size=4, **settings)
    assert len(set(together)) > 5
    assert generate.generate(backbone, [], **settings) == []
    reversed_texts = generate.generate(backbone, texts[::-1], **settings)
    assert reversed_texts[::-1] == together
    # One by one and by hand: the prompt, the text, one end of sequence, then the argmax.
    for text, answer, score in list(zip(texts, together, scores, strict=True))[:4]:
        tokens = np.asarray([[*LETTERS.encode_batch([text])[0], 1]], np.int32)
        target, likelihood = np.zeros((1, 6), np.int32), 0.0
        for i in range(6):
            inputs = np.zeros((1, 48), np.int32)
            inputs[:, : tokens.shape[1]] = tokens
            logits = tiny.jitted()(tiny.variables, inputs, shift_right(target, 0))[0, i]
            target[0, i] = int(logits.argmax())
            likelihood += float(jax.nn.log_softmax(logits).max())
            if target[0, i] == 1:
                break
        assert answer == LETTERS.decode(target[0].tolist())
        assert score == pytest.approx(likelihood, rel=1e-4)


def test_beam_settings_are_passed_on(backbone, tiny):
    texts, settings = random_texts(6), {"prompt": tiny.prompt, "max_new_tokens": 5}
    greedy = generate.generate(backbone, texts, **settings)
    written, scores = generate.generate_with_scores(
        backbone, texts, num_beams=4, alpha=2.0, **settings
    )
    assert written != greedy
    tokens = np.zeros((6, 48), np.int32)
    source = text_source(texts)
    for i in range(6):
        tokens[i, : source.input_lengths[i]] = source.tokens(i, 0)[0]
    beams = {"max_length": 5, "num_beams": 4, "alpha": 2.0}
    expected, expected_scores = decode(tiny.apply_fn(), tiny.variables, tokens, **beams)
    assert written == [LETTERS.decode(row) for row in expected.tolist()]
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-4)


def test_samples_depend_on_seed_and_text_number_only(backbone, tiny):
    texts = ["same"] * 6
    settings = {"prompt": tiny.prompt, "max_new_tokens": 6, "temperature": 2.0}
    drawn = generate.generate(backbone, texts, **settings)
    assert len(set(drawn)) == 6
    assert generate.generate(backbone, texts, batch_size=4, **settings) == drawn
    assert generate.generate(backbone, texts, seed=1, **settings) != drawn
    assert generate.generate(backbone, texts, seed=-1, **settings) != drawn


def test_lengths_come_from_the_prompts_metadata(backbone, tiny, caplog):
    metadata = {"input_length": 4, "target_length": 3}
    prompt = types.SimpleNamespace(prompt=tiny.prompt, metadata=metadata)
    cut, whole = generate.generate(backbone, ["abcdefgh", "abc"], prompt)
    assert cut == whole
    assert len(cut) <= 3
    assert "1 of 2 texts were cut to 4 tokens" in caplog.text
    longer = generate.generate(backbone, ["abcdefgh"], prompt, max_new_tokens=6, input_length=9)
    assert longer == generate.generate(backbone, ["abcdefgh"], tiny.prompt, max_new_tokens=6)
