"""Plans epochs, so that each batch can be built from its number alone; Grain builds them ahead.

Every process computes the same plan from (seed, epoch, token lengths) and thus the same global
batches, of which its devices take their rows. Shapes are equal on all processes, the position in
the data is the step, and resuming is exact on any number of processes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, SupportsIndex

import numpy as np

from ptjax.data.batch import Batch, SpecialIds, make_batch
from ptjax.errors import InputError

Bucket = tuple[int, int]
"""(T, L): input and target length of a batch."""


class Shape(NamedTuple):
    """The shape of a global batch.

    Attributes:
        rows: number of rows; in a sweep, of each member's batch.
        inputs, targets: T and L, the encoder and decoder positions of a row.
        packed: whether rows hold several examples.
        members: in a sweep, the number of members whose batches are stacked; else None.
    """

    rows: int
    inputs: int
    targets: int
    packed: bool = False
    members: int | None = None

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Shape:
        """Returns the shape of a batch, from its arrays."""
        *members, rows, inputs = batch["encoder_input_tokens"].shape
        targets = batch["decoder_input_tokens"].shape[-1]
        return cls(rows, inputs, targets, "encoder_segment_ids" in batch, *members)

    def __str__(self) -> str:
        members = "" if self.members is None else f"{self.members}x"
        return f"{members}{self.rows}x{self.inputs}+{self.targets}"

    def arrays(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Returns name -> (shape, dtype) of every array of a batch of this shape."""
        lead = (self.rows,) if self.members is None else (self.members, self.rows)
        encoder, decoder = (*lead, self.inputs), (*lead, self.targets)
        arrays: dict[str, tuple[tuple[int, ...], type]] = {
            "encoder_input_tokens": (encoder, np.int32),
            "decoder_input_tokens": (decoder, np.int32),
            "decoder_target_tokens": (decoder, np.int32),
            "decoder_loss_weights": (decoder, np.float32),
        }
        if not self.packed:
            arrays["encoder_lengths"] = (lead, np.int32)
        else:
            arrays["encoder_segment_ids"] = (encoder, np.int32)
            arrays["decoder_segment_ids"] = (decoder, np.int32)
        return arrays


class ExampleSource(Protocol):
    """The interface of a sequence of tokenised examples; `len` is their number.

    An example may have different tokens in each epoch. If its length varies too, `input_lengths`
    and `target_lengths` have the maximum over all epochs.
    """

    @property
    def input_lengths(self) -> np.ndarray:
        """The number of input tokens of each example, int32 [N], EOS included."""
        ...

    @property
    def target_lengths(self) -> np.ndarray:
        """The number of target tokens of each example, int32 [N], EOS included."""
        ...

    def __len__(self) -> int: ...

    def tokens(self, index: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the token ids (inputs int32 [t], targets int32 [l]) of an example in an epoch.

        Examples and epochs are counted from 0.
        """
        ...


class Batches(Protocol):
    """The interface of an endless sequence of global training batches.

    Attributes:
        shapes: all shapes that batches can have.
        ids: the special ids of the vocabulary.
    """

    shapes: list[Shape]
    ids: SpecialIds

    def batch(self, number: int) -> Batch:
        """Returns the batch of this number, counted from 0; the same on every process."""
        ...


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """The plan of a batch; `build_batch` builds it.

    Attributes:
        bucket: the lengths (T, L) of its rows.
        examples: int [B], the index in the `ExampleSource` of each row's example; -1 means an
            empty row.
    """

    bucket: Bucket
    examples: np.ndarray


def make_buckets(source: ExampleSource, *, smallest: int = 32) -> list[Bucket]:
    """Returns buckets with input lengths `smallest`, 2 * `smallest`, ..., from small to large.

    The last bucket is the first that fits the longest input. Its input length is reduced to that
    of the longest input, rounded up to a multiple of 16, if this is less. The target length of all
    buckets is that of the longest target: targets of classification tasks are short.
    """
    longest = int(source.input_lengths.max())
    lengths = [smallest]
    while lengths[-1] < longest:
        lengths.append(2 * lengths[-1])
    # The last length is the longest example's, rounded up to a multiple of 16.
    lengths[-1] = min(lengths[-1], -(-longest // 16) * 16)
    return [(length, int(source.target_lengths.max())) for length in lengths]


def assign_buckets(source: ExampleSource, buckets: Sequence[Bucket]) -> np.ndarray:
    """Returns the index of the first bucket in which each example fits, int [N].

    Raises:
        InputError: an example fits in none.
    """
    sizes = np.asarray(buckets)
    fits = (source.input_lengths[:, None] <= sizes[:, 0]) & (
        source.target_lengths[:, None] <= sizes[:, 1]
    )
    if not fits.any(axis=1).all():
        bad = int(np.argmin(fits.any(axis=1)))
        raise InputError(
            f"example {bad} has {source.input_lengths[bad]} input and "
            f"{source.target_lengths[bad]} target tokens, more than any bucket of {list(buckets)}"
        )
    return fits.argmax(axis=1)


def plan_epoch(
    assigned: np.ndarray, buckets: Sequence[Bucket], batch_size: int, seed: int, epoch: int
) -> list[PlannedBatch]:
    """Plans the batches of an epoch, in random order; each has `batch_size` examples.

    Examples that do not fill a batch of their bucket move to the next larger bucket; the last batch
    of the largest bucket is completed with repeated examples. Every example occurs at least once,
    and all epochs have the same number of batches.

    Args:
        assigned: int [N], the index in `buckets` for each example, from `assign_buckets`.
        buckets: from small to large, so that each contains the one before.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(assigned))
    planned = _fill_batches(order, assigned, buckets, batch_size, filler=order)
    return [planned[i] for i in rng.permutation(len(planned))]


