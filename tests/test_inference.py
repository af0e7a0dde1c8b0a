"""Inference from Python: logits, gradients, texts, label likelihoods, and what is compiled."""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptjax import inference
from ptjax.data.batch import shift_right
from ptjax.data.pipeline import make_buckets
from ptjax.data.preprocess import TokenizedExamples, TokenRows, tokenize_texts
from ptjax.errors import InputError
from ptjax.interop.prompt_file import PromptFile
from ptjax.models import decoding
from ptjax.prompting import check_prompt
from ptjax.scale.sharding import make_mesh, replicated, sharding_of
from ptjax.training.freeze import flatten_paths, unflatten_paths
from ptjax.training.loss import Loss


class LetterTokenizer:
    """'a' is 2, 'b' is 3, ...; every id of the tiny model's 64 is a text of its own."""

    name, vocab_size, pad_id, eos_id = "letters", 64, 0, 1
    fingerprint = "sha256:letters"

    def encode_batch(self, texts):
        return [[ord(c) - 95 for c in text] for text in texts]

    def decode(self, ids):
        ids = [*ids, 1]
        return "".join(chr(i + 95) for i in ids[: ids.index(1)] if i)


@pytest.fixture(scope="module")
def backbone(tiny):
    return types.SimpleNamespace(
        config=tiny.config,
        variables={"params": tiny.params},
        apply_fn=tiny.apply_fn(),
        tokenizer=LetterTokenizer(),
        fingerprint="sha256:0",
        name="tiny",
        mesh=make_mesh(devices=jax.devices()[:1]),
    )


def _source(texts: list[str]) -> TokenizedExamples:
    tokens = tokenize_texts(texts, LetterTokenizer(), 64)
    return TokenizedExamples(tokens, TokenRows(np.zeros(0), np.zeros(len(texts) + 1, int), 0))


def _texts(count: int, longest: int = 40) -> list[str]:
    rng = np.random.default_rng(count)
    return [
        "".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(1, longest)))
        for _ in range(count)
    ]


def test_forward_is_the_model_without_dropout(backbone, tiny, tiny_batch):
    apply_fn = tiny.jitted()
    names = ("encoder_input_tokens", "decoder_input_tokens")
    batch = [tiny_batch[name] for name in names]
    plain = inference.forward(backbone, tiny_batch)
    assert plain.dtype == jnp.float32
    np.testing.assert_allclose(plain, apply_fn(backbone.variables, *batch), atol=1e-6)
    expected = apply_fn(tiny.variables, *batch)
    assert not np.allclose(plain, expected, atol=1e-2)
    held = types.SimpleNamespace(prompt=np.asarray(tiny.prompt))
    for prompt in (tiny.prompt, held):
        np.testing.assert_allclose(
            inference.forward(backbone, tiny_batch, prompt), expected, atol=1e-6
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
        value, gradient = inference.loss_and_prompt_gradient(backbone, batch, tiny.prompt)
        expected = jax.value_and_grad(loss)(tiny.prompt, weights * scale)
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        np.testing.assert_allclose(gradient, expected[1], atol=1e-4)
        assert gradient.shape == tiny.prompt.shape
        assert np.abs(gradient).max() > 0


def test_bad_prompts_and_batches_are_named(backbone, tiny, tiny_batch):
    with pytest.raises(InputError, match=r"tiny has the shape \[P, 16\], this one has \[5, 8\]"):
        inference.forward(backbone, tiny_batch, tiny.prompt[:, :8])
    with pytest.raises(InputError, match=r"this one has \[16\]"):
        inference.generate(backbone, ["a"], tiny.prompt[0])
    with pytest.raises(InputError, match="no 'decoder_input_tokens'"):
        inference.forward(backbone, {"encoder_input_tokens": np.ones((1, 2))})
    with pytest.raises(InputError, match="needs a prompt"):
        inference.loss_and_prompt_gradient(backbone, tiny_batch, None)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("encoder_input_tokens", np.full((8, 3), 64), "ids from 64 to 64, tiny has 64"),
        ("decoder_target_tokens", np.full((8, 6), -100), "ids from -100 to -100"),
        ("encoder_input_tokens", np.ones(8), r"encoder_input_tokens has shape \[8\]"),
        ("decoder_input_tokens", np.ones((1, 6)), r"decoder_input_tokens has shape \[1, 6\]"),
        ("decoder_target_tokens", np.ones((8, 1)), "have to be of one shape"),
        ("decoder_loss_weights", np.ones((8, 1)), "have to be of one shape"),
    ],
)
def test_what_jax_would_clip_or_broadcast_is_refused(
    backbone, tiny, tiny_batch, name, value, message
):
    with pytest.raises(InputError, match=message):
        inference.loss_and_prompt_gradient(backbone, tiny_batch | {name: value}, tiny.prompt)


def test_a_loaded_prompt_without_a_fingerprint_is_said_once(backbone, tiny, tiny_batch, caplog):
    bare = PromptFile(np.asarray(tiny.prompt), {})
    inference.forward(backbone, tiny_batch, check_prompt(backbone, bare))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    caplog.clear()
    inference.forward(backbone, tiny_batch, bare)
    assert "does not say which backbone" in caplog.text


def test_a_prompt_may_live_on_another_mesh(backbone, tiny, tiny_batch):
    elsewhere = jax.device_put(tiny.prompt, replicated(make_mesh()))
    variables = jax.device_put(backbone.variables, jax.devices()[0])
    placed: Any = types.SimpleNamespace(**{**vars(backbone), "variables": variables})
    np.testing.assert_array_equal(
        inference.forward(placed, tiny_batch, elsewhere),
        inference.forward(placed, tiny_batch, tiny.prompt),
    )


def test_a_missing_tokenizer_names_the_argument(backbone):
    mute = types.SimpleNamespace(**{**vars(backbone), "tokenizer": None})
    with pytest.raises(InputError, match="`tokenizer=` of load_backbone"):
        inference.generate(mute, ["a"])


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 0},
        {"max_new_tokens": 0},
        {"batch_size": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"num_beams": 2, "temperature": 1.0},
        {"input_length": 1},
    ],
)
def test_impossible_settings_are_refused(backbone, settings):
    with pytest.raises(InputError):
        inference.generate(backbone, ["a"], **settings)


def test_generate_answers_every_text_in_order_whatever_the_batch(backbone, tiny):
    texts = _texts(11)
    settings = {"prompt": tiny.prompt, "max_new_tokens": 6}
    together, scores = inference.generate_with_scores(backbone, texts, batch_size=4, **settings)
    assert len(set(together)) > 5
    assert inference.generate(backbone, [], **settings) == []
    reversed_texts = inference.generate(backbone, texts[::-1], **settings)
    assert reversed_texts[::-1] == together
    # One by one and by hand: the prompt, the text, one end of sequence, then the argmax.
    for text, answer, score in list(zip(texts, together, scores, strict=True))[:4]:
        tokens = np.asarray([[*LetterTokenizer().encode_batch([text])[0], 1]], np.int32)
        target, likelihood = np.zeros((1, 6), np.int32), 0.0
        for i in range(6):
            inputs = np.zeros((1, 48), np.int32)
            inputs[:, : tokens.shape[1]] = tokens
            logits = tiny.jitted()(tiny.variables, inputs, shift_right(target))[0, i]
            target[0, i] = int(logits.argmax())
            likelihood += float(jax.nn.log_softmax(logits).max())
            if target[0, i] == 1:
                break
        assert answer == LetterTokenizer().decode(target[0].tolist())
        assert score == pytest.approx(likelihood, rel=1e-4)


def test_beam_settings_are_passed_on(backbone, tiny):
    texts, settings = _texts(6), {"prompt": tiny.prompt, "max_new_tokens": 5}
    greedy = inference.generate(backbone, texts, **settings)
    written, scores = inference.generate_with_scores(
        backbone, texts, num_beams=4, alpha=2.0, **settings
    )
    assert written != greedy
    tokens = np.zeros((6, 48), np.int32)
    source = _source(texts)
    for i in range(6):
        tokens[i, : source.input_lengths[i]] = source.tokens(i, 0)[0]
    beams = functools.partial(decoding.decode, tiny.apply_fn(), max_length=5, num_beams=4)
    expected, expected_scores = jax.jit(beams)(tiny.variables, tokens, alpha=2.0)
    assert written == [LetterTokenizer().decode(row) for row in expected.tolist()]
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-4)


def test_samples_depend_on_seed_and_text_number_only(backbone, tiny):
    texts = ["same"] * 6
    settings = {"prompt": tiny.prompt, "max_new_tokens": 6, "temperature": 2.0}
    drawn = inference.generate(backbone, texts, **settings)
    assert len(set(drawn)) == 6
    assert inference.generate(backbone, texts, batch_size=4, **settings) == drawn
    assert inference.generate(backbone, texts, seed=1, **settings) != drawn
    assert inference.generate(backbone, texts, seed=-1, **settings) != drawn


def test_lengths_come_from_the_prompts_metadata(backbone, tiny, caplog):
    metadata = {"input_length": 4, "target_length": 3}
    prompt = types.SimpleNamespace(prompt=tiny.prompt, metadata=metadata)
    cut, whole = inference.generate(backbone, ["abcdefgh", "abc"], prompt)
    assert cut == whole
    assert len(cut) <= 3
    assert "1 of 2 texts were cut to 4 tokens" in caplog.text
    longer = inference.generate(backbone, ["abcdefgh"], prompt, max_new_tokens=6, input_length=9)
    assert longer == inference.generate(backbone, ["abcdefgh"], tiny.prompt, max_new_tokens=6)


LABELS = ["yes", "no", "maybe", "b"]


def test_label_tokens_end_and_are_as_short_as_they_fit():
    tokens = inference.make_label_tokens(["ab", "c"], LetterTokenizer(), 8)
    np.testing.assert_array_equal(tokens, [[2, 3, 1], [4, 1, 0]])
    cut = inference.make_label_tokens(["abcd"], LetterTokenizer(), 3)
    np.testing.assert_array_equal(cut, [[2, 3, 1]])


@pytest.mark.parametrize("copies", [1, 5])  # 20 labels are more than are ranked at once
def test_ranking_is_each_labels_own_log_likelihood(tiny, tiny_batch, copies):
    labels = inference.make_label_tokens(LABELS * copies, LetterTokenizer(), 8)
    inputs = tiny_batch["encoder_input_tokens"]
    ranked = inference.rank(tiny.apply_fn(), tiny.variables, inputs, labels)
    assert ranked.shape == (8, 4 * copies)
    for c, label in enumerate(labels[:4]):
        label = label[label > 0]  # its own length: padding does not count
        targets = np.tile(label, (8, 1))
        logits = tiny.jitted()(tiny.variables, inputs, shift_right(targets))
        log_probs = np.asarray(jax.nn.log_softmax(logits))
        expected = np.take_along_axis(log_probs, targets[..., None], -1).sum((1, 2))
        for copy in range(copies):
            np.testing.assert_allclose(ranked[:, c + 4 * copy], expected, rtol=1e-4)


def test_label_predictions_are_in_order(backbone, tiny):
    source, labels = _source(_texts(19)), inference.make_label_tokens(LABELS, LetterTokenizer(), 8)
    buckets = make_buckets(source, smallest=16)
    assert len(buckets) > 1
    best, likelihoods = inference.predict_labels(
        backbone.apply_fn, tiny.variables, source, labels, buckets, 4
    )
    inputs = np.zeros((19, 48), np.int32)
    for i in range(19):
        row, _ = source.tokens(i, 0)
        inputs[i, : len(row)] = row
    expected = inference.rank(backbone.apply_fn, tiny.variables, inputs, labels)
    np.testing.assert_allclose(likelihoods, expected, atol=1e-4)
    np.testing.assert_array_equal(best, np.argmax(expected, axis=1))
    assert best.dtype == np.int32


def test_a_later_evaluation_compiles_nothing(tiny):
    traced = []

    def apply_fn(*args, **kwargs):  # it runs only while jax traces
        traced.append(kwargs.get("method"))
        return tiny.apply_fn()(*args, **kwargs)

    source, labels = _source(_texts(19)), inference.make_label_tokens(LABELS, LetterTokenizer(), 8)
    buckets = make_buckets(source, smallest=16)
    likelihoods = []
    for step in range(2):
        variables = tiny.variables | {"prompt": {"prompt": tiny.prompt + step}}
        where = (apply_fn, variables, source)
        likelihoods.append(inference.predict_labels(*where, labels, buckets, 4)[1])
        inference.predict_texts(*where, LetterTokenizer(), buckets, 4, max_length=3)
        # Ranking and decoding each encode once per shape.
        assert traced.count("encode") == 2 * len(buckets)
    assert not np.allclose(*likelihoods, atol=1e-2)


@dataclasses.dataclass
class CountingSource:
    """Counts how often each example's tokens are asked for."""

    source: TokenizedExamples

    def __post_init__(self):
        self.asked = np.zeros(len(self.source), int)
        self.input_lengths = self.source.input_lengths
        self.target_lengths = self.source.target_lengths

    def __len__(self):
        return len(self.source)

    def tokens(self, index, epoch):
        self.asked[index] += 1
        return self.source.tokens(index, epoch)


def test_every_example_is_computed_once(backbone, tiny):
    source = CountingSource(_source(_texts(19)))
    labels = inference.make_label_tokens(LABELS, LetterTokenizer(), 8)
    buckets = make_buckets(source, smallest=16)
    inference.predict_labels(backbone.apply_fn, tiny.variables, source, labels, buckets, 4)
    assert source.asked.tolist() == [1] * 19


@pytest.mark.parametrize("batch_size", [8, 3])
def test_a_sharded_backbone_predicts_the_same(backbone, tiny, batch_size):
    mesh = make_mesh(2)
    shared = inference._share(np.zeros((batch_size, 2)), mesh)
    assert shared.is_fully_replicated == (batch_size % mesh.shape["data"] > 0)
    sharded = unflatten_paths(
        {
            path: jax.device_put(array, sharding_of(path, array.shape, mesh))
            for path, array in flatten_paths(tiny.variables).items()
        }
    )
    source, labels = (
        _source(_texts(9, 15)),
        inference.make_label_tokens(LABELS, LetterTokenizer(), 8),
    )
    rest = (source, labels, [(16, 0)], batch_size)
    _, likelihoods = inference.predict_labels(backbone.apply_fn, sharded, *rest)
    _, expected = inference.predict_labels(backbone.apply_fn, tiny.variables, *rest)
    np.testing.assert_allclose(likelihoods, expected, atol=1e-4)
    for settings in ({}, {"num_beams": 3}, {"temperature": 1.0}):
        rest = (source, LetterTokenizer(), [(16, 0)], batch_size)
        texts, _ = inference.predict_texts(
            backbone.apply_fn, sharded, *rest, max_length=4, **settings
        )
        same, _ = inference.predict_texts(
            backbone.apply_fn, tiny.variables, *rest, max_length=4, **settings
        )
        assert texts == same
