"""Attention in Triton kernels, for a frozen T5 on an NVIDIA GPU: logits never reach memory.

These kernels cover what cuDNN's attention does not: packed rows, keys that all rows share, odd
lengths, masks without lengths. As in `fused_attention`, the bias is frozen, and the backward pass
starts from queries, keys and values alone. A row's keys do not fit in a GPU's shared memory, so the
softmax is computed one block of keys at a time (FlashAttention, Dao et al. 2022, algorithm 1).

Letters: B batch, q queries, k keys, H heads, K head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from ptjax.data.batch import PADDING_SEGMENT
from ptjax.models.attention import MASKED, Source
from ptjax.models.prefix import KeysValues
from ptjax.trees import Tree

_BLOCK = 64
"""The number of queries, and of keys, in a block."""
_BEYOND = 1e30
"""Subtracted from the logits of padding keys; far more than `MASKED`, so that their weight is 0
even where every real key is masked."""


def fused_forward(
    queries: Float[Array, "B q H K"], sources: tuple[Source, ...], interpret: bool = False
) -> Float[Array, "B q H K"]:
    """Computes `plain_attention`; logits and softmax are float32 whatever the queries' dtype.

    Args:
        sources: as for `plain_attention`; their masks have no `seen`.
        interpret: as for `pallas_call`: True runs the kernel on a device that is not a GPU.
    """
    inputs = _inputs(queries, sources)
    outputs = {"out": _shape(inputs["queries"])}
    made = _call(
        _forward_kernel, inputs, outputs, _counts(sources), products=2, interpret=interpret
    )
    return made["out"][:, : queries.shape[1]]


def fused_backward(
    queries: Float[Array, "B q H K"],
    sources: tuple[Source, ...],
    gradient: Float[Array, "B q H K"],
    interpret: bool = False,
) -> tuple[Float[Array, "B q H K"], tuple[KeysValues, ...]]:
    """Computes the gradients of the queries, and of every source's keys and values.

    Those of shared keys and values are float32 sums over the rows.

    Args:
        gradient: that of the result of `fused_forward`.
    """
    inputs = _inputs(queries, sources) | {"gradient": _padded(gradient.astype(queries.dtype))}
    batch, count, heads, _ = inputs["queries"].shape
    per_query = jax.ShapeDtypeStruct((batch, heads, count), jnp.float32)
    sums = dict.fromkeys(("top", "total", "mean"), per_query)
    outputs = {"queries": _shape(inputs["queries"]), **sums}
    counts = _counts(sources)
    made = _call(_queries_kernel, inputs, outputs, counts, products=5, interpret=interpret)
    of_sources = []
    for source, block, own in zip(sources, inputs["sources"], counts, strict=True):
        dtype = jnp.float32 if source.is_shared else block.keys.dtype
        shape = jax.ShapeDtypeStruct((batch, *block.keys.shape[1:]), dtype)
        of_one = inputs | {"sources": (block,)} | {name: made[name] for name in sums}
        made_of_keys = _call(
            _keys_kernel,
            of_one,
            {"keys": shape, "values": shape},
            [own],
            products=4,
            interpret=interpret,
            by_keys=True,
        )
        pair = (made_of_keys[name][:, :own] for name in ("keys", "values"))
        of_sources.append(tuple(x.sum(0) if source.is_shared else x for x in pair))
    return made["queries"][:, : queries.shape[1]], tuple(of_sources)


class _Block(NamedTuple):
    """A `Source` as the kernels read it, padded to whole blocks of queries and keys.

    Attributes:
        keys, values: [#B, k, H, K].
        bias: as in `Source`.
        keep: [B, H, k].
        ids: int32 [B, k].
        query_ids: int32 [B, q].
    """

    keys: Any
    values: Any
    bias: Any
    keep: Any
    ids: Any
    query_ids: Any


def _padded(x: Array, *axes: int) -> Array:
    """`x` with zeros appended, so that these axes (default: 1) are multiples of `_BLOCK`."""
    widths = [(0, -n % _BLOCK if axis in (axes or (1,)) else 0) for axis, n in enumerate(x.shape)]
    return jnp.pad(x, widths)


def _inputs(queries: Array, sources: tuple[Source, ...]) -> Tree:
    """What all kernels read, keys and values in the queries' dtype."""
    blocks = []
    for source in sources:
        keys, values = (
            _padded((x[None] if source.is_shared else x).astype(queries.dtype)) for x in source[:2]
        )
        bias = None if source.bias is None else _padded(source.bias, 2, 3)
        keep = None if source.keep is None else _padded(source.keep[:, :, 0], 2)
        ids = jax.tree.map(_padded, source.mask[:2])
        blocks.append(_Block(keys, values, bias, keep, *ids))
    return {"queries": _padded(queries), "sources": tuple(blocks)}


def _counts(sources: tuple[Source, ...]) -> list[int]:
    return [source.keys.shape[-3] for source in sources]


def _shape(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _call(
    kernel: Callable[..., None],
    inputs: Tree,
    outputs: Tree,
    counts: list[int],
    *,
    products: int,
    interpret: bool,
    by_keys: bool = False,
) -> Tree:
    """Runs a kernel once per row, head and block of queries (of keys, with `by_keys`).

    Args:
        counts: the number of keys of every source, without padding.
        products: the number of its matrix products, of 2 q k K FLOPs each.
    """
    batch, queries, heads, head_dim = inputs["queries"].shape
    keys = [block.keys.shape[1] for block in inputs["sources"]]

    def spec(x: Tree, axes: str) -> pl.BlockSpec:
        """`axes` has a letter per axis: b row, h head, q queries, k keys, "." the head's width."""
        blocked = "k" if by_keys else "q"
        shape = tuple(
            None if axis in "bh" else _BLOCK if axis == blocked else size
            for axis, size in zip(axes, x.shape, strict=True)
        )

        def place(block: Tree, row: Tree, head: Tree) -> Tree:
            at = {"b": 0 if len(x) == 1 else row, "h": head, blocked: block}
            return tuple(at.get(axis, 0) for axis in axes)

        return pl.BlockSpec(shape, place)

    of_block = _Block("bkh.", "bkh.", "bhqk", "bhk", "bk", "bq")
    axes = {"queries": "bqh.", "gradient": "bqh."} | dict.fromkeys(("top", "total", "mean"), "bhq")
    arrays = {name: x for name, x in inputs.items() if name in axes}
    in_specs: Tree = {name: spec(x, axes[name]) for name, x in arrays.items()}
    in_specs["sources"] = [
        _Block(*(None if x is None else spec(x, y) for x, y in zip(block, of_block, strict=True)))
        for block in inputs["sources"]
    ]
    of_outputs = axes | {"out": "bqh.", "keys": "bkh.", "values": "bkh."}
    size = batch * heads * queries * sum(keys)
    flops = 2 * products * size * head_dim
    call = pl.pallas_call(
        functools.partial(kernel, counts=counts),
        grid=((keys[0] if by_keys else queries) // _BLOCK, batch, heads),
        in_specs=[in_specs],
        out_specs={name: spec(x, of_outputs[name]) for name, x in outputs.items()},
        out_shape=outputs,
        compiler_params=plgpu.CompilerParams(num_warps=4 if head_dim <= 64 else 8, num_stages=2),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=size, bytes_accessed=0),
        interpret=interpret,
    )
    # XLA drops the estimate when it compiles for a GPU, so `planning.kernels` reads the FLOPs from
    # this scope's name: under `vmap`, as for a sweep, those of one member.
    with jax.named_scope(f"flops={flops}"):
        return call(arrays | {"sources": list(inputs["sources"])})


def _logits(refs: Tree, source: _Block, count: int, rows: Tree, keys: Tree, first: Tree) -> Array:
    """The float32 logits [q, k] of a block.

    Args:
        rows, keys: the indices of its queries and keys in the refs.
        first: the index of its first key in the source.
    """
    x = plgpu.dot(refs["queries"][rows, :], source.keys[keys, :].T)
    if source.bias is not None:
        x += source.bias[rows, keys].astype(jnp.float32)
    if source.ids is not None:
        ids = source.ids[keys][None, :]
        packed = source.query_ids is not None
        seen = source.query_ids[rows][:, None] == ids if packed else ids != PADDING_SEGMENT
        x += jnp.where(seen, 0.0, MASKED)
    if count % _BLOCK:
        x -= jnp.where(first + jnp.arange(_BLOCK) < count, 0.0, _BEYOND)[None, :]
    return x


def _dropped(x: Array, source: _Block, keys: Tree) -> Array:
    return x if source.keep is None else x * source.keep[keys][None, :]


def _over_keys(refs: Tree, counts: list[int], step: Callable[..., Tree], carry: Tree) -> Tree:
    """Folds `step(source, keys, logits, carry)` over all blocks of all sources' keys."""
    for source, count in zip(refs["sources"], counts, strict=True):

        def body(i: Tree, carry: Tree, source: Tree = source, count: int = count) -> Tree:
            keys = pl.ds(i * _BLOCK, _BLOCK)
            x = _logits(refs, source, count, slice(None), keys, i * _BLOCK)
            return step(source, keys, x, carry)

        carry = jax.lax.fori_loop(0, pl.cdiv(count, _BLOCK), body, carry)
    return carry


class _Softmax(NamedTuple):
    """The softmax of the keys so far.

    Attributes:
        top, total: float32 [q], the largest logit and the sum of exp(logit - top).
        summed: float32 [q, ..], what the weights, before the division by `total`, add up.
    """

    top: Array
    total: Array
    summed: Array

    @classmethod
    def start(cls, *shape: int) -> _Softmax:
        """Returns that of no key, with `summed` of this shape."""
        top = jnp.full(shape[0], -jnp.inf, jnp.float32)
        return cls(top, jnp.zeros(shape[0], jnp.float32), jnp.zeros(shape, jnp.float32))

    def after(self, x: Array, add: Callable[[Array], Array]) -> _Softmax:
        """Returns it after a block with the logits `x`, whose weights `add` maps to a summand."""
        top = jnp.maximum(self.top, x.max(-1))
        shrink, weights = jnp.exp(self.top - top), jnp.exp(x - top[:, None])
        kept = self.summed * shrink.reshape(-1, *[1] * (self.summed.ndim - 1))
        return _Softmax(top, self.total * shrink + weights.sum(-1), kept + add(weights))


def _forward_kernel(refs: Tree, outputs: Tree, *, counts: list[int]) -> None:
    def step(source: _Block, keys: Tree, x: Array, softmax: _Softmax) -> _Softmax:
        values = source.values[keys, :]

        def attended(weights: Array) -> Array:
            return plgpu.dot(_dropped(weights, source, keys).astype(values.dtype), values)

        return softmax.after(x, attended)

    softmax = _over_keys(refs, counts, step, _Softmax.start(*refs["queries"].shape))
    out = softmax.summed / softmax.total[:, None]
    outputs["out"][...] = out.astype(outputs["out"].dtype)


def _queries_kernel(refs: Tree, outputs: Tree, *, counts: list[int]) -> None:
    """The gradient of the queries, and what the kernel of keys and values needs of each of them.

    That is `top` and `total` of its softmax, and `mean`, the mean of its weights' gradients,
    weighted by the weights.
    """
    gradient = refs["gradient"][...]

    def of_weights(source: _Block, keys: Tree) -> Array:
        return _dropped(plgpu.dot(gradient, source.values[keys, :].T), source, keys)

    def add(source: _Block, keys: Tree, x: Array, softmax: _Softmax) -> _Softmax:
        return softmax.after(x, lambda weights: (weights * of_weights(source, keys)).sum(-1))

    top, total, summed = _over_keys(refs, counts, add, _Softmax.start(len(gradient)))
    mean = summed / total

    def step(source: _Block, keys: Tree, x: Array, of_queries: Array) -> Array:
        weights = jnp.exp(x - top[:, None]) / total[:, None]
        of_logits = weights * (of_weights(source, keys) - mean[:, None])
        array = source.keys[keys, :]
        return of_queries + plgpu.dot(of_logits.astype(array.dtype), array)

    nothing = jnp.zeros(gradient.shape, jnp.float32)
    of_queries = _over_keys(refs, counts, step, nothing)
    outputs["queries"][...] = of_queries.astype(outputs["queries"].dtype)
    for name, x in {"top": top, "total": total, "mean": mean}.items():
        outputs[name][...] = x


def _keys_kernel(refs: Tree, outputs: Tree, *, counts: list[int]) -> None:
    """The gradients of a block of a source's keys and values, over all blocks of queries."""
    [source], [count] = refs["sources"], counts
    every, first = slice(None), pl.program_id(0) * _BLOCK

    def step(i: Tree, carry: Tree) -> Tree:
        of_keys, of_values = carry
        rows = pl.ds(i * _BLOCK, _BLOCK)
        query, gradient = refs["queries"][rows, :], refs["gradient"][rows, :]
        x = _logits(refs, source, count, rows, every, first)
        weights = jnp.exp(x - refs["top"][rows][:, None]) / refs["total"][rows][:, None]
        dropped = _dropped(weights, source, every).astype(gradient.dtype)
        of_weights = _dropped(plgpu.dot(gradient, source.values[...].T), source, every)
        of_logits = weights * (of_weights - refs["mean"][rows][:, None])
        of_keys += plgpu.dot(of_logits.astype(query.dtype).T, query)
        return of_keys, of_values + plgpu.dot(dropped.T, gradient)

    nothing = jnp.zeros(source.keys.shape, jnp.float32)
    blocks = refs["queries"].shape[0] // _BLOCK
    of_keys, of_values = jax.lax.fori_loop(0, blocks, step, (nothing, nothing))
    outputs["keys"][...] = of_keys.astype(outputs["keys"].dtype)
    outputs["values"][...] = of_values.astype(outputs["values"].dtype)
