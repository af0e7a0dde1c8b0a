"""Packed batches: every example, one shape, nothing lost or mixed, little padding."""

from __future__ import annotations

import collections
import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from t5_ids import T5_IDS
from test_pipeline import Source, equal, lengths

from ptjax.data.batch import make_packed_batch
from ptjax.data.packing import PackedBatches, first_fit, make_template, spread_evenly
from ptjax.data.pipeline import (
    MixtureBatches,
    Shape,
    TrainBatches,
    make_buckets,
    make_iterator,
)
from ptjax.errors import InputError

fast = settings(max_examples=60)


class Numbered(Source):
    """Every token says its example, its place in it and its epoch."""

    def tokens(self, index, epoch):
        first = 1 + 100_000 * (index + 1)
        return (
            np.arange(first, first + self.input_lengths[index], dtype=np.int32),
            np.arange(first, first + self.target_lengths[index], dtype=np.int32) + 1000 * epoch,
        )


def examples_in(batch, source, epoch, prompt_slots) -> list[int]:
    """The examples of a batch, each compared with its source position by position."""
    found = []
    for row, segments in enumerate(batch["encoder_segment_ids"]):
        decoder_segments = batch["decoder_segment_ids"][row]
        for ids in (segments, decoder_segments):
            # 1, 2, 3 ... without gaps, then padding to the end of the row.
            used = ids[ids > 0]
            np.testing.assert_array_equal(ids[len(used) :], 0)
            assert set(np.diff(used, prepend=0)) <= {0, 1}
        assert segments.max() == decoder_segments.max()
        for number in range(1, segments.max() + 1):
            tokens = batch["encoder_input_tokens"][row][segments == number]
            inside = decoder_segments == number
            index = int(tokens[-1]) // 100_000 - 1
            inputs, targets = source.tokens(index, epoch)
            np.testing.assert_array_equal(tokens, [0] * prompt_slots + list(inputs))
            np.testing.assert_array_equal(batch["decoder_target_tokens"][row][inside], targets)
            np.testing.assert_array_equal(
                batch["decoder_input_tokens"][row][inside], [0, *targets[:-1]]
            )
            found.append(index)
        assert not batch["encoder_input_tokens"][row][segments == 0].any()
        for name in ("decoder_input_tokens", "decoder_target_tokens"):
            assert not batch[name][row][decoder_segments == 0].any()
    np.testing.assert_array_equal(batch["decoder_loss_weights"], batch["decoder_segment_ids"] > 0)
    return found


def shape_of(batch) -> Shape:
    return Shape(
        *batch["encoder_input_tokens"].shape, batch["decoder_target_tokens"].shape[1], packed=True
    )


outliers = st.lists(st.one_of(st.integers(1, 12), st.just(300)), min_size=1, max_size=60)
equals = st.builds(lambda n, size: [size] * n, st.integers(1, 60), st.integers(1, 50))
skewed = st.lists(st.integers(0, 8).map(lambda power: 2**power), min_size=1, max_size=60)


