"""Plans: every example, full batches, the same on every host, resumed from one integer."""

from __future__ import annotations

import collections
import re

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from t5_ids import T5_IDS

from ptjax.data.batch import make_batch, shift_right
from ptjax.data.packing import PackedBatches
from ptjax.data.pipeline import (
    MixtureBatches,
    Shape,
    SweepBatches,
    TrainBatches,
    assign_buckets,
    build_batch,
    make_buckets,
    make_iterator,
    plan_epoch,
    plan_evaluation,
)
from ptjax.errors import InputError


class Source:
    """Example i is its own number, written as often as its lengths say."""

    def __init__(self, input_lengths, target_lengths=None) -> None:
        self.input_lengths = np.asarray(input_lengths, np.int32)
        if target_lengths is None:
            target_lengths = np.full(len(self.input_lengths), 2)
        self.target_lengths = np.asarray(target_lengths, np.int32)

    def __len__(self) -> int:
        return len(self.input_lengths)

    def tokens(self, index, epoch):
        return (
            np.full(self.input_lengths[index], index + 1, np.int32),
            np.full(self.target_lengths[index], 1000 * epoch + index + 1, np.int32),
        )


lengths = st.lists(st.integers(1, 100), min_size=1, max_size=60)
sources = st.builds(Source, lengths)
fast = settings(max_examples=60)


def examples_of(planned) -> collections.Counter:
    return collections.Counter(int(i) for batch in planned for i in batch.examples)


def plan(source, batch_size, seed, epoch):
    buckets = make_buckets(source, smallest=16)
    return plan_epoch(assign_buckets(source, buckets), buckets, batch_size, seed, epoch)


