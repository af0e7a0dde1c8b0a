"""Puts arrays on a mesh: batches divided over the mesh axes of rows, others replicated."""

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
from ptjax.models.quantized import Quantized
from ptjax.models.stacking import gathered
from ptjax.sharding.rules import spec_of
from ptjax.trees import Tree


def stack_layers(layers: Iterable[Tree], count: int) -> Tree:
    """Stacks the arrays of `count` layers along a new first axis, which is not sharded.

    Writes each layer into the stack before it takes the next one from `layers`, so at most one
    layer is in memory twice, on the devices and on the host.

    Args:
        layers: yields a tree of arrays for each layer, all with a `NamedSharding`.
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
    """Returns a function that undoes FSDP's sharding: it gathers parameters that `data` divides.

    With FSDP the network applies this function to a layer's parameters before it runs the layer.
    Without it the compiler may move the activations instead, which are larger. Calls with equal
    meshes return the same function object, so that jit's cache, whose key contains it, is hit.
    """

    def gather(variables: Tree) -> Tree:
        def whole(path: jax.tree_util.KeyPath, weights: Tree) -> Tree:
            if isinstance(weights, Quantized):  # `data` never divides the rest
                return dataclasses.replace(weights, values=whole(path, weights.values))
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            sharding = NamedSharding(mesh, spec_of(name, weights.ndim))
            return gathered(jax.lax.with_sharding_constraint(weights, sharding))

        return jax.tree.map_with_path(whole, variables, is_leaf=lambda x: isinstance(x, Quantized))

    return gather


def reduction_groups(mesh: Mesh, *, microbatches: int, attends_to_input: bool) -> int:
    """Returns the `groups` for `make_train_step` with which devices sum gradients once per step.

    Usually this is `rows_divisor(mesh)`. It is 1 if the compiler sums once anyway: with one
    microbatch and `attends_to_input`.

    Args:
        microbatches: the number of parts of a batch whose gradients are computed one by one.
        attends_to_input: whether the prompt attends to the input; then every row of the batch has
            its own copy of the prompt.
    """
    return 1 if microbatches == 1 and attends_to_input else rows_divisor(mesh)


GROUPS = "groups"
"""The name of the axis under which `make_train_step` computes its groups of rows."""


def is_grouped() -> bool:
    """Whether a function is being traced for a group of rows."""
    try:
        jax.lax.axis_size(GROUPS)
    except NameError:  # JAX's for an axis that is not bound
        return False
    return True


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array of which every device of the mesh holds a whole copy."""
    return NamedSharding(mesh, P())


def rows_axes(mesh: Mesh) -> tuple[str, ...]:
    """The names of the axes over which the rows of a batch are divided: all except `model`."""
    return tuple(name for name in mesh.axis_names if name != "model")


def rows_divisor(mesh: Mesh) -> int:
    """The number of parts into which rows are divided: the product of the sizes of `rows_axes`."""
    return math.prod(mesh.shape[name] for name in rows_axes(mesh))


def replicate_key(key: jax.Array, mesh: Mesh) -> jax.Array:
    """Copies typed random keys to every device of the mesh.

    Works across processes, where `jax.device_put` of typed keys fails.
    """
    data = np.asarray(jax.random.key_data(key))
    return jax.random.wrap_key_data(jax.device_put(data, replicated(mesh)))


def batch_sharding(mesh: Mesh, rank: int = 2) -> NamedSharding:
    """The sharding of an array [..., rows, length] of a batch: divides the axis of rows.

    The rows are divided over the mesh axes `rows_axes`. Other axes are not divided, and an array of
    rank 0 or 1 is replicated.
    """
    return NamedSharding(mesh, P(*[None] * (rank - 2), rows_axes(mesh)) if rank > 1 else P())


def sharding_in_batch(name: str, rank: int, mesh: Mesh) -> NamedSharding:
    """The sharding of the array `name` of a batch, which has `rank` axes.

    It is that of `batch_sharding`, except for arrays with one number per row (`PER_ROW`): their
    rows are the last axis.
    """
    return batch_sharding(mesh, rank + (name in PER_ROW))


def put_batch(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a global batch on the mesh with the shardings of `sharding_in_batch`.

    Every process passes the whole batch and transfers only the rows of its own devices.
    """
    return {
        name: jax.make_array_from_callback(
            rows.shape, sharding_in_batch(name, rows.ndim, mesh), rows.__getitem__
        )
        for name, rows in batch.items()
    }


def put_replicated(arrays: Iterable[np.ndarray], mesh: Mesh) -> tuple[jax.Array, ...]:
    """Copies arrays to every device of the mesh; every process must pass the same whole arrays."""
    where = replicated(mesh)
    return tuple(jax.make_array_from_callback(x.shape, where, x.__getitem__) for x in arrays)


def check_batch_size(batch_size: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Raises InputError unless the rows of every microbatch divide equally over the devices."""
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
