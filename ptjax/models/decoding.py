"""Greedy decoding, sampling and beam search over the KV cache.

Pure functions of a network's `apply_fn`. The encoder and the cross-attention's keys and values are
computed once; a `while_loop` of static shapes then decodes one target position at a time. How many
it decodes is a traced number, so one compiled program serves every length up to its cache's.
"""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ptjax.data.batch import SpecialIds
from ptjax.models.decode_loop import Loop, Network, Source, encode, map_cache, pick, pick_rows
from ptjax.models.family import ApplyFn
from ptjax.models.t5 import Cache
from ptjax.trees import Variables


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
    shards: int = 1,
) -> tuple[Int[Array, "B L"], Float[Array, " B"]]:
    """Generates a target for each row, and scores it.

    Decodes greedily by default, samples with `sampling`, and with `num_beams > 1` returns the best
    target of a beam search, which ignores `sampling`. A row of length 0 is filler: the loop never
    waits for it, and its result is meaningless.

    Args:
        apply_fn: the network, see `family.Family.build`.
        encoder_lengths: the number of real tokens in each row.
        ids: the vocabulary's start, end and padding ids, and the forced first token, if any.
        max_length: L, the number of positions in the cache. Must be static under `jax.jit`, like
            `apply_fn`, `ids` and `num_beams`.
        limit: the maximum number of tokens to generate, at most L; may be traced. None means L.
        prompt_ids: if the variables hold a bank of prompts, the index of each row's prompt; -1
            means no prompt.
        alpha: the exponent of the beam search's brevity penalty.
        shards: the number of parts in which the mesh divides the rows. Static, too.

    Returns:
        `(tokens, scores)`. The tokens are int32 [B, L], with `pad_id` after the end of sequence.
        The scores are float32 [B]: the log-likelihood of each row's tokens, end of sequence
        included, at temperature 1, or after a beam search its score (see `beam_search`). A forced
        first token adds 0.
    """
    limit = max_length if limit is None else limit
    if num_beams > 1:
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
            shards=shards,
        )
        return tokens[:, 0], scores[:, 0]
    run, inputs = functools.partial(apply_fn, variables), (encoder_input_tokens, encoder_lengths)
    network, source = encode(run, inputs, prompt_ids, ids, max_length)
    return _decode_rows(network, source, encoder_lengths, limit, sampling, shards)


