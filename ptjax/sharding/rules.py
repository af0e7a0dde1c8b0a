"""One table says where every array lives.

Pattern of a variable's path -> `PartitionSpec` over the axes of a mesh; `jax.jit` with
`NamedSharding` (what pjit became) does the rest. The axes are `data`, over which the rows of a
batch are divided, `model`, over which weights are, and across slices `replica`, whose members hold
the same weights and other rows. Prompts and their optimizer state are small and stay replicated in
float32, so that any host can write them. Each family of networks has its table
(`models.family.Family.sharding_rules`).

T5's table is T5X's `standard_logical_axis_rules` for one activation dimension: `fsdp=False` its
parameter_partitioning_dims=1, `fsdp=True` its 2, but that only the layers' kernels are divided
along D (T5X divides norm scales, embedding and logits too, 2% of XXL). Activations have no rows: a
batch over `data` and these weights leave the compiler the layout that T5X's (1, ...) rules ask for,
heads, mlp and logits over `model`, the width whole. T5X's two activation dimensions, which divide
the width of activations over `model`, are not offered.
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
    """Every variable has a row, every row has a use, and no two contradict each other.

    Rows are judged by the collections that `variables` has. A row may be the exception from a
    later one, which then matches all that it does and more. Two that overlap otherwise and differ
    contradict each other.

    Args:
        variables: {"params": ...} or {"params": ..., "prompt": ...} of leaves with a shape.

    Raises:
        InputError: a variable without a row; a row that matches none, is never reached,
            contradicts another, has more axes than its variable, names an axis twice or one that
            no mesh has.
    """
    shapes = {path: leaf.shape for path, leaf in flatten_paths(variables).items()}
    for path, shape in shapes.items():
        spec_of(path, len(shape), rules=rules)
    seen: list[tuple[str, P, set[str]]] = []
    for pattern, spec in rules:
        _check_axes(pattern, spec)
        collection = pattern.split("/")[0]
        if collection not in COLLECTIONS:
            raise InputError(f"the sharding table's row {pattern!r} is for no collection of ours")
        if collection not in variables:
            continue
        found = {path for path in shapes if re.fullmatch(pattern, path)}
        if not found:
            raise InputError(f"the sharding table's row {pattern!r} matches no variable")
        if found <= set().union(*(before for *_, before in seen)):
            raise InputError(
                f"the sharding table's row {pattern!r} is never reached: earlier rows take all "
                "that it matches"
            )
        for other, other_spec, before in seen:
            if other_spec != spec and found & before and not before < found:
                raise InputError(
                    f"the sharding table's rows {other!r} ({other_spec}) and {pattern!r} ({spec}) "
                    f"contradict each other about variable {min(found & before)!r}"
                )
        seen.append((pattern, spec, found))


def _check_axes(pattern: str, spec: P) -> None:
    named = [name for axis in spec for name in _names(axis)]
    if unknown := sorted(set(named) - {*AXES, "fsdp"}):
        raise InputError(f"the sharding table's row {pattern!r} names axis {unknown[0]!r}")
    used = ["data" if name == "fsdp" else name for name in named]
    if len(set(used)) < len(used):
        raise InputError(f"the sharding table's row {pattern!r} names an axis twice: {spec}")


def _names(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one dimension's entry in a spec."""
    return () if axis is None else (axis,) if isinstance(axis, str) else axis


def spec_of(path: str, rank: int, *, fsdp: bool = False, rules: Rules = RULES) -> P:
    """The spec of the variable `path` ("params/encoder/...") of `rank` axes.

    The layers of a stack may be one array each, `.../layers/...`, with an axis of the layers in
    front: that one is never divided.

    Raises:
        InputError: no row covers it, or its row has more axes than it.
    """
    spec = next((spec for pattern, spec in rules if re.fullmatch(pattern, path)), None)
    if spec is None:
        raise InputError(f"the sharding table has no row for variable {path!r}")
    stacked = "/layers/" in path
    meant = {"fsdp": ("data",) if fsdp and stacked else ()}
    # JAX reads an entry of one name, or none, like the name itself, or None.
    resolved = [
        tuple(real for name in _names(axis) for real in meant.get(name, (name,))) for axis in spec
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
    """Where the variable `path` ("params/encoder/...") lives.

    Raises:
        InputError: no row covers it, or the mesh does not divide it (`meshes.check_mesh` says
            that of a whole model, and what does).
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
    """`sharding_of` of every leaf of `variables`, after `check_rules`; errors as there."""
    check_rules(variables, rules)
    found = {
        path: sharding_of(path, leaf.shape, mesh, fsdp=fsdp, rules=rules)
        for path, leaf in flatten_paths(variables).items()
    }
    return unflatten_paths(found)


def bytes_per_device(
    variables: Tree, sizes: dict[str, int], *, fsdp: bool = False, rules: Rules = RULES
) -> int:
    """What one device holds of `variables`, leaves with shape and dtype, on such a mesh."""
    held = 0
    for path, leaf in flatten_paths(variables).items():
        spec = spec_of(path, len(leaf.shape), fsdp=fsdp, rules=rules)
        parts = math.prod(sizes[name] for axis in spec for name in _names(axis))
        held += math.prod(leaf.shape) // parts * leaf.dtype.itemsize
    return held
