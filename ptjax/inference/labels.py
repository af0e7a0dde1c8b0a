"""Ranks closed sets of labels: how likely each label is as the target of an example."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ptjax.data.batch import SpecialIds, pad
from ptjax.data.pipeline import ExampleSource
from ptjax.data.preprocess import tokenize_texts
from ptjax.data.tokenizer import Tokenizer
from ptjax.inference.batches import map_examples
from ptjax.inference.capacity import label_capacity, round_up
from ptjax.inference.model import Model
from ptjax.models.family import ApplyFn
from ptjax.training.loss import log_likelihood
from ptjax.trees import Variables

LABELS_AT_ONCE = 16
"""The maximum number of labels whose logits [B, L, V] are in memory at the same time."""


class Labels(NamedTuple):
    """A closed label set as target tokens, or K sets of the same size.

    Attributes:
        tokens: int32 [*K, C, L], C labels of L tokens, end of sequence included, then padding.
        lengths: int32 [*K, C], the number of tokens of each label. A label of length 0 is empty: it
            pads a set with fewer labels.
    """

    tokens: Int[np.ndarray, "*K C L"]
    lengths: Int[np.ndarray, "*K C"]


def make_label_tokens(
    labels: Sequence[str], tokenizer: Tokenizer, target_length: int, ids: SpecialIds
) -> Labels:
    """Tokenises a closed label set to [C, L], where L is the length of the longest label.

    Silently truncates labels to `target_length` tokens. Call `data.preprocess.check_labels` before:
    it raises an error for labels that are longer.
    """
    rows = tokenize_texts(labels, tokenizer, target_length)
    tokens = pad([rows[i] for i in range(len(rows))], int(rows.lengths.max()), ids.pad_id)
    return Labels(tokens, rows.lengths)


def stack_label_sets(sets: Sequence[Labels], ids: SpecialIds) -> Labels:
    """Stacks label sets [C_k, L_k] into one `Labels` [K, C, L] for `rank`.

    K, C and L are rounded up to capacities, so that sets of similar sizes share one compiled
    program. Empty labels and empty sets are the padding.
    """
    count = round_up(len(sets), 1)
    most, longest = (max(sizes) for sizes in zip(*(x.tokens.shape for x in sets), strict=True))
    shape = count, *label_capacity(most, longest)
    stacked = Labels(np.full(shape, ids.pad_id, np.int32), np.zeros(shape[:2], np.int32))
    for k, (tokens, lengths) in enumerate(sets):
        stacked.tokens[k, : len(tokens), : tokens.shape[1]] = tokens
        stacked.lengths[k, : len(lengths)] = lengths
    return stacked


def predict_labels(
    model: Model,
    source: ExampleSource,
    sets: Sequence[Labels],
    batch_size: int,
    *,
    label_sets: Int[np.ndarray, " N"] | None = None,
    prompt_ids: Int[np.ndarray, " N"] | None = None,
    group: int = 1,
) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, "N C"]]:
    """Computes the log-likelihood of every label for each example, and the likeliest label.

    Args:
        sets: label sets [C_k, L_k].
        label_sets: the index of each example's set; None means the first set for all.
        prompt_ids: the number of each example's prompt, if the model's variables hold a bank.
        batch_size, group: as for `batches.plan_batches`.

    Returns:
        The index of each example's likeliest label, int32 [N], and the log-likelihoods [N, C], both
        in the order of the examples. C is the size of the largest set; the rows of examples with a
        smaller set end in -inf.
    """
    labels, ids = stack_label_sets(sets, model.ids), model.ids

    def compute(tokens: Array, lengths: Array, rows: tuple[Array | None, ...]) -> Array:
        return rank(model.apply_fn, model.variables, tokens, lengths, labels, *rows, ids=ids)

    if label_sets is None:
        label_sets = np.zeros(len(source), np.int32)
    rows = label_sets, prompt_ids
    likelihoods = np.asarray(map_examples(compute, model, source, rows, batch_size, group))
    likelihoods = likelihoods[:, : max(len(x.lengths) for x in sets)]
    return likelihoods.argmax(axis=1).astype(np.int32), likelihoods


def label_probabilities(likelihoods: Float[np.ndarray, "*n C"]) -> Float[np.ndarray, "*n C"]:
    """Normalises the log-likelihoods of C labels to probabilities, float64; -inf becomes 0."""
    # As scipy.special.softmax, whose import would take a seventh of that of ptjax.inference.
    shifted = np.exp(likelihoods.astype(np.float64) - likelihoods.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


@functools.partial(jax.jit, static_argnames=("apply_fn", "ids"))
def rank(
    apply_fn: ApplyFn,
    variables: Variables,
    encoder_input_tokens: Int[Array, "B T"],
    encoder_lengths: Int[Array, " B"],
    labels: Labels,
    label_sets: Int[Array, " B"] | None = None,
    prompt_ids: Int[Array, " B"] | None = None,
    *,
    ids: SpecialIds,
) -> Float[Array, "B C"]:
    """Computes log p(label | input) of every label (end of sequence included) for every row.

    The encoder's output and the keys and values of cross-attention are computed once per row. All
    labels of the row share them without copies. The decoder runs on `LABELS_AT_ONCE` labels at a
    time, and skips chunks that contain only empty labels.

    Args:
        encoder_lengths: the number of real tokens in each row.
        labels: one set of labels, or K sets. Empty labels, at the end of a set, get -inf.
        label_sets: the index of each row's set, if there are K sets.
        prompt_ids: the number of each row's prompt, if the variables hold a bank.
        ids: the vocabulary's special ids. A forced first token is not added to labels, as in
            transformers' loss; it applies to generated text only.
    """
    run = functools.partial(apply_fn, variables)
    encoded = run(
        encoder_input_tokens,
        encoder_lengths=encoder_lengths,
        prompt_ids=prompt_ids,
        method="encode",
    )
    cache = run(encoded, labels.tokens.shape[-1], method="init_cache")
    most = jnp.max(jnp.sum(labels.lengths > 0, axis=-1))
    if label_sets is not None:
        labels = jax.tree.map(lambda x: x[label_sets], labels)
    rows, count = len(encoder_input_tokens), labels.lengths.shape[-1]
    tokens = jnp.broadcast_to(labels.tokens, (rows, *labels.tokens.shape[-2:]))
    lengths = jnp.broadcast_to(labels.lengths, (rows, count))

    def likelihood(targets: Int[Array, "B L"], length: Int[Array, " B"]) -> Float[Array, " B"]:
        start = jnp.full_like(targets[:, :1], ids.decoder_start_id)
        inputs = jnp.concatenate([start, targets[:, :-1]], axis=1)
        logits, _ = run(inputs, cache, 0, encoded, method="decode_step")
        inside = jnp.arange(targets.shape[1]) < length[:, None]
        return jnp.where(length > 0, log_likelihood(logits, targets, inside), -jnp.inf)

    chunk = jax.vmap(likelihood, in_axes=1, out_axes=1)
    if count <= LABELS_AT_ONCE:
        return chunk(tokens, lengths)

    def rank_chunk(number: Array, scores: Float[Array, "B C"]) -> Float[Array, "B C"]:
        # Where the last chunk would reach beyond the labels, both slices begin earlier instead.
        start = number * LABELS_AT_ONCE
        part = (
            jax.lax.dynamic_slice_in_dim(x, start, LABELS_AT_ONCE, axis=1)
            for x in (tokens, lengths)
        )
        return jax.lax.dynamic_update_slice_in_dim(scores, chunk(*part), start, axis=1)

    chunks = (most + LABELS_AT_ONCE - 1) // LABELS_AT_ONCE
    scores = jnp.full((rows, count), -jnp.inf)
    return jax.lax.fori_loop(0, chunks, rank_chunk, scores)
