"""Puts arrays on a mesh: batches divided over `data`, random keys and prompts replicated."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ptjax.data.batch import PER_ROW, Batch
from ptjax.errors import InputError
from ptjax.models.layers import Quantized
from ptjax.models.stacking import gathered
from ptjax.sharding.rules import spec_of
from ptjax.trees import Tree


def stack_layers(layers: Iterable[Tree], count: int) -> Tree:
    """Stacks the arrays of `count` layers along a new first axis, over which they are not sharded.

    Writes each layer into the stack before it takes the next one from `layers`, so at most one
    layer is in memory twice, on the devices and on the host.

    Args:
        layers: trees of arrays with a `NamedSharding`.
    """
    stacked = None
    for number, layer in enumerate(layers):
        if stacked is None:
            stacked = jax.tree.map(functools.partial(_empty_stack, count), layer)
        stacked = jax.tree.map(
            lambda stack, array, number=number: _layer_writer(stack.sharding)(stack, array, number),
            stacked,
            layer,
        )
    return stacked


def _empty_stack(count: int, layer: jax.Array) -> jax.Array:
    sharding = layer.sharding
    assert isinstance(sharding, NamedSharding)
    spec = P(None, *sharding.spec) if len(sharding.spec) else P()
    stacked = NamedSharding(sharding.mesh, spec)
    make = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=stacked)
    return make((count, *layer.shape), layer.dtype)


@functools.cache
def _layer_writer(sharding: NamedSharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """A function (stack, layer, number) -> the stack with that layer, in the same memory."""

    def write(stack: jax.Array, layer: jax.Array, number: int) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, layer, number, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


@functools.cache
def gather_layer(mesh: Mesh) -> Callable[[Tree], Tree]:
    """Returns a function that gathers a layer's parameters: they are then sharded as without FSDP.

    With FSDP it runs before each layer. Without this constraint on the weights, the compiler may
    move the activations instead, which are larger. Equal meshes get the same function object,
    which is part of jit's cache key.
    """

    def gather(variables: Tree) -> Tree:
        def whole(path: jax.tree_util.KeyPath, weights: Tree) -> Tree:
            if isinstance(weights, Quantized):  # its scales are never divided over `data`
                return dataclasses.replace(weights, values=whole(path, weights.values))
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            sharding = NamedSharding(mesh, spec_of(name, weights.ndim))
            return gathered(jax.lax.with_sharding_constraint(weights, sharding))

        return jax.tree.map_with_path(whole, variables, is_leaf=lambda x: isinstance(x, Quantized))

    return gather


def reduction_groups(mesh: Mesh, *, microbatches: int, attends_to_input: bool) -> int:
    """The argument `groups` with which `make_train_step` sums one gradient over `data` per step.

    It is 1 if the compiler does that without groups: for a batch in one microbatch, each of whose
    rows has its own copy of the prompt (`attends_to_input`).
    """
    return 1 if microbatches == 1 and attends_to_input else rows_divisor(mesh)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device of the mesh holds whole."""
    return NamedSharding(mesh, P())


def rows_axes(mesh: Mesh) -> tuple[str, ...]:
    """The names of the axes over which the rows of a batch are divided: all except `model`."""
    return tuple(name for name in mesh.axis_names if name != "model")


def rows_divisor(mesh: Mesh) -> int:
    """The number of parts into which a batch's rows are divided: the sizes replica x data."""
    return math.prod(mesh.shape[name] for name in rows_axes(mesh))


def replicate_key(key: jax.Array, mesh: Mesh) -> jax.Array:
    """Copies typed random keys to every device of the mesh.

    Works across processes, where `jax.device_put` of typed keys fails.
    """
    data = np.asarray(jax.random.key_data(key))
    return jax.random.wrap_key_data(jax.device_put(data, replicated(mesh)))


def batch_sharding(mesh: Mesh, rank: int = 2) -> NamedSharding:
    """The sharding of a batch's array: its rows, the axis before the last, over `replica`, `data`.

    Other axes are not divided; an array of rank 0 or 1 is replicated.
    """
    return NamedSharding(mesh, P(*[None] * (rank - 2), rows_axes(mesh)) if rank > 1 else P())


def sharding_in_batch(name: str, rank: int, mesh: Mesh) -> NamedSharding:
    """The sharding of a batch's array `name`, of this rank.

    As `batch_sharding`; the rows of an array with one number per row are its last axis.
    """
    return batch_sharding(mesh, rank + (name in PER_ROW))


def put_batch(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a global batch on the mesh, sharded as by `sharding_in_batch`.

    Every process passes the whole batch and transfers only the rows of its own devices.
    """
    return {
        name: jax.make_array_from_callback(
            rows.shape, sharding_in_batch(name, rows.ndim, mesh), rows.__getitem__
        )
        for name, rows in batch.items()
    }


def put_replicated(arrays: Iterable[np.ndarray], mesh: Mesh) -> tuple[jax.Array, ...]:
    """Puts arrays, of which every process has a whole copy, on every device of the mesh."""
    where = replicated(mesh)
    return tuple(jax.make_array_from_callback(x.shape, where, x.__getitem__) for x in arrays)


def check_batch_size(batch_size: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Raises InputError unless the mesh divides the rows of every microbatch equally."""
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
