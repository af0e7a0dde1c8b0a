"""Texts and label likelihoods of tokenised examples, and what is compiled for them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from letters import LETTERS, make_backbone, random_texts, text_source
from t5_ids import T5_IDS, lengths_of

from ptjax.data.batch import shift_right
from ptjax.data.preprocess import TokenizedExamples
from ptjax.inference import batches, generate
from ptjax.inference.capacity import round_up
from ptjax.inference.labels import make_label_tokens, predict_labels, rank
from ptjax.inference.model import Model, bind
from ptjax.inference.prompts import open_prompt
from ptjax.sharding.meshes import make_mesh
from ptjax.sharding.rules import sharding_of
from ptjax.trees import flatten_paths, unflatten_paths


@pytest.fixture(scope="module")
def backbone(tiny):
    return make_backbone(tiny)


@pytest.fixture(scope="module")
def model(backbone, tiny) -> Model:
    return bind(backbone, open_prompt(backbone, tiny.prompt))


LABELS = ["yes", "no", "maybe", "b"]


def test_label_tokens_end_and_are_as_short_as_they_fit():
    tokens, lengths = make_label_tokens(["ab", "c"], LETTERS, 8, T5_IDS)
    np.testing.assert_array_equal(tokens, [[2, 3, 1], [4, 1, 0]])
    np.testing.assert_array_equal(lengths, [3, 2])
    cut, _ = make_label_tokens(["abcd"], LETTERS, 3, T5_IDS)
    np.testing.assert_array_equal(cut, [[2, 3, 1]])


@pytest.mark.parametrize("copies", [1, 5])  # 20 labels are more than are ranked at once
def test_ranking_is_each_labels_own_log_likelihood(tiny, tiny_batch, copies):
    labels = make_label_tokens(LABELS * copies, LETTERS, 8, T5_IDS)
    inputs = tiny_batch["encoder_input_tokens"]
    ranked = rank(tiny.apply_fn(), tiny.variables, inputs, lengths_of(inputs), labels, ids=T5_IDS)
    assert ranked.shape == (8, 4 * copies)
    for c, label in enumerate(labels.tokens[:4]):
        label = label[label > 0]  # its own length: padding does not count
        targets = np.tile(label, (8, 1))
        logits = tiny.jitted()(tiny.variables, inputs, shift_right(targets, 0))
        log_probs = np.asarray(jax.nn.log_softmax(logits))
        expected = np.take_along_axis(log_probs, targets[..., None], -1).sum((1, 2))
        for copy in range(copies):
            np.testing.assert_allclose(ranked[:, c + 4 * copy], expected, rtol=1e-4)


def test_label_predictions_are_in_order(model, tiny):
    source = text_source(random_texts(19))
    labels = make_label_tokens(LABELS, LETTERS, 8, T5_IDS)
    assert len(batches.input_buckets(source)) > 1
    best, likelihoods = predict_labels(model, source, [labels], 4)
    inputs = np.zeros((19, 48), np.int32)
    for i in range(19):
        row, _ = source.tokens(i, 0)
        inputs[i, : len(row)] = row
    expected = rank(model.apply_fn, tiny.variables, inputs, lengths_of(inputs), labels, ids=T5_IDS)
    np.testing.assert_allclose(likelihoods, expected, atol=1e-4)
    np.testing.assert_array_equal(best, np.argmax(expected, axis=1))
    assert best.dtype == np.int32


def test_a_later_evaluation_compiles_nothing(model, tiny):
    traced = []

    def apply_fn(*args, **kwargs):  # it runs only while jax traces
        traced.append(kwargs.get("method"))
        return tiny.apply_fn()(*args, **kwargs)

    source = text_source(random_texts(19))
    labels = make_label_tokens(LABELS, LETTERS, 8, T5_IDS)
    likelihoods = []
    for step in range(2):
        variables = tiny.variables | {"prompt": {"prompt": tiny.prompt + step}}
        other = dataclasses.replace(model, apply_fn=apply_fn, variables=variables)
        likelihoods.append(predict_labels(other, source, [labels], 4)[1])
        generate.generate_tokens(other, source, 4, max_new_tokens=3)
        # Ranking and decoding each encode once per shape.
        assert traced.count("encode") == 2 * len(batches.input_buckets(source))
    assert not np.allclose(*likelihoods, atol=1e-2)


@dataclasses.dataclass
class CountingSource:
    """Counts how often each example's tokens are read."""

    source: TokenizedExamples

    def __post_init__(self):
        self.reads = np.zeros(len(self.source), int)
        self.input_lengths = self.source.input_lengths
        self.target_lengths = self.source.target_lengths

    def __len__(self):
        return len(self.source)

    def tokens(self, index, epoch):
        self.reads[index] += 1
        return self.source.tokens(index, epoch)


def test_every_example_is_computed_once(model):
    source = CountingSource(text_source(random_texts(19)))
    labels = make_label_tokens(LABELS, LETTERS, 8, T5_IDS)
    predict_labels(model, source, [labels], 4)
    assert source.reads.tolist() == [1] * 19


def test_a_sharded_backbone_predicts_the_same(model, tiny):
    """Batches of 3 rows are rounded up to a share for each device."""
    mesh = make_mesh(2)
    shared = batches._share_rows(np.zeros((8, 2)), mesh)
    assert shared.sharding.shard_shape((8, 2)) == (8 // mesh.shape["data"], 2)
    sharded = unflatten_paths(
        {
            path: jax.device_put(array, sharding_of(path, array.shape, mesh))
            for path, array in flatten_paths(tiny.variables).items()
        }
    )
    divided = dataclasses.replace(model, variables=sharded, mesh=mesh)
    source = text_source(random_texts(9, 15))
    labels = make_label_tokens(LABELS, LETTERS, 8, T5_IDS)
    _, likelihoods = predict_labels(divided, source, [labels], 3)
    _, expected = predict_labels(model, source, [labels], 3)
    np.testing.assert_allclose(likelihoods, expected, atol=1e-4)
    for settings in ({}, {"num_beams": 3}, {"temperature": 1.0}):
        how = generate.Decoding(**settings)
        tokens, same = (
            generate.generate_tokens(x, source, 3, max_new_tokens=4, how=how)[0]
            for x in (divided, model)
        )
        np.testing.assert_array_equal(tokens, same)


# Shapes


def test_sizes_are_rounded_up_to_few():
    assert sorted({round_up(n) for n in range(1, 65)}) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    for steps in (1, 2, 8):
        rounded = [round_up(n, steps) for n in range(1, 2000)]
        # Never below, by less than a step of the doubling above, and a capacity stays as it is.
        assert all(0 <= r - n <= n / steps for n, r in enumerate(rounded, 1))
        assert [round_up(r, steps) for r in rounded] == rounded
        assert rounded == sorted(rounded)


@pytest.mark.parametrize(("batch_size", "group", "divisor"), [(8, 3, 1), (2, 5, 1), (4, 1, 8)])
def test_batches_are_of_equal_rows_and_keep_groups_together(batch_size, group, divisor):
    source = text_source(random_texts(15 * group))
    planned = batches.plan_batches(source, batch_size, divisor, group)
    [rows] = {len(x.examples) for x in planned}
    assert rows % divisor == 0 and rows >= group
    examples = np.concatenate([x.examples for x in planned])
    assert sorted(examples[examples >= 0]) == list(range(15 * group))
