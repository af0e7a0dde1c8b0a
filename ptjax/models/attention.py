"""T5's attention: which keys a query attends to, and the plain computation.

Letters: B batch, q queries, k keys, P prompt length, H heads, K head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ptjax.data.batch import PADDING_SEGMENT
from ptjax.models.prefix import shared_einsum
from ptjax.trees import Tree

MASKED = -1e10


class Mask(NamedTuple):
    """Which keys a query may attend to: those that all of its parts allow.

    T5X masks padded queries too; here they are not masked, because their outputs reach neither
    the loss nor any real position.

    Attributes:
        ids: int32 [B, k], the segment id of every key; 0 is padding.
        query_ids: int32 [B, q] for packed rows: a query attends to the keys with its own id.
            Without it, it attends to all that are not padding.
        seen: bool [#B, q, k], a further restriction, such as the decoder's to earlier positions.
        lengths: int32 [B], where `ids` leave the first keys of every row alone: how many. For
            kernels that take lengths; `allowed` follows from the other parts.
    """

    ids: Tree = None
    query_ids: Tree = None
    seen: Tree = None
    lengths: Tree = None

    def allowed(self) -> Bool[Array, "#B #q k"] | None:
        """Returns True where a query may attend to a key; None if every query sees all keys."""
        parts = [] if self.seen is None else [self.seen]
        if self.query_ids is not None:
            parts.append(self.query_ids[:, :, None] == self.ids[:, None, :])
        elif self.ids is not None:
            parts.append((self.ids != PADDING_SEGMENT)[:, None])
        return functools.reduce(jnp.logical_and, parts) if parts else None


class Source(NamedTuple):
    """Keys and values to attend to: those of every row, or a prompt's, which all rows share.

    Its leaves may also be specs of shardings in place of arrays.

    Attributes:
        keys, values: [B, k, H, K] of every row, or [k, H, K] for all of them.
        bias: [#B, H, q, k], added to the logits.
        mask: `Mask`.
        keep: float32 [B, H, 1, k], multiplied with the weights: dropout, with one mask for all
            queries as in T5X. `plain_attention` rounds it to the weights' dtype, as Flax does. It
            gets no gradient.
    """

    keys: Tree
    values: Tree
    bias: Tree = None
    mask: Mask = Mask()
    keep: Tree = None

    @property
    def is_shared(self) -> bool:
        """Whether all rows share these keys and values."""
        return self.keys.ndim == 3


AttendFn = Callable[[Array, tuple[Source, ...]], Array]
"""Computes what `plain_attention` does."""


def plain_attention(
    queries: Float[Array, "B q H K"], sources: tuple[Source, ...]
) -> Float[Array, "B q H K"]:
    """Computes softmax(queries keys^T + bias) values, over the keys of all sources together.

    Args:
        sources: each row's own keys first, then those that all rows share.
    """
    # Heads first: XLA's CPU matmuls over leading batch axes are twice as fast.
    queries = swap_heads(queries)
    logits = [_logits(queries, source) for source in sources]
    dtype = queries.dtype
    if len(sources) == 1:
        attended = _attended(jax.nn.softmax(logits[0]).astype(dtype), sources[0])
    else:
        # One softmax, without concatenating what is shared with what is not.
        top = functools.reduce(jnp.maximum, (x.max(-1, keepdims=True) for x in logits))
        weights = [jnp.exp(x - jax.lax.stop_gradient(top)) for x in logits]
        total = sum(x.sum(-1, keepdims=True) for x in weights)
        attended = sum(_attended(x, source) for x, source in zip(weights, sources, strict=True))
        attended /= total
    return swap_heads(attended)


def swap_heads(x: ArrayLike) -> Array:
    """[..., t, H, K] -> [..., H, t, K], and back."""
    return jnp.swapaxes(x, -3, -2)


def _logits(queries: Float[Array, "B H q K"], source: Source) -> Float[Array, "B H q k"]:
    if source.is_shared:
        logits = shared_einsum("bhqd,phd->bhqp", queries, source.keys)
    else:
        logits = jnp.einsum("bhqd,bhkd->bhqk", queries, swap_heads(source.keys))
    if source.bias is not None:
        logits += source.bias
    allowed = source.mask.allowed()
    return logits if allowed is None else logits + mask_bias(allowed, logits.dtype)


def _attended(weights: Float[Array, "B H q k"], source: Source) -> Float[Array, "B H q K"]:
    if source.keep is not None:
        # Cast first: a float32 product crashes libtpu 0.0.42's compiler with FSDP and remat 'full'.
        weights = weights * source.keep.astype(weights.dtype)
    if source.is_shared:
        return shared_einsum("bhqp,phd->bhqd", weights, source.values)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, swap_heads(source.values))


def mask_bias(allowed: Bool[Array, "#B #q k"], dtype: DTypeLike) -> Float[Array, "#B 1 #q k"]:
    """Returns the attention bias of a mask: 0 where a query may attend to a key, else -1e10."""
    return jnp.where(allowed, 0.0, MASKED).astype(dtype)[:, None]


def positions_in_segments(segment_ids: Int[Array, "B t"]) -> Int[Array, "B t"]:
    """Returns the position of each token within its example, counted from 0."""
    index = jnp.arange(segment_ids.shape[1])
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(segment_ids != before, index, 0), axis=1)