def _decode_rows(
    network: Network,
    source: Source,
    lengths: Int[Array, " B"],
    limit: Int[Array, ""] | int,
    sampling: Sampling | None,
    shards: int,
) -> tuple[Int[Array, "B L"], Float[Array, " B"]]:
    """Greedy decoding, or sampling: `decode` without beams."""
    ids = network.ids
    source = source._replace(keys=sampling and sampling.keys)

    def grow(position: Array, state: _Rows, cache: Cache, source: Source) -> tuple[_Rows, Cache]:
        log_probs, cache = network.step(state.last, cache, position, source)
        if sampling is None:
            token = jnp.argmax(log_probs, axis=-1)
        else:
            token = _sample(log_probs, sampling._replace(keys=source.keys), position)
        gained = jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]
        token = jnp.where(state.ended, ids.pad_id, token).astype(jnp.int32)
        made = _Rows(
            tokens=state.tokens.at[:, position].set(token),
            last=token,
            log_likelihood=state.log_likelihood + jnp.where(state.ended, 0.0, gained),
            ended=state.ended | _ends(token, ids),
        )
        return made, cache

    rows = len(lengths)
    state = _Rows(
        tokens=jnp.full((rows, network.length), ids.pad_id, jnp.int32),
        last=jnp.full(rows, ids.decoder_start_id, jnp.int32),
        log_likelihood=jnp.zeros(rows, jnp.float32),
        ended=lengths == 0,
    )
    loop = Loop(network, grow, lambda state: ~state.ended, limit, shards)
    state = loop.run(jnp.int32(0), state, source)
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
    shards: int = 1,
) -> tuple[Int[Array, "B K L"], Float[Array, "B K"]]:
    """Finds the K = `num_beams` best targets of each row, like T5X (`t5x/decoding.py`).

    Even with one beam the result can differ from greedy decoding: the search keeps a finished
    target, but continues as long as a longer one may score better.

    Arguments as for `decode`.

    Returns:
        `(tokens, scores)` of the finished targets, best first. A score is the log-likelihood
        divided by ((5 + length) / 6)^alpha, alpha >= 0; both include the end of sequence. A row
        that finished fewer than K targets has scores of -inf for the rest. A row that finished
        none has its unfinished beams instead.
    """
    rows, width = len(encoder_input_tokens), num_beams
    limit = max_length if limit is None else limit
    inputs, run = (encoder_input_tokens, encoder_lengths), functools.partial(apply_fn, variables)
    network, source = encode(run, inputs, prompt_ids, ids, max_length, width)

    def penalty(length: Array | int) -> Array:
        return ((5.0 + length) / 6.0) ** jnp.float32(alpha)

    def unfinished(state: _Beams) -> Array:
        # Log-likelihoods only fall and the penalty is greatest at the full length, so no live
        # beam can end with a better score than this.
        return state.scores[:, -1] < state.live_log_likelihood[:, 0] / penalty(limit)

    def grow(position: Array, state: _Beams, cache: Cache, source: Source) -> tuple[_Beams, Cache]:
        log_probs, cache = network.step(state.last.reshape(-1), cache, position, source)
        rows, vocabulary = len(state.last), log_probs.shape[-1]
        log_probs = (
            log_probs.reshape(rows, width, vocabulary) + state.live_log_likelihood[..., None]
        )
        # Enough candidates that `width` beams stay alive even if every beam takes every EOS id.
        ways = min(1 + len(ids.eos_ids), vocabulary)
        best, index = jax.lax.top_k(log_probs.reshape(rows, -1), ways * width)
        beam, token = jnp.divmod(index, vocabulary)
        tokens = pick(state.live, beam).at[:, :, position].set(token)
        ended = _ends(token, ids)
        scores = jnp.where(ended, best / penalty(position + 1), -jnp.inf)
        scores, kept = jax.lax.top_k(jnp.concatenate([state.scores, scores], axis=1), width)
        finished = pick(jnp.concatenate([state.finished, tokens], axis=1), kept)
        live_log_likelihood, kept = jax.lax.top_k(jnp.where(ended, -jnp.inf, best), width)
        made = _Beams(
            live=pick(tokens, kept),
            last=pick(token, kept),
            live_log_likelihood=live_log_likelihood,
            finished=finished,
            scores=scores,
        )
        # Each beam gets what the beam that it continues had written.
        kept = pick(beam, kept)
        return made, map_cache(lambda x: pick_rows(x, kept, width), cache)

    # All beams start equal, so only the first counts; filler rows start without any.
    first = (encoder_lengths > 0)[:, None] & (jnp.arange(width) == 0)
    nothing = jnp.full((rows, width, max_length), ids.pad_id, jnp.int32)
    state = _Beams(
        live=nothing,
        last=jnp.full((rows, width), ids.decoder_start_id, jnp.int32),
        live_log_likelihood=jnp.where(first, 0.0, -jnp.inf),
        finished=nothing,
        scores=jnp.full((rows, width), -jnp.inf),
    )
    loop = Loop(network, grow, unfinished, limit, shards)
    state = loop.run(jnp.int32(0), state, source)
    finished = jnp.isfinite(state.scores[:, :1])
    # NaN ends the search: targets that were finished before it are not an answer.
    finished &= ~jnp.isnan(state.live_log_likelihood).any(axis=1, keepdims=True)
    tokens = jnp.where(finished[..., None], state.finished, state.live)
    return tokens, jnp.where(finished, state.scores, state.live_log_likelihood / penalty(limit))


class _Rows(NamedTuple):
    """The state of greedy decoding and of sampling."""

    tokens: Int[Array, "B L"]
    last: Int[Array, " B"]
    log_likelihood: Float[Array, " B"]
    ended: Bool[Array, " B"]


class _Beams(NamedTuple):
    """The state of a beam search; both halves are sorted, best first."""

    live: Int[Array, "B K L"]
    last: Int[Array, "B K"]
    live_log_likelihood: Float[Array, "B K"]
    finished: Int[Array, "B K L"]
    scores: Float[Array, "B K"]


def _ends(tokens: Int[Array, "*n"], ids: SpecialIds) -> Bool[Array, "*n"]:
    """Which tokens are an end of sequence."""
    return functools.reduce(operator.or_, (tokens == eos for eos in ids.eos_ids))


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
