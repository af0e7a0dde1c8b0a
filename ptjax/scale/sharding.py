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

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ptjax.data.batch import PER_ROW
from ptjax.errors import InputError
from ptjax.models.family import Rules
from ptjax.models.layers import Quantized
from ptjax.models.stacking import gathered
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


def stack_layers(layers: Iterable[Tree], count: int) -> Tree:
    """What `count` layers have, as arrays with an axis of the layers in front, never divided.

    Each is written into its place before the next one is asked for: one layer is all that is held
    twice, on the devices and, while it is read, on the host.
    """
    stacked = None
    for number, layer in enumerate(layers):
        if stacked is None:
            stacked = jax.tree.map(functools.partial(_empty_stack, count), layer)
        stacked = jax.tree.map(
            lambda stack, own, number=number: _layer_writer(stack.sharding)(stack, own, number),
            stacked,
            layer,
        )
    return stacked


def _empty_stack(count: int, layer: jax.Array) -> jax.Array:
    where = layer.sharding
    assert isinstance(where, NamedSharding)
    spec = P(None, *where.spec) if len(where.spec) else P()
    make = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=NamedSharding(where.mesh, spec))
    return make((count, *layer.shape), layer.dtype)


@functools.cache
def _layer_writer(where: NamedSharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """(stack, a layer, its number) -> the stack with it, in the same memory."""

    def write(stack: jax.Array, layer: jax.Array, number: int) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, layer, number, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=where)


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


def make_mesh(shape: int | Sequence[int] = 1, devices: Iterable[jax.Device] | None = None) -> Mesh:
    """All `devices` as `data` x `model`, or as `replica` x `data` x `model`.

    Neighbours on `model`, the axis that communicates most, are neighbours in the machine; the first
    axis goes over the slices, where there are several. The devices may be of a topology that is
    only compiled for.

    Args:
        shape: the sizes of two or three axes; an int is `model` alone, `data` has the rest and
            `replica` the slices, if there are several.

    Raises:
        InputError: the devices cannot be divided so.
    """
    found = list(jax.devices() if devices is None else devices)
    slices = count_slices(found)
    if isinstance(shape, int):
        if shape < 1 or len(found) // slices % shape:
            each = f"{len(found)} devices" + (f" in {slices} slices" if slices > 1 else "")
            raise InputError(f"{each} cannot be divided into a model axis of {shape}")
        rest = len(found) // slices // shape
        shape = (rest, shape) if slices == 1 else (slices, rest, shape)
    check_shape(shape, found)
    axis_types = (AxisType.Auto,) * len(shape)
    return Mesh(_arrange(tuple(shape), slices, found), AXES[-len(shape) :], axis_types=axis_types)


def check_shape(shape: Sequence[int], devices: Sequence[Any]) -> None:
    """InputError unless a mesh of `shape` takes all devices and its first axis the slices."""
    slices = count_slices(devices)
    name = "x".join(map(str, shape))
    if len(shape) not in (2, 3) or min(shape) < 1 or math.prod(shape) != len(devices):
        raise InputError(
            f"a mesh of {name} is {math.prod(shape)} devices, and there are {len(devices)}; it is "
            "data x model, or replica x data x model"
        )
    if shape[0] % slices:
        raise InputError(
            f"a mesh of {name}: the devices are in {slices} slices, and the first axis, "
            f"{shape[0]}, is not a multiple of them"
        )


def _arrange(shape: tuple[int, ...], slices: int, devices: list[jax.Device]) -> np.ndarray:
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        within = (shape[0] // slices, *shape[1:])
        across = (slices, *(1 for _ in shape[1:]))
        return mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )
    except (ValueError, NotImplementedError, AssertionError) as error:
        name = "x".join(map(str, shape))
        reason = str(error).splitlines()[0] if str(error) else "not a block of the machine"
        raise InputError(f"these devices make no mesh of {name}: {reason}") from error


def count_slices(devices: Iterable[Any]) -> int:
    """In how many slices they are; those that do not say are in one."""
    return len({getattr(device, "slice_index", 0) for device in devices})


@functools.cache
def gather_layer(mesh: Mesh) -> Callable[[Tree], Tree]:
    """A layer's parameters -> the same as the table has them without FSDP.

    What FSDP does before weights are used. Said of the weights, for the compiler alone may move the
    activations instead, which are larger. The same object for the same mesh: jit caches by it.
    """

    def gather(variables: Tree) -> Tree:
        def whole(path: Any, weights: Any) -> Any:
            if isinstance(weights, Quantized):  # its scales are whole
                return dataclasses.replace(weights, values=whole(path, weights.values))
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            where = NamedSharding(mesh, spec_of(name, weights.ndim))
            return gathered(jax.lax.with_sharding_constraint(weights, where))

        return jax.tree.map_with_path(whole, variables, is_leaf=lambda x: isinstance(x, Quantized))

    return gather


def reduction_groups(mesh: Mesh, *, microbatches: int, sees_input: bool) -> int:
    """`groups` of `make_train_step`, so that `data` sums one array a step, the prompt's gradient.

    1 where the compiler finds that sum by itself: from a batch in one piece whose rows each have
    the prompt before them.
    """
    return 1 if microbatches == 1 and sees_input else rows_divisor(mesh)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def rows_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes over which the rows of a batch are divided."""
    return tuple(name for name in mesh.axis_names if name != "model")


def rows_divisor(mesh: Mesh) -> int:
    """Of what the number of rows of a batch is a multiple: replica x data."""
    return math.prod(mesh.shape[name] for name in rows_axes(mesh))


def replicate_key(key: jax.Array, mesh: Mesh) -> jax.Array:
    """Typed random keys on every device of the mesh; `jax.device_put` cannot, across processes."""
    data = np.asarray(jax.random.key_data(key))
    return jax.random.wrap_key_data(jax.device_put(data, replicated(mesh)))


def batch_sharding(mesh: Mesh, rank: int = 2) -> NamedSharding:
    """Rows, the last axis but one, over `replica` and `data`; everything else whole."""
    return NamedSharding(mesh, P(*[None] * (rank - 2), rows_axes(mesh)) if rank > 1 else P())


def sharding_in_batch(name: str, rank: int, mesh: Mesh) -> NamedSharding:
    """Of the array `name` of a batch; one number a row lies where the row does."""
    return batch_sharding(mesh, rank + (name in PER_ROW))


def put_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """A global batch, which every process has whole, as arrays over `data`, see `batch_sharding`.

    Each process moves what its own devices hold, however the mesh lies over the processes.
    """
    return {
        name: jax.make_array_from_callback(
            rows.shape, sharding_in_batch(name, rows.ndim, mesh), rows.__getitem__
        )
        for name, rows in batch.items()
    }


def check_batch_size(batch_size: int, mesh: Mesh, microbatches: int = 1) -> None:
    """InputError unless the mesh divides the rows of every microbatch equally."""
    step = rows_divisor(mesh) * microbatches
    if batch_size % step:
        lower = batch_size // step * step
        near = [str(size) for size in (lower, lower + step) if size]
        parts = f", in {microbatches} microbatches," if microbatches > 1 else ""
        raise InputError(
            f"batch size {batch_size}{parts} is not a multiple of the {rows_divisor(mesh)} devices "
            f"on the mesh's {' x '.join(rows_axes(mesh))} axis; choose {' or '.join(near)}, or "
            "another MESH"
        )
