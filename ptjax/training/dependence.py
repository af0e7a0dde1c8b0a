"""Checks, before the first step, that the loss depends on every trainable variable."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.interpreters import partial_eval

from ptjax.errors import InputError
from ptjax.models.family import ApplyFn
from ptjax.training import freeze as freezing
from ptjax.training.loss import Loss
from ptjax.training.step import batch_loss
from ptjax.trees import Tree


def check_used(apply_fn: ApplyFn, loss: Loss, trainable: Tree, frozen: Tree, batch: Tree) -> None:
    """Raises InputError for trainable variables that the network never reads: they cannot learn.

    Args:
        batch: of any shape of the run. Batch and variables may be `jax.ShapeDtypeStruct`s.

    Raises:
        InputError: the loss does not depend on a leaf of `trainable`, which is named.
    """

    def loss_of(trainable: Tree, frozen: Tree, batch: Tree) -> jax.Array:
        variables = freezing.combine(trainable, frozen)
        return batch_loss(apply_fn, loss, variables, batch, jax.random.key(0))

    unused = unused_leaves(loss_of, trainable, frozen, batch)
    if unused:
        others = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        raise InputError(
            f"the loss does not depend on {unused[0]}{others}, so training would not change it; "
            "make the network read it (Method.wrap) or freeze it (Method.freeze_rules)"
        )


def unused_leaves(
    function: Callable[..., jax.Array], trainable: Tree, *arguments: Tree
) -> list[str]:
    """Lists the paths of leaves that the derivative of `function(trainable, *arguments)` ignores.

    The result depends on the program, not on values: a leaf that is used only through
    `stop_gradient` or an argmax is listed; one whose gradient happens to be zero (LoRA's first
    matrix while the second is zero) is not. `function` is traced, but nothing is computed.
    """

    def tangent(tangents: Tree, trainable: Tree, *arguments: Tree) -> jax.Array:
        def of_trainable(trainable: Tree) -> jax.Array:
            return function(trainable, *arguments)

        return jax.jvp(of_trainable, (trainable,), (tangents,))[1]

    traced = jax.make_jaxpr(tangent)(trainable, trainable, *arguments)
    # Tangents of unused leaves are dead code, also within scans and calls. The tangents are the
    # first inputs.
    _, used = partial_eval.dce_jaxpr(traced.jaxpr, [True])
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(trainable)]
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, is_used in zip(paths, used, strict=False)
        if not is_used
    ]
