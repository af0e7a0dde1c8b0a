"""Packing: plans epochs whose rows hold several examples each.

The examples are sorted by length and divided into as many strata as a batch has examples. A batch
takes one example from every stratum, so all batches are similar and fit one template: slot k has
room for the longest example of stratum k, and the slots are distributed over rows of one length.
A slot wastes at most the spread of its stratum; over a batch that adds up to about half the spread
of all lengths, whatever the batch size.

A few examples far longer than the others would enlarge one slot of every batch. If it saves enough,
that stratum is cut, and batches with examples of its longer part get a separate template.

The room for targets is the longest target of each stratum, which sorting by input length does not
bound: long targets of varying length are padded, as in unpacked batches.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
from collections.abc import Sequence

import numpy as np

from ptjax.data.batch import PADDING_SEGMENT, Batch, SpecialIds, make_packed_batch
from ptjax.data.pipeline import ExampleSource, Shape
from ptjax.errors import InputError

_MOST_TEMPLATES = 4  # each costs a compilation, like a bucket
_WORTH_A_TEMPLATE = 0.05  # share of an epoch's cost that one more template must save
_ATTENTION = 4096  # attention over T positions adds T / 6D to a position's cost; about 6D of a T5
_LENGTH_STEP = 16


@dataclasses.dataclass(frozen=True)
class Template:
    """The layout of a packed batch: which of its B slots are in which row.

    A slot is the place of one example. Slots are numbered from 0 in the order in which the batch's
    examples are listed.

    Attributes:
        shape: the shape of the batch.
        slots: int [B], the numbers of all slots, sorted by row.
        rows: int [B], ascending: `rows[i]` is the row of slot `slots[i]`.
    """

    shape: Shape
    slots: np.ndarray
    rows: np.ndarray

    @property
    def cost(self) -> float:
        """The approximate cost of a step, in positions of encoder and decoder.

        Encoder positions count for more in longer rows, because attention costs more there.
        """
        rows, inputs, targets = self.shape[:3]
        return rows * (inputs * (1 + inputs / _ATTENTION) + targets)


def first_fit(needs: np.ndarray, row_length: int) -> np.ndarray:
    """Assigns each slot of a batch, the longest first, to the first row that has room for it.

    Args:
        needs: the number of encoder positions that each slot takes, int [B], at most `row_length`.
        row_length: the number of encoder positions of a row.

    Returns:
        The index of each slot's row, int [B].
    """
    room = np.full(len(needs), row_length)
    rows = np.zeros(len(needs), int)
    for slot in np.argsort(-needs, kind="stable"):
        rows[slot] = np.argmax(room >= needs[slot])
        room[rows[slot]] -= needs[slot]
    return rows


def spread_evenly(needs: np.ndarray, row_count: int) -> np.ndarray:
    """Assigns each slot, the longest first, to the least full of `row_count` rows.

    `needs` and the result are like those of `first_fit`, but rows have no maximum length.
    """
    full = [(0, row) for row in range(row_count)]
    rows = np.zeros(len(needs), int)
    for slot in np.argsort(-needs, kind="stable"):
        used, rows[slot] = full[0]
        heapq.heapreplace(full, (used + int(needs[slot]), int(rows[slot])))
    return rows


def place_slots(needs: np.ndarray, row_length: int, row_multiple: int) -> np.ndarray:
    """Assigns slots to few rows, by `spread_evenly` if possible, else by `first_fit`.

    Tries `spread_evenly` with growing multiples of `row_multiple` as the number of rows, up to the
    number that `first_fit` needs, rounded up to a multiple. Returns the first result in which no
    row exceeds `row_length`, or else the result of `first_fit`. `spread_evenly` is preferred:
    its rows have similar numbers of examples, so targets take less room. `needs`, `row_length` and
    the result are like those of `first_fit`.
    """
    rows = first_fit(needs, row_length)
    least = -(-int(needs.sum()) // row_length)
    for count in range(_round_up(least, row_multiple), rows.max() + 1 + row_multiple, row_multiple):
        even = spread_evenly(needs, count)
        if np.bincount(even, needs).max() <= row_length:
            return even
    return rows


def make_template(
    needs: np.ndarray,
    targets: np.ndarray,
    *,
    row_length: int | None = None,
    row_multiple: int = 1,
) -> Template:
    """Distributes the slots of a batch over rows and returns the resulting layout.

    Args:
        needs: the number of encoder positions that each slot takes, int [B], at most `row_length`.
        targets: the number of decoder positions that each slot takes, int [B].
        row_length: T, the encoder positions of a row; None chooses the length with the least
            `Template.cost`.
        row_multiple: the number of rows must be a multiple of this.
    """
    candidates = []
    for length in _row_lengths(needs) if row_length is None else [row_length]:
        rows = place_slots(needs, length, row_multiple)
        row_count = _round_up(int(rows.max()) + 1, row_multiple)
        if row_length is None:
            length = _round_up(int(np.bincount(rows, needs).max()), _LENGTH_STEP)
        shape = Shape(row_count, length, int(np.bincount(rows, targets).max()), packed=True)
        slots = np.argsort(rows, kind="stable")
        candidates.append(Template(shape, slots, rows[slots]))
    return min(candidates, key=lambda template: template.cost)


def _row_lengths(needs: np.ndarray) -> list[int]:
    """Row lengths to try: 1 to 4 times the longest slot; longer rows hardly fill better."""
    longest = int(needs.max())
    most = min(int(needs.sum()), max(4 * longest, 256))
    tried = np.geomspace(longest, most, 33)
    return sorted({_round_up(int(np.ceil(length)), _LENGTH_STEP) for length in tried})


class PackedBatches:
    """Shuffled, packed batches of exactly `batch_size` examples, epoch after epoch.

    Args:
        ids: the special ids of the backbone's vocabulary.
        prompt_slots: number of positions before each example's input for its copy of the prompt; 0
            for a prompt that does not attend to its input.
        row_length: T of the rows, prompt slots included; None chooses it automatically.
        row_multiple: the number of rows must be a multiple of this, so that they can be divided
            into microbatches and over the mesh.
        weights: float32 [N], how much each example counts in the loss; None is 1 for all.

    Raises:
        InputError: an example with its prompt slots is longer than `row_length`.
    """

    def __init__(
        self,
        source: ExampleSource,
        *,
        batch_size: int,
        seed: int,
        ids: SpecialIds,
        prompt_slots: int = 0,
        row_length: int | None = None,
        row_multiple: int = 1,
        weights: np.ndarray | None = None,
    ) -> None:
        self.source, self.batch_size, self.seed, self.ids = source, batch_size, seed, ids
        self.prompt_slots, self.weights = prompt_slots, weights
        self.batches_per_epoch = -(-len(source) // batch_size)
        _check_row_length(source.input_lengths, prompt_slots, row_length)
        inputs = source.input_lengths.astype(np.int64)
        # Ascending keys are descending lengths; equal targets stay together within equal inputs.
        self._keys = -(inputs * (int(source.target_lengths.max()) + 1) + source.target_lengths)
        self._stratum, self._bounds, self._templates = _make_templates(
            *self._longest(), prompt_slots, row_length, row_multiple
        )
        self.shapes = sorted({template.shape for template in self._templates})
        self._plan = functools.lru_cache(maxsize=2)(self._draw)

    def batch(self, number: int) -> Batch:
        """Builds the global batch `number`, counted from 0 across epochs."""
        epoch, index = divmod(number, self.batches_per_epoch)
        examples, templates = self._plan(epoch)
        template = self._templates[templates[index]]
        chosen = examples[index, template.slots]
        tokens = [self.source.tokens(int(i), epoch) for i in chosen]
        batch = make_packed_batch(
            [inputs for inputs, _ in tokens],
            [targets for _, targets in tokens],
            template.rows,
            row_count=template.shape.rows,
            input_length=template.shape.inputs,
            target_length=template.shape.targets,
            ids=self.ids,
            prompt_slots=self.prompt_slots,
        )
        if self.weights is not None:
            # Examples are in the order of their rows, and of the segments within a row.
            lengths = [len(targets) for _, targets in tokens]
            real = batch["decoder_segment_ids"] != PADDING_SEGMENT
            batch["decoder_loss_weights"][real] = np.repeat(self.weights[chosen], lengths)
        return batch

    def padding(self) -> float:
        """The fraction of the first epoch's encoder positions that are padding.

        Positions for the prompt do not count as padding.
        """
        examples, templates = self._plan(0)
        real = int(self.source.input_lengths[examples].sum()) + self.prompt_slots * examples.size
        sizes = np.array([t.shape.rows * t.shape.inputs for t in self._templates])
        return 1 - real / int(sizes[templates].sum())

    def _places(self, offset: int) -> np.ndarray:
        """Strata [B, batches] of indices into the sorted examples; every index occurs.

        If the examples do not fill the last batch, some indices are repeated, evenly spaced.
        `offset`, 0 ... N - 1, decides which; it shifts every entry by at most one.
        """
        size = self.batch_size * self.batches_per_epoch
        places = (np.arange(size) * len(self.source) + offset) // size
        return places.reshape(self.batch_size, -1)

    def _longest(self) -> tuple[np.ndarray, np.ndarray]:
        """The longest input and target [B, batches] of each element of the strata in any epoch."""
        order = np.argsort(self._keys, kind="stable")
        inputs, targets = self.source.input_lengths[order], self.source.target_lengths[order]
        first, last = self._places(0), self._places(len(order) - 1)
        return inputs[first], np.maximum(targets[first], targets[last])

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Examples [batches, B] of an epoch by slot, and the template [batches] of each batch."""
        rng = np.random.default_rng((self.seed, epoch))
        # Examples of equal length are permuted, so that strata mix as far as possible.
        order = rng.permutation(len(self._keys))
        order = order[np.argsort(self._keys[order], kind="stable")]
        strata = order[self._places(int(rng.integers(len(order))))]
        examples = rng.permuted(strata, axis=1)
        # The stratum that is cut keeps its order; the others are combined with it at random.
        examples[self._stratum] = strata[self._stratum]
        batches = rng.permutation(self.batches_per_epoch)
        templates = np.searchsorted(self._bounds, batches, side="right") - 1
        return np.ascontiguousarray(examples[:, batches].T), templates