def _fill_batches(
    order: np.ndarray,
    assigned: np.ndarray,
    buckets: Sequence[Bucket],
    batch_size: int,
    filler: np.ndarray,
) -> list[PlannedBatch]:
    """Full batches of the examples in `order`, the last one completed from `filler`, repeated."""
    planned = []
    left = order[:0]
    for index, bucket in enumerate(buckets):
        waiting = np.concatenate([left, order[assigned[order] == index]])
        if index == len(buckets) - 1:
            waiting = np.concatenate([waiting, np.resize(filler, -len(waiting) % batch_size)])
        full = len(waiting) - len(waiting) % batch_size
        planned += [PlannedBatch(bucket, rows) for rows in waiting[:full].reshape(-1, batch_size)]
        left = waiting[full:]
    return planned


class TrainBatches:
    """Shuffled, bucketed batches of one example source, epoch after epoch.

    `weights` float32 [N]: how much each example counts in the loss; None is 1.

    Raises:
        InputError: an example fits in no bucket, or a bucket does not contain the smaller ones.
    """

    def __init__(
        self,
        source: ExampleSource,
        *,
        buckets: Sequence[Bucket],
        batch_size: int,
        seed: int,
        ids: SpecialIds,
        weights: np.ndarray | None = None,
    ) -> None:
        self.source, self.batch_size, self.seed, self.ids = source, batch_size, seed, ids
        self.weights = weights
        # Sorted, because left-over examples move to the next larger bucket.
        self.buckets = sorted(buckets, key=lambda bucket: (bucket[0] * bucket[1], bucket))
        for small, large in itertools.pairwise(self.buckets):
            if small[0] > large[0] or small[1] > large[1]:
                raise InputError(
                    f"buckets {small} and {large}: the larger must contain the smaller"
                )
        assigned = assign_buckets(source, self.buckets)
        self._plan = functools.lru_cache(maxsize=2)(
            lambda epoch: plan_epoch(assigned, self.buckets, batch_size, seed, epoch)
        )
        self.batches_per_epoch = len(self._plan(0))
        self.shapes = sorted({Shape(batch_size, *planned.bucket) for planned in self._plan(0)})

    def batch(self, number: int) -> Batch:
        """Builds the global batch `number`, counted from 0 across epochs."""
        epoch, index = divmod(number, self.batches_per_epoch)
        planned = self._plan(epoch)[index]
        batch = build_batch(self.source, planned, epoch, self.ids)
        if self.weights is not None:
            batch["decoder_loss_weights"] *= self.weights[planned.examples][:, None]
        return batch

    def padding(self) -> float:
        """The fraction of the first epoch's input positions that are padding."""
        real = sum(int(self.source.input_lengths[p.examples].sum()) for p in self._plan(0))
        return 1 - real / sum(p.bucket[0] * len(p.examples) for p in self._plan(0))


