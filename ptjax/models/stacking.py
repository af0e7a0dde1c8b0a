"""Runs layers of the same kind: as separate modules, or stacked and scanned over.

A scanned layer is compiled once, whatever the depth: XXL compiles in a fifth of the time. Its
parameters have one name for all layers, `encoder/layers/...`, and a leading axis.
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
from ptjax.trees import Tree

T = TypeVar("T")
Made = TypeVar("Made")
Layers = list[T] | T
"""A value per layer: a list, or arrays with a leading axis if layers are scanned."""

GatherFn = Callable[[Any], Any]
"""Maps a layer's parameters to ones replicated over the mesh axis `data`; see `gathered`."""

_GATHERED = "gathered"
# The outputs that are kept, by the name of the `Dense` module. Attention's own (large, cheap) are
# computed again.
_ATTENTION = ("query", "key", "value", "out")
_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(*_ATTENTION, "wi", "wi_0", "wi_1", "wo"),
    "attention": jax.checkpoint_policies.save_only_these_names(*_ATTENTION),
    "full": jax.checkpoint_policies.nothing_saveable,
}
_OF_LAYER = re.compile(r"(.*/layers)_(\d+)/(.*)")


def make_layers(kind: type[nn.Module], config: T5Config, count: int, *settings: Tree) -> Tree:
    """Makes the modules of `count` layers, each `kind(config, *settings)`, for `run_layers`.

    Returns a list of modules or, with `config.scan_layers`, a single module that represents all
    layers. Assign the result to an attribute named `layers`.
    """
    if config.scan_layers:
        return kind(config, *settings)  # pyright: ignore[reportCallIssue]
    return [kind(config, *settings) for _ in range(count)]  # pyright: ignore[reportCallIssue]


def run_layers(
    config: T5Config,
    count: int,
    step: Callable[..., tuple[Tree, Tree]],
    layers: Tree,
    x: Tree,
    *inputs: Layers[Tree] | None,
    gather: GatherFn | None = None,
    collections: Collection[str] = (),
) -> tuple[Tree, Layers[Tree]]:
    """Runs `x, output = step(layer, x, *layer_inputs)` for each layer in turn.

    Args:
        step: runs one layer; returns x for the next layer, and this layer's output.
        layers: the result of `make_layers`.
        x: the first layer's x, such as the embedded tokens.
        inputs: further arguments of `step`. Each is a `Layers`, of which a layer gets its own
            value, or None, which every layer gets.
        gather: applied to a layer's parameters before they are used, and again in the backward
            pass. Keeping the results until then would hold all layers' gathered parameters in
            memory at once.
        collections: names of the collections, other than `params`, that hold arrays of the layers,
            stacked like the parameters.

    Returns:
        `(x, outputs)`: the last layer's x, and the outputs of all layers as `Layers`.

    Raises:
        InputError: scanned layers have arrays in a collection that is neither `params` nor in
            `collections`.
    """
    policy = _POLICIES.get(config.remat)
    if gather is not None:
        step = nn.map_variables(step, "params", gather)
        policy = policy or jax.checkpoint_policies.save_anything_except_these_names(_GATHERED)
    if policy is not None:
        # In a scan, XLA cannot merge the recomputation with other operations anyway.
        step = nn.remat(step, policy=policy, prevent_cse=not config.scan_layers)
    if config.scan_layers:
        _check_carried(layers, collections)
        scanned = nn.scan(
            step,
            variable_axes=dict.fromkeys(("params", *collections), 0),
            split_rngs={"params": True, "dropout": True},
            length=count,
        )
        return scanned(layers, x, *inputs)
    outputs = []
    for index, layer in enumerate(layers):
        x, output = step(layer, x, *(None if each is None else each[index] for each in inputs))
        outputs.append(output)
    return x, outputs


