"""Runs a jitted function over examples of any lengths, in batches of few shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array

from ptjax.data.pipeline import Bucket, ExampleSource, PlannedBatch, build_batch, plan_evaluation
from ptjax.data.preprocess import TokenizedExamples, TokenRows, tokenize_texts
from ptjax.data.tokenizer import Tokenizer
from ptjax.inference.capacity import batch_rows, input_lengths
from ptjax.inference.model import Model
from ptjax.sharding.arrays import batch_sharding, replicated, rows_divisor

Result = TypeVar("Result", Array, tuple[Array, Array])
PerExample = tuple[np.ndarray | None, ...]
"""Arrays [N, ...] with further inputs of each example, in addition to its tokens."""


def tokenize_inputs(
    texts: Sequence[str], tokenizer: Tokenizer, length: int | Sequence[int] | np.ndarray
) -> TokenizedExamples:
    """Tokenises texts, without targets; truncates those that are too long, with a warning.

    Args:
        length: the most tokens, EOS included: one number for all texts, or one for each.

    Raises:
        InputError: a length leaves no room for a token.
    """
    limits = np.broadcast_to(length, len(texts))
    ids: list[np.ndarray] = [np.zeros(0, np.int32)] * len(texts)
    truncated = 0
    for limit in np.unique(limits):
        rows = np.flatnonzero(limits == limit).tolist()
        tokens = tokenize_texts([texts[i] for i in rows], tokenizer, int(limit))
        if tokens.truncated:
            logging.warning(
                "%d of %d texts were cut to %d tokens", tokens.truncated, len(rows), limit
            )
        truncated += tokens.truncated
        for place, i in enumerate(rows):
            ids[i] = tokens[place]
    offsets = np.cumsum([0, *map(len, ids)])
    nothing = TokenRows(np.zeros(0, np.int32), np.zeros_like(offsets), truncated=0)
    return TokenizedExamples(TokenRows(np.concatenate(ids), offsets, truncated), nothing)


def input_buckets(source: ExampleSource) -> list[Bucket]:
    """Returns the shapes (T, L) of a source's batches; T as from `capacity.input_lengths`."""
    targets = int(source.target_lengths.max())
    return [(length, targets) for length in input_lengths(int(source.input_lengths.max()))]


def plan_batches(
    source: ExampleSource, batch_size: int, divisor: int, group: int = 1
) -> list[PlannedBatch]:
    """Plans batches, all with the same number of rows, with every example exactly once.

    Examples of similar length share a batch. The index -1 is an empty row.

    Args:
        batch_size: the number of examples per batch, rounded up to a capacity.
        divisor: the number of rows is a multiple of it: the number of devices that share them.
        group: number of consecutive examples that must be in the same batch, such as copies of one.
    """
    rows = batch_rows(max(batch_size, group), len(source), divisor)
    used = rows // group * group
    planned = plan_evaluation(source, input_buckets(source), used)
    filler = np.full(rows - used, -1)
    return [PlannedBatch(x.bucket, np.concatenate([x.examples, filler])) for x in planned]


def map_examples(
    compute: Callable[[Array, Array, tuple[Array | None, ...]], Result],
    model: Model,
    source: ExampleSource,
    per_example: PerExample,
    batch_size: int,
    group: int = 1,
) -> Result:
    """Applies a function to every example of a source, in batches.

    Batches are dispatched one after another and their results fetched together; the devices of the
    model's mesh share the rows. All processes must call it together.

    Args:
        compute: called with tokens [B, T], lengths [B] and the batch's rows of `per_example`.
        batch_size, group: as for `plan_batches`.

    Returns:
        The results as numpy arrays [N, ...], in the order of the examples.
    """
    mesh, outputs = model.mesh, []
    planned = plan_batches(source, batch_size, rows_divisor(mesh), group)
    for part in planned:
        batch = build_batch(source, part, 0, model.ids)
        inputs = batch["encoder_input_tokens"], batch["encoder_lengths"]
        # Filler takes the last example's; nothing reads its results.
        rows = tuple(None if x is None else x[part.examples] for x in per_example)
        tokens, lengths, own = jax.tree.map(lambda x: _share_rows(x, mesh), (*inputs, rows))
        # Replicated, so that every host can read it.
        outputs.append(jax.device_put(compute(tokens, lengths, own), replicated(mesh)))
    order = np.concatenate([part.examples for part in planned])
    position = np.argsort(order, kind="stable")[-len(source) :]  # behind the filler, which is -1
    return jax.tree.map(lambda *parts: np.concatenate(parts)[position], *jax.device_get(outputs))


def _share_rows(rows: np.ndarray, mesh: Mesh) -> Array:
    """Rows that every host has whole, divided over the mesh."""
    return jax.make_array_from_callback(rows.shape, batch_sharding(mesh), lambda index: rows[index])
