"""The fused attentions on a mesh: each device runs the kernels on its rows and heads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
from absl import logging
from etils import epy
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ptjax.errors import InputError
from ptjax.models.attention import AttendFn, Mask, Source, plain_attention
from ptjax.sharding.arrays import is_grouped, rows_axes, rows_divisor
from ptjax.trees import Tree

with epy.lazy_imports():  # Pallas
    from ptjax.models import fused_attention, triton_attention

Attention = Literal["auto", "plain", "fused"]
"""What a user chooses."""
Kind = Literal["plain", "fused", "gpu"]
"""What that choice means on a given device."""
Kernels = Literal["tpu", "gpu"]
"""The device for which the Pallas kernels are written."""
Rows = tuple[str, ...] | None
"""The mesh axes that divide the rows."""

_NVIDIA = ("NVIDIA", "Tesla", "Quadro", "GeForce")
"""How JAX's `device_kind` of an NVIDIA GPU begins; that of older ones lacks the maker's name."""
_FEWEST_QUERIES = 8
"""Rows of a TPU's registers: fewer queries, as in a step of decoding, would fill them badly. On a
GPU most of a block would be padding."""
_VMEM = 15 * 2**20
"""The largest `vmem_bytes`: a TPU v4 has 16 MiB. T5 with heads of 64 then has up to 960 keys."""


def choose_attention(
    attention: Attention | Kind, device_kind: str, compute_capability: str | None = None
) -> Kind:
    """Returns the kind of attention; "auto" is "fused" on a TPU from v4 on, else "plain".

    On NVIDIA's GPUs, "fused" is "gpu".

    Args:
        device_kind: JAX's name for the kind of device.
        compute_capability: of an NVIDIA GPU, where it is known.

    Raises:
        InputError: "fused" on a TPU v2 or v3, whose matrix units lack its products, on an NVIDIA
            GPU before Ampere, or on a device that is not a TPU, a CPU or an NVIDIA GPU.
    """
    old = device_kind.startswith(("TPU v2", "TPU v3"))
    if attention == "fused" and old:
        raise InputError(f"ATTENTION = 'fused' needs a TPU from v4 on, not {device_kind}")
    if attention == "auto":
        return "fused" if device_kind.startswith("TPU") and not old else "plain"
    if attention == "fused" and device_kind != "cpu" and not device_kind.startswith("TPU"):
        if not device_kind.startswith(_NVIDIA):
            raise InputError(f"ATTENTION = 'fused' needs a TPU or an NVIDIA GPU, not {device_kind}")
        if compute_capability is not None and float(compute_capability) < 8:
            raise InputError(
                "ATTENTION = 'fused' needs an NVIDIA GPU from Ampere on (compute capability 8.0), "
                f"not {device_kind} ({compute_capability})"
            )
        return "gpu"
    return attention


def make_attend(attention: str, mesh: Mesh) -> AttendFn:
    """Returns the function for a `Kind` of attention; equal arguments give equal functions.

    Args:
        mesh: a `Mesh`, or an `AbstractMesh` of the devices that `attention` is for.
    """
    if attention == "fused":
        return FusedAttention(mesh)
    return GpuAttention(mesh) if attention == "gpu" else plain_attention


@dataclasses.dataclass(frozen=True)
class FusedAttention:
    """Attention in one kernel on a TPU, and in Pallas's slow interpreter elsewhere.

    Where it has no advantage or cannot be used, it is `plain_attention`: for the decoder's
    self-attention and decoding with fewer than eight beams, for rows with more than about 960 keys,
    for a prompt or an input of length 1, for a batch of prompts of which some do not attend to
    their input, and where the biases are trained.
    """

    mesh: Mesh

    def __call__(
        self, queries: Float[Array, "B q H K"], sources: tuple[Source, ...]
    ) -> Float[Array, "B q H K"]:
        """Computes what `plain_attention` does."""
        if queries.shape[1] == 1:
            # Greedy decoding. With one query, the TPU's compiler makes a product and a sum out of a
            # matrix product, and keeps a copy of all layers' keys and values in their layout.
            twice = jnp.repeat(queries, 2, axis=1)
            return plain_attention(twice, sources)[:, :1]
        if not self._suits(queries, sources):
            return plain_attention(queries, sources)
        return _attend(queries, sources, self.mesh, "tpu")

    def _suits(self, queries: Array, sources: tuple[Source, ...]) -> bool:
        _, count, heads, head_dim = queries.shape
        keys = [source.keys.shape[-3] for source in sources]
        heads //= self.mesh.shape["model"]
        needed = fused_attention.vmem_bytes(count, keys, heads, head_dim, queries.dtype.itemsize)
        seen = any(source.mask.seen is not None for source in sources)
        # The TPU's compiler cannot broadcast a single key.
        return not seen and count >= _FEWEST_QUERIES and min(keys) > 1 and needed <= _VMEM


@dataclasses.dataclass(frozen=True)
class GpuAttention:
    """Attention in cuDNN's kernels or in Triton's, on an NVIDIA GPU from Ampere on.

    cuDNN's are for the encoder's self-attention over rows of one example of an even length;
    Triton's for packed rows, shared prompts, prefixes, odd lengths and cross-attention. It is
    `plain_attention` for the decoder's self-attention, for a bank's prompts that do not attend to
    their input, for fewer than eight queries, in other dtypes than bfloat16, for heads of other
    widths than 16, 32, 64 and 128, and instead of Triton's where the biases are trained. cuDNN
    keeps the log-sum-exp and the output for the backward pass, and gives the biases their gradient.

    Attributes:
        implementation: of `jax.nn.dot_product_attention`; "xla" computes the same on any device.
    """

    mesh: Mesh
    implementation: Literal["cudnn", "xla"] = "cudnn"

    def __call__(
        self, queries: Float[Array, "B q H K"], sources: tuple[Source, ...]
    ) -> Float[Array, "B q H K"]:
        """Computes what `plain_attention` does."""
        if not self._suits(queries, sources):
            return plain_attention(queries, sources)
        if not self._suits_cudnn(queries, sources):
            return _attend(queries, sources, self.mesh, "gpu")
        [source] = sources
        values = source.values
        if source.keep is not None:  # one mask for all queries: it may multiply the values instead
            values *= jnp.einsum("bhqk->bkhq", source.keep).astype(values.dtype)
        try:
            return jax.nn.dot_product_attention(
                queries,
                source.keys,
                values,
                bias=source.bias,
                key_value_seq_lengths=source.mask.lengths,
                scale=1.0,
                implementation=self.implementation,
            )
        except RuntimeError as error:  # XLA's own errors are among these
            if not str(error).startswith("cuDNN"):
                raise
            raise InputError(
                f"ATTENTION = 'fused' needs cuDNN on GPUs ({str(error).rstrip('.')}): pip install "
                "nvidia-cudnn-cu13, or set ATTENTION = 'plain'"
            ) from error

    def _suits(self, queries: Array, sources: tuple[Source, ...]) -> bool:
        _, count, _, head_dim = queries.shape
        return (
            (queries.dtype == jnp.bfloat16 or self.implementation == "xla")
            and all(source.mask.seen is None for source in sources)
            and count >= _FEWEST_QUERIES
            and head_dim in (16, 32, 64, 128)
        )

    def _suits_cudnn(self, queries: Array, sources: tuple[Source, ...]) -> bool:
        source, mask = sources[0], sources[0].mask
        return (
            len(sources) == 1
            and (mask.ids is None or mask.lengths is not None)
            and mask.query_ids is None
            and queries.shape[1] % 2 == source.keys.shape[1] % 2 == 0
        )


# Outside of shard_map, which has no rule for symbolic zeros.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attend(queries: Array, sources: tuple[Source, ...], mesh: Mesh, kernels: Kernels) -> Array:
    def attend(rows: Rows, queries: Array, sources: tuple[Source, ...]) -> Array:
        return _module(kernels).fused_forward(queries, sources, _interpreted(mesh))

    return _on_mesh(attend, mesh, lambda rows, *_: P(rows, None, "model"), queries, sources)


def _module(kernels: Kernels) -> ModuleType:
    return fused_attention if kernels == "tpu" else triton_attention


def _forward(queries: Tree, sources: Tree, mesh: Mesh, kernels: Kernels) -> tuple[Array, Tree]:
    trained = any(x.perturbed for source in sources for x in jax.tree.leaves(source.bias))
    queries, sources = jax.tree.map(lambda x: x.value, (queries, sources))
    if not trained:
        return _attend(queries, sources, mesh, kernels), (queries, sources)
    message = "the relative position biases are trained: plain attention in place of the fused one"
    logging.log_first_n(logging.INFO, message, 1)
    return jax.vjp(plain_attention, queries, sources)


def _backward(mesh: Mesh, kernels: Kernels, kept: Tree, gradient: Array) -> Tree:
    if not isinstance(kept, tuple):
        return kept(gradient)
    queries, sources = kept

    def attend(
        rows: Rows, queries: Array, sources: tuple[Source, ...], gradient: Array
    ) -> tuple[Array, Tree]:
        of_queries, pairs = _module(kernels).fused_backward(
            queries, sources, gradient, _interpreted(mesh)
        )
        return of_queries, tuple(
            jax.lax.psum(pair, rows) if source.is_shared and rows else pair
            for source, pair in zip(sources, pairs, strict=True)
        )

    def made(rows: Rows, of_queries: P, of_sources: tuple[Source, ...], _: P) -> Tree:
        return of_queries, tuple(source[:2] for source in of_sources)

    of_queries, pairs = _on_mesh(attend, mesh, made, queries, sources, gradient)
    # The other parts of a source get no gradient.
    nothing: Tree = (None,) * (len(Source._fields) - 2)
    return of_queries, tuple(
        Source(keys.astype(source.keys.dtype), values.astype(source.values.dtype), *nothing)
        for source, (keys, values) in zip(sources, pairs, strict=True)
    )


_attend.defvjp(_forward, _backward, symbolic_zeros=True)


def _on_mesh(
    function: Callable[..., Tree],
    mesh: Mesh,
    out_specs: Callable[..., Tree],
    queries: Array,
    sources: tuple[Source, ...],
    *more: Array,
) -> Tree:
    """Runs `function(rows, queries, sources, *more)` on each device's rows and heads.

    Args:
        out_specs: makes the specs of the results from `rows` and those of the other arguments.
        more: arrays of the queries' shape.
    """

    def run(rows: Rows, batched: Tree, *arrays: Tree) -> Tree:
        """With `batched`, its arrays have an axis in front that `rows_axes` divide."""
        of_rows = P(rows, None, "model")
        specs: Tree = (of_rows, tuple(_specs(x, rows) for x in sources), *[of_rows] * len(more))
        results = out_specs(rows, *specs)
        local = functools.partial(function, rows)
        if batched is not None:
            lead = rows_axes(mesh)
            specs = jax.tree.map(
                lambda spec, has: P(lead, *spec) if has else spec,
                specs,
                batched,
                is_leaf=lambda x: isinstance(x, P),
            )
            results = jax.tree.map(
                lambda spec: P(lead, *spec), results, is_leaf=lambda x: isinstance(x, P)
            )
            local = functools.partial(_of_group, local, batched)
        sharded = jax.shard_map(
            local, mesh=mesh, in_specs=specs, out_specs=results, check_vma=False
        )
        return sharded(*arrays)

    # A batch of one, such as a prompt alone, is not divided.
    rows = rows_axes(mesh) if len(queries) % rows_divisor(mesh) == 0 else None
    grouped = is_grouped()
    call = jax.custom_batching.custom_vmap(functools.partial(run, rows, None))

    @call.def_vmap
    def _(size: int, batched: Tree, *arrays: Tree) -> tuple[Tree, Tree]:
        batched = tuple(batched)
        # A step's groups of rows lie on a device each (`make_train_step`): no array moves.
        if grouped and size == rows_divisor(mesh) > 1 and batched[0]:
            made = run(None, batched, *arrays)
        else:
            axes = jax.tree.map(lambda has: 0 if has else None, batched)
            made = jax.vmap(functools.partial(run, rows, None), axes)(*arrays)
        return made, jax.tree.map(lambda _: True, made)

    return call(queries, sources, *more)


def _of_group(function: Callable[..., Tree], batched: Tree, *arrays: Tree) -> Tree:
    """`function` for a device's group: the axis in front, of one, goes and comes back."""
    arrays = jax.tree.map(lambda x, has: x[0] if has else x, arrays, batched)
    return jax.tree.map(lambda x: x[None], function(*arrays))


def _interpreted(mesh: Mesh) -> bool:
    return isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"


def _specs(source: Source, rows: Rows) -> Source:
    """How the arrays of a source are divided: rows over `rows`, heads over `model`."""

    def of(x: Array | None, *spec: str) -> Tree:
        return None if x is None else P(None if len(x) == 1 else rows, *spec)

    pair = P(None, "model") if source.is_shared else P(rows, None, "model")
    mask = Mask(of(source.mask.ids), of(source.mask.query_ids), lengths=of(source.mask.lengths))
    return Source(pair, pair, of(source.bias, "model"), mask, of(source.keep, "model"))
