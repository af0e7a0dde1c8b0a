"""Frozen kernels in int8, with a scale for every output channel."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ptjax.models.family import Config, Family
from ptjax.models.layers import Quantized
from ptjax.models.t5_family import T5_FAMILY
from ptjax.sharding.rules import sharding_of
from ptjax.trees import flatten_paths, unflatten_paths

LARGEST = 127
"""-128 is left out, so that rounding is the same on both sides of zero."""


def weight_shapes(
    config: Config, dtype: str, quantize: str | None = None, *, family: Family = T5_FAMILY
) -> dict[str, Any]:
    """The parameters as `jax.ShapeDtypeStruct`s of the dtype in which they are held.

    Scales are left out: they add a thousandth.
    """

    def held(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            leaf.shape, quantize if quantize and family.is_quantized(path) else dtype
        )

    shapes = flatten_paths(family.parameter_shapes(config))
    return unflatten_paths({path: held(path, leaf) for path, leaf in shapes.items()})


def sharded_shapes(
    config: Config,
    dtype: str,
    mesh: Mesh,
    *,
    fsdp: bool = False,
    quantize: str | None = None,
    family: Family = T5_FAMILY,
) -> dict[str, Any]:
    """The parameters as `load_backbone` would hold them on `mesh`: shapes with shardings."""

    def placed(path: str, shape: tuple[int, ...]) -> Any:
        rules = family.sharding_rules
        where = sharding_of(f"params/{path}", shape, mesh, fsdp=fsdp, rules=rules)
        if not (quantize and family.is_quantized(path)):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=where)
        places = _places(where, len(shape))
        scale = (*shape[:-2], 1, shape[-1])
        return Quantized(
            jax.ShapeDtypeStruct(shape, quantize, sharding=places.values),
            jax.ShapeDtypeStruct(scale, "float32", sharding=places.scale),
        )

    shapes = flatten_paths(family.parameter_shapes(config))
    return unflatten_paths({path: placed(path, leaf.shape) for path, leaf in shapes.items()})


@jax.jit
def quantize(kernel: Float[Array, "*L i o"]) -> Quantized:
    """Symmetric, by the largest absolute value of a channel; one of zeros has the scale 1.

    A channel with a NaN or an infinity has it as its scale: int8 could not hold it.
    """
    kernel = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(kernel), axis=-2, keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest / LARGEST)
    return Quantized(jnp.round(kernel / scale).astype(jnp.int8), scale)


def dequantize(kernel: Quantized) -> Float[Array, "*L i o"]:
    """Float32; off by half a scale at the most."""
    return kernel.values.astype(jnp.float32) * kernel.scale


def quantize_sharded(kernel: jax.Array) -> Quantized:
    """`quantize` of a kernel on a mesh: the values stay where they are, scales go with channels."""
    where = kernel.sharding
    assert isinstance(where, NamedSharding)
    return _compiled(_places(where, kernel.ndim))(kernel)


def _places(where: NamedSharding, rank: int) -> Quantized:
    """The shardings of a quantized kernel; scales are whole over `data`, for FSDP gathers none."""
    *lead, _, channels = [*where.spec, *[None] * (rank - len(where.spec))]
    channels = None if channels in ("data", ("data",)) else channels
    return Quantized(where, NamedSharding(where.mesh, P(*lead, None, channels)))


@functools.cache
def _compiled(places: Quantized):
    return jax.jit(quantize, out_shardings=places)
