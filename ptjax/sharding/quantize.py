"""Frozen kernels in int8, with a scale per output channel."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ptjax.models.family import Config, Family
from ptjax.models.quantized import Quantized
from ptjax.models.t5_family import T5_FAMILY
from ptjax.sharding.rules import sharding_of
from ptjax.trees import Tree, flatten_paths, unflatten_paths

LARGEST = 127
"""-128 is not used, so that the range is symmetric."""


def weight_shapes(
    config: Config, dtype: str, quantize: str | None = None, *, family: Family = T5_FAMILY
) -> Tree:
    """The shapes and dtypes of the frozen weights, as a tree of `jax.ShapeDtypeStruct`s.

    Leaves out the scales of quantized kernels, which add only about 0.1% to the bytes.

    Args:
        dtype: the dtype of the weights that are not quantized.
        quantize: the dtype of the quantized kernels, "int8"; None if no kernels are quantized.
    """

    def with_dtype(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            leaf.shape, quantize if quantize and family.is_quantized(path) else dtype
        )

    shapes = flatten_paths(family.parameter_shapes(config))
    return unflatten_paths({path: with_dtype(path, leaf) for path, leaf in shapes.items()})


def sharded_shapes(
    config: Config,
    dtype: str,
    mesh: Mesh,
    *,
    fsdp: bool = False,
    quantize: str | None = None,
    family: Family = T5_FAMILY,
) -> Tree:
    """The shapes, dtypes and shardings of the parameters as `load_backbone` puts them on `mesh`.

    Returns a tree of `jax.ShapeDtypeStruct`s; a quantized kernel is a `Quantized` of two of them.
    The arguments are those of `load_backbone`.
    """

    def sharded(path: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct | Quantized:
        rules = family.sharding_rules
        sharding = sharding_of(f"params/{path}", shape, mesh, fsdp=fsdp, rules=rules)
        if not (quantize and family.is_quantized(path)):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        shardings = _quantized_shardings(sharding, len(shape))
        scale = (*shape[:-2], 1, shape[-1])
        return Quantized(
            jax.ShapeDtypeStruct(shape, quantize, sharding=shardings.values),
            jax.ShapeDtypeStruct(scale, "float32", sharding=shardings.scale),
        )

    shapes = flatten_paths(family.parameter_shapes(config))
    return unflatten_paths({path: sharded(path, leaf.shape) for path, leaf in shapes.items()})


@jax.jit
def quantize(kernel: Float[Array, "*L i o"]) -> Quantized:
    """Rounds a kernel [..., input, output] to int8, with a float32 scale per output channel.

    The scale is the channel's largest magnitude / 127, or 1 if all its values are 0. int8 cannot
    hold NaN or infinity: a channel with one gets it as its scale.
    """
    kernel = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(kernel), axis=-2, keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest / LARGEST)
    return Quantized(jnp.round(kernel / scale).astype(jnp.int8), scale)


def dequantize(kernel: Quantized) -> Float[Array, "*L i o"]:
    """Returns the kernel in float32; its rounding error is at most half of its channel's scale."""
    return kernel.values.astype(jnp.float32) * kernel.scale


def quantize_sharded(kernel: jax.Array) -> Quantized:
    """Quantizes a kernel on a mesh, like `quantize`.

    The values keep the kernel's sharding. The scales are sharded like the kernel's output channels,
    but never over the mesh axis `data`.
    """
    sharding = kernel.sharding
    assert isinstance(sharding, NamedSharding)
    return _compiled(_quantized_shardings(sharding, kernel.ndim))(kernel)


def _quantized_shardings(kernel: NamedSharding, rank: int) -> Quantized:
    """The shardings of a quantized kernel; `data` never divides scales, as FSDP gathers none."""
    *lead, _, channels = [*kernel.spec, *[None] * (rank - len(kernel.spec))]
    channels = None if channels in ("data", ("data",)) else channels
    return Quantized(kernel, NamedSharding(kernel.mesh, P(*lead, None, channels)))


@functools.cache
def _compiled(shardings: Quantized):
    return jax.jit(quantize, out_shardings=shardings)
