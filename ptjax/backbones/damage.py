"""Says which weight is to blame where what a model computes is not finite.

Nothing is looked at before that: loading makes no extra pass over the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptjax.backbones.load import Backbone
from ptjax.errors import InputError
from ptjax.models.stacking import UnstackedView
from ptjax.trees import flatten_paths


class NotFiniteError(InputError):
    """What a model with whole weights computes is not finite."""


def check_weights(params: Mapping[str, Any], name: str) -> None:
    """Looks through every weight; what was donated to a train step is left out.

    Raises:
        InputError: one is NaN or infinite; the message names it.
    """
    arrays = UnstackedView({k: x for k, x in flatten_paths(params).items() if not _is_deleted(x)})
    for path in sorted(arrays):
        # An int8 kernel has the NaN and the infinity of a channel in its scale.
        for array in jax.tree.leaves(arrays[path]):
            if jnp.issubdtype(array.dtype, jnp.floating) and (bad := int(_count(array))):
                what = "NaN" if bool(_has_nan(array)) else "infinity"
                raise InputError(
                    f"{name} has {what} in {path} ({bad:,} of {array.size:,} entries): the "
                    "backbone is damaged; copy or convert it again"
                )


def check_scores(scores: Any, backbone: Backbone, what: str) -> None:
    """Refuses log-likelihoods or states that are not finite, and names the weight that caused it.

    Args:
        scores: arrays; of ranked labels without those that only fill a smaller set up.
        what: what has these scores, for the message.

    Raises:
        InputError: a weight of the backbone is not finite.
        NotFiniteError: something is not finite, though all weights are.
    """
    if all(bool(np.isfinite(np.asarray(x, np.float32)).all()) for x in jax.tree.leaves(scores)):
        return
    check_weights(backbone.variables["params"], backbone.name)
    raise NotFiniteError(
        f"{what} is not finite, though every weight of {backbone.name} is; the values of the "
        "prompt are too large for it"
    )


def advice(updated: bool) -> str:
    """What to do about training that is not finite, though all weights of the backbone are.

    `updated`: what trains was updated before.
    """
    if updated:
        return "A smaller learning rate usually helps"
    return (
        "Nothing was updated before it, so no learning rate is to blame, and the weights of the "
        "backbone are finite; check the initial prompt"
    )


@jax.jit
def _count(array: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(array))


@jax.jit
def _has_nan(array: jax.Array) -> jax.Array:
    return jnp.isnan(array).any()


def _is_deleted(tree: Any) -> bool:
    return any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(tree))
