"""Converts nested dicts to dicts by path, `{"a": {"b": 1}}` to `{"a/b": 1}`, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Tree = Any
"""A leaf of any type, or a mapping from names to trees."""

Variables = dict[str, Any]
"""Flax's variables: a nested dict of arrays for each collection, such as "params"."""


def flatten_paths(
    tree: Tree,
    *,
    separator: str = "/",
    is_leaf: Callable[[Mapping[str, Tree]], bool] | None = None,
) -> dict[str, Tree]:
    """Flattens a nested dict to `{"a/b": leaf}`, in the same order. Inverse of `unflatten_paths`.

    Args:
        tree: mappings with keys of any type, which a path contains as `str`. Empty mappings are
            dropped.
        separator: joins the names of a path.
        is_leaf: whether to treat a mapping as a leaf instead of flattening it.

    >>> flatten_paths({"params": {"w": 1, "b": {"c": 2}}})
    {'params/w': 1, 'params/b/c': 2}
    >>> flatten_paths({"params": {"w": 1, "b": {"c": 2}}}, is_leaf=lambda node: "c" in node)
    {'params/w': 1, 'params/b': {'c': 2}}
    """
    paths: dict[str, Tree] = {}

    def walk(node: Tree, names: tuple[str, ...]) -> None:
        if not isinstance(node, Mapping) or (is_leaf is not None and is_leaf(node)):
            paths[separator.join(names)] = node
            return
        for name, child in node.items():
            walk(child, (*names, str(name)))

    walk(tree, ())
    return paths


def unflatten_paths(paths: Mapping[str, Tree]) -> dict[str, Tree]:
    """Makes a nested dict from `{"a/b": leaf}`. Inverse of `flatten_paths`, for string keys.

    >>> unflatten_paths({"params/w": 1, "params/b/c": 2})
    {'params': {'w': 1, 'b': {'c': 2}}}
    """
    tree: dict[str, Tree] = {}
    for path, leaf in paths.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
