"""Counts the work of a function from its jaxpr: no weights, no compilation, any size in seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import optax
from jax.extend.core import Jaxpr, JaxprEqn
from jax.interpreters import partial_eval

from ptjax.training import freeze as freezing
from ptjax.training.loss import Loss
from ptjax.training.step import batch_loss, init_train_state, make_train_step

_UNKNOWN = ("conv_general_dilated", "ragged_dot_general", "pallas_call", "shard_map")


def count_flops(function: Callable[..., Any], *shapes: Any) -> int:
    """FLOPs of the matrix products that `function(*shapes)` runs.

    Every `dot_general` counts (2 x elements of the result x contracted length), and with it
    `jnp.dot`, `@` and `jnp.einsum`, which all lower to it. A `scan` counts as often as it turns
    (XLA's own `cost_analysis()` counts it once), a rematerialised part every time that it runs, a
    `cond` as its dearest branch. What no result depends on does not count: the compiler drops it
    too. Elementwise work, reductions and gathers do not count: a per cent of a T5.

    Args:
        shapes: the arguments, as arrays or `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError: the function has matrix products in a `while` loop, whose turns are not known,
            or uses a primitive whose work this does not know.

    >>> import jax.numpy as jnp
    >>> count_flops(jnp.dot, jax.ShapeDtypeStruct((2, 3), "float32"), jnp.ones((3, 5)))
    60
    """
    jaxpr = jax.make_jaxpr(function)(*shapes).jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _jaxpr_flops(used)


def step_flops(
    apply_fn: Callable[..., jax.Array],
    variables: freezing.Tree,
    freeze: freezing.Freeze,
    batch: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
) -> tuple[int, int]:
    """(FLOPs of the forward pass, dropout and loss included; FLOPs of the whole train step).

    The step of a frozen network is a little over twice the forward pass: going back costs the
    gradients of the activations alone. 3 times means that weight gradients are computed.

    Args:
        variables: {"params": ..., ["prompt": ...]}, arrays or shapes; so is `batch`.
        freeze: what is frozen among them (`training.freeze`).
    """
    loss = Loss()
    trainable, frozen = freezing.split(variables, freeze)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda t, k: init_train_state(t, optimizer, k), trainable, key)

    def forward(variables: Any, batch: Any, key: jax.Array) -> jax.Array:
        return batch_loss(apply_fn, loss, variables, batch, key)

    step = make_train_step(apply_fn, optimizer, loss)
    return count_flops(forward, variables, batch, key), count_flops(step, state, frozen, batch)


def _jaxpr_flops(jaxpr: Jaxpr) -> int:
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: JaxprEqn) -> int:
    name = equation.primitive.name
    if name in _UNKNOWN:
        raise ValueError(f"count_flops does not know the work of {name!r}")
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left: Any = equation.invars[0].aval
        result: Any = equation.outvars[0].aval
        return 2 * math.prod(result.shape) * math.prod(left.shape[axis] for axis in contracted)
    inner = [_jaxpr_flops(jaxpr) for jaxpr in _inner_jaxprs(equation)]
    if name == "scan":
        return equation.params["length"] * sum(inner)
    if name == "cond":
        return max(inner)
    if name == "while" and sum(inner):
        raise ValueError("count_flops cannot tell how often a while loop turns; use lax.scan")
    return sum(inner)


def _inner_jaxprs(equation: JaxprEqn) -> Iterator[Jaxpr]:
    """The jaxprs among an equation's parameters: loop bodies, branches, jitted calls."""
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            jaxpr = getattr(item, "jaxpr", item)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr
