"""Nested dicts by the paths of their leaves, `{"a": {"b": 1}}` as `{"a/b": 1}`, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Tree = Any
"""A leaf, or a mapping from names to trees. What a leaf is does not matter here."""

Variables = dict[str, Any]
"""Flax's variables: collection -> nested dict of arrays."""


def flatten_paths(
    tree: Tree,
    *,
    separator: str = "/",
    is_leaf: Callable[[Mapping[Any, Any]], bool] | None = None,
) -> dict[str, Any]:
    """A nested dict as `{"a/b": leaf}`, in its own order. Inverse of `unflatten_paths`.

    Args:
        tree: mappings with keys of any kind; a path has their `str`. Empty ones leave nothing.
        separator: what stands between the names of a path.
        is_leaf: whether a mapping counts as a leaf, instead of being flattened too.

    >>> flatten_paths({"params": {"w": 1, "b": {"c": 2}}})
    {'params/w': 1, 'params/b/c': 2}
    >>> flatten_paths({"params": {"w": 1, "b": {"c": 2}}}, is_leaf=lambda node: "c" in node)
    {'params/w': 1, 'params/b': {'c': 2}}
    """
    paths: dict[str, Any] = {}

    def walk(node: Tree, names: tuple[str, ...]) -> None:
        if not isinstance(node, Mapping) or (is_leaf is not None and is_leaf(node)):
            paths[separator.join(names)] = node
            return
        for name, child in node.items():
            walk(child, (*names, str(name)))

    walk(tree, ())
    return paths


def unflatten_paths(paths: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a/b": leaf}` as a nested dict. Inverse of `flatten_paths`.

    >>> unflatten_paths({"params/w": 1, "params/b/c": 2})
    {'params': {'w': 1, 'b': {'c': 2}}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in paths.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