@fast
@given(
    st.one_of(lengths, outliers, equals, skewed),
    st.integers(0, 5),
    st.integers(1, 9),
    st.sampled_from([0, 1, 20]),
    st.sampled_from([1, 2, 3]),
    st.booleans(),
)
def test_an_epoch_has_every_example_whole_in_full_batches(
    input_lengths, seed, size, slots, multiple, given_length
) -> None:
    # Targets that do not follow the inputs.
    target_lengths = (np.asarray(input_lengths) * 7 + np.arange(len(input_lengths))) % 11 + 1
    source = Numbered(input_lengths, target_lengths)
    batches = PackedBatches(
        source,
        batch_size=size,
        seed=seed,
        ids=T5_IDS,
        prompt_slots=slots,
        row_length=max(input_lengths) + slots if given_length else None,
        row_multiple=multiple,
    )
    count = batches.batches_per_epoch
    assert count == -(-len(source) // size)
    for epoch in range(3):
        seen = collections.Counter()
        for number in range(epoch * count, (epoch + 1) * count):
            batch = batches.batch(number)
            assert shape_of(batch) in batches.shapes
            found = examples_in(batch, source, epoch, slots)
            assert len(found) == size
            seen.update(found)
        assert set(seen) == set(range(len(source)))
        # Only what the last batch lacks comes twice.
        assert max(seen.values()) <= -(-count * size // len(source))
    assert all(shape.rows % multiple == 0 for shape in batches.shapes)


@pytest.fixture(scope="module")
def source() -> Numbered:
    drawn = np.random.default_rng(0)
    return Numbered(drawn.integers(5, 60, 203), drawn.integers(1, 5, 203))


def test_batches_are_drawn_from_seed_and_number_alone(source) -> None:
    def make(seed):
        return PackedBatches(source, batch_size=16, seed=seed, ids=T5_IDS, prompt_slots=4)

    going, fresh, other = make(3), make(3), make(4)
    drawn = [going.batch(number) for number in range(40)]
    for number in (39, 0, 14, 13):
        assert equal(fresh.batch(number), drawn[number])
    assert not equal(drawn[0], drawn[going.batches_per_epoch])
    assert not equal(drawn[0], other.batch(0))


def test_one_shape_and_a_batch_of_all_lengths(source) -> None:
    batches = PackedBatches(source, batch_size=16, seed=0, ids=T5_IDS)
    (shape,) = batches.shapes
    for number in range(60):
        batch = batches.batch(number)
        assert shape_of(batch) == shape
        found = examples_in(batch, source, number // batches.batches_per_epoch, 0)
        drawn = np.sort(source.input_lengths[found])
        assert drawn[0] < 10 and drawn[-1] > 55
        assert abs(drawn.mean() - source.input_lengths.mean()) < 3


def meetings(source, batches, epochs) -> set[tuple[int, int]]:
    """Pairs of examples, the smaller first, that share a batch in some epoch."""
    met = set()
    for number in range(epochs * batches.batches_per_epoch):
        found = examples_in(batches.batch(number), source, number // batches.batches_per_epoch, 0)
        met |= set(itertools.combinations(sorted(found), 2))
    return met


def test_all_but_neighbours_in_length_meet() -> None:
    pairs = set(itertools.combinations(range(24), 2))
    alike = Numbered(np.full(24, 7))
    assert meetings(alike, PackedBatches(alike, batch_size=4, seed=0, ids=T5_IDS), 120) == pairs
    for unlike in (Numbered(np.arange(1, 25)), Numbered(np.r_[np.arange(1, 21), 270:510:60])):
        batches = PackedBatches(unlike, batch_size=4, seed=0, ids=T5_IDS)
        strangers = {(a, b) for a, b in pairs if a // 6 == b // 6}
        assert meetings(unlike, batches, 120) == pairs - strangers
    assert len(batches.shapes) > 1


def test_no_example_is_the_one_that_always_comes_twice() -> None:
    source = Numbered(np.arange(1, 25))
    batches = PackedBatches(source, batch_size=16, seed=0, ids=T5_IDS)
    total = collections.Counter()
    for number in range(120):
        total.update(examples_in(batches.batch(number), source, number // 2, 0))
    # 32 places for 24 examples in 60 epochs: 80 each.
    assert min(total.values()) > 60 and max(total.values()) < 110


def test_padding_is_the_share_of_positions_in_no_segment(source) -> None:
    for slots, multiple in ((0, 1), (30, 8)):
        batches = PackedBatches(
            source, batch_size=16, seed=1, ids=T5_IDS, prompt_slots=slots, row_multiple=multiple
        )
        epoch = [batches.batch(n)["encoder_segment_ids"] for n in range(batches.batches_per_epoch)]
        want = sum((ids == 0).sum() for ids in epoch) / sum(ids.size for ids in epoch)
        assert batches.padding() == pytest.approx(want)


@pytest.mark.parametrize(
    ("draw", "slots", "most"),
    [
        (lambda rng: rng.integers(8, 80, 3000), 0, 0.1),
        (lambda rng: rng.integers(8, 80, 3000), 100, 0.1),
        (lambda rng: np.minimum(np.exp(rng.normal(5, 0.7, 3000)), 512), 0, 0.1),
        (lambda rng: np.r_[np.full(995, 20), np.full(5, 500)], 0, 0.05),
        (lambda rng: np.r_[rng.integers(5, 26, 997), [500, 450, 480]], 0, 0.1),
        (lambda rng: np.r_[rng.integers(5, 26, 997), [500, 450, 480]], 100, 0.1),
        (lambda rng: np.exp(rng.normal(3, 1, 20_000)) + 2, 0, 0.2),
    ],
)
def test_there_is_little_padding(draw, slots, most) -> None:
    source = Source(draw(np.random.default_rng(0)))
    batches = PackedBatches(source, batch_size=32, seed=0, ids=T5_IDS, prompt_slots=slots)
    assert batches.padding() < most


def test_a_few_long_examples_have_a_template_of_their_own() -> None:
    source = Numbered(np.r_[np.full(95, 20), np.full(5, 500)])
    batches = PackedBatches(source, batch_size=10, seed=0, ids=T5_IDS)
    usual, long = sorted(batches.shapes, key=lambda shape: shape.rows * shape.inputs)
    assert usual.inputs < 500 <= long.inputs
    drawn = [[shape_of(batches.batch(10 * epoch + i)) for i in range(10)] for epoch in range(4)]
    for shapes in drawn:
        assert 5 <= shapes.count(long) < 10
    # The long batches come at other times in each epoch.
    assert len({tuple(shapes) for shapes in drawn}) > 1


def test_a_given_row_length_is_kept_and_one_too_short_is_refused() -> None:
    source = Numbered([10, 30, 20], [2, 2, 2])
    for length in (40, 50, 77):
        batches = PackedBatches(
            source,
            batch_size=2,
            seed=0,
            ids=T5_IDS,
            prompt_slots=10,
            row_length=length,
            row_multiple=2,
        )
        assert {shape.inputs for shape in batches.shapes} == {length}
    with pytest.raises(InputError, match=r"example 1 has 30 input tokens after 10 prompt slots"):
        PackedBatches(source, batch_size=2, seed=0, ids=T5_IDS, prompt_slots=10, row_length=39)
    with pytest.raises(InputError, match=r"a row of 39; set row_length to 40 or more"):
        PackedBatches(source, batch_size=2, seed=0, ids=T5_IDS, prompt_slots=10, row_length=39)


def test_an_iterator_starts_anywhere(source) -> None:
    batches = PackedBatches(source, batch_size=16, seed=2, ids=T5_IDS, row_multiple=2)
    want = [batches.batch(number) for number in range(30)]
    for start in range(0, 30, 7):
        rest = make_iterator(batches, 30, start=start)
        for one, two in zip(rest, want[start:], strict=True):
            assert equal(one, two)


def test_packed_and_unpacked_components_mix(source) -> None:
    packed = PackedBatches(source, batch_size=4, seed=0, ids=T5_IDS)
    plain = TrainBatches(source, buckets=[(60, 5)], batch_size=4, seed=0, ids=T5_IDS)
    mixture = MixtureBatches([packed, plain], [1, 1], seed=0)
    assert set(mixture.shapes) == {*packed.shapes, Shape(4, 60, 5)}
    kinds = {"encoder_segment_ids" in mixture.batch(number) for number in range(20)}
    assert kinds == {True, False}


needs = st.lists(st.integers(1, 50), min_size=1, max_size=40).map(np.array)


@fast
@given(needs, st.integers(0, 30), st.integers(1, 5))
def test_slots_fit_in_their_rows(needs, spare, multiple) -> None:
    targets = needs % 5 + 1
    for length in (None, int(needs.max()) + spare):
        template = make_template(needs, targets, row_length=length, row_multiple=multiple)
        rows, inputs, room, packed, _ = template.shape
        assert packed and rows % multiple == 0
        assert sorted(template.slots) == list(range(len(needs)))
        assert (np.diff(template.rows) >= 0).all() and template.rows.max() < rows
        assert np.bincount(template.rows, needs[template.slots]).max() <= inputs
        assert np.bincount(template.rows, targets[template.slots]).max() == room
        if length is not None:
            assert inputs == length
            # No more rows than first fit takes.
            assert rows - multiple < first_fit(needs, length).max() + 1


def test_first_fit_and_the_even_spread() -> None:
    needs = np.array([3, 7, 5, 5, 2])
    np.testing.assert_array_equal(first_fit(needs, 10), [0, 0, 1, 1, 2])
    np.testing.assert_array_equal(spread_evenly(needs, 3), [1, 0, 1, 2, 2])
    # Rows of like numbers of examples where they fit: two and two, not three and one.
    template = make_template(np.array([4, 2, 2, 2]), np.ones(4, int), row_length=8)
    np.testing.assert_array_equal(np.bincount(template.rows), [2, 2])


def test_make_packed_batch_by_hand() -> None:
    inputs = [np.array(row, np.int32) for row in ([5, 1], [6, 7, 1], [8, 1])]
    targets = [np.array(row, np.int32) for row in ([2, 1], [3, 1], [4, 9, 1])]
    batch = make_packed_batch(
        inputs,
        targets,
        np.array([0, 0, 2]),
        row_count=3,
        input_length=8,
        target_length=5,
        ids=T5_IDS,
        prompt_slots=1,
    )
    want = {
        "encoder_input_tokens": [[0, 5, 1, 0, 6, 7, 1, 0], [0] * 8, [0, 8, 1, 0, 0, 0, 0, 0]],
        "encoder_segment_ids": [[1, 1, 1, 2, 2, 2, 2, 0], [0] * 8, [1, 1, 1, 0, 0, 0, 0, 0]],
        "decoder_input_tokens": [[0, 2, 0, 3, 0], [0] * 5, [0, 4, 9, 0, 0]],
        "decoder_target_tokens": [[2, 1, 3, 1, 0], [0] * 5, [4, 9, 1, 0, 0]],
        "decoder_segment_ids": [[1, 1, 2, 2, 0], [0] * 5, [1, 1, 1, 0, 0]],
        "decoder_loss_weights": [[1, 1, 1, 1, 0], [0] * 5, [1, 1, 1, 0, 0]],
    }
    assert set(batch) == set(want)
    for name, array in batch.items():
        np.testing.assert_array_equal(array, want[name], err_msg=name)
        assert array.dtype == (np.float32 if name == "decoder_loss_weights" else np.int32)
    with pytest.raises(InputError, match="the examples of row 0 take 7 positions of 6"):
        make_packed_batch(
            inputs,
            targets,
            np.array([0, 0, 2]),
            row_count=3,
            input_length=6,
            target_length=5,
            ids=T5_IDS,
            prompt_slots=1,
        )


@pytest.mark.parametrize("packed", [False, True])
def test_weights_travel_with_their_examples(source, packed) -> None:
    weights = np.arange(1, len(source) + 1, dtype=np.float32) / 8
    common = {"batch_size": 8, "seed": 3, "ids": T5_IDS}
    if packed:
        batches = PackedBatches(source, **common, prompt_slots=2, weights=weights)
    else:
        batches = TrainBatches(source, **common, buckets=make_buckets(source), weights=weights)
    for number in range(batches.batches_per_epoch + 1):
        batch = batches.batch(number)
        tokens = batch["decoder_target_tokens"]
        of_position = np.where(tokens > 0, weights[tokens // 100_000 - 1], 0)
        np.testing.assert_array_equal(batch["decoder_loss_weights"], of_position)
        assert batch["decoder_loss_weights"].dtype == np.float32
