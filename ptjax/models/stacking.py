"""Layers of one kind: written out one after the other, or stacked and scanned over.

A stack is compiled once, whatever its depth: XXL compiles in a fifth of the time. Its parameters
have one name for all layers, `encoder/layers/...`, and a leading axis.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from ptjax.errors import InputError
from ptjax.models.config import T5Config

T = TypeVar("T")
Made = TypeVar("Made")
Layers = list[T] | T
"""Something of every layer: a list, or where layers are scanned, arrays with a leading axis."""

GatherFn = Callable[[Any], Any]
"""A layer's parameters -> the same, whole on every device of `data`; see `gathered`."""

_GATHERED = "gathered"
_POLICIES = {
    # A projection's output is kept, what attention makes of it (large, cheap) is made again.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
_OF_LAYER = re.compile(r"(.*/layers)_(\d+)/(.*)")


def make_layers(kind: type[nn.Module], config: T5Config, count: int) -> Any:
    """The modules of `count` layers, for `run_layers`; an attribute called `layers`."""
    if config.scan_layers:
        return kind(config)  # pyright: ignore[reportCallIssue]
    return [kind(config) for _ in range(count)]  # pyright: ignore[reportCallIssue]


def run_layers(
    config: T5Config,
    count: int,
    step: Callable[..., tuple[Any, Any]],
    layers: Any,
    x: Any,
    *own: Any,
    gather: GatherFn | None = None,
    collections: Collection[str] = (),
) -> tuple[Any, Layers[Any]]:
    """`x, made = step(layer, x, *own of this layer)` for every layer: the last x, and all made.

    Args:
        own: `Layers` each, or None.
        collections: beside `params`, those in which layers have arrays of their own; stacked as
            the parameters are.
        gather: what is done to a layer's parameters before they are used. It is done once more on
            the way back: to keep what was gathered would be to keep all of it.

    Raises:
        InputError: layers that are scanned over have arrays in another collection.
    """
    policy = _POLICIES.get(config.remat)
    if gather is not None:
        step = nn.map_variables(step, "params", gather)
        policy = policy or jax.checkpoint_policies.save_anything_except_these_names(_GATHERED)
    if policy is not None:
        # Within a scan nothing else could be merged with what is made again.
        step = nn.remat(step, policy=policy, prevent_cse=not config.scan_layers)
    if config.scan_layers:
        _check_carried(layers, collections)
        scanned = nn.scan(
            step,
            variable_axes=dict.fromkeys(("params", *collections), 0),
            split_rngs={"params": True, "dropout": True},
            length=count,
        )
        return scanned(layers, x, *own)
    made = []
    for index, layer in enumerate(layers):
        x, of_layer = step(layer, x, *(None if one is None else one[index] for one in own))
        made.append(of_layer)
    return x, made


def _check_carried(layers: nn.Module, collections: Collection[str]) -> None:
    """A scan leaves all other collections out without a word."""
    for name, arrays in layers.variables.items():
        if arrays and name not in ("params", *collections):
            raise InputError(
                f"SCAN_LAYERS = True: the layers have arrays in the collection {name!r}, which the "
                f"scan over them does not carry; build the network with collections=({name!r},)"
            )


def gathered(weights: jax.Array) -> jax.Array:
    """Says of `weights` that a `GatherFn` made them."""
    return checkpoint_name(weights, _GATHERED)


def stack(layers: Layers[Any]) -> Any:
    """What every layer has, as arrays with a leading axis. Inverse of `unstack`."""
    return jax.tree.map(lambda *x: jnp.stack(x), *layers) if isinstance(layers, list) else layers


def unstack(config: T5Config, count: int, stacked: T) -> Layers[T]:
    """Arrays with a leading axis of layers, as `run_layers` takes them."""
    if config.scan_layers or stacked is None:
        return stacked
    return [jax.tree.map(lambda x: x[index], stacked) for index in range(count)]  # noqa: B023


def map_layers(function: Callable[[T], Made], layers: Layers[T]) -> Layers[Made]:
    """`function` of what every layer has."""
    if isinstance(layers, list):
        return [function(of_layer) for of_layer in layers]
    return jax.vmap(function)(layers)


def split_path(path: str) -> tuple[str, int | None]:
    """The name that a parameter of a layer has when layers are stacked, and which layer it is.

    >>> split_path("encoder/layers_3/mlp/wo/kernel")
    ('encoder/layers/mlp/wo/kernel', 3)
    >>> split_path("encoder/encoder_norm/scale")
    ('encoder/encoder_norm/scale', None)
    """
    match = _OF_LAYER.fullmatch(path)
    return (f"{match[1]}/{match[3]}", int(match[2])) if match else (path, None)


def stack_paths(arrays: Mapping[str, T], join: Callable[[list[T]], T]) -> dict[str, T]:
    """Parameters by T5X's names -> by those of stacked layers; `join` stacks those of a name."""
    found: dict[str, Any] = {}
    for path, array in arrays.items():
        name, layer = split_path(path)
        if layer is None:
            found[name] = array
        else:
            found.setdefault(name, {})[layer] = array
    return {
        name: join([own[layer] for layer in sorted(own)]) if isinstance(own, dict) else own
        for name, own in found.items()
    }


class UnstackedView(Mapping[str, Any]):
    """Parameters by T5X's names, also where layers are stacked: each is sliced when asked for.

    >>> list(UnstackedView({"encoder/layers/scale": np.ones((2, 8)), "encoder/norm": np.ones(8)}))
    ['encoder/layers_0/scale', 'encoder/layers_1/scale', 'encoder/norm']
    """

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._arrays = arrays

    def __getitem__(self, path: str) -> Any:
        if path in self._arrays:
            return self._arrays[path]
        name, layer = split_path(path)
        return jax.tree.map(lambda x: x[layer], self._arrays[name])

    def __iter__(self) -> Iterator[str]:
        for name, array in self._arrays.items():
            before, inside, rest = name.partition("/layers/")
            if inside:
                count = len(jax.tree.leaves(array)[0])
                yield from (f"{before}/layers_{layer}/{rest}" for layer in range(count))
            else:
                yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)
