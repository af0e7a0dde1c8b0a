"""Greedy decoding, sampling and beam search over the KV cache.

Pure functions of `PromptedT5.apply`. The encoder and the cross-attention's keys and values are
computed once; a `while_loop` of static shapes then runs one target position at a time.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ptjax.data.batch import SpecialIds
from ptjax.models.stacking import map_layers
from ptjax.models.t5 import Cache

Step = Callable[[Array, Cache, Array], tuple[Array, Cache]]


def decode(
    apply_fn: Callable[..., Any],
    variables: dict[str, Any],
    encoder_input_tokens: Int[Array, "B T"],
    encoder_lengths: Int[Array, " B"],
    *,
    ids: SpecialIds,
    max_length: int,
    prompt_ids: Int[Array, " B"] | None = None,
    num_beams: int = 1,
    alpha: float | Array = 0.6,
    keys: Key[Array, " B"] | None = None,
    temperature: float | Array = 1.0,
    top_p: float | Array = 1.0,
) -> tuple[Int[Array, "B L"], Float[Array, " B"]]:
    """The targets that the model writes, and their scores.

    Greedy by default, the best of a beam search with `num_beams > 1`, sampled with `keys`. A row
    of length 0 is filler: it is never waited for, and its result means nothing.

    Args:
        encoder_lengths: how many of a row's tokens are real.
        ids: with what a target begins and ends, with what it is filled up, and the token that
            comes first in every target, if there is one.
        max_length: L; static under `jax.jit`, as are `apply_fn`, `ids` and `num_beams`.
        prompt_ids: where the variables hold a bank of prompts, which is each row's.
        alpha: of the beam search's brevity penalty.
        keys: one per row, so that what a row draws does not depend on the other rows.
        temperature: divides the logits before sampling; > 0.
        top_p: samples from the fewest tokens whose probabilities reach it; in (0, 1].

    Returns:
        Tokens int32 [B, L], `pad_id` after the end of sequence. Float32 scores [B]: the tokens'
        log-likelihood (whatever the temperature), the end of sequence included; after a beam
        search as `beam_search` has it. A forced first token is certain: it adds 0.
    """
    if num_beams > 1:
        tokens, scores = beam_search(
            apply_fn,
            variables,
            encoder_input_tokens,
            encoder_lengths,
            ids=ids,
            max_length=max_length,
            prompt_ids=prompt_ids,
            num_beams=num_beams,
            alpha=alpha,
        )
        return tokens[:, 0], scores[:, 0]
    inputs = encoder_input_tokens, encoder_lengths
    step, cache = _start(apply_fn, variables, inputs, prompt_ids, ids, max_length, 1)

    def unfinished(state: _Rows) -> Array:
        return (state.position < max_length) & ~jnp.all(state.ended)

    def grow(state: _Rows) -> _Rows:
        log_probs, cache = step(state.last, state.cache, state.position)
        if keys is None:
            token = jnp.argmax(log_probs, axis=-1)
        else:
            token = _sample(log_probs, keys, state.position, temperature, top_p)
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

    rows = len(encoder_input_tokens)
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
    apply_fn: Callable[..., Any],
    variables: dict[str, Any],
    encoder_input_tokens: Int[Array, "B T"],
    encoder_lengths: Int[Array, " B"],
    *,
    ids: SpecialIds,
    max_length: int,
    num_beams: int,
    prompt_ids: Int[Array, " B"] | None = None,
    alpha: float | Array = 0.6,
) -> tuple[Int[Array, "B K L"], Float[Array, "B K"]]:
    """T5X's beam search (`t5x/decoding.py`): the K = `num_beams` best finished targets, best first.

    A score is the log-likelihood over ((5 + length) / 6)^alpha, alpha >= 0, the end of sequence
    counted in both. A row that finished nothing gets its unfinished beams instead; where fewer
    than K were finished, the rest have the score -inf. Unlike greedy decoding it also weighs
    stopping at every step, with one beam too.
    """
    rows, width = len(encoder_input_tokens), num_beams
    inputs = encoder_input_tokens, encoder_lengths
    step, cache = _start(apply_fn, variables, inputs, prompt_ids, ids, max_length, width)

    def penalty(length: Array | int) -> Array:
        return ((5.0 + length) / 6.0) ** jnp.float32(alpha)

    def unfinished(state: _Beams) -> Array:
        # Log-likelihoods only fall and the penalty is greatest at the full length, so no live
        # beam can end with a better score than this.
        bound = state.live_log_likelihood[:, 0] / penalty(max_length)
        return (state.position < max_length) & jnp.any(state.scores[:, -1] < bound)

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
        beam = _pick(beam, kept)

        def reorder(x: Array) -> Array:
            return _pick(x.reshape(rows, width, *x.shape[1:]), beam).reshape(x.shape)

        # Beams of one row share their encoder states: only what they wrote has to move.
        cache = map_layers(
            lambda layer: {
                name: jax.tree.map(reorder, x) if name.startswith("self_") else x
                for name, x in layer.items()
            },
            cache,
        )
        return _Beams(
            position=state.position + 1,
            live=_pick(tokens, kept),
            last=_pick(token, kept),
            live_log_likelihood=live_log_likelihood,
            finished=finished,
            scores=scores,
            cache=cache,
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
    some = jnp.isfinite(state.scores[:, :1])
    # NaN ends the search: what had been finished by then is no answer.
    some &= ~jnp.isnan(state.live_log_likelihood).any(axis=1, keepdims=True)
    tokens = jnp.where(some[..., None], state.finished, state.live)
    return tokens, jnp.where(some, state.scores, state.live_log_likelihood / penalty(max_length))


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
    apply_fn: Callable[..., Any],
    variables: dict[str, Any],
    inputs: tuple[Int[Array, "B T"], Int[Array, " B"]],
    prompt_ids: Int[Array, " B"] | None,
    ids: SpecialIds,
    max_length: int,
    width: int,
) -> tuple[Step, Cache]:
    """A function of (last token [B*K], cache, position) -> (log p [B*K, V], cache), first cache.

    Args:
        inputs: tokens and lengths.
    """
    tokens, lengths = inputs
    encoded = apply_fn(
        variables, tokens, encoder_lengths=lengths, prompt_ids=prompt_ids, method="encode"
    )
    cache = apply_fn(variables, encoded, max_length, method="init_cache")

    # Every row its beams; a prompt that all rows share stays one.
    def repeat(x: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, width, axis=0), x)

    cache, segment_ids = map_layers(repeat, cache), repeat(encoded.segment_ids)
    encoded = encoded._replace(segment_ids=segment_ids)

    def step(last: Array, cache: Cache, position: Array) -> tuple[Array, Cache]:
        logits, cache = apply_fn(
            variables, last[:, None], cache, position, encoded, method="decode_step"
        )
        log_probs = jax.nn.log_softmax(logits[:, 0])
        if ids.forced_bos_id is not None:
            forced = jnp.arange(log_probs.shape[-1]) == ids.forced_bos_id
            certain = jnp.where(forced, 0.0, -jnp.inf)
            log_probs = jnp.where(position == 0, certain, log_probs)
        return log_probs, cache

    return step, cache


def _ends(tokens: Int[Array, "*n"], ids: SpecialIds) -> Bool[Array, "*n"]:
    """Which tokens are an end of sequence."""
    return functools.reduce(operator.or_, (tokens == eos for eos in ids.eos_ids))


def _pick(x: Array, index: Int[Array, "B k"]) -> Array:
    """x [B, n, ...] -> [B, k, ...]; batched over B, so a sharded batch stays where it is."""
    return jax.vmap(lambda row, chosen: row[chosen])(x, index)


def _sample(
    log_probs: Float[Array, "B V"],
    keys: Key[Array, " B"],
    position: Int[Array, ""],
    temperature: float | Array,
    top_p: float | Array,
) -> Int[Array, " B"]:
    def nucleus(logits: Array) -> Array:
        probs = jax.nn.softmax(logits)
        descending = jnp.sort(probs, axis=-1, descending=True)
        before = jnp.cumsum(descending, axis=-1) - descending
        # The most probable token is always one of them: nothing comes before it.
        last = jnp.sum(before < top_p, axis=-1, keepdims=True) - 1
        return jnp.where(probs >= jnp.take_along_axis(descending, last, axis=-1), logits, -jnp.inf)

    # A condition, not `where`: sorting the vocabulary is slow, and mostly not asked for.
    logits = jax.lax.cond(top_p < 1.0, nucleus, lambda x: x, log_probs / temperature)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
    return jax.vmap(jax.random.categorical)(keys, logits)
