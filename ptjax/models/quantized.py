"""Frozen kernels at one byte per entry, and the product with one."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A frozen kernel `values * scale`, stored at one byte per entry.

    It is a pytree; its leaves may also be shapes or shardings in place of arrays.

    Attributes:
        values: int8 [..., in, out].
        scale: float32 [..., 1, out].
    """

    values: Any
    scale: Any


def quantized_dot(
    x: Float[Array, "*b i"], kernel: Quantized, dtype: DTypeLike
) -> Float[Array, "*b o"]:
    """Computes x @ kernel with the kernel's values cast to `dtype`; the kernel gets no gradient.

    The scales belong to output channels, so they multiply the output, which is smaller than the
    kernel.
    """
    return _dot(x.astype(dtype), kernel.values, kernel.scale[0], dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dot(x: Array, values: Array, scale: Array, dtype: DTypeLike) -> Array:
    return _product(x, values, scale, dtype)


def _product(x: Array, values: Array, scale: Array, dtype: DTypeLike) -> Array:
    product = jnp.dot(x, _cast(values, dtype))
    return (product.astype(jnp.float32) * scale).astype(dtype)


def _cast(values: Array, dtype: DTypeLike) -> Array:
    # A product that takes in the cast crashes the TPU's compiler at XXL's size under a scan.
    return jax.lax.optimization_barrier(values.astype(dtype))


def _dot_forward(
    x: Array, values: Array, scale: Array, dtype: DTypeLike
) -> tuple[Array, tuple[Array, Array]]:
    # Not `_dot`, in which REMAT = 'dots' would not see the product, whose result it keeps.
    return _product(x, values, scale, dtype), (values, scale)


def _dot_backward(
    dtype: DTypeLike, kept: tuple[Array, Array], gradient: Array
) -> tuple[Array, np.ndarray, Array]:
    """Casts the values again: to keep the cast ones takes more memory than a bfloat16 backbone."""
    values, scale = kept
    scaled = (gradient.astype(jnp.float32) * scale).astype(dtype)
    nothing = np.zeros(values.shape, jax.dtypes.float0)
    return jnp.dot(scaled, _cast(values, dtype).T), nothing, jnp.zeros_like(scale)


_dot.defvjp(_dot_forward, _dot_backward)
