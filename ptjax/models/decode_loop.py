"""The loops of decoding: which rows are still decoded, and with which arrays.

A loop's cache has the self-attention's arrays only. When three of four rows have finished, another
loop decodes the others, with a quarter of the rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ptjax.data.batch import SpecialIds
from ptjax.models.family import ApplyFn
from ptjax.models.prefix import PromptStates
from ptjax.models.stacking import join_layers, map_layers
from ptjax.models.t5 import Cache, Encoded

State = TypeVar("State", bound=tuple[Any, ...])

SHRINKAGE = 4
"""A loop ends once at most 1 / SHRINKAGE of its rows are unfinished; another decodes these."""
FEWEST_ROWS = 8
"""No further loop has fewer rows a device: each loop is compiled, and few rows cost little."""


class Source(NamedTuple):
    """What the rows are decoded from, and no step changes.

    Attributes:
        states, segment_ids: of `Encoded`.
        keys: the keys [B] of `Sampling`, or None.
        cross: the cache's keys and values of the encoder's output, which a row's beams share; None
            before a loop begins. A loop's state is in memory twice, so they are kept out of it.
    """

    states: Array
    segment_ids: Array
    keys: Array | None = None
    cross: Cache | None = None


@dataclasses.dataclass(frozen=True)
class Network:
    """A network's decoder.

    Attributes:
        run: its `apply_fn` with its variables.
        prompt: of `Encoded`; all rows share it.
        length: of the cache, in tokens.
        width: the beams of a row, K.
    """

    run: ApplyFn
    prompt: PromptStates | None
    ids: SpecialIds
    length: int
    width: int

    def start(self, source: Source) -> tuple[Source, Cache]:
        """Computes `cross`; returns the source with it, and an empty cache of self-attention."""
        cache = self.run(self._encoded(source), self.length, method="init_cache")
        own, cross = _divide(cache)
        own = map_cache(lambda x: jnp.repeat(x, self.width, axis=0), own)
        return source._replace(cross=cross), own

    def step(
        self, last: Array, cache: Cache, position: Array, source: Source
    ) -> tuple[Array, Cache]:
        """The log-probabilities [B*K, V] of the tokens behind `last` [B*K], and the new cache."""
        joined: Any = join_layers(source.cross, cache)
        encoded = self._encoded(source)
        logits, made = self.run(last[:, None], joined, position, encoded, method="decode_step")
        log_probs = jax.nn.log_softmax(logits[:, 0])
        if self.ids.forced_bos_id is not None:
            forced = jnp.arange(log_probs.shape[-1]) == self.ids.forced_bos_id
            certain = jnp.where(forced, 0.0, -jnp.inf)
            log_probs = jnp.where(position == 0, certain, log_probs)
        return log_probs, _divide(made)[0]

    def _encoded(self, source: Source) -> Encoded:
        return Encoded(source.states, source.segment_ids, self.prompt)


def encode(
    run: ApplyFn,
    inputs: tuple[Int[Array, "B T"], Int[Array, " B"]],
    prompt_ids: Int[Array, " B"] | None,
    ids: SpecialIds,
    max_length: int,
    width: int = 1,
) -> tuple[Network, Source]:
    """Runs the encoder on tokens and their lengths."""
    tokens, lengths = inputs
    encoded = run(tokens, encoder_lengths=lengths, prompt_ids=prompt_ids, method="encode")
    network = Network(run, encoded.prompt, ids, max_length, width)
    return network, Source(encoded.states, encoded.segment_ids)


def _divide(cache: Cache) -> tuple[Cache, Cache]:
    """Divides a cache into the self-attention's arrays and the others."""
    if isinstance(cache, list):
        own, cross = zip(*map(_divide, cache), strict=True)
        return [*own], [*cross]
    own = {name: x for name, x in cache.items() if name.startswith("self_")}
    return own, {name: x for name, x in cache.items() if name not in own}


@dataclasses.dataclass(frozen=True)
class Loop(Generic[State]):
    """Decodes until all rows have finished or have `limit` tokens.

    Attributes:
        grow: decodes one position: (position, state, cache, source) -> (state, cache).
        unfinished: which rows of a state have not finished, bool [B].
    """

    network: Network
    grow: Callable[[Array, State, Cache, Source], tuple[State, Cache]]
    unfinished: Callable[[State], Bool[Array, " B"]]
    limit: Int[Array, ""] | int
    shards: int

    def run(
        self, position: Array, state: State, source: Source, cache: Cache | None = None
    ) -> State:
        """Decodes from `position` on, with the cache of what is there before; the last state."""
        source, empty = self.network.start(source)
        rows, shards = len(source.segment_ids), self.shards
        fewer = rows // SHRINKAGE
        if rows % (SHRINKAGE * shards) or fewer < FEWEST_ROWS * shards:
            fewer = 0

        def goes_on(carry: tuple[Array, State, Cache]) -> Array:
            position, state, _ = carry
            waiting = self.unfinished(state).reshape(shards, -1).sum(axis=1).max()
            return (position < self.limit) & (waiting > fewer // shards)

        def step(carry: tuple[Array, State, Cache]) -> tuple[Array, State, Cache]:
            position, state, cache = carry
            return position + 1, *self.grow(position, state, cache, source)

        carry = position, state, empty if cache is None else cache
        position, state, cache = jax.lax.while_loop(goes_on, step, carry)
        if not fewer:
            return state
        # Each device keeps rows of its own, first those that have not finished.
        order = jnp.argsort(~self.unfinished(state).reshape(shards, -1), axis=1)
        index, entries = order[:, : fewer // shards], rows // shards
        take = functools.partial(pick_rows, index=index, entries=entries)
        # `cross` is computed again: to pick from it, a TPU would copy all of it.
        source = jax.tree.map(take, source._replace(cross=None))
        decoded = self.run(position, jax.tree.map(take, state), source, map_cache(take, cache))

        def put(x: Array, part: Array) -> Array:
            grouped, part = (y.reshape(shards, -1, *y.shape[1:]) for y in (x, part))
            place = jax.vmap(lambda x, part, at: x.at[at].set(part))
            return place(grouped, part, index).reshape(x.shape)

        return jax.tree.map(put, state, decoded)


def pick(x: Array, index: Int[Array, "B k"]) -> Array:
    """x [B, n, ...] -> [B, k, ...]; batched over B, so a sharded batch stays where it is."""
    return jax.vmap(lambda row, chosen: row[chosen])(x, index)


def pick_rows(x: Array, index: Int[Array, "g k"], entries: int) -> Array:
    """Picks k of the `entries` in each of g groups; an entry is one row of x, or several."""
    grouped = x.reshape(len(index), entries, -1, *x.shape[1:])
    return pick(grouped, index).reshape(-1, *x.shape[1:])


def map_cache(function: Callable[[Array], Array], cache: Cache) -> Cache:
    return map_layers(lambda layer: jax.tree.map(function, layer), cache)
