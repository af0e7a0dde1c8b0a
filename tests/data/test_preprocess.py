"""Token rows: T5's trimming, storage without padding, counts of what was cut."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from ptjax.data import preprocess
from ptjax.data.examples import Example
from ptjax.data.preprocess import check_labels, tokenize_examples, tokenize_texts
from ptjax.data.tokenizer import ByteTokenizer, SentencePieceTokenizer
from ptjax.errors import InputError


@pytest.fixture(scope="module")
def nano():
    return SentencePieceTokenizer("package:nano/spiece.model")


def _example(inputs: str, targets: str) -> Example:
    return Example(inputs, targets, {}, "a.jsonl", 1)


def test_trimmed_to_length_minus_one_and_then_ended():
    tokenizer = ByteTokenizer()
    rows = tokenize_texts(["abcd", "abc", "ab", ""], tokenizer, 4)
    a, b, c = tokenizer.encode("abc")
    assert [row.tolist() for row in map(rows.__getitem__, range(4))] == [
        [a, b, c, 1],
        [a, b, c, 1],
        [a, b, 1],
        [1],
    ]
    assert rows.truncated == 1
    assert rows.lengths.tolist() == [4, 4, 3, 1]
    assert rows.ids.dtype == rows.lengths.dtype == np.int32
    with pytest.raises(IndexError):
        rows[4]


@hypothesis.given(st.lists(st.text("ab é", max_size=12), max_size=9), st.integers(2, 9))
def test_rows_are_the_encoded_texts(texts, length):
    tokenizer = ByteTokenizer()
    rows = tokenize_texts(texts, tokenizer, length)
    full = [tokenizer.encode(text) for text in texts]
    assert len(rows) == len(texts)
    for i, ids in enumerate(full):
        assert rows[i].tolist() == [*ids[: length - 1], 1]
    assert rows.truncated == sum(len(ids) >= length for ids in full)


def test_chunks_make_no_difference(nano, monkeypatch):
    texts = [f"film {i} is fine" for i in range(23)]
    whole = tokenize_texts(texts, nano, 4)
    monkeypatch.setattr(preprocess, "CHUNK", 5)
    chunked = tokenize_texts(texts, nano, 4)
    np.testing.assert_array_equal(chunked.ids, whole.ids)
    np.testing.assert_array_equal(chunked.offsets, whole.offsets)
    assert chunked.truncated == whole.truncated > 0


def test_examples_have_two_sides(nano):
    examples = [_example("a long text about a film", "yes"), _example("b", "no no no")]
    tokenized = tokenize_examples(examples, nano, 5, 3)
    assert len(tokenized) == 2
    assert (tokenized.inputs.truncated, tokenized.targets.truncated) == (1, 1)
    inputs, targets = tokenized.tokens(0, epoch=3)
    assert inputs.tolist() == [*nano.encode(examples[0].inputs)[:4], 1]
    assert targets.tolist() == [*nano.encode("yes")[:2], 1]
    assert inputs.dtype == targets.dtype == np.int32
    for i in range(2):
        inputs, targets = tokenized.tokens(i, 0)
        assert tokenized.input_lengths[i] == len(inputs)
        assert tokenized.target_lengths[i] == len(targets)


def test_the_end_of_sequence_is_the_tokenizers_own():
    tokenizer = ByteTokenizer()
    tokenizer.eos_id = 2
    assert tokenize_texts(["a"], tokenizer, 4)[0].tolist() == [100, 2]


def test_a_length_without_room_is_refused(nano):
    with pytest.raises(InputError, match="a length of 1 tokens has no room"):
        tokenize_texts(["a"], nano, 1)


def test_labels_have_to_come_back(nano):
    check_labels(["positive", "Sci/Tech", "not_equivalent"], nano, 12)
    with pytest.raises(InputError, match="the label 'not_equivalent' comes back as 'not"):
        check_labels(["positive", "not_equivalent"], nano, 3)
    with pytest.raises(InputError, match="; it needs 7; or give it another text in the task's ver"):
        check_labels(["positive", "not_equivalent"], nano, 3)
    with pytest.raises(
        InputError, match=r"the label '正' comes back as .* 8 target tokens; give it"
    ):
        check_labels(["正"], nano, 8)
    with pytest.raises(InputError) as raised:
        check_labels(["a\nb" + 200 * "x"], nano, 300)
    assert "\n" not in str(raised.value) and f"'a\\nb{76 * 'x'}...' comes" in str(raised.value)


@pytest.mark.parametrize("labels", [["good", "bad", "good "], ["good", "good"]])
def test_labels_that_are_the_same_tokens_are_refused(nano, labels):
    check_labels(["good", "Good", "bad"], nano, 12)
    message = f"the labels 'good' and {labels[-1]!r} are the same tokens to .*; give one"
    with pytest.raises(InputError, match=message):
        check_labels(labels, nano, 12)
