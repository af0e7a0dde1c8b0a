"""Span corruption and prefix LM give back the text that they took apart."""

from __future__ import annotations

import numpy as np
import pytest

from ptjax.data.denoising import PrefixLMSource, SpanCorruptionSource
from ptjax.errors import InputError


class Sentinels:
    """Text ids are below 1000, sentinel k is 1099 - k: all that denoising asks of a tokenizer."""

    eos_id = 1

    def sentinel_id(self, k: int) -> int:
        assert 0 <= k < 100
        return 1099 - k


TOKENIZER = Sentinels()
# Every token of the text says where it stands.
STREAM = np.arange(10, 1000).astype(np.uint16)
SETTINGS = [
    {"input_length": 32},
    {"input_length": 128},
    {"input_length": 24, "noise_density": 0.5, "mean_span": 2.0},
    {"input_length": 40, "noise_density": 0.3, "mean_span": 10.0},
]


def rebuild(inputs: np.ndarray, targets: np.ndarray) -> tuple[list[int], list[int]]:
    """(text, sentinels in the order of the inputs)."""
    spans: dict[int, list[int]] = {}
    for token in targets[:-1]:
        if token >= 1000:
            spans[int(token)] = []
        else:
            spans[list(spans)[-1]].append(int(token))
    text, sentinels = [], []
    for token in inputs[:-1]:
        if token >= 1000:
            sentinels.append(int(token))
            text += spans.pop(int(token))
        else:
            text.append(int(token))
    assert not spans
    return text, sentinels


@pytest.mark.parametrize("settings", SETTINGS)
def test_inputs_and_targets_rebuild_the_piece(settings) -> None:
    source = SpanCorruptionSource(STREAM, TOKENIZER, **settings)
    assert len(source) >= 5
    for index in range(len(source)):
        for epoch in (0, 1):
            inputs, targets = source.tokens(index, epoch)
            assert len(inputs) == source.input_lengths[index] <= settings["input_length"]
            assert len(targets) == source.target_lengths[index]
            assert inputs.dtype == targets.dtype == np.int32
            assert inputs[-1] == targets[-1] == 1
            text, sentinels = rebuild(inputs, targets)
            assert text == list(range(text[0], text[0] + source.piece))
            assert text[-1] < 1000
            assert sentinels == [1099 - k for k in range(source.spans)]
            # No two sentinels touch, and none stands for nothing.
            assert (np.diff(np.flatnonzero(inputs >= 1000)) > 1).all()
            assert (np.diff(np.flatnonzero(np.append(targets, 1000) >= 1000)) > 1).all()


def test_lengths_are_those_of_t5() -> None:
    # random_spans_helper(inputs_length=512, extra_tokens_per_span_inputs=1, ..., 0.15, 3.0) of
    # t5/data/preprocessors.py gives (568, 114): known from T5's and Flax's pre-training scripts.
    source = SpanCorruptionSource(np.arange(2000) % 1000, TOKENIZER, input_length=512)
    assert (source.piece, source.target_lengths[0]) == (568, 114)
    assert source.input_lengths[0] == 512
    assert source.noise / source.piece == pytest.approx(0.15, abs=1e-3)


MAKE = {
    "spans": lambda seed=0: SpanCorruptionSource(STREAM, TOKENIZER, input_length=32, seed=seed),
    "prefix": lambda seed=0: PrefixLMSource(
        STREAM, TOKENIZER, input_length=16, target_length=8, seed=seed
    ),
}


def patterns(source, epoch: int) -> list[np.ndarray]:
    """Where each example's text stops for a sentinel or the end, whatever the text is."""
    examples = (source.tokens(index, epoch)[0] for index in range(len(source)))
    return [np.flatnonzero((inputs >= 1000) | (inputs == 1)) for inputs in examples]


@pytest.mark.parametrize("make", list(MAKE.values()), ids=list(MAKE))
def test_examples_follow_from_seed_epoch_and_index(make) -> None:
    def all_of(source, epoch):
        return [tuple(map(tuple, source.tokens(i, epoch))) for i in range(len(source))]

    first = all_of(make(), 0)
    assert all_of(make(), 0) == first
    assert len(set(first)) == len(first)
    assert not set(all_of(make(), 1)) & set(first)
    assert not set(all_of(make(1), 0)) & set(first)
    # Not the cuts of the text alone: what is hidden in a piece is drawn anew as well.
    drawn = [
        tuple(tuple(inputs) for inputs in patterns(make(seed), epoch))
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert len(set(drawn)) == 3
    assert all(len(set(epoch)) > 5 for epoch in drawn)


def test_a_prefix_and_what_follows_it() -> None:
    source = PrefixLMSource(STREAM, TOKENIZER, input_length=16, target_length=8)
    lengths, ends = set(), []
    for index in range(len(source)):
        inputs, targets = source.tokens(index, 0)
        assert inputs[-1] == 1
        assert 2 <= len(inputs) <= source.input_lengths[index] == 16
        assert len(targets) == source.target_lengths[index] == 8
        text = np.concatenate([inputs[:-1], targets])
        np.testing.assert_array_equal(text, np.arange(text[0], text[0] + len(text)))
        assert inputs.dtype == targets.dtype == np.int32
        lengths.add(len(inputs))
        ends.append(int(targets[-1]))
    assert len(lengths) > 10
    # The pieces follow one another: no text is used twice in an epoch.
    np.testing.assert_array_equal(np.diff(ends), 24)


def test_epochs_cut_the_text_at_other_places() -> None:
    source = PrefixLMSource(STREAM, TOKENIZER, input_length=16, target_length=8)
    assert len({int(source.tokens(0, epoch)[1][-1]) for epoch in range(10)}) > 5


def test_too_little_text_is_refused() -> None:
    for length, enough in ((47, False), (48, True)):
        text = STREAM[:length]
        if enough:
            assert len(PrefixLMSource(text, TOKENIZER, input_length=16, target_length=8)) == 1
            continue
        with pytest.raises(InputError, match="47 tokens of text are too few for pieces of 24"):
            PrefixLMSource(text, TOKENIZER, input_length=16, target_length=8)
    with pytest.raises(InputError, match="too few"):
        SpanCorruptionSource(STREAM[:50], TOKENIZER, input_length=32)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"noise_density": 0.9, "mean_span": 1.0}, "sentinels"),
        ({"noise_density": 1.0}, "noise_density"),
        ({"input_length": 2}, "input_length"),
        ({"input_length": 4000}, "sentinels"),
    ],
)
def test_impossible_span_corruption_is_refused(settings, named):
    with pytest.raises(InputError, match=named):
        SpanCorruptionSource(np.arange(20_000) % 90 + 3, TOKENIZER, **settings)


def test_impossible_prefix_lm_is_refused():
    with pytest.raises(InputError, match="input_length"):
        PrefixLMSource(np.arange(1000) % 90 + 3, TOKENIZER, input_length=1)


def test_short_pieces_have_the_length_they_declare():
    source = SpanCorruptionSource(np.arange(500) % 90 + 3, TOKENIZER, input_length=8)
    assert source.input_lengths[0] <= 8
    assert len(source.tokens(0, 0)[0]) == source.input_lengths[0]
