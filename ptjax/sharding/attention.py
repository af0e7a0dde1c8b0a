"""The fused attention on a mesh: each device runs the kernel on its rows and heads."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
from absl import logging
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ptjax.models.attention import AttendFn, Mask, Source, plain_attention
from ptjax.models.fused_attention import fused_backward, fused_forward, vmem_bytes
from ptjax.sharding.arrays import rows_axes, rows_divisor
from ptjax.trees import Tree

Attention = Literal["auto", "plain", "fused"]

_FEWEST_QUERIES = 8
"""Rows of a TPU's registers: fewer queries, as in a step of decoding, would fill them badly."""
_VMEM = 20 * 2**20
"""The largest `vmem_bytes`, of a TPU's 32 MiB or more: T5 with heads of 64 then has up to 1,100
keys. The compiler may need more than the estimate, up to twice as much."""


def choose_attention(attention: Attention, platform: str) -> Literal["plain", "fused"]:
    """Returns the kind of attention; "auto" is "fused" on the platform "tpu", else "plain"."""
    if attention == "auto":
        return "fused" if platform == "tpu" else "plain"
    return attention


def make_attend(attention: str, mesh: Mesh) -> AttendFn:
    """Returns the function for "plain" or "fused" attention; equal arguments give equal ones.

    Args:
        mesh: a `Mesh`, or an `AbstractMesh` of TPUs.
    """
    return FusedAttention(mesh) if attention == "fused" else plain_attention


@dataclasses.dataclass(frozen=True)
class FusedAttention:
    """Attention in one kernel on a TPU, and in Pallas's slow interpreter elsewhere.

    Where it has no advantage or cannot be used, it is `plain_attention`: for the decoder's
    self-attention and steps of decoding, for rows with more than about 1,100 keys, for a batch of
    prompts of which some do not attend to their input, and where the biases are trained.
    """

    mesh: Mesh

    def __call__(
        self, queries: Float[Array, "B q H K"], sources: tuple[Source, ...]
    ) -> Float[Array, "B q H K"]:
        """Computes what `plain_attention` does."""
        if not self._suits(queries, sources):
            return plain_attention(queries, sources)
        return _attend(queries, sources, self.mesh)

    def _suits(self, queries: Array, sources: tuple[Source, ...]) -> bool:
        _, count, heads, head_dim = queries.shape
        keys = [source.keys.shape[-3] for source in sources]
        heads //= self.mesh.shape["model"]
        needed = vmem_bytes(count, keys, heads, head_dim, queries.dtype.itemsize)
        seen = any(source.mask.seen is not None for source in sources)
        return not seen and count >= _FEWEST_QUERIES and needed <= _VMEM


# Outside of shard_map, which has no rule for symbolic zeros.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(queries: Array, sources: tuple[Source, ...], mesh: Mesh) -> Array:
    rows = _rows(queries, mesh)
    of_rows, of_sources = P(rows, None, "model"), tuple(_specs(x, rows) for x in sources)
    attend = functools.partial(fused_forward, interpret=_interpreted(mesh))
    attend = jax.shard_map(
        attend, mesh=mesh, in_specs=(of_rows, of_sources), out_specs=of_rows, check_vma=False
    )
    return attend(queries, sources)


def _forward(queries: Tree, sources: Tree, mesh: Mesh) -> tuple[Array, Tree]:
    trained = any(x.perturbed for source in sources for x in jax.tree.leaves(source.bias))
    queries, sources = jax.tree.map(lambda x: x.value, (queries, sources))
    if not trained:
        return _attend(queries, sources, mesh), (queries, sources)
    message = "the relative position biases are trained: plain attention in place of the fused one"
    logging.log_first_n(logging.INFO, message, 1)
    return jax.vjp(plain_attention, queries, sources)


def _backward(mesh: Mesh, kept: Tree, gradient: Array) -> Tree:
    if not isinstance(kept, tuple):
        return kept(gradient)
    queries, sources = kept
    rows = _rows(queries, mesh)

    def local(queries: Array, sources: tuple[Source, ...], gradient: Array) -> Tree:
        of_queries, pairs = fused_backward(queries, sources, gradient, _interpreted(mesh))
        return of_queries, tuple(
            jax.lax.psum(pair, rows) if source.is_shared and rows else pair
            for source, pair in zip(sources, pairs, strict=True)
        )

    of_rows, of_sources = P(rows, None, "model"), tuple(_specs(x, rows) for x in sources)
    out_specs = of_rows, tuple(x[:2] for x in of_sources)
    in_specs = of_rows, of_sources, of_rows
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    of_queries, pairs = sharded(queries, sources, gradient)
    # The other parts of a source get no gradient.
    nothing: Tree = (None,) * (len(Source._fields) - 2)
    return of_queries, tuple(
        Source(keys.astype(source.keys.dtype), values.astype(source.values.dtype), *nothing)
        for source, (keys, values) in zip(sources, pairs, strict=True)
    )


_attend.defvjp(_forward, _backward, symbolic_zeros=True)


def _interpreted(mesh: Mesh) -> bool:
    return isinstance(mesh, Mesh) and mesh.devices.flat[0].platform != "tpu"


def _rows(queries: Array, mesh: Mesh) -> tuple[str, ...] | None:
    """The mesh axes that divide the rows; a batch of one, such as a prompt alone, is whole."""
    return rows_axes(mesh) if len(queries) % rows_divisor(mesh) == 0 else None


def _specs(source: Source, rows: tuple[str, ...] | None) -> Source:
    """How the arrays of a source are divided: rows over `rows`, heads over `model`."""

    def of(x: Array | None, *spec: str) -> Tree:
        return None if x is None else P(None if len(x) == 1 else rows, *spec)

    pair = P(None, "model") if source.is_shared else P(rows, None, "model")
    mask = Mask(of(source.mask.ids), of(source.mask.query_ids))
    return Source(pair, pair, of(source.bias, "model"), mask, of(source.keep, "model"))
