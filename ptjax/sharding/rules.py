"""The sharding table: which axes of a mesh divide which variable.

The table maps a pattern of a variable's path to a `PartitionSpec`; `jax.jit` with `NamedSharding`
does the rest. `data` divides the rows of a batch, `model` divides weights, and `replica`, across
slices, has the same weights and other rows. Prompts and their optimizer state are small and stay
replicated in float32, so that any host can write them. Each family of networks has its own table
(`models.family.Family.sharding_rules`).

T5's table is T5X's `standard_logical_axis_rules` for one activation dimension. `fsdp=False` is its
parameter_partitioning_dims=1. `fsdp=True` is its 2, except that only the layers' kernels are
divided along D (T5X also divides norm scales, embedding and logits, 2% of XXL). The table has no
rows for activations: given a batch over `data` and these weights, the compiler chooses the layout
of T5X's (1, ...) rules: heads, mlp and logits over `model`, the width whole. T5X's two activation
dimensions, which divide the width of activations over `model`, are not supported.
"""

from __future__ import annotations

import math
import re

from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ptjax.errors import InputError
from ptjax.models.family import Rules
from ptjax.models.t5_family import T5_FAMILY
from ptjax.trees import Tree, flatten_paths, unflatten_paths

RULES = T5_FAMILY.sharding_rules
COLLECTIONS = ("params", "prompt")
AXES = ("replica", "data", "model")


def check_rules(variables: Tree, rules: Rules = RULES) -> None:
    """Checks that every variable has a row in the sharding table, and that the rows are sound.

    Every row must be used, and no two may conflict: two rows that match the same variable must have
    the same spec, unless the earlier one is an exception to the later one, which then matches all
    of its variables and more. Only rows for the collections of `variables` must be used.

    Args:
        variables: {"params": ...} or {"params": ..., "prompt": ...} of leaves with a shape.

    Raises:
        InputError: a variable without a row; a row that matches no variable, is never reached,
            conflicts with another, has more axes than its variable, names an axis twice, or names
            an unknown axis.
    """
    shapes = {path: leaf.shape for path, leaf in flatten_paths(variables).items()}
    for path, shape in shapes.items():
        spec_of(path, len(shape), rules=rules)
    seen: list[tuple[str, P, set[str]]] = []
    for pattern, spec in rules:
        _check_axes(pattern, spec)
        collection = pattern.split("/")[0]
        if collection not in COLLECTIONS:
            raise InputError(f"the sharding table's row {pattern!r} is for an unknown collection")
        if collection not in variables:
            continue
        matched = {path for path in shapes if re.fullmatch(pattern, path)}
        if not matched:
            raise InputError(f"the sharding table's row {pattern!r} matches no variable")
        if matched <= set().union(*(earlier for *_, earlier in seen)):
            raise InputError(
                f"the sharding table's row {pattern!r} is never reached: earlier rows match "
                "all its variables"
            )
        for other, other_spec, earlier in seen:
            if other_spec != spec and matched & earlier and not earlier < matched:
                raise InputError(
                    f"the sharding table's rows {other!r} ({other_spec}) and {pattern!r} ({spec}) "
                    f"conflict about variable {min(matched & earlier)!r}"
                )
        seen.append((pattern, spec, matched))


def _check_axes(pattern: str, spec: P) -> None:
    named = [name for axis in spec for name in _names(axis)]
    if unknown := sorted(set(named) - {*AXES, "fsdp"}):
        raise InputError(
            f"the sharding table's row {pattern!r} names the unknown axis {unknown[0]!r}"
        )
    used = ["data" if name == "fsdp" else name for name in named]
    if len(set(used)) < len(used):
        raise InputError(f"the sharding table's row {pattern!r} names an axis twice: {spec}")


def _names(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one dimension's entry in a spec."""
    return () if axis is None else (axis,) if isinstance(axis, str) else axis


def spec_of(path: str, rank: int, *, fsdp: bool = False, rules: Rules = RULES) -> P:
    """Returns the spec of the variable `path` ("params/encoder/...") with `rank` axes.

    A stacked variable, `.../layers/...`, has an additional first axis of layers, which is never
    divided.

    Raises:
        InputError: no row matches it, or its row has more axes than it.
    """
    spec = next((spec for pattern, spec in rules if re.fullmatch(pattern, path)), None)
    if spec is None:
        raise InputError(f"the sharding table has no row for variable {path!r}")
    stacked = "/layers/" in path
    axes_of = {"fsdp": ("data",) if fsdp and stacked else ()}
    # To JAX a tuple of one name equals the name, and an empty one None.
    resolved = [
        tuple(real for name in _names(axis) for real in axes_of.get(name, (name,))) for axis in spec
    ]
    if resolved and stacked:
        resolved.insert(0, ())
    if len(resolved) > rank:
        raise InputError(
            f"the sharding table gives variable {path!r} {len(resolved)} axes, but it has {rank}"
        )
    return P(*(axes or None for axes in resolved))


def sharding_of(
    path: str,
    shape: tuple[int, ...],
    mesh: Mesh,
    *,
    fsdp: bool = False,
    rules: Rules = RULES,
) -> NamedSharding:
    """Returns the sharding of the variable `path` ("params/encoder/...").

    Raises:
        InputError: no row matches it, or the mesh does not divide it (`meshes.check_mesh` checks a
            whole model, and names meshes that do).
    """
    spec = spec_of(path, len(shape), fsdp=fsdp, rules=rules)
    for size, axis in zip(shape, tuple(spec), strict=False):
        parts = math.prod(mesh.shape[name] for name in _names(axis))
        if size % parts:
            raise InputError(
                f"variable {path!r} {list(shape)}: {size} is not a multiple of {parts}, the mesh's "
                f"{' x '.join(_names(axis))} axis; choose another MESH"
            )
    return NamedSharding(mesh, spec)


def shardings_of(variables: Tree, mesh: Mesh, *, fsdp: bool = False, rules: Rules = RULES) -> Tree:
    """Returns the sharding of every leaf of `variables`, as a tree; first calls `check_rules`.

    Raises:
        InputError: as in `check_rules` and `sharding_of`.
    """
    check_rules(variables, rules)
    shardings = {
        path: sharding_of(path, leaf.shape, mesh, fsdp=fsdp, rules=rules)
        for path, leaf in flatten_paths(variables).items()
    }
    return unflatten_paths(shardings)


def bytes_per_device(
    variables: Tree, sizes: dict[str, int], *, fsdp: bool = False, rules: Rules = RULES
) -> int:
    """Computes how many bytes of `variables` one device holds.

    Args:
        variables: leaves with shape and dtype.
        sizes: the size of each axis of the mesh.
    """
    total = 0
    for path, leaf in flatten_paths(variables).items():
        spec = spec_of(path, len(leaf.shape), fsdp=fsdp, rules=rules)
        parts = math.prod(sizes[name] for axis in spec for name in _names(axis))
        total += math.prod(leaf.shape) // parts * leaf.dtype.itemsize
    return total
