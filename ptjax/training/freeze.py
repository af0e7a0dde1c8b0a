"""The freeze map: the one place that states which variables are frozen.

It is a prefix tree over the variables, True = frozen: `{"params": True, "prompt": False}` is prompt
tuning. The gradient, the optimizer, the checkpoint and the start-up report all read it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import jax
from etils import epy

from ptjax.errors import InputError
from ptjax.trees import Tree, flatten_paths, unflatten_paths

with epy.lazy_imports():
    import optax

Freeze = Tree
"""A bool, or a dict of `Freeze` with the keys of the variables."""

SMALL = 0.1
"""The trainable elements count as few if they are at most this fraction of the frozen ones."""


def make_freeze(variables: Tree, rules: Mapping[str, bool]) -> Freeze:
    """Makes a freeze map, a bool for every leaf of `variables`, from rules.

    Every variable must match a rule; nothing is frozen by default.

    Args:
        rules: pattern of a variable's whole path -> whether it is frozen.

    Raises:
        InputError: a pattern matches no variable; a variable matches no pattern, or matches
            patterns that disagree.
    """
    decided: dict[str, bool] = {}
    used = set()
    for path in flatten_paths(variables):
        verdicts = {p: frozen for p, frozen in rules.items() if re.fullmatch(p, path)}
        used |= set(verdicts)
        if len(set(verdicts.values())) != 1:
            what = "no freeze rule covers" if not verdicts else f"rules {verdicts} disagree about"
            raise InputError(f"{what} variable {path!r}; give it True (frozen) or False, once")
        decided[path] = next(iter(verdicts.values()))
    if unused := set(rules) - used:
        raise InputError(f"freeze rule {sorted(unused)[0]!r} matches no variable")
    return unflatten_paths(decided)


def split(variables: Tree, freeze: Freeze) -> tuple[Tree, Tree]:
    """Splits nested dicts into two: (trainable, frozen). Inverse of `combine`.

    >>> split({"params": {"w": 1}, "prompt": {"p": 2}}, {"params": True, "prompt": False})
    ({'prompt': {'p': 2}}, {'params': {'w': 1}})
    """
    if isinstance(freeze, bool):
        return ({}, variables) if freeze else (variables, {})
    trainable, frozen = {}, {}
    for name, child in variables.items():
        if isinstance(freeze[name], bool):
            (frozen if freeze[name] else trainable)[name] = child
            continue
        train_child, frozen_child = split(child, freeze[name])
        if train_child:
            trainable[name] = train_child
        if frozen_child:
            frozen[name] = frozen_child
    return trainable, frozen


def combine(trainable: Tree, frozen: Tree) -> Tree:
    """Merges the two parts that `split` returned. Inverse of `split`.

    >>> combine({"prompt": {"p": 2}}, {"params": {"w": 1}})
    {'params': {'w': 1}, 'prompt': {'p': 2}}
    """
    merged = dict(frozen)
    for name, child in trainable.items():
        merged[name] = combine(child, frozen[name]) if name in frozen else child
    return merged


def freeze_updates(
    optimizer: optax.GradientTransformation, freeze: Freeze
) -> optax.GradientTransformation:
    """Wraps an optimizer so that the updates of frozen variables are zero.

    This is a second safeguard in addition to `split`: the wrapped optimizer accepts the trainable
    part of the variables or the whole tree. (`optax.masked` would pass the raw gradients of frozen
    weights through.)
    """

    def labels(tree: Tree, freeze: Freeze = freeze) -> Tree:
        if isinstance(freeze, bool):
            return "freeze" if freeze else "train"
        return {name: labels(child, freeze[name]) for name, child in tree.items()}

    # As `optax.transforms.selective_transform`, whose mask cannot depend on the given tree.
    return optax.transforms.partition({"train": optimizer, "freeze": optax.set_to_zero()}, labels)


def is_small(trained: int, frozen: int) -> bool:
    """Whether the trainable variables are small compared with the frozen ones.

    If they are, copies of them or of their gradients cost little memory (such as one gradient per
    row group).

    Args:
        trained, frozen: the numbers of array elements. `trained` is small if it is at most `SMALL`
            times `frozen`.
    """
    return trained <= SMALL * frozen


def sizes(tree: Tree) -> tuple[int, int]:
    """Returns the numbers of elements and of bytes, (elements, bytes), of all arrays in `tree`.

    Arrays may be given as `jax.ShapeDtypeStruct`s.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    return count, sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
