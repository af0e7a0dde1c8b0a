"""Counts the FLOPs of a function from its jaxpr, without weights or compilation."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator

import jax
from etils import epy
from jax.extend.core import Jaxpr, JaxprEqn
from jax.interpreters import partial_eval

from ptjax.training import freeze as freezing
from ptjax.training.loss import Loss
from ptjax.training.step import batch_loss, init_train_state, make_train_step
from ptjax.trees import Tree

with epy.lazy_imports():
    import optax

_Flops = collections.Counter[str]
"""FLOPs by the dtype of the operands."""
_UNKNOWN = ("conv_general_dilated", "ragged_dot_general")


def count_flops(function: Callable[..., object], *shapes: Tree) -> int:
    """Counts the FLOPs of the matrix products that `function(*shapes)` runs.

    Every `dot_general` counts 2 x (elements of the result) x (contracted length); `jnp.dot`, `@`
    and `jnp.einsum` lower to it. The body of a `scan` counts once per iteration (XLA's own
    `cost_analysis()` counts it once), that of a `pallas_call` once per point of its grid, that of a
    `shard_map` once per device. Recomputed activations count every time, a `cond` counts as its
    most expensive branch. Dead code does not count, since the compiler removes it. Elementwise
    operations, reductions and gathers do not count: together they are about 1% of a T5.

    Args:
        shapes: the arguments, as arrays or `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError: a `while` loop, whose number of iterations is unknown, contains matrix products,
            or the function uses a primitive that is not supported.

    >>> import jax.numpy as jnp
    >>> count_flops(jnp.dot, jax.ShapeDtypeStruct((2, 3), "float32"), jnp.ones((3, 5)))
    60
    """
    return count_jaxpr_flops(jax.make_jaxpr(function)(*shapes).jaxpr)


def flops_by_dtype(function: Callable[..., object], *shapes: Tree) -> dict[str, int]:
    """Counts like `count_flops`, by the dtype of the products' operands."""
    return dict(_used_flops(jax.make_jaxpr(function)(*shapes).jaxpr))


def count_jaxpr_flops(jaxpr: Jaxpr) -> int:
    """Counts the FLOPs of a jaxpr like `count_flops`, with the same errors."""
    return _used_flops(jaxpr).total()


def _used_flops(jaxpr: Jaxpr) -> _Flops:
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _jaxpr_flops(used)


def step_flops(
    apply_fn: Callable[..., jax.Array],
    variables: freezing.Tree,
    freeze: freezing.Freeze,
    batch: Tree,
    optimizer: optax.GradientTransformation,
) -> tuple[int, int]:
    """Counts the FLOPs of the forward pass alone and of the whole train step.

    The step of a frozen network costs a little over twice the forward pass, because the backward
    pass computes gradients of activations only. A factor of three means that it computes gradients
    of weights too.

    Args:
        variables: {"params": ...} or {"params": ..., "prompt": ...}, trees of arrays or shapes.
        freeze: determines which variables are frozen (see `training.freeze`).
        batch: the arrays of a batch by name, or their shapes.

    Returns:
        `(forward, step)`: the FLOPs of the forward pass with dropout and loss, and of the step.
    """
    loss = Loss()
    trainable, frozen = freezing.split(variables, freeze)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda t, k: init_train_state(t, optimizer, k), trainable, key)

    def forward(variables: Tree, batch: Tree, key: jax.Array) -> jax.Array:
        return batch_loss(apply_fn, loss, variables, batch, key)

    step = make_train_step(apply_fn, optimizer, loss)
    return count_flops(forward, variables, batch, key), count_flops(step, state, frozen, batch)


def _jaxpr_flops(jaxpr: Jaxpr) -> _Flops:
    return sum((_equation_flops(equation) for equation in jaxpr.eqns), _Flops())


def _times(count: int, flops: _Flops) -> _Flops:
    return _Flops({dtype: count * number for dtype, number in flops.items()})


def _equation_flops(equation: JaxprEqn) -> _Flops:
    name = equation.primitive.name
    if name in _UNKNOWN:
        raise ValueError(f"count_flops does not support {name!r}")
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left: Tree = equation.invars[0].aval
        result: Tree = equation.outvars[0].aval
        length = math.prod(left.shape[axis] for axis in contracted)
        return _Flops({left.dtype.name: 2 * math.prod(result.shape) * length})
    inner = [_jaxpr_flops(jaxpr) for jaxpr in _inner_jaxprs(equation)]
    if name == "cond":
        return max(inner, key=_Flops.total)
    total = sum(inner, _Flops())
    if name == "scan":
        return _times(equation.params["length"], total)
    if name == "shard_map":
        return _times(equation.params["mesh"].size, total)
    if name == "pallas_call":
        return _times(math.prod(equation.params["grid_mapping"].grid), total)
    if name == "while" and total:
        raise ValueError("count_flops cannot count the iterations of a while loop; use lax.scan")
    return total


def _inner_jaxprs(equation: JaxprEqn) -> Iterator[Jaxpr]:
    """The jaxprs among an equation's parameters: loop bodies, branches, jitted calls."""
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            jaxpr = getattr(item, "jaxpr", item)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr
