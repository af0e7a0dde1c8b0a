"""Which backbone this is, whatever file, dtype or devices it came through.

There are two fingerprints, both over sizes and a sample of the weights in bfloat16, the coarsest
dtype that backbones are kept in. `v2` samples every parameter and covers everything that the
network computes with. `v1` ("sha256:...") samples embeddings, norms and a row of each `wo` kernel,
so a T5 with merged LoRA has the one of its base. Prompts record both, each under a key of its own:
versions of ptjax that know v1 alone go on reading new prompts, and prompts that record v1 alone
stay valid.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ptjax.models.config import T5Config
from ptjax.models.stacking import Unstacked
from ptjax.scale import sharding
from ptjax.trees import flatten_paths

V1_KEY, V2_KEY = "backbone_fingerprint", "backbone_fingerprint_v2"
"""The metadata of a prompt that holds each."""

V2_PREFIX = "v2:"

NOT_COMPUTED = (
    # How the network is run.
    "dtype",
    "dropout_rate",
    "scan_layers",
    "remat",
    # What its inputs and outputs mean.
    "pad_id",
    "eos_ids",
    "decoder_start_id",
    "forced_bos_id",
)
"""Fields of `T5Config` that change no logits of given tokens; v2 covers every other field."""

V1_FIELDS = (
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


class Fingerprints(NamedTuple):
    """Of one backbone."""

    v1: str
    v2: str

    def compare(self, metadata: Mapping[str, Any]) -> tuple[str, str] | None:
        """(what a prompt's metadata records, what this backbone has): equal if it is the same one.

        v2 decides where it is recorded; None where neither is.
        """
        recorded = metadata.get(V2_KEY) or metadata.get(V1_KEY)
        if recorded is None:
            return None
        recorded = str(recorded)
        return recorded, self.v2 if recorded.startswith(V2_PREFIX) else self.v1

    def contradict(self, metadata: Mapping[str, Any]) -> bool:
        """Whether a prompt records that it was tuned on another backbone."""
        pair = self.compare(metadata)
        return pair is not None and pair[0] != pair[1]

    def match_v1_alone(self, metadata: Mapping[str, Any]) -> bool:
        """Whether a prompt records this backbone's v1, and no v2."""
        return self.compare(metadata) == (self.v1, self.v1)

    def as_metadata(self) -> dict[str, str]:
        """What a prompt that is tuned on this backbone records."""
        return {V1_KEY: self.v1, V2_KEY: self.v2}


def fingerprint(config: T5Config, params: Mapping[str, Any], mesh: Mesh) -> Fingerprints:
    """Both fingerprints of parameters by T5X's names.

    The sample is taken from the arrays on their devices, so that no file is read a second time.
    """
    samples = {}
    for path, array in flatten_paths(params).items():
        samples |= sample_of(path, array, mesh)
    return digest(config, samples)


def digest(config: T5Config, samples: Mapping[str, Mapping[str, jax.Array]]) -> Fingerprints:
    """The fingerprints, from what `sample_of` took of each parameter."""
    sizes = {field: getattr(config, field) for field in V1_FIELDS}
    v1 = hashlib.sha256(json.dumps(sizes).encode())
    v2 = hashlib.sha256(json.dumps(_computed(config), sort_keys=True).encode())
    values = Unstacked(jax.device_get(samples))
    for path in sorted(values):
        sample = {kind: np.ascontiguousarray(x).tobytes() for kind, x in values[path].items()}
        if "rows" in sample:
            v1.update(path.encode())
            v1.update(sample["rows"])
        v2.update(path.encode())
        for kind in sorted(sample):
            v2.update(sample[kind])
    return Fingerprints(f"sha256:{v1.hexdigest()}", f"{V2_PREFIX}{v2.hexdigest()}")


def _computed(config: T5Config) -> dict[str, Any]:
    """The fields that the network's function depends on.

    One at its default is left out: a field that a later version adds changes no old fingerprint.
    """
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in NOT_COMPUTED and getattr(config, field.name) != field.default
    }


def sample_of(path: str, array: jax.Array, mesh: Mesh) -> dict[str, dict[str, jax.Array]]:
    """What the fingerprints take of a parameter, by its name."""
    module, name = path.split("/")[-2:]
    return {path: _sample(array, (module, name), "/layers/" in path, mesh)}


def sampled(path: str, shape: tuple[int, ...]) -> dict[str, tuple[slice, ...]]:
    """The parts of a parameter that are sampled, as the slices of each axis.

    "rows" (v1): embedding rows 0, 97, 194, ..., a whole norm scale, the first row of a `wo` kernel.
    "grid" (v2): every other parameter and `wo` at steps of at most 61 (fewer than a head is wide)
    along each axis, and at least 64 entries of an axis that has them. A dense change (another
    scale, merged LoRA, more training) shows in it, and that of a head or another band of rows or
    columns.

    >>> sampled("encoder/layers_0/attention/query/kernel", (512, 384))
    {'grid': (slice(None, None, 8), slice(None, None, 6))}
    """
    *_, module, name = path.split("/")
    every = slice(None)
    if name == "embedding":
        return {"rows": (slice(None, None, 97), every)}
    if name == "scale":
        return {"rows": (every,)}
    grid = tuple(slice(None, None, min(61, max(1, size // 64))) for size in shape)
    return {"rows": (slice(0, 1), every), "grid": grid} if module == "wo" else {"grid": grid}


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _sample(
    array: jax.Array, names: tuple[str, str], stacked: bool, mesh: Mesh
) -> dict[str, jax.Array]:
    """The `sampled` parts of an array, or of each layer of a stack; on every device."""
    layers = (slice(None),) if stacked else ()
    parts = sampled("/".join(names), array.shape[len(layers) :])
    taken = {kind: array[layers + part].astype(jnp.bfloat16) for kind, part in parts.items()}
    return jax.lax.with_sharding_constraint(taken, sharding.replicated(mesh))
