"""Greedy decoding, sampling and beam search over the KV cache.

Pure functions of a network's `apply_fn`. The encoder and the cross-attention's keys and values are
computed once; a `while_loop` of static shapes then decodes one target position at a time. How many
it decodes is a traced number, so one compiled program serves every length up to its cache's.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ptjax.data.batch import SpecialIds
from ptjax.models.family import ApplyFn
from ptjax.models.stacking import map_layers
from ptjax.models.t5 import Cache
from ptjax.trees import Variables

T = TypeVar("T")
Step = Callable[[Array, Cache, Array], tuple[Array, Cache]]


class Sampling(NamedTuple):
    """How tokens are sampled.

    Attributes:
        keys: one random key per row, so that a row's sample does not depend on the other rows.
        temperature: divides the logits before sampling; > 0.
        top_p: samples from the smallest set of most probable tokens whose probabilities add up to
            at least this; in (0, 1], where 1 keeps all tokens.
    """

    keys: Key[Array, " B"]
    temperature: float | Array = 1.0
    top_p: float | Array = 1.0


def decode(
    apply_fn: ApplyFn,
    variables: Variables,
    encoder_input_tokens: Int[Array, "B T"],
    encoder_lengths: Int[Array, " B"],
    *,
    ids: SpecialIds,
    max_length: int,
    limit: Int[Array, ""] | int | None = None,
    prompt_ids: Int[Array, " B"] | None = None,
    num_beams: int = 1,
    alpha: float | Array = 0.6,
    sampling: Sampling | None = None,
) -> tuple[Int[Array, "B L"], Float[Array, " B"]]:
    """Generates a target for each row, and scores it.

    Decodes greedily by default, samples with `sampling`, and with `num_beams > 1` returns the best
    target of a beam search, which ignores `sampling`. A row of length 0 is filler: the loop never
    waits for it, and its result is meaningless.

    Args:
        apply_fn: the network, see `family.Family.build`.
        encoder_lengths: the number of real tokens in each row.
        ids: the vocabulary's start, end and padding ids, and the forced first token, if any.
        max_length: L, the places in the cache; static under `jax.jit`, as are `apply_fn`, `ids`
            and `num_beams`.
        limit: the most tokens to generate, up to L; may be traced. None is L.
        prompt_ids: if the variables hold a bank of prompts, the index of each row's prompt.
        alpha: the exponent of the beam search's brevity penalty.

    Returns:
        Tokens int32 [B, L], `pad_id` after the end of sequence. Float32 scores [B]: the tokens'
        log-likelihood (at temperature 1), the end of sequence included; after a beam search as in
        `beam_search`. A forced first token is certain: it adds 0.
    """
    run = functools.partial(apply_fn, variables)
    limit = max_length if limit is None else limit
    if num_beams == 1:
        step, cache = _start(
            run, (encoder_input_tokens, encoder_lengths), prompt_ids, ids, max_length, 1
        )
        return _decode_rows(step, cache, encoder_lengths, ids, max_length, limit, sampling)
    tokens, scores = beam_search(
        apply_fn,
        variables,
        encoder_input_tokens,
        encoder_lengths,
        ids=ids,
        max_length=max_length,
        limit=limit,
        prompt_ids=prompt_ids,
        num_beams=num_beams,
        alpha=alpha,
    )
    return tokens[:, 0], scores[:, 0]


def _decode_rows(
    step: Step,
    cache: Cache,
    encoder_lengths: Int[Array, " B"],
    ids: SpecialIds,
    max_length: int,
    limit: Int[Array, ""] | int,
    sampling: Sampling | None,
) -> tuple[Int[Array, "B L"], Float[Array, " B"]]:
    """Greedy decoding, or sampling: `decode` without beams."""

    def unfinished(state: _Rows) -> Array:
        return (state.position < limit) & ~jnp.all(state.ended)

    def grow(state: _Rows) -> _Rows:
        log_probs, cache = step(state.last, state.cache, state.position)
        if sampling is None:
            token = jnp.argmax(log_probs, axis=-1)
        else:
            token = _sample(log_probs, sampling, state.position)
        gained = jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]
        token = jnp.where(state.ended, ids.pad_id, token).astype(jnp.int32)
        return _Rows(
            position=state.position + 1,
            tokens=state.tokens.at[:, state.position].set(token),
            last=token,
            log_likelihood=state.log_likelihood + jnp.where(state.ended, 0.0, gained),
            ended=state.ended | _ends(token, ids),
            cache=cache,
        )

    rows = len(encoder_lengths)
    start = _Rows(
        position=jnp.int32(0),
        tokens=jnp.full((rows, max_length), ids.pad_id, jnp.int32),
        last=jnp.full(rows, ids.decoder_start_id, jnp.int32),
        log_likelihood=jnp.zeros(rows, jnp.float32),
        ended=encoder_lengths == 0,
        cache=cache,
    )
    state = jax.lax.while_loop(unfinished, grow, start)
    return state.tokens, state.log_likelihood


def beam_search(
    apply_fn: ApplyFn,
    variables: Variables,
    encoder_input_tokens: Int[Array, "B T"],
    encoder_lengths: Int[Array, " B"],
    *,
    ids: SpecialIds,
    max_length: int,
    num_beams: int,
    limit: Int[Array, ""] | int | None = None,
    prompt_ids: Int[Array, " B"] | None = None,
    alpha: float | Array = 0.6,
) -> tuple[Int[Array, "B K L"], Float[Array, "B K"]]:
    """Returns each row's K = `num_beams` best finished targets and scores, best first; as T5X does.

    A score is the log-likelihood divided by ((5 + length) / 6)^alpha, alpha >= 0; both include the
    end of sequence. If a row finished no target, its unfinished beams are returned; if it finished
    fewer than K, the rest have the score -inf. Unlike greedy decoding, even one beam compares
    stopping with continuing at every step. Arguments as for `decode` (`t5x/decoding.py`).
    """
    rows, width = len(encoder_input_tokens), num_beams
    limit = max_length if limit is None else limit
    inputs, run = (encoder_input_tokens, encoder_lengths), functools.partial(apply_fn, variables)
    step, cache = _start(run, inputs, prompt_ids, ids, max_length, width)

    def penalty(length: Array | int) -> Array:
        return ((5.0 + length) / 6.0) ** jnp.float32(alpha)

    def unfinished(state: _Beams) -> Array:
        # Log-likelihoods only fall and the penalty is greatest at the full length, so no live
        # beam can end with a better score than this.
        bound = state.live_log_likelihood[:, 0] / penalty(limit)
        return (state.position < limit) & jnp.any(state.scores[:, -1] < bound)

    def grow(state: _Beams) -> _Beams:
        log_probs, cache = step(state.last.reshape(-1), state.cache, state.position)
        vocabulary = log_probs.shape[-1]
        log_probs = (
            log_probs.reshape(rows, width, vocabulary) + state.live_log_likelihood[..., None]
        )
        # Enough candidates that `width` beams stay alive even if every beam takes every EOS id.
        ways = min(1 + len(ids.eos_ids), vocabulary)
        best, index = jax.lax.top_k(log_probs.reshape(rows, -1), ways * width)
        beam, token = jnp.divmod(index, vocabulary)
        tokens = _pick(state.live, beam).at[:, :, state.position].set(token)
        ended = _ends(token, ids)
        scores = jnp.where(ended, best / penalty(state.position + 1), -jnp.inf)
        scores, kept = jax.lax.top_k(jnp.concatenate([state.scores, scores], axis=1), width)
        finished = _pick(jnp.concatenate([state.finished, tokens], axis=1), kept)
        live_log_likelihood, kept = jax.lax.top_k(jnp.where(ended, -jnp.inf, best), width)
        return _Beams(
            position=state.position + 1,
            live=_pick(tokens, kept),
            last=_pick(token, kept),
            live_log_likelihood=live_log_likelihood,
            finished=finished,
            scores=scores,
            cache=_reorder(cache, _pick(beam, kept)),
        )

    # All beams start equal, so only the first counts; filler rows start without any.
    first = (encoder_lengths > 0)[:, None] & (jnp.arange(width) == 0)
    nothing = jnp.full((rows, width, max_length), ids.pad_id, jnp.int32)
    start = _Beams(
        position=jnp.int32(0),
        live=nothing,
        last=jnp.full((rows, width), ids.decoder_start_id, jnp.int32),
        live_log_likelihood=jnp.where(first, 0.0, -jnp.inf),
        finished=nothing,
        scores=jnp.full((rows, width), -jnp.inf),
        cache=cache,
    )
    state = jax.lax.while_loop(unfinished, grow, start)
    finished = jnp.isfinite(state.scores[:, :1])
    # NaN ends the search: targets that were finished before it are not an answer.
    finished &= ~jnp.isnan(state.live_log_likelihood).any(axis=1, keepdims=True)
    tokens = jnp.where(finished[..., None], state.finished, state.live)
    return tokens, jnp.where(finished, state.scores, state.live_log_likelihood / penalty(limit))


class _Rows(NamedTuple):
    """Greedy decoding and sampling after `position` steps."""

    position: Int[Array, ""]
    tokens: Int[Array, "B L"]
    last: Int[Array, " B"]
    log_likelihood: Float[Array, " B"]
    ended: Array
    cache: Cache


class _Beams(NamedTuple):
    """Beam search after `position` steps; both halves are sorted, best first."""

    position: Int[Array, ""]
    live: Int[Array, "B K L"]
    last: Int[Array, "B K"]
    live_log_likelihood: Float[Array, "B K"]
    finished: Int[Array, "B K L"]
    scores: Float[Array, "B K"]
    cache: Cache


def _start(
    run: ApplyFn,
    inputs: tuple[Int[Array, "B T"], Int[Array, " B"]],
    prompt_ids: Int[Array, " B"] | None,
    ids: SpecialIds,
    max_length: int,
    width: int,
) -> tuple[Step, Cache]:
    """A function (last token [B*K], cache, position) -> (log p [B*K, V], cache); the first cache.

    Args:
        run: the network's `apply_fn` with its variables.
        inputs: tokens and lengths.
        width: K.
    """
    tokens, lengths = inputs
    encoded = run(tokens, encoder_lengths=lengths, prompt_ids=prompt_ids, method="encode")
    cache = run(encoded, max_length, method="init_cache")

    # Every beam gets its row's arrays; a prompt that all rows share is not repeated.
    def repeat(rows: T) -> T:
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, width, axis=0), rows)

    cache, segment_ids = map_layers(repeat, cache), repeat(encoded.segment_ids)
    encoded = encoded._replace(segment_ids=segment_ids)

    def step(last: Array, cache: Cache, position: Array) -> tuple[Array, Cache]:
        logits, cache = run(last[:, None], cache, position, encoded, method="decode_step")
        log_probs = jax.nn.log_softmax(logits[:, 0])
        if ids.forced_bos_id is not None:
            forced = jnp.arange(log_probs.shape[-1]) == ids.forced_bos_id
            certain = jnp.where(forced, 0.0, -jnp.inf)
            log_probs = jnp.where(position == 0, certain, log_probs)
        return log_probs, cache

    return step, cache


def _reorder(cache: Cache, beam: Int[Array, "B K"]) -> Cache:
    """The cache in which each beam has what the beam that it continues had written.

    The beams of a row share its encoder states, so only self-attention's arrays move.
    """
    rows, width = beam.shape

    def reorder(x: Array) -> Array:
        return _pick(x.reshape(rows, width, *x.shape[1:]), beam).reshape(x.shape)

    return map_layers(
        lambda layer: {
            name: jax.tree.map(reorder, x) if name.startswith("self_") else x
            for name, x in layer.items()
        },
        cache,
    )


def _ends(tokens: Int[Array, "*n"], ids: SpecialIds) -> Bool[Array, "*n"]:
    """Which tokens are an end of sequence."""
    return functools.reduce(operator.or_, (tokens == eos for eos in ids.eos_ids))


def _pick(x: Array, index: Int[Array, "B k"]) -> Array:
    """x [B, n, ...] -> [B, k, ...]; batched over B, so a sharded batch stays where it is."""
    return jax.vmap(lambda row, chosen: row[chosen])(x, index)


def _sample(
    log_probs: Float[Array, "B V"], sampling: Sampling, position: Int[Array, ""]
) -> Int[Array, " B"]:
    keys, temperature, top_p = sampling

    def nucleus(logits: Array) -> Array:
        probs = jax.nn.softmax(logits)
        descending = jnp.sort(probs, axis=-1, descending=True)
        before = jnp.cumsum(descending, axis=-1) - descending
        # The most probable token is always included: nothing comes before it.
        last = jnp.sum(before < top_p, axis=-1, keepdims=True) - 1
        return jnp.where(probs >= jnp.take_along_axis(descending, last, axis=-1), logits, -jnp.inf)

    # A condition, not `where`: sorting the vocabulary is slow, and rarely needed.
    logits = jax.lax.cond(top_p < 1.0, nucleus, lambda x: x, log_probs / temperature)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
    return jax.vmap(jax.random.categorical)(keys, logits)