class MixtureBatches:
    """A mixture of several sequences of batches; each of its batches is a batch of one of them.

    The mixture consists of blocks of `BLOCK` batches. Each block has the same number of batches
    from a component, proportional to its rate except for rounding, in random order. So the seed and
    a batch's number determine its component and its number among that component's batches.

    Args:
        components: the sequences of batches to mix.
        rates: one positive rate per component; only their ratios matter.

    Raises:
        InputError: there is not one positive rate per component, or a rate is so small that a block
            would have no batch of its component.
    """

    BLOCK = 1000

    def __init__(self, components: Sequence[Batches], rates: Sequence[float], seed: int) -> None:
        if len(components) != len(rates) or not components or min(rates) <= 0:
            raise InputError(f"a mixture needs one positive rate per component, not {list(rates)}")
        self.components, self.seed, self.ids = list(components), seed, components[0].ids
        share = np.cumsum(np.asarray(rates, float)) / np.sum(rates)
        self._counts = np.diff(np.round(share * self.BLOCK).astype(int), prepend=0)
        if not self._counts.all():
            raise InputError(
                f"a rate of {min(rates)} in {sum(rates)} is too small: fewer than one batch in "
                f"{self.BLOCK}"
            )
        self.shapes = sorted({shape for component in components for shape in component.shapes})
        self._schedule = functools.lru_cache(maxsize=2)(self._draw)

    def _draw(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(component, its own batch number) of every batch in `block`."""
        component = np.repeat(np.arange(len(self.components)), self._counts)
        component = np.random.default_rng((self.seed, block)).permutation(component)
        number = np.zeros_like(component)
        for index, count in enumerate(self._counts):
            number[component == index] = block * count + np.arange(count)
        return component, number

    def batch(self, number: int) -> Batch:
        block, index = divmod(number, self.BLOCK)
        components, numbers = self._schedule(block)
        return self.components[components[index]].batch(int(numbers[index]))


class SweepBatches:
    """Batches of a sweep: the batches of its N members, stacked to arrays [N, rows, length].

    Each member has its own examples in its own order. To be stacked, the members' batches with the
    same number are padded to a common shape, just large enough for them. If that would result in
    more than `MOST_SHAPES` shapes, all are padded to one shape, large enough for every batch.
    """

    MOST_SHAPES = 8  # each is compiled

    def __init__(self, members: Sequence[Batches]) -> None:
        self.members, self.ids = list(members), members[0].ids
        shapes = set(members[0].shapes)
        for member in members[1:]:
            shapes = {_larger(a, b) for a in shapes for b in member.shapes}
        if len(shapes) > self.MOST_SHAPES:
            shapes = {functools.reduce(_larger, shapes)}
        self.shapes = sorted(shape._replace(members=len(members)) for shape in shapes)

    def batch(self, number: int) -> Batch:
        parts = [member.batch(number) for member in self.members]
        shape = functools.reduce(_larger, map(Shape.of, parts))._replace(members=len(parts))
        if shape not in self.shapes:
            [shape] = self.shapes
        sizes = {name: size[1:] for name, (size, _) in shape.arrays().items()}
        # Filler rows have no length and no segment, and their targets weigh nothing.
        fill = {name: self.ids.pad_id if name.endswith("_tokens") else 0 for name in sizes}
        return {
            n: np.stack([_pad_to(part[n], sizes[n], fill[n]) for part in parts]) for n in parts[0]
        }


def _larger(left: Shape, right: Shape) -> Shape:
    rows, inputs, targets = map(max, left[:3], right[:3])
    return Shape(rows, inputs, targets, left.packed)


def _pad_to(array: np.ndarray, size: Sequence[int], value: int) -> np.ndarray:
    more = [(0, n - m) for n, m in zip(size, array.shape, strict=True)]
    return np.pad(array, more, constant_values=value)


def build_batch(source: ExampleSource, planned: PlannedBatch, epoch: int, ids: SpecialIds) -> Batch:
    """Builds a planned batch from the tokens of its examples in this epoch."""
    empty = np.zeros(0, np.int32), np.zeros(0, np.int32)
    rows = [source.tokens(int(i), epoch) if i >= 0 else empty for i in planned.examples]
    input_length, target_length = planned.bucket
    return make_batch(
        [inputs for inputs, _ in rows],
        [targets for _, targets in rows],
        input_length=input_length,
        target_length=target_length,
        ids=ids,
    )


def plan_evaluation(
    source: ExampleSource, buckets: Sequence[Bucket], batch_size: int
) -> list[PlannedBatch]:
    """Plans batches, one bucket after another, in which every example occurs exactly once.

    Examples that do not fill a batch of their bucket move to the next larger bucket. The last batch
    is completed with empty rows, which have the index -1.

    Args:
        buckets: as for `plan_epoch`.
    """
    assigned = assign_buckets(source, buckets)
    order = np.arange(len(assigned))
    return _fill_batches(order, assigned, buckets, batch_size, filler=np.array([-1]))


@dataclasses.dataclass(frozen=True)
class _Numbered:
    """A Grain data source: batches start ... stop - 1 of a pipeline."""

    batches: Batches
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: SupportsIndex) -> Batch:
        return self.batches.batch(self.start + int(index))


def make_iterator(batches: Batches, stop: int, *, start: int = 0) -> Iterator[Batch]:
    """Iterates over the global batches start ... stop - 1, which threads build in advance."""
    import grain  # only here: plans and batches are plain numpy and do not need Grain

    dataset = grain.MapDataset.source(_Numbered(batches, start, stop))
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)))
