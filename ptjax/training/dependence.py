"""Whether the loss depends on all that trains, before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.interpreters import partial_eval

from ptjax.errors import InputError
from ptjax.training import freeze as freezing
from ptjax.training.loss import Loss
from ptjax.training.step import batch_loss
from ptjax.trees import Tree


def check_used(
    apply_fn: Callable[..., jax.Array], loss: Loss, trainable: Tree, frozen: Tree, batch: Tree
) -> None:
    """Refuses to train what cannot learn: a leaf that the network never reads.

    Args:
        batch: of any shape that the run has; this and all else may be `jax.ShapeDtypeStruct`s.

    Raises:
        InputError: the loss does not depend on a leaf of `trainable`; it is named.
    """

    def loss_of(trainable: Tree, frozen: Tree, batch: Tree) -> jax.Array:
        variables = freezing.combine(trainable, frozen)
        return batch_loss(apply_fn, loss, variables, batch, jax.random.key(0))

    unused = unused_leaves(loss_of, trainable, frozen, batch)
    if unused:
        others = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        raise InputError(
            f"the loss does not depend on {unused[0]}{others}, which would train without learning; "
            "have the network read it (Method.wrap) or freeze it (Method.freeze_rules)"
        )


def unused_leaves(
    function: Callable[..., jax.Array], trainable: Tree, *arguments: Any
) -> list[str]:
    """Paths in `trainable` of which the scalar `function(trainable, *arguments)` has no derivative.

    As the function is written, whatever the values: what only passes through `stop_gradient` or an
    argmax is unused, a gradient that happens to be zero (that of LoRA's first matrix while the
    second is zero) is not. Nothing is computed.
    """

    def tangent(tangents: Tree, trainable: Tree, *arguments: Any) -> jax.Array:
        def of_trainable(trainable: Tree) -> jax.Array:
            return function(trainable, *arguments)

        return jax.jvp(of_trainable, (trainable,), (tangents,))[1]

    traced = jax.make_jaxpr(tangent)(trainable, trainable, *arguments)
    # Of what the derivative is not made is dead code, in scans and calls too. The first inputs are
    # the tangents.
    _, used = partial_eval.dce_jaxpr(traced.jaxpr, [True])
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(trainable)]
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, is_used in zip(paths, used, strict=False)
        if not is_used
    ]
