"""Texts and label likelihoods of tokenised examples, and what is compiled for them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from letters import LETTERS, make_backbone, random_texts, text_source
from t5_ids import T5_IDS, lengths_of

from ptjax.data.batch import shift_right
from ptjax.data.pipeline import make_buckets
from ptjax.data.preprocess import TokenizedExamples
from ptjax.inference import answering
from ptjax.sharding.meshes import make_mesh
from ptjax.sharding.rules import sharding_of
from ptjax.trees import flatten_paths, unflatten_paths


@pytest.fixture(scope="module")
def backbone(tiny):
    return make_backbone(tiny)


LABELS = ["yes", "no", "maybe", "b"]


def test_label_tokens_end_and_are_as_short_as_they_fit():
    tokens, lengths = answering.make_label_tokens(["ab", "c"], LETTERS, 8, T5_IDS)
    np.testing.assert_array_equal(tokens, [[2, 3, 1], [4, 1, 0]])
    np.testing.assert_array_equal(lengths, [3, 2])
    cut, _ = answering.make_label_tokens(["abcd"], LETTERS, 3, T5_IDS)
    np.testing.assert_array_equal(cut, [[2, 3, 1]])


@pytest.mark.parametrize("copies", [1, 5])  # 20 labels are more than are ranked at once
def test_ranking_is_each_labels_own_log_likelihood(tiny, tiny_batch, copies):
    labels = answering.make_label_tokens(LABELS * copies, LETTERS, 8, T5_IDS)
    inputs = tiny_batch["encoder_input_tokens"]
    ranked = answering.rank(
        tiny.apply_fn(), tiny.variables, inputs, lengths_of(inputs), labels, ids=T5_IDS
    )
    assert ranked.shape == (8, 4 * copies)
    for c, label in enumerate(labels.tokens[:4]):
        label = label[label > 0]  # its own length: padding does not count
        targets = np.tile(label, (8, 1))
        logits = tiny.jitted()(tiny.variables, inputs, shift_right(targets, 0))
        log_probs = np.asarray(jax.nn.log_softmax(logits))
        expected = np.take_along_axis(log_probs, targets[..., None], -1).sum((1, 2))
        for copy in range(copies):
            np.testing.assert_allclose(ranked[:, c + 4 * copy], expected, rtol=1e-4)


def test_label_predictions_are_in_order(backbone, tiny):
    source, labels = (
        text_source(random_texts(19)),
        answering.make_label_tokens(LABELS, LETTERS, 8, T5_IDS),
    )
    buckets = make_buckets(source, smallest=16)
    assert len(buckets) > 1
    best, likelihoods = answering.predict_labels(
        backbone.apply_fn, tiny.variables, source, labels, buckets, 4, ids=T5_IDS
    )
    inputs = np.zeros((19, 48), np.int32)
    for i in range(19):
        row, _ = source.tokens(i, 0)
        inputs[i, : len(row)] = row
    expected = answering.rank(
        backbone.apply_fn, tiny.variables, inputs, lengths_of(inputs), labels, ids=T5_IDS
    )
    np.testing.assert_allclose(likelihoods, expected, atol=1e-4)
    np.testing.assert_array_equal(best, np.argmax(expected, axis=1))
    assert best.dtype == np.int32


def test_a_later_evaluation_compiles_nothing(tiny):
    traced = []

    def apply_fn(*args, **kwargs):  # it runs only while jax traces
        traced.append(kwargs.get("method"))
        return tiny.apply_fn()(*args, **kwargs)

    source, labels = (
        text_source(random_texts(19)),
        answering.make_label_tokens(LABELS, LETTERS, 8, T5_IDS),
    )
    buckets = make_buckets(source, smallest=16)
    likelihoods = []
    for step in range(2):
        variables = tiny.variables | {"prompt": {"prompt": tiny.prompt + step}}
        where = (apply_fn, variables, source)
        likelihoods.append(answering.predict_labels(*where, labels, buckets, 4, ids=T5_IDS)[1])
        answering.predict_texts(*where, LETTERS, buckets, 4, ids=T5_IDS, max_length=3)
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
    source = CountingSource(text_source(random_texts(19)))
    labels = answering.make_label_tokens(LABELS, LETTERS, 8, T5_IDS)
    buckets = make_buckets(source, smallest=16)
    answering.predict_labels(
        backbone.apply_fn, tiny.variables, source, labels, buckets, 4, ids=T5_IDS
    )
    assert source.asked.tolist() == [1] * 19


@pytest.mark.parametrize("batch_size", [8, 3])
def test_a_sharded_backbone_predicts_the_same(backbone, tiny, batch_size):
    mesh = make_mesh(2)
    shared = answering._share(np.zeros((batch_size, 2)), mesh)
    assert shared.is_fully_replicated == (batch_size % mesh.shape["data"] > 0)
    sharded = unflatten_paths(
        {
            path: jax.device_put(array, sharding_of(path, array.shape, mesh))
            for path, array in flatten_paths(tiny.variables).items()
        }
    )
    source, labels = (
        text_source(random_texts(9, 15)),
        answering.make_label_tokens(LABELS, LETTERS, 8, T5_IDS),
    )
    rest = (source, labels, [(16, 0)], batch_size)
    _, likelihoods = answering.predict_labels(backbone.apply_fn, sharded, *rest, ids=T5_IDS)
    _, expected = answering.predict_labels(backbone.apply_fn, tiny.variables, *rest, ids=T5_IDS)
    np.testing.assert_allclose(likelihoods, expected, atol=1e-4)
    for settings in ({}, {"num_beams": 3}, {"temperature": 1.0}):
        rest = (source, LETTERS, [(16, 0)], batch_size)
        texts, _ = answering.predict_texts(
            backbone.apply_fn, sharded, *rest, ids=T5_IDS, max_length=4, **settings
        )
        same, _ = answering.predict_texts(
            backbone.apply_fn, tiny.variables, *rest, ids=T5_IDS, max_length=4, **settings
        )
        assert texts == same
