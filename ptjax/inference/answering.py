"""What a backbone answers to tokenised examples: texts, and likelihoods of labels.

Every example is computed exactly once; the host waits once, at the end. What touches the device are
the module-level jitted functions below, so a shape compiles once per process, whoever asks for it.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from ptjax.data.batch import SpecialIds, pad
from ptjax.data.pipeline import Bucket, ExampleSource, build_batch, plan_evaluation
from ptjax.data.preprocess import TokenizedExamples, TokenRows, tokenize_texts
from ptjax.data.tokenizer import Tokenizer
from ptjax.errors import InputError
from ptjax.models import decoding
from ptjax.sharding.arrays import batch_sharding, replicated, rows_divisor
from ptjax.training.loss import log_likelihood
from ptjax.trees import Variables

COLDEST = 1e-30
"""The lowest temperature above 0: log-likelihoods divided by it stay within float32."""
LABELS_AT_ONCE = 16
"""Labels whose logits [B, L, V] are held at the same time by `rank`."""


def tokenize_inputs(
    texts: Sequence[str], tokenizer: Tokenizer, length: int | Sequence[int] | np.ndarray
) -> TokenizedExamples:
    """Texts without targets as ids, each cut to `length`, one or one for each, with a warning."""
    lengths = np.broadcast_to(length, len(texts))
    ids: list[np.ndarray] = [np.zeros(0, np.int32)] * len(texts)
    truncated = 0
    for limit in np.unique(lengths):
        rows = np.flatnonzero(lengths == limit).tolist()
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


def rows_at_once(texts: int, batch_size: int) -> int:
    """A few texts do not pay for a full batch; powers of two keep the shapes few."""
    return min(batch_size, 1 << (texts - 1).bit_length())


def predict_texts(
    apply_fn: Callable[..., Any],
    variables: Variables,
    source: ExampleSource,
    tokenizer: Tokenizer,
    buckets: Sequence[Bucket],
    batch_size: int,
    *,
    ids: SpecialIds,
    max_length: int,
    prompt_ids: Int[np.ndarray, " N"] | None = None,
    numbers: Int[np.ndarray, " N"] | None = None,
    num_beams: int = 1,
    alpha: float = 0.6,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> tuple[list[str], np.ndarray]:
    """The text that the model writes for every example, in order, and their scores float32 [N].

    Settings as for `generate`, `max_length` as its `max_new_tokens`.

    Args:
        ids: of the backbone's vocabulary.
        prompt_ids: where the variables hold a bank of prompts, which is each example's.
        numbers: what an example draws depends on (seed, its number); default: its place.

    Raises:
        InputError: an impossible setting, or an example that fits no bucket.
    """
    if num_beams < 1 or max_length < 1 or batch_size < 1:
        raise InputError("num_beams, the length to generate and batch_size must be 1 or more")
    if not (temperature == 0 or COLDEST <= temperature < np.inf) or not 0 < top_p <= 1:
        raise InputError(
            f"temperature = {temperature} must be 0 (greedy) or a finite number from {COLDEST} on, "
            f"top_p = {top_p} above 0 and up to 1"
        )
    if not 0 <= alpha < np.inf:
        raise InputError(f"alpha = {alpha} must be a finite number of 0 or more")
    if num_beams > 1 and temperature > 0:
        raise InputError("a beam search does not sample: choose num_beams = 1 or temperature = 0")

    def compute(tokens: Any, lengths: Any, own: Any) -> tuple[Array, Array]:
        return _decode(
            apply_fn,
            variables,
            tokens,
            lengths,
            *own,
            np.uint32(seed % 2**32),
            settings,
            ids=ids,
            max_length=max_length,
            num_beams=num_beams,
            sample=temperature > 0,
        )

    settings = {"alpha": alpha, "temperature": temperature, "top_p": top_p}
    own = np.asarray(np.arange(len(source)) if numbers is None else numbers, np.uint32), prompt_ids
    tokens, scores = _map_examples(compute, variables, source, own, buckets, batch_size, ids)
    return [tokenizer.decode(before_end(row, ids)) for row in tokens.tolist()], scores


def before_end(row: Sequence[int], ids: SpecialIds) -> list[int]:
    """What stands before the first end of sequence."""
    return list(itertools.takewhile(lambda token: token not in ids.eos_ids, row))


class Labels(NamedTuple):
    """A closed label set as target tokens, or K sets of the same size.

    Attributes:
        tokens: int32 [*K, C, L], end of sequence included.
        lengths: int32 [*K, C]; a label of length 0 fills up a smaller set.
    """

    tokens: Int[np.ndarray, "*K C L"]
    lengths: Int[np.ndarray, "*K C"]


def make_label_tokens(
    labels: Sequence[str], tokenizer: Tokenizer, target_length: int, ids: SpecialIds
) -> Labels:
    """A closed label set [C, L], as short as its labels fit."""
    rows = tokenize_texts(labels, tokenizer, target_length)
    tokens = pad([rows[i] for i in range(len(rows))], int(rows.lengths.max()), ids.pad_id)
    return Labels(tokens, rows.lengths)


def stack_label_sets(sets: Sequence[Labels], ids: SpecialIds) -> Labels:
    """Label sets of several sizes, as `rank` takes them: a smaller one ends in empty labels."""
    count, length = (max(x) for x in zip(*(one.tokens.shape for one in sets), strict=True))
    shape = len(sets), count, length
    stacked = Labels(np.full(shape, ids.pad_id, np.int32), np.zeros(shape[:2], np.int32))
    for k, (tokens, lengths) in enumerate(sets):
        stacked.tokens[k, : len(tokens), : tokens.shape[1]] = tokens
        stacked.lengths[k, : len(lengths)] = lengths
    return stacked


def predict_labels(
    apply_fn: Callable[..., Any],
    variables: Variables,
    source: ExampleSource,
    labels: Labels,
    buckets: Sequence[Bucket],
    batch_size: int,
    *,
    ids: SpecialIds,
    label_sets: Int[np.ndarray, " N"] | None = None,
    prompt_ids: Int[np.ndarray, " N"] | None = None,
) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, "N C"]]:
    """Index of the likeliest label of every example, in order, and all log-likelihoods.

    `label_sets` and `prompt_ids` are each example's; all else is as for `rank`.
    """

    def compute(tokens: Any, lengths: Any, own: Any) -> Array:
        return rank(apply_fn, variables, tokens, lengths, labels, *own, ids=ids)

    own = label_sets, prompt_ids
    likelihoods = _map_examples(compute, variables, source, own, buckets, batch_size, ids)
    return likelihoods.argmax(axis=1).astype(np.int32), likelihoods


@functools.partial(jax.jit, static_argnames=("apply_fn", "ids"))
def rank(
    apply_fn: Callable[..., Any],
    variables: Variables,
    encoder_input_tokens: Int[Array, "B T"],
    encoder_lengths: Int[Array, " B"],
    labels: Labels,
    label_sets: Int[Array, " B"] | None = None,
    prompt_ids: Int[Array, " B"] | None = None,
    *,
    ids: SpecialIds,
) -> Float[Array, "B C"]:
    """log p(label | input) of every label (end of sequence included) for every row.

    Args:
        encoder_lengths: how many of a row's tokens are real.
        labels: one set of labels, or K of them, of which `label_sets` tells each row's; a
            smaller set has empty labels at its end, whose log-likelihood is -inf.
        prompt_ids: where the variables hold a bank of prompts, which is each row's.
        ids: of the vocabulary. Labels are ranked as they are tokenised, as in transformers' loss:
            a forced first token is for generated text alone.

    The encoder and the cross-attention's keys and values are computed once a row; the labels are
    a batch dimension of the decoder's queries alone, so nothing is copied per label.
    """
    encoded = apply_fn(
        variables,
        encoder_input_tokens,
        encoder_lengths=encoder_lengths,
        prompt_ids=prompt_ids,
        method="encode",
    )
    cache = apply_fn(variables, encoded, labels.tokens.shape[-1], method="init_cache")
    if label_sets is not None:
        labels = jax.tree.map(lambda x: x[label_sets], labels)
    rows = len(encoder_input_tokens)
    tokens = jnp.broadcast_to(labels.tokens, (rows, *labels.tokens.shape[-2:]))
    lengths = jnp.broadcast_to(labels.lengths, (rows, labels.lengths.shape[-1]))

    def likelihood(label: tuple[Array, Array]) -> Float[Array, " B"]:
        targets, length = label
        start = jnp.full_like(targets[:, :1], ids.decoder_start_id)
        inputs = jnp.concatenate([start, targets[:, :-1]], axis=1)
        logits, _ = apply_fn(variables, inputs, cache, 0, encoded, method="decode_step")
        found = log_likelihood(logits, targets, jnp.arange(targets.shape[1]) < length[:, None])
        return jnp.where(length > 0, found, -jnp.inf)

    each = jnp.swapaxes(tokens, 0, 1), jnp.swapaxes(lengths, 0, 1)
    return jax.lax.map(likelihood, each, batch_size=LABELS_AT_ONCE).T


@functools.partial(
    jax.jit, static_argnames=("apply_fn", "ids", "max_length", "num_beams", "sample")
)
def _decode(
    apply_fn: Callable[..., Any],
    variables: Variables,
    tokens: Array,
    lengths: Array,
    numbers: Array,
    prompt_ids: Array | None,
    seed: Array,
    settings: dict[str, Any],
    *,
    ids: SpecialIds,
    max_length: int,
    num_beams: int,
    sample: bool,
) -> tuple[Array, Array]:
    keys = None
    if sample:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)
    return decoding.decode(
        apply_fn,
        variables,
        tokens,
        lengths,
        ids=ids,
        max_length=max_length,
        prompt_ids=prompt_ids,
        num_beams=num_beams,
        keys=keys,
        **settings,
    )


def _map_examples(
    compute: Callable[[Any, Any, Any], Any],
    variables: Variables,
    source: ExampleSource,
    own: Any,
    buckets: Sequence[Bucket],
    batch_size: int,
    ids: SpecialIds,
) -> Any:
    """`compute(tokens [B, T], lengths [B], rows of own [B, ...])` of every example, in order.

    `own` are arrays [N, ...] of what else belongs to each example. Batches are dispatched one after
    the other and fetched together. Where the variables live on a mesh, its devices share the
    rows.
    """
    where: Any = getattr(jax.tree.leaves(variables)[0], "sharding", None)
    mesh: Any = where.mesh if isinstance(where, NamedSharding) else None
    planned = plan_evaluation(source, buckets, batch_size)
    outputs = []
    for part in planned:
        batch = build_batch(source, part, 0, ids)
        inputs = batch["encoder_input_tokens"], batch["encoder_lengths"]
        # Filler takes what the last example has; nobody reads what becomes of it.
        rows = jax.tree.map(operator.itemgetter(part.examples), own)
        result = compute(*jax.tree.map(lambda x: _share(x, mesh), (*inputs, rows)))
        # Replicated, so that every host can read it.
        outputs.append(result if mesh is None else jax.device_put(result, replicated(mesh)))
    order = np.concatenate([part.examples for part in planned])
    position = np.argsort(order, kind="stable")[-len(source) :]  # behind the filler, which is -1
    return jax.tree.map(lambda *parts: np.concatenate(parts)[position], *jax.device_get(outputs))


def _share(rows: np.ndarray, mesh: Any) -> Any:
    """Rows that every host has whole, over the mesh where it divides them."""
    if mesh is None:
        return rows
    divides = len(rows) % rows_divisor(mesh) == 0
    where = batch_sharding(mesh) if divides else replicated(mesh)
    return jax.make_array_from_callback(rows.shape, where, lambda index: rows[index])
