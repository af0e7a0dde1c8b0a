"""Attention in one kernel, for a frozen T5 on a TPU: no array [.., q, k] reaches memory.

T5's attention adds a learned bias to its logits. The flash attentions of JAX's own libraries refuse
a bias, or write its gradient, an array [B, H, q, k]. A frozen backbone needs no such gradient, and
a T5's rows are short: whole rows of keys fit the TPU's vector memory (VMEM). So one pass computes
the softmax, and the backward pass computes it again from queries, keys and values alone. Neither
the output nor the logarithms of its sums are kept.

Letters: B batch, q queries, k keys, P prompt length, H heads, K head width, J = H * K.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ptjax.data.batch import PADDING_SEGMENT
from ptjax.models.attention import MASKED, Source
from ptjax.models.prefix import KeysValues
from ptjax.trees import Tree

_LANES = 128
_QUERIES = 128
"""The queries of a block: their logits are in VMEM at the same time."""


def fused_forward(
    queries: Float[Array, "B q H K"], sources: tuple[Source, ...], interpret: bool = False
) -> Float[Array, "B q H K"]:
    """Computes `plain_attention`; logits and softmax are float32 whatever the queries' dtype.

    Args:
        sources: as for `plain_attention`; their masks have no `seen`.
        interpret: as for `pallas_call`: True runs the kernel on a device that is not a TPU.
    """
    inputs = _inputs(queries, sources)
    outputs = {"out": _shape(inputs["queries"])}
    made = _call(_forward_kernel, inputs, outputs, queries.shape[2], interpret)
    return made["out"].reshape(queries.shape)


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
    inputs = _inputs(queries, sources) | {"gradient": _join(gradient.astype(queries.dtype))}
    of_sources = tuple(
        (_shape(block.keys, jnp.float32 if source.is_shared else None),) * 2
        for source, block in zip(sources, inputs["sources"], strict=True)
    )
    outputs = {"queries": _shape(inputs["queries"]), "sources": of_sources}
    made = _call(_backward_kernel, inputs, outputs, queries.shape[2], interpret)
    of_sources = tuple(
        (keys.reshape(source.keys.shape), values.reshape(source.keys.shape))
        for source, (keys, values) in zip(sources, made["sources"], strict=True)
    )
    return made["queries"].reshape(queries.shape), of_sources


def vmem_bytes(
    queries: int, keys: Sequence[int], num_heads: int, head_dim: int, itemsize: int
) -> int:
    """Estimates the VMEM that the backward kernel, the larger one, needs.

    Args:
        keys: k of every source.
        num_heads, head_dim: H on a device, and K.
        itemsize: bytes of an entry of the queries.
    """
    heads = _heads_of_block(num_heads, head_dim)
    lanes = max(heads * head_dim, _LANES)
    total = sum(keys)
    blocks = lanes * (3 * queries + 4 * total) + heads * queries * total  # and the bias
    sums = 2 * heads * total * max(head_dim, _LANES) * 4
    logits = 6 * min(queries, _QUERIES) * total * 4
    return 2 * blocks * itemsize + sums + logits


class _Block(NamedTuple):
    """A `Source` as the kernels read it.

    Attributes:
        keys, values: [#B, k, J].
        bias, keep: as in `Source`.
        ids: int32 [B, 1, k].
    """

    keys: Any
    values: Any
    bias: Any
    keep: Any
    ids: Any


def _inputs(queries: Array, sources: tuple[Source, ...]) -> Tree:
    """What both kernels read: heads joined, keys and values in the queries' dtype."""
    blocks, query_ids = [], None
    for source in sources:
        keys, values = (
            _join(x[None] if source.is_shared else x).astype(queries.dtype) for x in source[:2]
        )
        ids = None if source.mask.ids is None else source.mask.ids[:, None]
        blocks.append(_Block(keys, values, source.bias, source.keep, ids))
        if source.mask.query_ids is not None:
            query_ids = source.mask.query_ids[:, :, None]
    return {"queries": _join(queries), "sources": tuple(blocks), "query_ids": query_ids}


def _join(x: Array) -> Array:
    return x.reshape(*x.shape[:2], -1)


def _shape(x: Array, dtype: DTypeLike | None = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype)


def _heads_of_block(num_heads: int, head_dim: int) -> int:
    """The heads that a kernel takes at once: as many as fill the lanes, if they divide H."""
    heads = max(_LANES // head_dim, 1)
    filled = num_heads % heads == 0 and heads * head_dim % _LANES == 0
    return heads if filled else num_heads


def _call(
    kernel: Callable[..., None], inputs: Tree, outputs: Tree, num_heads: int, interpret: bool
) -> Tree:
    """Runs a kernel for every block of heads and every row, the rows of a block in sequence.

    So the biases, which all rows share, are read once for a block of heads.
    """
    batch, queries, joined = inputs["queries"].shape
    head_dim = joined // num_heads
    heads = _heads_of_block(num_heads, head_dim)
    blocks = inputs["sources"]
    lengths = [block.keys.shape[1] for block in blocks]
    backward = "gradient" in inputs

    def row_of(x: Tree, row: Tree) -> Tree:
        return 0 if len(x) == 1 else row

    def joined_heads(x: Tree) -> pl.BlockSpec:
        shape = (1, x.shape[1], heads * head_dim)
        return pl.BlockSpec(shape, lambda block, row: (row_of(x, row), 0, block))

    def by_head(x: Tree) -> pl.BlockSpec:
        shape = (1, heads, *x.shape[2:])
        return pl.BlockSpec(shape, lambda block, row: (row_of(x, row), block, 0, 0))

    def ids(x: Tree) -> pl.BlockSpec:
        return pl.BlockSpec((1, *x.shape[1:]), lambda block, row: (row_of(x, row), 0, 0))

    of_block = _Block(joined_heads, joined_heads, by_head, by_head, ids)
    of_blocks = tuple(
        _Block(*(jax.tree.map(spec, x) for spec, x in zip(of_block, block, strict=True)))
        for block in blocks
    )
    in_specs = jax.tree.map(joined_heads, inputs | {"query_ids": None, "sources": None})
    in_specs |= {"query_ids": jax.tree.map(ids, inputs["query_ids"]), "sources": of_blocks}
    itemsize = inputs["queries"].dtype.itemsize
    return pl.pallas_call(
        functools.partial(
            kernel,
            head_lanes=[slice(h * head_dim, (h + 1) * head_dim) for h in range(heads)],
            shared=[len(block.keys) == 1 for block in blocks],
        ),
        grid=(num_heads // heads, batch),
        in_specs=[in_specs],
        out_specs=jax.tree.map(joined_heads, outputs),
        out_shape=outputs,
        scratch_shapes=[
            [pltpu.VMEM((heads, length, head_dim), jnp.float32)] * 2
            for length in lengths * backward
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=2 * vmem_bytes(queries, lengths, num_heads, head_dim, itemsize),
        ),
        cost_estimate=pl.CostEstimate(
            flops=(5 if backward else 2) * 2 * batch * queries * sum(lengths) * joined,
            transcendentals=batch * num_heads * queries * sum(lengths),
            bytes_accessed=sum(
                math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((inputs, outputs))
            ),
        ),
        interpret=interpret,
    )(inputs)


def _blocks(refs: Tree, head_lanes: list[slice]) -> Iterator[tuple[slice, int, slice]]:
    """(queries, head, its lanes) of every step of a kernel's loop."""
    count = refs["queries"].shape[1]
    for start in range(0, count, _QUERIES):
        for head, lanes in enumerate(head_lanes):
            yield slice(start, min(start + _QUERIES, count)), head, lanes


def _weights(refs: Tree, rows: slice, head: int, lanes: slice) -> list[Array]:
    """The attention weights of queries, float32 [q, k] for each source."""
    logits = []
    for source in refs["sources"]:
        x = _dot(refs["queries"][0, rows, lanes], source.keys[0, :, lanes], 1, 1)
        if source.bias is not None:
            x += source.bias[0, head, rows, :].astype(jnp.float32)
        if source.ids is not None:
            ids, query_ids = source.ids[0], refs["query_ids"]
            seen = ids != PADDING_SEGMENT if query_ids is None else query_ids[0, rows, :] == ids
            x += jnp.where(seen, 0.0, MASKED)
        logits.append(x)
    top = functools.reduce(jnp.maximum, (x.max(-1, keepdims=True) for x in logits))
    weights = [jnp.exp(x - top) for x in logits]
    total = sum(x.sum(-1, keepdims=True) for x in weights)
    return [x / total for x in weights]


def _dot(left: Array, right: Array, of_left: int, of_right: int) -> Array:
    """The float32 product of two matrices, contracted over these axes."""
    contracted = ((of_left,), (of_right,)), ((), ())
    return jax.lax.dot_general(left, right, contracted, preferred_element_type=jnp.float32)


def _dropped(x: Array, source: _Block, head: int) -> Array:
    return x if source.keep is None else x * source.keep[0, head]


def _forward_kernel(refs: Tree, outputs: Tree, *, head_lanes: list[slice], shared: Tree) -> None:
    for rows, head, lanes in _blocks(refs, head_lanes):
        attended: Tree = 0.0
        for source, weights in zip(refs["sources"], _weights(refs, rows, head, lanes), strict=True):
            values = source.values[0, :, lanes]
            attended += _dot(_dropped(weights, source, head).astype(values.dtype), values, 1, 0)
        outputs["out"][0, rows, lanes] = attended.astype(outputs["out"].dtype)


def _backward_kernel(
    refs: Tree, outputs: Tree, *sums: Tree, head_lanes: list[slice], shared: list[bool]
) -> None:
    """Also adds up, in float32, the gradients of keys and values over blocks of queries.

    Those of shared ones add up over the rows too.
    """
    sources = refs["sources"]
    for arrays, of_all in zip(sums, shared, strict=True):

        @pl.when(pl.program_id(1) == 0 if of_all else True)
        def _(arrays: Tree = arrays) -> None:
            for array in arrays:
                array[...] = jnp.zeros(array.shape, array.dtype)

    for rows, head, lanes in _blocks(refs, head_lanes):
        weights = _weights(refs, rows, head, lanes)
        query, gradient = (refs[name][0, rows, lanes] for name in ("queries", "gradient"))
        of_weights = [
            _dropped(_dot(gradient, source.values[0, :, lanes], 1, 1), source, head)
            for source in sources
        ]
        mean = sum(
            (x * of_x).sum(-1, keepdims=True) for x, of_x in zip(weights, of_weights, strict=True)
        )
        of_query: Tree = 0.0
        for source, x, of_x, (of_keys, of_values) in zip(
            sources, weights, of_weights, sums, strict=True
        ):
            of_logits = (x * (of_x - mean)).astype(query.dtype)
            of_query += _dot(of_logits, source.keys[0, :, lanes], 1, 0)
            of_keys[head] += _dot(of_logits, query, 0, 0)
            of_values[head] += _dot(_dropped(x, source, head).astype(query.dtype), gradient, 0, 0)
        outputs["queries"][0, rows, lanes] = of_query.astype(query.dtype)
    for arrays, results in zip(sums, outputs["sources"], strict=True):
        for array, result in zip(arrays, results, strict=True):
            for head, lanes in enumerate(head_lanes):
                result[0, :, lanes] = array[head].astype(result.dtype)