def _make_templates(
    inputs: np.ndarray,
    targets: np.ndarray,
    prompt_slots: int,
    row_length: int | None,
    row_multiple: int,
) -> tuple[int, list[int], list[Template]]:
    """The stratum to cut, the bounds of its parts, and one template per part.

    `inputs` and `targets` [B, batches] are the strata's lengths, longest input first.
    """
    count = inputs.shape[1]
    stratum = int((_savings(inputs).max(axis=1)).argmax())

    @functools.cache
    def make_part(start: int, stop: int) -> Template:
        needs, room = inputs[:, 0] + prompt_slots, targets.max(axis=1)
        needs[stratum] = inputs[stratum, start] + prompt_slots
        room[stratum] = targets[stratum, start:stop].max()
        return make_template(needs, room, row_length=row_length, row_multiple=row_multiple)

    def cost(bounds: Sequence[int]) -> float:
        return sum((b - a) * make_part(a, b).cost for a, b in itertools.pairwise(bounds))

    bounds = [0, count]
    while len(bounds) <= min(_MOST_TEMPLATES, count - 1):
        finer = sorted({*bounds, _best_cut(inputs[stratum], bounds)})
        if cost(finer) > (1 - _WORTH_A_TEMPLATE) * cost(bounds):
            break
        bounds = finer
    return stratum, bounds, [make_part(a, b) for a, b in itertools.pairwise(bounds)]


def _savings(lengths: np.ndarray) -> np.ndarray:
    """Positions [..., n] saved by a cut before each element; `lengths` [..., n] descend."""
    behind = lengths.shape[-1] - np.arange(lengths.shape[-1])
    return behind * (lengths[..., :1].astype(np.int64) - lengths)


def _best_cut(lengths: np.ndarray, bounds: Sequence[int]) -> int:
    """The index of the best additional cut of `lengths` [n], which descend."""
    savings = np.concatenate([_savings(lengths[a:b]) for a, b in itertools.pairwise(bounds)])
    return int(savings.argmax())


def _check_row_length(lengths: np.ndarray, prompt_slots: int, row_length: int | None) -> None:
    worst = int(lengths.argmax())
    needed = int(lengths[worst]) + prompt_slots
    if row_length is not None and needed > row_length:
        raise InputError(
            f"example {worst} has {lengths[worst]} input tokens after {prompt_slots} prompt slots,"
            f" more than a row of {row_length}; set row_length to {needed} or more, or shorten the "
            f"inputs"
        )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