@fast
@given(sources, st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_has_every_example_in_full_batches_that_fit(source, size, seed, epoch) -> None:
    planned = plan(source, size, seed, epoch)
    counts = examples_of(planned)
    assert set(counts) == set(range(len(source)))
    assert all(len(batch.examples) == size for batch in planned)
    # Only the last batch is filled up: with more examples than that, nothing stands there thrice.
    assert len(planned) == -(-len(source) // size)
    if len(source) >= size:
        assert max(counts.values()) <= 2
    for batch in planned:
        assert (source.input_lengths[batch.examples] <= batch.bucket[0]).all()


@fast
@given(sources, st.integers(1, 9), st.integers(0, 3))
def test_epochs_are_deterministic_and_alike_in_shape(source, size, seed) -> None:
    for epoch in range(3):
        first, again = plan(source, size, seed, epoch), plan(source, size, seed, epoch)
        for one, two in zip(first, again, strict=True):
            assert one.bucket == two.bucket
            np.testing.assert_array_equal(one.examples, two.examples)
        shapes = collections.Counter(batch.bucket for batch in first)
        assert shapes == collections.Counter(b.bucket for b in plan(source, size, seed, 0))


def test_epochs_and_seeds_differ() -> None:
    source = Source(np.arange(1, 65))
    orders = {
        (seed, epoch): np.concatenate([b.examples for b in plan(source, 8, seed, epoch)]).tobytes()
        for seed in range(2)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == 6


@fast
@given(lengths, st.integers(1, 40))
def test_buckets_double_and_end_with_the_longest(input_lengths, smallest) -> None:
    source = Source(input_lengths, np.asarray(input_lengths) % 7 + 1)
    buckets = make_buckets(source, smallest=smallest)
    sizes = [bucket[0] for bucket in buckets]
    longest = max(input_lengths)
    assert {target for _, target in buckets} == {source.target_lengths.max()}
    assert sizes == sorted(set(sizes))
    assert sizes[:-1] == [smallest * 2**k for k in range(len(sizes) - 1)]
    # Room for the longest, and less than 16 positions more, or less than doubling needs.
    assert longest <= sizes[-1] < longest + 16 or sizes == [smallest]
    assert sizes[-1] <= smallest * 2 ** (len(sizes) - 1)
    assert len(sizes) == 1 or longest > sizes[-2]
    assign_buckets(source, buckets)


@pytest.mark.parametrize(
    ("longest", "want"),
    [
        (5, [16]),
        (31, [32]),
        (32, [32]),
        (33, [32, 48]),
        (64, [32, 64]),
        (65, [32, 64, 80]),
        (128, [32, 64, 128]),
        (500, [32, 64, 128, 256, 512]),
        (513, [32, 64, 128, 256, 512, 528]),
    ],
)
def test_buckets_of_some_lengths(longest, want) -> None:
    assert [bucket[0] for bucket in make_buckets(Source([1, longest]))] == want


def test_an_example_that_fits_in_no_bucket_is_refused() -> None:
    source = Source([3, 40, 5], [2, 2, 2])
    with pytest.raises(InputError, match="example 1 has 40 input and 2 target tokens"):
        assign_buckets(source, [(8, 4), (32, 4)])
    with pytest.raises(InputError, match="example 0"):
        TrainBatches(Source([3], [9]), buckets=[(8, 4)], batch_size=1, seed=0, ids=T5_IDS)
    np.testing.assert_array_equal(assign_buckets(source, [(8, 4), (40, 2)]), [0, 1, 0])


def test_batches_hold_the_planned_tokens_and_count_their_padding() -> None:
    source = Source([3, 20, 16, 1, 9, 30, 2], [1, 2, 3, 1, 2, 3, 1])
    batches = TrainBatches(
        source, buckets=make_buckets(source, smallest=16), batch_size=2, seed=5, ids=T5_IDS
    )
    assert batches.shapes == [Shape(2, 16, 3), Shape(2, 32, 3)]
    assert batches.batches_per_epoch == 4
    seen, real, positions = set(), 0, 0
    for number in range(8):
        batch = batches.batch(number)
        epoch = number // 4
        tokens = batch["encoder_input_tokens"]
        assert Shape(*tokens.shape, batch["decoder_target_tokens"].shape[1]) in batches.shapes
        for row, target in zip(tokens, batch["decoder_target_tokens"], strict=True):
            index = row[0] - 1
            seen.add((epoch, index))
            np.testing.assert_array_equal(row[row > 0], source.tokens(index, epoch)[0])
            np.testing.assert_array_equal(target[target > 0], source.tokens(index, epoch)[1])
        if epoch == 0:
            real, positions = real + (tokens > 0).sum(), positions + tokens.size
        np.testing.assert_array_equal(
            batch["decoder_input_tokens"], shift_right(batch["decoder_target_tokens"], 0)
        )
        np.testing.assert_array_equal(
            batch["decoder_loss_weights"], batch["decoder_target_tokens"] > 0
        )
    assert seen == {(epoch, index) for epoch in range(2) for index in range(7)}
    assert batches.padding() == pytest.approx(1 - real / positions)


def test_the_order_of_the_buckets_does_not_matter() -> None:
    source = Source(np.arange(1, 33))
    for buckets in ([(8, 2), (16, 2), (32, 2)], [(32, 2), (8, 2), (16, 2)]):
        batches = TrainBatches(source, buckets=buckets, batch_size=3, seed=0, ids=T5_IDS)
        assert batches.shapes == [Shape(3, 8, 2), Shape(3, 16, 2), Shape(3, 32, 2)]
        tokens = np.concatenate([batches.batch(n)["decoder_target_tokens"] for n in range(11)])
        assert set(tokens[:, 0]) == set(range(1, 33))


def equal(one, two) -> bool:
    return set(one) == set(two) and all(np.array_equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def batches() -> TrainBatches:
    source = Source(np.random.default_rng(0).integers(1, 60, 50))
    return TrainBatches(source, buckets=make_buckets(source), batch_size=8, seed=3, ids=T5_IDS)


@pytest.mark.parametrize("start", [0, 7, 19, 20])
def test_an_iterator_starts_anywhere(batches, start) -> None:
    rest = list(make_iterator(batches, 20, start=start))
    assert len(rest) == 20 - start
    for number, one in enumerate(rest, start):
        assert equal(one, batches.batch(number))


def test_a_mixture_draws_exact_counts_and_each_components_own_order() -> None:
    def component(size, shape):
        source = Source(np.full(size, shape))
        return TrainBatches(source, buckets=[(shape, 2)], batch_size=1, seed=shape, ids=T5_IDS)

    parts = [component(7, 3), component(5, 4), component(11, 5)]
    mixture = MixtureBatches(parts, [6, 3, 1], seed=0)
    again = MixtureBatches(parts, [0.6, 0.3, 0.1], seed=0)
    other = MixtureBatches(parts, [6, 3, 1], seed=1)
    assert mixture.shapes == [Shape(1, 3, 2), Shape(1, 4, 2), Shape(1, 5, 2)]
    drawn = {3: [], 4: [], 5: []}
    order, orders = [], []
    for number in range(2000):
        batch = mixture.batch(number)
        shape = batch["encoder_input_tokens"].shape[1]
        drawn[shape].append(batch)
        order.append(shape)
        assert equal(batch, again.batch(number))
        orders.append(other.batch(number)["encoder_input_tokens"].shape[1])
    for block in (order[:1000], order[1000:]):
        assert collections.Counter(block) == {3: 600, 4: 300, 5: 100}
    assert order[:1000] != order[1000:] != orders[1000:]
    for part, got in zip(parts, drawn.values(), strict=True):
        for number, batch in enumerate(got):
            assert equal(batch, part.batch(number))
    # Any batch by its number alone, whatever was asked for before.
    fresh = MixtureBatches(parts, [6, 3, 1], seed=0)
    assert equal(fresh.batch(1999), mixture.batch(1999))


@pytest.mark.parametrize("rates", [[1.0], [1.0, 0.0], [1.0, -1.0], []])
def test_a_mixture_without_one_rate_per_component_is_refused(batches, rates) -> None:
    with pytest.raises(InputError, match="one positive rate per component"):
        MixtureBatches([batches, batches] if rates else [], rates, seed=0)


@fast
@given(sources, st.integers(1, 9))
def test_evaluation_sees_every_example_once(source, size) -> None:
    buckets = make_buckets(source, smallest=16)
    planned = plan_evaluation(source, buckets, size)
    counts = examples_of(planned)
    counts.pop(-1, None)
    assert counts == dict.fromkeys(range(len(source)), 1)
    assert all(len(batch.examples) == size for batch in planned)
    assert len(planned) == -(-len(source) // size)
    for batch in planned:
        built = build_batch(source, batch, epoch=0, ids=T5_IDS)
        np.testing.assert_array_equal(
            built["encoder_input_tokens"][:, 0], np.maximum(batch.examples + 1, 0)
        )
        weights = built["decoder_loss_weights"].sum(1)
        np.testing.assert_array_equal(weights > 0, batch.examples >= 0)


def test_make_batch_pads_shifts_and_weighs() -> None:
    batch = make_batch([[5, 1], []], [[7, 8, 1], []], input_length=3, target_length=4, ids=T5_IDS)
    np.testing.assert_array_equal(batch["encoder_input_tokens"], [[5, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(batch["decoder_input_tokens"], [[0, 7, 8, 1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch["decoder_target_tokens"], [[7, 8, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch["decoder_loss_weights"], [[1, 1, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch["encoder_lengths"], [2, 0])
    dtypes = {name: array.dtype.name for name, array in batch.items()}
    assert dtypes.pop("decoder_loss_weights") == "float32"
    assert set(dtypes.values()) == {"int32"}


def test_buckets_that_do_not_hold_each_other_are_refused():
    source = Source(np.full(4, 10, np.int32), np.full(4, 5, np.int32))
    # The larger is the one with more positions for inputs times targets, in whatever order.
    for small, large in (((32, 8), (16, 32)), ((8, 32), (64, 8))):
        message = f"buckets {small} and {large}: the larger must contain the smaller"
        for buckets in ([small, large], [large, small]):
            with pytest.raises(InputError, match=re.escape(message)):
                TrainBatches(source, buckets=buckets, batch_size=2, seed=0, ids=T5_IDS)


def test_a_rate_that_would_never_be_drawn_is_refused():
    source = Source(np.full(4, 10, np.int32), np.full(4, 5, np.int32))
    part = TrainBatches(source, buckets=[(16, 8)], batch_size=2, seed=0, ids=T5_IDS)
    with pytest.raises(InputError, match="too small"):
        MixtureBatches([part, part], [10_000, 1], seed=0)


def test_a_shape_says_the_arrays_of_its_batches():
    source = Source(np.full(6, 4), np.full(6, 3))
    settings = {"batch_size": 3, "seed": 0, "ids": T5_IDS}
    plain = TrainBatches(source, buckets=[(4, 3)], **settings)
    packed = PackedBatches(source, row_length=8, **settings)
    sweep = SweepBatches([plain, plain])
    assert Shape(3, 4, 3) == Shape(3, 4, 3, packed=False, members=None)
    assert plain.shapes == [Shape(3, 4, 3)]
    assert packed.shapes == [Shape(2, 8, 6, packed=True)]
    assert sweep.shapes == [Shape(3, 4, 3, members=2)]
    for batches, shown in ((plain, "3x4+3"), (packed, "2x8+6"), (sweep, "2x3x4+3")):
        [shape] = batches.shapes
        batch = batches.batch(0)
        assert Shape.of(batch) == shape
        assert str(shape) == shown
        arrays = {name: (array.shape, array.dtype.type) for name, array in batch.items()}
        assert arrays == shape.arrays()
