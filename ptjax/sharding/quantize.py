"""Frozen kernels in int8, with a scale per output channel, and perhaps a factor per input one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ptjax.models.family import Config, Family
from ptjax.models.quantized import LARGEST, Quantized, has_factors
from ptjax.models.t5_family import T5_FAMILY
from ptjax.sharding.rules import sharding_of
from ptjax.trees import Tree, flatten_paths, unflatten_paths


def weight_shapes(
    config: Config, dtype: str, quantize: str | None = None, *, family: Family = T5_FAMILY
) -> Tree:
    """The shapes and dtypes of the frozen weights, as a tree of `jax.ShapeDtypeStruct`s.

    Leaves out the scales and factors of quantized kernels, which add only about 0.1% to the bytes.

    Args:
        dtype: the dtype of the weights that are not quantized.
        quantize: as for `load_backbone`.
    """

    def with_dtype(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            leaf.shape, "int8" if quantize and family.is_quantized(path) else dtype
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
        shapes = jax.eval_shape(
            functools.partial(quantize_kernel, factors=has_factors(quantize, path)),
            jax.ShapeDtypeStruct(shape, "float32"),
        )
        shardings = _quantized_shardings(sharding, len(shape), has_factors(quantize, path))
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            shapes,
            shardings,
        )

    shapes = flatten_paths(family.parameter_shapes(config))
    return unflatten_paths({path: sharded(path, leaf.shape) for path, leaf in shapes.items()})


@functools.partial(jax.jit, static_argnames="factors")
def quantize_kernel(kernel: Float[Array, "*L i o"], factors: bool = False) -> Quantized:
    """Rounds a kernel [..., input, output] to int8, with a float32 scale per output channel.

    The scale is the channel's largest magnitude / 127, or 1 if all its values are 0. int8 cannot
    hold NaN or infinity: a channel with one gets it as its scale.

    Args:
        factors: divide each row, the weights of an input channel, by its largest magnitude first
            (or by 1), to the nearest power of two, and keep that as the row's factor. Then what
            multiplies the kernel is weighed by what it contributes before it is rounded itself, so
            an input channel that is large and has small weights does not take the range of all
            others. Exact except for the rounding
            (SmoothQuant, Xiao et al. 2023, section 4, without measured activations).
    """
    kernel = kernel.astype(jnp.float32)
    rows = None
    if factors:
        rows = _power_of_two(_largest(kernel, -1))
        kernel = kernel / rows
    scale = _largest(kernel, -2, LARGEST)
    return Quantized(jnp.round(kernel / scale).astype(jnp.int8), scale, rows)


def _power_of_two(x: Array) -> Array:
    """The nearest power of two, exactly; `jnp.exp2` is off by an ulp on some devices."""
    share, exponent = jnp.frexp(x)
    return jnp.ldexp(jnp.ones_like(x), exponent - (share < 0.75))


def _largest(kernel: Array, axis: int, divisor: int = 1) -> Array:
    """The largest magnitude along an axis / divisor; 1 where that is 0."""
    largest = jnp.max(jnp.abs(kernel), axis=axis, keepdims=True)
    return jnp.where(largest == 0, 1.0, largest / divisor)


def dequantize(kernel: Quantized) -> Float[Array, "*L i o"]:
    """Returns the kernel in float32.

    Its rounding error is at most half of its channel's scale, times its row's factor.
    """
    factors = 1.0 if kernel.factors is None else kernel.factors
    return kernel.values.astype(jnp.float32) * kernel.scale * factors


def quantize_sharded(kernel: jax.Array, factors: bool = False) -> Quantized:
    """Quantizes a kernel on a mesh, like `quantize_kernel`.

    The values keep the kernel's sharding. The scales are sharded like the kernel's output channels
    and the factors like its input channels, but never over the mesh axis `data`.
    """
    sharding = kernel.sharding
    assert isinstance(sharding, NamedSharding)
    return _compiled(_quantized_shardings(sharding, kernel.ndim, factors))(kernel, factors)


def _quantized_shardings(kernel: NamedSharding, rank: int, factors: bool) -> Quantized:
    """The shardings of a quantized kernel; FSDP gathers neither scales nor factors."""
    spec = [*kernel.spec, *[None] * (rank - len(kernel.spec))]
    *lead, rows, channels = [None if axis in ("data", ("data",)) else axis for axis in spec]
    scale, row = P(*lead, None, channels), P(*lead, rows, None)
    return Quantized(
        kernel,
        NamedSharding(kernel.mesh, scale),
        NamedSharding(kernel.mesh, row) if factors else None,
    )


@functools.cache
def _compiled(shardings: Quantized):
    return jax.jit(quantize_kernel, out_shardings=shardings, static_argnums=1)
