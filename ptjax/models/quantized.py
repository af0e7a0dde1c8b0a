"""Frozen kernels at one byte per entry, and the product with one."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

Quantization = Literal["int8", "int8_products", "int8_products_but_wo"]
"""How kernels are stored and used; see `load_backbone`."""

LARGEST = 127
"""-128 is not used, so that the range is symmetric."""


def has_factors(quantize: str, path: str) -> bool:
    """Whether the kernel at `path` computes in int8 under this `Quantization`."""
    return quantize != "int8" and not (quantize.endswith("but_wo") and path.endswith("wo/kernel"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A frozen kernel `factors * values * scale`, stored at one byte per entry.

    It is a pytree; its leaves may also be shapes or shardings in place of arrays.

    Attributes:
        values: int8 [..., in, out].
        scale: float32 [..., 1, out].
        factors: float32 [..., in, 1], powers of two, if products with the kernel are computed in
            int8: what they multiply is rounded too, after multiplication with the factors. None
            means that the kernel is cast.
    """

    values: Any
    scale: Any
    factors: Any = None


def quantized_dot(
    x: Float[Array, "*b i"], kernel: Quantized, dtype: DTypeLike
) -> Float[Array, "*b o"]:
    """Computes x @ kernel; the kernel gets no gradient.

    Without factors, the kernel's values are cast to `dtype`. With them, every row of x is rounded
    to int8, and so is every row of the gradient in the backward pass; sums are int32.
    """
    if kernel.factors is not None:
        return _int8_dot(x, kernel, dtype)
    # The scales belong to output channels: the output is smaller than the kernel.
    return _dot(x.astype(dtype), kernel.values, kernel.scale[0], dtype)


def round_rows(x: Float[Array, "*b i"]) -> tuple[Int8[Array, "*b i"], Float[Array, "*b 1"]]:
    """Returns (values, scale): x to half a scale, with one float32 scale per row.

    A row with a NaN or an infinity has it as its scale.
    """
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32)
    scale = jnp.where(largest == 0, 1.0, largest / LARGEST)
    return jnp.round(x.astype(jnp.float32) / scale).astype(jnp.int8), scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _int8_dot(x: Array, kernel: Quantized, dtype: DTypeLike) -> Array:
    # Exact, for the factors are powers of two: no float32 copy of x is made.
    rows, row_scale = round_rows(x * kernel.factors[:, 0].astype(x.dtype))
    return (_product8(rows, kernel.values, 0) * row_scale * kernel.scale[0]).astype(dtype)


def _int8_dot_forward(x: Array, kernel: Quantized, dtype: DTypeLike) -> tuple[Array, Any]:
    return _int8_dot(x, kernel, dtype), (jnp.zeros(0, x.dtype), kernel)


def _int8_dot_backward(dtype: DTypeLike, kept: Any, gradient: Array) -> tuple[Array, None]:
    like, kernel = kept
    rows, row_scale = round_rows(gradient.astype(jnp.float32) * kernel.scale[0])
    of_x = _product8(rows, kernel.values, 1) * row_scale * kernel.factors[:, 0]
    return of_x.astype(like.dtype), None


_int8_dot.defvjp(_int8_dot_forward, _int8_dot_backward)


def _product8(rows: Array, values: Array, contracted: int) -> Array:
    """The product of int8 rows with `values`, or with its transpose for 1, in float32."""
    dimensions = (((rows.ndim - 1,), (contracted,)), ((), ()))
    product = jax.lax.dot_general(rows, values, dimensions, preferred_element_type=jnp.int32)
    return product.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dot(x: Array, values: Array, scale: Array, dtype: DTypeLike) -> Array:
    product = jnp.dot(x, _cast(values, dtype))
    return (product.astype(jnp.float32) * scale).astype(dtype)


def _cast(values: Array, dtype: DTypeLike) -> Array:
    # A product that takes in the cast crashes the TPU's compiler at XXL's size under a scan.
    return jax.lax.optimization_barrier(values.astype(dtype))


def _dot_forward(
    x: Array, values: Array, scale: Array, dtype: DTypeLike
) -> tuple[Array, tuple[Array, Array]]:
    return _dot(x, values, scale, dtype), (values, scale)


def _dot_backward(
    dtype: DTypeLike, kept: tuple[Array, Array], gradient: Array
) -> tuple[Array, np.ndarray, Array]:
    """Casts the values again: to keep the cast ones takes more memory than a bfloat16 backbone."""
    values, scale = kept
    scaled = (gradient.astype(jnp.float32) * scale).astype(dtype)
    nothing = np.zeros(values.shape, jax.dtypes.float0)
    return jnp.dot(scaled, _cast(values, dtype).T), nothing, jnp.zeros_like(scale)


_dot.defvjp(_dot_forward, _dot_backward)
