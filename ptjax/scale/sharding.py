"""One table says where every array lives.

Pattern of a variable's path -> `PartitionSpec` over the mesh axes `data` and `model`; `jax.jit`
with `NamedSharding` (what pjit became) does the rest. Prompts and their optimizer state are small
and stay replicated, so that any host can write them.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ptjax.errors import InputError

RULES: tuple[tuple[str, P], ...] = (
    (r"params/token_embedder/embedding", P("model", None)),
    (r"params/.*/(query|key|value)/kernel", P(None, "model")),
    (r"params/.*/out/kernel", P("model", None)),
    (r"params/.*/(wi|wi_0|wi_1)/kernel", P(None, "model")),
    (r"params/.*/wo/kernel", P("model", None)),
    (r"params/decoder/logits_dense/kernel", P(None, "model")),
    (r"params/.*/(scale|rel_embedding)", P()),
    (r"prompt/.*", P()),
)


def make_mesh(model_parallelism: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """All devices as ("data", "model"), `model_parallelism` of them on the model axis.

    Raises:
        InputError: the devices cannot be divided so.
    """
    count = len(devices) if devices is not None else jax.device_count()
    if model_parallelism < 1 or count % model_parallelism:
        raise InputError(
            f"{count} devices cannot be divided into model_parallelism = {model_parallelism}; "
            "choose a divisor"
        )
    shape = (count // model_parallelism, model_parallelism)
    # By position: the first parameter's name changed between releases of JAX.
    return jax.make_mesh(shape, ("data", "model"), (AxisType.Auto,) * 2, devices=devices)


def sharding_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where the variable `path` ("params/encoder/...") lives.

    A dimension that its axis does not divide is replicated (T5 small has 6 heads).

    Raises:
        InputError: not exactly one kind of rule covers the path.
    """
    specs = {spec for pattern, spec in RULES if re.fullmatch(pattern, path)}
    if len(specs) != 1:
        raise InputError(f"the sharding table has {len(specs)} rules for variable {path!r}")
    spec = [
        axis if axis and size % mesh.shape[axis] == 0 else None
        for size, axis in zip(shape, tuple(specs.pop()), strict=False)
    ]
    return NamedSharding(mesh, P(*spec))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def replicate_key(key: jax.Array, mesh: Mesh) -> jax.Array:
    """Typed random keys on every device of the mesh; `jax.device_put` cannot, across processes."""
    data = np.asarray(jax.random.key_data(key))
    return jax.random.wrap_key_data(jax.device_put(data, replicated(mesh)))


def batch_sharding(mesh: Mesh, rank: int = 2) -> NamedSharding:
    """Rows, the last axis but one, over `data`; everything else whole."""
    return NamedSharding(mesh, P(*[None] * (rank - 2), "data") if rank > 1 else P())


def put_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """A global batch, which every process has whole, as arrays over `data`, see `batch_sharding`.

    Each process moves what its own devices hold, however the mesh lies over the processes.
    """
    return {
        name: jax.make_array_from_callback(
            rows.shape, batch_sharding(mesh, rows.ndim), rows.__getitem__
        )
        for name, rows in batch.items()
    }


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """InputError unless every device of the data axis gets the same number of rows."""
    if batch_size % mesh.shape["data"]:
        raise InputError(
            f"batch size {batch_size} is not a multiple of the {mesh.shape['data']} devices on "
            "the mesh's data axis; change BATCH_SIZE or make_mesh.model_parallelism"
        )
