"""The prompt's initialisers."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from ptjax.data.tokenizer import load_tokenizer
from ptjax.errors import InputError
from ptjax.interop.prompt_file import save_prompt
from ptjax.methods.base import InitContext
from ptjax.methods.from_file import FromFile
from ptjax.methods.initializers import (
    ClassLabels,
    FrequentWords,
    FromText,
    SampledVocabulary,
    Uniform,
)

KEY = jax.random.key(0)
TOKENIZER = load_tokenizer("package:nano")
TEXTS = ["The plot is the plot, and the acting!", "A plot of 12 twists; acting, acting, acting."]


@pytest.fixture(scope="module")
def context() -> InitContext:
    """Row i of the table is (i, i): a row of a prompt tells which tokens it came from."""
    table = np.repeat(np.arange(8192, dtype=np.float32)[:, None], 2, axis=1)
    return InitContext(jax.numpy.asarray(table), TOKENIZER, ("positive", "no"), lambda: TEXTS)


def mean_id(text: str) -> float:
    return float(np.mean(TOKENIZER.encode(text)))


def test_uniform_fills_its_interval_evenly(context):
    rows = np.asarray(Uniform(0.5)(KEY, 5000, context))
    assert rows.shape == (5000, 2)
    assert rows.min() < -0.49 and rows.max() > 0.49
    assert abs(rows).max() <= 0.5
    # Standard error of the mean of 10,000 draws: 0.0029.
    assert abs(rows.mean()) < 0.012


def test_uniform_is_the_papers_interval_by_default(context):
    np.testing.assert_array_equal(Uniform()(KEY, 3, context), Uniform(0.5)(KEY, 3, context))


def test_sampled_vocabulary_draws_common_tokens_once(context):
    ids = np.asarray(SampledVocabulary(population=50)(KEY, 50, context))[:, 0]
    assert sorted(ids) == list(range(3, 53))
    again = np.asarray(SampledVocabulary(population=50)(jax.random.key(1), 50, context))[:, 0]
    assert list(ids) != list(again)
    longer = np.asarray(SampledVocabulary(population=5)(KEY, 40, context))[:, 0]
    assert set(longer) == set(range(3, 8))


def test_sampled_vocabulary_draws_the_5000_most_common_by_default(context):
    ids = np.asarray(SampledVocabulary()(KEY, 5000, context))[:, 0]
    assert sorted(ids) == list(range(3, 5003))


def test_sampled_vocabulary_ends_where_a_small_vocabulary_does(context):
    small = dataclasses.replace(context, embedding=context.embedding[:10])
    ids = np.asarray(SampledVocabulary()(KEY, 7, small))[:, 0]
    assert sorted(ids) == list(range(3, 10))
    after_one = np.asarray(SampledVocabulary(special_tokens=1)(KEY, 9, small))[:, 0]
    assert sorted(after_one) == list(range(1, 10))


def test_class_labels_average_their_pieces_and_fill_up(context):
    rows = np.asarray(ClassLabels()(KEY, 6, context))
    assert rows[:2, 0].tolist() == [mean_id("positive"), mean_id("no")]
    np.testing.assert_array_equal(rows[2:], SampledVocabulary()(KEY, 6, context)[2:])
    own = np.asarray(ClassLabels(labels=("commonsense reasoning",))(KEY, 1, context))
    assert own[0, 0] == pytest.approx(mean_id("commonsense reasoning"))
    open_set = InitContext(context.embedding, TOKENIZER, None, lambda: TEXTS)
    with pytest.raises(InputError, match="closed label set"):
        ClassLabels()(KEY, 6, open_set)


def test_a_text_is_cut_or_filled_up(context):
    ids = TOKENIZER.encode("a rather long text about nothing")
    cut = np.asarray(FromText("a rather long text about nothing")(KEY, 3, context))
    assert cut[:, 0].tolist() == ids[:3]
    filled = np.asarray(FromText("a rather long text about nothing")(KEY, 20, context))
    assert filled[: len(ids), 0].tolist() == ids
    assert len(filled) == 20


@pytest.mark.parametrize("initializer", [FromText(" "), ClassLabels(("good", ""))])
def test_a_text_without_pieces_is_refused(context, initializer):
    with pytest.raises(
        InputError, match=r"cannot initialise a prompt from the text ' ?': it has no"
    ):
        initializer(KEY, 3, context)


def test_frequent_words_leave_out_stop_words_and_punctuation(context):
    assert FrequentWords().words(9, TEXTS) == ["acting", "plot", "twists"]
    rows = np.asarray(FrequentWords()(KEY, 3, context))
    assert rows[:, 0].tolist() == pytest.approx([mean_id(w) for w in ("acting", "plot", "twists")])


def test_frequent_words_are_ranked_by_their_number_then_by_the_alphabet(context):
    texts = ["wing wing wing bird", "Apple tree bird", "wing zebra tree_house 2nd"]
    assert FrequentWords().words(9, texts) == [
        *("wing", "bird", "tree"),
        *("apple", "house", "zebra"),
    ]
    assert FrequentWords().words(2, texts) == ["wing", "bird"]


def test_frequent_words_are_as_long_as_wanted():
    texts = ["ox ox ox cat cat bird"]
    assert FrequentWords().words(9, texts) == ["cat", "bird"]
    assert FrequentWords(minimum_letters=2).words(9, texts) == ["ox", "cat", "bird"]
    assert FrequentWords(minimum_letters=4).words(9, texts) == ["bird"]


def test_other_initialisers_fill_the_rows_that_are_left(context):
    fill = Uniform(0.01)
    for initializer, given in [
        (ClassLabels(rest=fill), 2),
        (FromText("plot", rest=fill), len(TOKENIZER.encode("plot"))),
        (FrequentWords(rest=fill), 3),
    ]:
        rows = np.asarray(initializer(KEY, 8, context))
        assert rows.shape == (8, 2)
        assert (rows[:given] > 0.01).all()
        np.testing.assert_array_equal(rows[given:], fill(KEY, 8, context)[given:])


def test_no_words_at_all_leave_the_rest_alone(context):
    """Texts of stop words only."""
    bare = dataclasses.replace(context, texts=lambda: ["the and of"])
    rows = FrequentWords()(KEY, 4, bare)
    np.testing.assert_array_equal(rows, SampledVocabulary()(KEY, 4, bare))


def test_from_file_wants_the_same_length(context, tmp_path):
    path = tmp_path / "p.safetensors"
    save_prompt(path, np.arange(8, dtype=np.float32).reshape(4, 2), {})
    np.testing.assert_array_equal(FromFile(str(path))(KEY, 4, context), np.arange(8).reshape(4, 2))
    with pytest.raises(InputError, match="4 rows, but the run expects 5"):
        FromFile(str(path))(KEY, 5, context)


def test_without_a_tokenizer_the_message_names_the_argument(context):
    bare = InitContext(context.embedding, None, ("yes",), lambda: TEXTS)
    with pytest.raises(InputError, match="tokenizer="):
        ClassLabels()(KEY, 2, bare)
