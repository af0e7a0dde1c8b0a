"""Which backbone this is, whatever file, dtype or devices it came through."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ptjax.models.config import T5Config
from ptjax.models.stacking import Unstacked
from ptjax.scale import sharding
from ptjax.training.freeze import flatten_paths

SIZE_FIELDS = (
    "vocab_size",
    "emb_dim",
    "num_heads",
    "num_encoder_layers",
    "num_decoder_layers",
    "head_dim",
    "mlp_dim",
    "mlp_activations",
    "logits_via_embedding",
    "relpos_buckets",
)


def fingerprint(config: T5Config, params: Mapping[str, Any], mesh: Mesh) -> str:
    """ "sha256:..." over the sizes and the bfloat16 bytes of a fixed sample of the weights.

    The sample, in sorted T5X names: embedding rows 0, 97, 194, ..., every norm scale, the first
    row of each `wo` kernel. bfloat16 is the coarsest dtype that backbones are kept in. It is taken
    from the arrays on their devices, so that no file is read a second time.
    """
    samples = {}
    for path, array in flatten_paths(params).items():
        samples |= sample_of(path, array, mesh)
    return digest(config, samples)


def digest(config: T5Config, samples: Mapping[str, jax.Array]) -> str:
    """The fingerprint, from what `sample_of` took of each parameter."""
    hashed = hashlib.sha256()
    hashed.update(json.dumps({f: getattr(config, f) for f in SIZE_FIELDS}).encode())
    values = Unstacked(jax.device_get(samples))
    for path in sorted(values):
        hashed.update(path.encode())
        hashed.update(np.ascontiguousarray(values[path]).tobytes())
    return f"sha256:{hashed.hexdigest()}"


def sample_of(path: str, array: jax.Array, mesh: Mesh) -> dict[str, jax.Array]:
    """What the fingerprint takes of a parameter, by its name, if it takes any."""
    if not path.endswith(("/embedding", "/scale", "/wo/kernel")):
        return {}
    return {path: _sample(array, path.rsplit("/", 1)[1], "/layers/" in path, mesh)}


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _sample(array: jax.Array, name: str, stacked: bool, mesh: Mesh) -> jax.Array:
    """The fingerprint's rows of an array, or of each layer of a stack; on every device."""
    rows = {"embedding": np.s_[::97], "scale": np.s_[:], "kernel": np.s_[:1]}[name]
    chosen = array[:, rows] if stacked else array[rows]
    return jax.lax.with_sharding_constraint(chosen.astype(jnp.bfloat16), sharding.replicated(mesh))
