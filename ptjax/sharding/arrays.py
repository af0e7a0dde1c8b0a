"""Arrays on a mesh: batches over `data`, keys and prompts everywhere, weights layer by layer."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ptjax.data.batch import PER_ROW
from ptjax.errors import InputError
from ptjax.models.layers import Quantized
from ptjax.models.stacking import gathered
from ptjax.sharding.rules import spec_of
from ptjax.trees import Tree


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


def reduction_groups(mesh: Mesh, *, microbatches: int, attends_to_input: bool) -> int:
    """`groups` of `make_train_step`, so that `data` sums one array a step, the prompt's gradient.

    1 where the compiler finds that sum by itself: from a batch in one piece whose rows each have
    the prompt before them.
    """
    return 1 if microbatches == 1 and attends_to_input else rows_divisor(mesh)


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
