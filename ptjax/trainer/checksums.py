"""Computes and verifies checksums of checkpoints: Orbax does not notice every damaged file."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ptjax.errors import one_line
from ptjax.files import JsonObject
from ptjax.training.step import TrainState

Sums = list[list[int]]
"""Two checksums for every array of a state, in the order of `jax.tree.leaves`."""
READ_TWICE = 1 << 30
"""Number of bytes of a checkpoint to verify before Orbax reads it; Orbax reports damage in the
rest."""


def hash_json(progress: JsonObject, identity: JsonObject, sums: Sums) -> str:
    """Computes the hexadecimal SHA-256 of the JSON of a checkpoint, checksums included."""
    text = json.dumps([progress, identity, sums], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sum_arrays(state: TrainState) -> Sums:
    """Computes two checksums over the bits of every array, on the devices.

    They differ if any single element differs, or if elements are at other positions. All processes
    must call it together.
    """
    sums = jax.device_get(_sum_bits(jax.tree.leaves(state)))
    return np.asarray(sums).tolist()


@jax.jit
def _sum_bits(leaves: list[jax.Array]) -> jax.Array:
    """[number of leaves, 2] uint32, computed on the devices: no host needs a whole array."""
    return jnp.stack([_sum_array(leaf) for leaf in leaves])


def _sum_array(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    unsigned = jnp.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}")
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        index = index * np.uint32(size) + along
    # Odd factors, which are invertible modulo 2^32: no single difference is lost.
    factors = (index * np.uint32(2_654_435_761)) | np.uint32(1)
    return jnp.stack([jnp.sum(bits), jnp.sum(bits * factors)])


def find_damage(folder: epath.Path, *, remote: bool) -> str:
    """Reads the files of the arrays in `folder`; returns what is damaged, "" if nothing is.

    It reads the first `READ_TWICE` bytes or a little more, and only files in Orbax's format OCDBT;
    Orbax itself reports other damage. It comes first because half-read arrays that Orbax abandons
    print tracebacks, some of them long after.

    Args:
        folder: the item `state` of a checkpoint.
        remote: whether `folder` is a URL, such as gs://...
    """
    import tensorstore as ts

    try:
        if not json.loads((folder / "_METADATA").read_bytes()).get("use_ocdbt"):
            return ""
        base = os.fspath(folder) if remote else folder.absolute().as_uri()
        spec: Any = {"driver": "ocdbt", "base": f"{base}/"}
        store: Any = ts.KvStore.open(spec).result()
        size = 0
        keys = store.list().result()
        if not keys:  # tensorstore reads a folder without a manifest as an empty database
            return f"{folder} holds no arrays"
        for key in keys:
            size += len(store.read(key).result().value)  # which verifies tensorstore's checksums
            if size > READ_TWICE:
                break
    except (OSError, ValueError, AttributeError) as error:
        return one_line(error)
    return ""
