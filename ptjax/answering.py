"""What a backbone answers to tokenised examples: texts, and likelihoods of labels.

Every example is computed exactly once; the host waits once, at the end. What touches the device are
the module-level jitted functions below, so a shape compiles once per process, whoever asks for it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from ptjax.data.batch import pad
from ptjax.data.pipeline import Bucket, ExampleSource, build_batch, plan_evaluation
from ptjax.data.preprocess import TokenizedExamples, TokenRows, tokenize_texts
from ptjax.data.tokenizer import Tokenizer
from ptjax.errors import InputError
from ptjax.models import decoding
from ptjax.scale.sharding import batch_sharding, replicated, rows_divisor
from ptjax.training.loss import log_likelihood

Variables = dict[str, Any]

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
        prompt_ids: where the variables hold a bank of prompts, which is each example's.
        numbers: what an example draws depends on (seed, its number); default: its place.

    Raises:
        InputError: an impossible setting, or an example that fits no bucket.
    """
    if num_beams < 1 or max_length < 1 or batch_size < 1:
        raise InputError("num_beams, the length to generate and batch_size must be 1 or more")
    if temperature < 0 or not 0 < top_p <= 1:
        raise InputError(
            f"temperature = {temperature} must be 0 or more, top_p = {top_p} above 0 and up to 1"
        )
    if num_beams > 1 and temperature > 0:
        raise InputError("a beam search does not sample: choose num_beams = 1 or temperature = 0")

    def compute(tokens: Any, own: Any) -> tuple[Array, Array]:
        return _decode(
            apply_fn,
            variables,
            tokens,
            *own,
            np.uint32(seed % 2**32),
            settings,
            max_length=max_length,
            num_beams=num_beams,
            sample=temperature > 0,
        )

    settings = {
        "alpha": alpha,
        "temperature": temperature,
        "top_p": top_p,
        "eos_id": tokenizer.eos_id,
    }
    own = np.asarray(np.arange(len(source)) if numbers is None else numbers, np.uint32), prompt_ids
    tokens, scores = _map_examples(compute, variables, source, own, buckets, batch_size)
    return [tokenizer.decode(row) for row in tokens.tolist()], scores


def make_label_tokens(
    labels: Sequence[str], tokenizer: Tokenizer, target_length: int
) -> Int[np.ndarray, "C L"]:
    """A closed label set as target tokens, end of sequence included, as short as they fit."""
    rows = tokenize_texts(labels, tokenizer, target_length)
    return pad([rows[i] for i in range(len(rows))], int(rows.lengths.max()))


def stack_label_sets(sets: Sequence[Int[np.ndarray, "_ _"]]) -> Int[np.ndarray, "K C L"]:
    """Label sets of several sizes, as `rank` takes them: a smaller one ends in empty labels."""
    count, length = (max(sizes) for sizes in zip(*(one.shape for one in sets), strict=True))
    missing = [((0, count - len(one)), (0, length - one.shape[1])) for one in sets]
    return np.stack([np.pad(one, place) for one, place in zip(sets, missing, strict=True)])


def predict_labels(
    apply_fn: Callable[..., Any],
    variables: Variables,
    source: ExampleSource,
    label_tokens: Int[np.ndarray, "*K C L"],
    buckets: Sequence[Bucket],
    batch_size: int,
    *,
    label_sets: Int[np.ndarray, " N"] | None = None,
    prompt_ids: Int[np.ndarray, " N"] | None = None,
) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, "N C"]]:
    """Index of the likeliest label of every example, in order, and all log-likelihoods.

    The last four arguments but for every example instead of every row, as for `rank`.
    """

    def compute(tokens: Any, own: Any) -> Array:
        return rank(apply_fn, variables, tokens, label_tokens, *own)

    own = label_sets, prompt_ids
    likelihoods = _map_examples(compute, variables, source, own, buckets, batch_size)
    return likelihoods.argmax(axis=1).astype(np.int32), likelihoods


@functools.partial(jax.jit, static_argnames="apply_fn")
def rank(
    apply_fn: Callable[..., Any],
    variables: Variables,
    encoder_input_tokens: Int[Array, "B T"],
    label_tokens: Int[Array, "*K C L"],
    label_sets: Int[Array, " B"] | None = None,
    prompt_ids: Int[Array, " B"] | None = None,
) -> Float[Array, "B C"]:
    """log p(label | input) of every label (end of sequence included) for every row.

    Args:
        label_tokens: one set of labels, or K of them, of which `label_sets` tells each row's; a
            smaller set has empty labels at its end, whose log-likelihood is -inf.
        prompt_ids: where the variables hold a bank of prompts, which is each row's.

    The encoder and the cross-attention's keys and values are computed once a row; the labels are
    a batch dimension of the decoder's queries alone, so nothing is copied per label.
    """
    encoded = apply_fn(variables, encoder_input_tokens, prompt_ids=prompt_ids, method="encode")
    cache = apply_fn(variables, encoded, label_tokens.shape[-1], method="init_cache")
    labels = label_tokens if label_sets is None else label_tokens[label_sets]
    labels = jnp.broadcast_to(labels, (len(encoder_input_tokens), *labels.shape[-2:]))

    def likelihood(targets: Int[Array, "B L"]) -> Float[Array, " B"]:
        inputs = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)))
        logits, _ = apply_fn(variables, inputs, cache, 0, encoded, method="decode_step")
        found = log_likelihood(logits, targets, targets > 0)
        return jnp.where(targets[:, 0] > 0, found, -jnp.inf)

    return jax.lax.map(likelihood, jnp.swapaxes(labels, 0, 1), batch_size=LABELS_AT_ONCE).T


@functools.partial(jax.jit, static_argnames=("apply_fn", "max_length", "num_beams", "sample"))
def _decode(
    apply_fn: Callable[..., Any],
    variables: Variables,
    tokens: Array,
    numbers: Array,
    prompt_ids: Array | None,
    seed: Array,
    settings: dict[str, Any],
    *,
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
        max_length=max_length,
        prompt_ids=prompt_ids,
        num_beams=num_beams,
        keys=keys,
        **settings,
    )


def _map_examples(
    compute: Callable[[Any, Any], Any],
    variables: Variables,
    source: ExampleSource,
    own: Any,
    buckets: Sequence[Bucket],
    batch_size: int,
) -> Any:
    """`compute(encoder tokens [B, T], rows of own [B, ...])` of every example once, in order.

    `own` are arrays [N, ...] of what else belongs to each example. Batches are dispatched one after
    the other and fetched together. Where the variables live on a mesh, its devices share the
    rows.
    """
    where: Any = getattr(jax.tree.leaves(variables)[0], "sharding", None)
    mesh: Any = where.mesh if isinstance(where, NamedSharding) else None
    planned = plan_evaluation(source, buckets, batch_size)
    outputs = []
    for part in planned:
        tokens = build_batch(source, part, 0)["encoder_input_tokens"]
        # Filler takes what the last example has; nobody reads what becomes of it.
        rows = jax.tree.map(operator.itemgetter(part.examples), own)
        result = compute(*jax.tree.map(lambda x: _share(x, mesh), (tokens, rows)))
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
