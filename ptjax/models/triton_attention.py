"""Attention in Triton kernels, for a frozen T5 on an NVIDIA GPU: no array [B, H, q, k] in memory.

For what cuDNN's attention lacks, such as packed rows and the keys that all rows of a batch share.
As in `fused_attention`, the bias is frozen, and the backward pass starts from queries, keys and
values alone. Rows of keys do not fit a GPU's shared memory: the softmax is that of FlashAttention,
over one block of keys after the other (Dao et al. 2022, algorithm 1).

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
"""The queries, and the keys, of a block."""
_PADDED = 1e30
"""Taken from the logits of keys that only fill a block: far more than a mask takes."""


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
    inputs = _inputs(queries, sources) | {"gradient": _filled(gradient.astype(queries.dtype))}
    batch, count, heads, _ = inputs["queries"].shape
    per_query = jax.ShapeDtypeStruct((batch, heads, count), jnp.float32)
    outputs = {"queries": _shape(inputs["queries"]), "top": per_query, "mean": per_query}
    counts = _counts(sources)
    made = _call(_queries_kernel, inputs, outputs, counts, products=5, interpret=interpret)
    of_sources = []
    for source, block, own in zip(sources, inputs["sources"], counts, strict=True):
        dtype = jnp.float32 if source.is_shared else block.keys.dtype
        shape = jax.ShapeDtypeStruct((batch, *block.keys.shape[1:]), dtype)
        of_one = inputs | {"sources": (block,), "top": made["top"], "mean": made["mean"]}
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
    """A `Source` as the kernels read it, filled up to whole blocks of queries and keys.

    Attributes:
        keys, values: [#B, k, H, K].
        bias: as in `Source`.
        keep: [B, H, k].
        ids: int32 [B, k].
    """

    keys: Any
    values: Any
    bias: Any
    keep: Any
    ids: Any


def _filled(x: Array, *axes: int) -> Array:
    """`x` with zeros behind it, so that blocks divide these axes (by default the first after B)."""
    widths = [(0, -n % _BLOCK if axis in (axes or (1,)) else 0) for axis, n in enumerate(x.shape)]
    return jnp.pad(x, widths)


def _inputs(queries: Array, sources: tuple[Source, ...]) -> Tree:
    """What all kernels read, keys and values in the queries' dtype."""
    blocks, query_ids = [], None
    for source in sources:
        keys, values = (
            _filled((x[None] if source.is_shared else x).astype(queries.dtype)) for x in source[:2]
        )
        bias = None if source.bias is None else _filled(source.bias, 2, 3)
        keep = None if source.keep is None else _filled(source.keep[:, :, 0], 2)
        ids = None if source.mask.ids is None else _filled(source.mask.ids)
        blocks.append(_Block(keys, values, bias, keep, ids))
        if source.mask.query_ids is not None:
            query_ids = _filled(source.mask.query_ids)
    return {"queries": _filled(queries), "sources": tuple(blocks), "query_ids": query_ids}


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
    """Runs a kernel for every head of every row, and every block of queries (of keys: `by_keys`).

    Args:
        counts: the keys of every source, without the filling.
        products: how many products [q, k] x K it computes.
    """
    batch, queries, heads, head_dim = inputs["queries"].shape
    keys = [block.keys.shape[1] for block in inputs["sources"]]

    def spec(x: Tree, axes: str) -> pl.BlockSpec:
        """`axes`: a letter for every axis: of the row, the head, or queries, keys or all of it."""
        blocked = "k" if by_keys else "q"
        shape = tuple(
            None if axis in "bh" else _BLOCK if axis == blocked else size
            for axis, size in zip(axes, x.shape, strict=True)
        )

        def place(block: Tree, row: Tree, head: Tree) -> Tree:
            at = {"b": 0 if len(x) == 1 else row, "h": head, blocked: block}
            return tuple(at.get(axis, 0) for axis in axes)

        return pl.BlockSpec(shape, place)

    of_block = _Block("bkh.", "bkh.", "bhqk", "bhk", "bk")
    axes = {"queries": "bqh.", "gradient": "bqh.", "query_ids": "bq", "top": "bhq", "mean": "bhq"}
    arrays = {name: x for name, x in inputs.items() if name in axes and x is not None}
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
    # Compiled for a GPU, the estimate is lost: `planning.kernels` reads the scope's name.
    with jax.named_scope(f"flops={flops}"):
        return call(arrays | {"sources": list(inputs["sources"])})


def _logits(refs: Tree, source: _Block, count: int, rows: Tree, keys: Tree, first: Tree) -> Array:
    """The float32 logits [q, k] of a block.

    Args:
        rows, keys: where its queries and keys lie in the references.
        first: the number of its first key.
    """
    x = plgpu.dot(refs["queries"][rows, :], source.keys[keys, :].T)
    if source.bias is not None:
        x += source.bias[rows, keys].astype(jnp.float32)
    if source.ids is not None:
        ids = source.ids[keys][None, :]
        packed = "query_ids" in refs
        seen = refs["query_ids"][rows][:, None] == ids if packed else ids != PADDING_SEGMENT
        x += jnp.where(seen, 0.0, MASKED)
    if count % _BLOCK:
        x -= jnp.where(first + jnp.arange(_BLOCK) < count, 0.0, _PADDED)[None, :]
    return x


def _dropped(x: Array, source: _Block, keys: Tree) -> Array:
    return x if source.keep is None else x * source.keep[keys][None, :]


def _over_keys(refs: Tree, counts: list[int], step: Callable[..., Tree], carry: Tree) -> Tree:
    """`carry` after `step(source, keys, logits, carry)` of every block of every source's keys."""
    for source, count in zip(refs["sources"], counts, strict=True):

        def body(i: Tree, carry: Tree, source: Tree = source, count: int = count) -> Tree:
            keys = pl.ds(i * _BLOCK, _BLOCK)
            x = _logits(refs, source, count, slice(None), keys, i * _BLOCK)
            return step(source, keys, x, carry)

        carry = jax.lax.fori_loop(0, pl.cdiv(count, _BLOCK), body, carry)
    return carry


def _start(refs: Tree) -> tuple[Array, Array]:
    """The largest logit and the sum of weights of no key."""
    count = refs["queries"].shape[0]
    return jnp.full(count, -jnp.inf, jnp.float32), jnp.zeros(count, jnp.float32)


def _forward_kernel(refs: Tree, outputs: Tree, *, counts: list[int]) -> None:
    def step(source: _Block, keys: Tree, x: Array, carry: Tree) -> Tree:
        top, total, attended = carry
        new = jnp.maximum(top, x.max(-1))
        shrink, weights = jnp.exp(top - new), jnp.exp(x - new[:, None])
        values = source.values[keys, :]
        dropped = _dropped(weights, source, keys).astype(values.dtype)
        attended = attended * shrink[:, None] + plgpu.dot(dropped, values)
        return new, total * shrink + weights.sum(-1), attended

    nothing = jnp.zeros(refs["queries"].shape, jnp.float32)
    _, total, attended = _over_keys(refs, counts, step, (*_start(refs), nothing))
    outputs["out"][...] = (attended / total[:, None]).astype(outputs["out"].dtype)


def _queries_kernel(refs: Tree, outputs: Tree, *, counts: list[int]) -> None:
    """The gradient of the queries.

    Also `top`, the logarithm of the sum of a query's weights, and `mean`, that of its weights'
    gradients: the kernel of keys and values needs them.
    """
    gradient = refs["gradient"][...]

    def of_weights(source: _Block, keys: Tree) -> Array:
        return _dropped(plgpu.dot(gradient, source.values[keys, :].T), source, keys)

    def sums(source: _Block, keys: Tree, x: Array, carry: Tree) -> Tree:
        top, total, weighted = carry
        new = jnp.maximum(top, x.max(-1))
        shrink, weights = jnp.exp(top - new), jnp.exp(x - new[:, None])
        weighted = weighted * shrink + (weights * of_weights(source, keys)).sum(-1)
        return new, total * shrink + weights.sum(-1), weighted

    top, total, weighted = _over_keys(refs, counts, sums, (*_start(refs), _start(refs)[1]))
    top, mean = top + jnp.log(total), weighted / total

    def step(source: _Block, keys: Tree, x: Array, of_queries: Array) -> Array:
        of_logits = jnp.exp(x - top[:, None]) * (of_weights(source, keys) - mean[:, None])
        array = source.keys[keys, :]
        return of_queries + plgpu.dot(of_logits.astype(array.dtype), array)

    nothing = jnp.zeros(refs["queries"].shape, jnp.float32)
    of_queries = _over_keys(refs, counts, step, nothing)
    outputs["queries"][...] = of_queries.astype(outputs["queries"].dtype)
    outputs["top"][...], outputs["mean"][...] = top, mean


def _keys_kernel(refs: Tree, outputs: Tree, *, counts: list[int]) -> None:
    """The gradients of a block of a source's keys and values, over all blocks of queries."""
    [source], [count] = refs["sources"], counts
    every, first = slice(None), pl.program_id(0) * _BLOCK

    def step(i: Tree, carry: Tree) -> Tree:
        of_keys, of_values = carry
        rows = pl.ds(i * _BLOCK, _BLOCK)
        query, gradient = refs["queries"][rows, :], refs["gradient"][rows, :]
        x = _logits(refs, source, count, rows, every, first)
        weights = jnp.exp(x - refs["top"][rows][:, None])
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