def _check_carried(layers: nn.Module, collections: Collection[str]) -> None:
    """InputError for arrays in other collections, which a scan would silently drop."""
    for name, arrays in layers.variables.items():
        if arrays and name not in ("params", *collections):
            raise InputError(
                f"SCAN_LAYERS = True: the layers have arrays in the collection {name!r}, which the "
                f"scan over them does not carry; build the network with collections=({name!r},)"
            )


def gathered(weights: jax.Array) -> jax.Array:
    """Marks `weights` as the result of a `GatherFn`.

    Because of the mark, `run_layers` gathers them again in the backward pass instead of storing
    them.
    """
    return checkpoint_name(weights, _GATHERED)


def stack(layers: Layers[Tree]) -> Tree:
    """Stacks the values of all layers along a new leading axis. Inverse of `unstack`.

    Values of scanned layers are stacked already and returned as they are.
    """
    return jax.tree.map(lambda *x: jnp.stack(x), *layers) if isinstance(layers, list) else layers


def unstack(config: T5Config, count: int, stacked: T) -> Layers[T]:
    """Converts arrays with a leading axis of `count` layers to `Layers`, for `run_layers`.

    Returns None for None. Inverse of `stack`.
    """
    if config.scan_layers or stacked is None:
        return stacked
    return [jax.tree.map(lambda x: x[index], stacked) for index in range(count)]  # noqa: B023


def map_layers(function: Callable[[T], Made], layers: Layers[T]) -> Layers[Made]:
    """Applies `function` to the value of every layer."""
    if isinstance(layers, list):
        return [function(of_layer) for of_layer in layers]
    return jax.vmap(function)(layers)


def join_layers(layers: Layers[Tree], more: Layers[Tree]) -> Layers[Tree]:
    """Joins two dicts of every layer; an entry of `more` replaces one of the same name."""
    if isinstance(layers, list):
        return [one | other for one, other in zip(layers, more, strict=True)]
    return layers | more


def split_path(path: str) -> tuple[str, int | None]:
    """Splits T5X's name of a parameter into its name in stacked layers and its layer's index.

    The index is None for a parameter outside of the layers.

    >>> split_path("encoder/layers_3/mlp/wo/kernel")
    ('encoder/layers/mlp/wo/kernel', 3)
    >>> split_path("encoder/encoder_norm/scale")
    ('encoder/encoder_norm/scale', None)
    """
    match = _OF_LAYER.fullmatch(path)
    return (f"{match[1]}/{match[3]}", int(match[2])) if match else (path, None)


def stack_paths(arrays: Mapping[str, T], join: Callable[[list[T]], T]) -> dict[str, T]:
    """Joins the arrays of all layers, parameter by parameter, under the names of stacked layers.

    `encoder/layers_0/...`, `encoder/layers_1/...` become one entry `encoder/layers/...`. Arrays
    outside of the layers are returned unchanged.

    Args:
        arrays: each parameter's array under its name in T5X.
        join: makes one array from a list of the layers' arrays, in the order of the layers.
    """
    by_layer: dict[str, dict[int, T]] = {}  # in the order of `arrays`; -1: not of a layer
    for path, array in arrays.items():
        name, layer = split_path(path)
        by_layer.setdefault(name, {})[-1 if layer is None else layer] = array
    return {
        name: layers[-1] if -1 in layers else join([layers[i] for i in sorted(layers)])
        for name, layers in by_layer.items()
    }


class UnstackedView(Mapping[str, Any]):
    """A view of parameters under T5X's names; stacked layers are sliced on access.

    >>> import numpy as np
    >>> list(UnstackedView({"encoder/layers/scale": np.ones((2, 8)), "encoder/norm": np.ones(8)}))
    ['encoder/layers_0/scale', 'encoder/layers_1/scale', 'encoder/norm']
    """

    def __init__(self, arrays: Mapping[str, Tree]) -> None:
        self._arrays = arrays

    def __getitem__(self, path: str) -> Tree:
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
