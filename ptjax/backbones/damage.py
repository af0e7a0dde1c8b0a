"""Finds the weight that causes results that are not finite.

Weights are only checked after such a result: loading makes no extra pass over them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ptjax.backbones.load import Backbone
from ptjax.errors import InputError
from ptjax.models.stacking import UnstackedView
from ptjax.trees import Tree, flatten_paths


class NotFiniteError(InputError):
    """Scores or states are NaN or infinite, although all weights of the backbone are finite."""


def check_weights(params: Tree, name: str) -> None:
    """Raises InputError if a weight is NaN or infinite; the message names it.

    Arrays that were donated to a train step, and so no longer exist, are not checked.

    Args:
        name: the backbone's name, for the message.
    """
    arrays = UnstackedView({k: x for k, x in flatten_paths(params).items() if not _is_deleted(x)})
    for path in sorted(arrays):
        # A NaN or infinity in an int8 kernel shows in the scale of its channel, or all of them.
        for array in jax.tree.leaves(arrays[path]):
            if jnp.issubdtype(array.dtype, jnp.floating) and (bad := int(_count(array))):
                what = "NaN" if bool(_has_nan(array)) else "infinity"
                raise InputError(
                    f"{name} has {what} in {path} ({bad:,} of {array.size:,} entries): the "
                    "backbone is damaged; copy or convert it again"
                )


def check_scores(scores: Tree, backbone: Backbone, what: str) -> None:
    """Raises an error if log-likelihoods or states are not finite; its message names the cause.

    Args:
        scores: a tree of arrays. The caller must have removed padding, such as the -inf that
            fills the row of a task with fewer labels than others.
        backbone: the backbone that computed the scores; its weights are checked.
        what: the name of the scores in the message, such as "the score of a label".

    Raises:
        InputError: a weight of the backbone is not finite; the message names the weight.
        NotFiniteError: a score is not finite, although all weights are.
    """
    if all(bool(np.isfinite(np.asarray(x, np.float32)).all()) for x in jax.tree.leaves(scores)):
        return
    check_weights(backbone.variables["params"], backbone.name)
    raise NotFiniteError(
        f"{what} is not finite, although every weight of {backbone.name} is; the values of the "
        "prompt are too large for it"
    )


def advice(updated: bool) -> str:
    """Returns a sentence of advice for a loss that is not finite with finite weights.

    Args:
        updated: whether any step has updated the trainable variables before this loss.
    """
    if updated:
        return "A smaller learning rate usually helps"
    return (
        "Nothing was updated before it, so the learning rate is not the cause, and the weights of "
        "the backbone are finite; check the initial prompt"
    )


@jax.jit
def _count(array: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(array))


@jax.jit
def _has_nan(array: jax.Array) -> jax.Array:
    return jnp.isnan(array).any()


def _is_deleted(tree: Tree) -> bool:
    return any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(tree))
