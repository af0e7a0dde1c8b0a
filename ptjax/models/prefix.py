"""Keys and values that all examples share: those of an input-independent prompt, or of a prefix.

A prefix (Li and Liang 2021) is trained; the network computes those of a prompt. Their positions
precede those of every example. Letters as in `layers`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ptjax.errors import InputError
from ptjax.trees import Tree

KeysValues = tuple[Array, Array]
"""The keys and values of one attention layer, arrays of the same shape."""


class PromptStates(NamedTuple):
    """Keys and values [layers, P, H, K] in front of the attention layers, shared by all rows.

    They are the same for every example: the states of an input-independent prompt, computed once,
    or a trained prefix. Queries attend to all of them, in packed rows too. None adds nothing to
    those layers; P may differ between the three.

    Attributes:
        encoder: (keys, values) for the self-attention of every encoder layer.
        decoder: (keys, values) for the cross-attention of every decoder layer.
        targets: (keys, values) for the self-attention of every decoder layer; only a prefix has
            them.
    """

    encoder: KeysValues | None
    decoder: KeysValues | None
    targets: KeysValues | None = None

    def present(self) -> dict[str, tuple[Tree, Tree]]:
        """Returns the fields that are not None, by name: arrays of jax or numpy."""
        return {name: pair for name, pair in self._asdict().items() if pair is not None}

    def check(self) -> None:
        """Raises InputError for a prefix without positions: give None in place of it."""
        for name, (keys, _) in self.present().items():
            if not keys.shape[1]:
                raise InputError(f"PromptStates.{name} has length 0; leave it out: {name}=None")


def bias_in_front(
    relpos_bias: Callable[..., Float[Array, "1 H q k"]],
    before: int,
    queries: int,
    keys: int,
    position: Int[Array, ""] | int = 0,
    positions: Int[Array, "B q"] | None = None,
) -> Float[Array, "#B H q P"]:
    """Returns the biases of `before` positions directly in front of an example's first one.

    Args:
        relpos_bias: a `layers.RelativePositionBias`.
        before: P.
        queries, keys, position: as for `relpos_bias`, without the positions in front.
        positions: in packed rows, each query's position in its example.
    """
    bias = relpos_bias(queries, before + keys, before + position)[..., :before]
    return bias if positions is None else jnp.swapaxes(bias[0][:, positions], 0, 1)


def shared_einsum(
    spec: str, x: Float[Array, "..."], shared: Float[Array, "P H K"]
) -> Float[Array, "..."]:
    """Returns `jnp.einsum(spec, x, shared)` in the dtype of x.

    The gradient of `shared` sums over all rows and queries. If `shared` is float32 and x is
    bfloat16, a plain einsum of `shared.astype(x.dtype)` has that whole sum as one matrix product
    with a bfloat16 result: it is rounded once by the product, but summed over devices after that.
    Here the product's result is float32, without a copy of `shared` for each row.
    """
    if shared.dtype == x.dtype:
        return jnp.einsum(spec, x, shared)
    return _cast_einsum(spec, x, shared)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cast_einsum(spec: str, x: Array, shared: Array) -> Array:
    return jnp.einsum(spec, x, shared.astype(x.dtype))


def _forward(spec: str, x: Array, shared: Array) -> tuple[Array, tuple[Array, Array]]:
    return _cast_einsum(spec, x, shared), (x, shared)


def _backward(spec: str, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, shared = saved
    left, right, out = spec.replace("->", ",").split(",")
    of_x = jnp.einsum(f"{out},{right}->{left}", gradient, shared.astype(x.dtype))
    wide = jnp.promote_types(x.dtype, shared.dtype)
    of_shared = jnp.einsum(f"{out},{left}->{right}", gradient, x, preferred_element_type=wide)
    return of_x, of_shared.astype(shared.dtype)


_cast_einsum.defvjp(_forward, _backward)
