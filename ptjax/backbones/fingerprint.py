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

from ptjax.models.family import Family
from ptjax.models.stacking import UnstackedView
from ptjax.models.t5_family import T5_FAMILY
from ptjax.sharding.arrays import replicated
from ptjax.trees import flatten_paths

V1_KEY, V2_KEY = "backbone_fingerprint", "backbone_fingerprint_v2"
"""The metadata of a prompt that holds each."""

V2_PREFIX = "v2:"


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


def fingerprint(
    config: Any, params: Mapping[str, Any], mesh: Mesh, family: Family = T5_FAMILY
) -> Fingerprints:
    """Both fingerprints of parameters by ptjax's names.

    The sample is taken from the arrays on their devices, so that no file is read a second time.
    """
    samples = {}
    for path, array in flatten_paths(params).items():
        samples |= sample_of(path, array, mesh, family)
    return digest(config, samples, family)


def digest(
    config: Any, samples: Mapping[str, Mapping[str, jax.Array]], family: Family
) -> Fingerprints:
    """The fingerprints, from what `sample_of` took of each parameter."""
    sizes = {field: getattr(config, field) for field in family.old_fields}
    v1 = hashlib.sha256(json.dumps(sizes).encode())
    v2 = hashlib.sha256(json.dumps(_computed(config, family), sort_keys=True).encode())
    values = UnstackedView(jax.device_get(samples))
    for path in sorted(values):
        sample = {kind: np.ascontiguousarray(x).tobytes() for kind, x in values[path].items()}
        if "rows" in sample:
            v1.update(path.encode())
            v1.update(sample["rows"])
        v2.update(path.encode())
        for kind in sorted(sample):
            v2.update(sample[kind])
    return Fingerprints(f"sha256:{v1.hexdigest()}", f"{V2_PREFIX}{v2.hexdigest()}")


def _computed(config: Any, family: Family) -> dict[str, Any]:
    """The fields that the network's function depends on.

    One at its default is left out: a field that a later version adds changes no old fingerprint.
    """
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in family.not_computed and getattr(config, field.name) != field.default
    }


def sample_of(
    path: str, array: jax.Array, mesh: Mesh, family: Family
) -> dict[str, dict[str, jax.Array]]:
    """What the fingerprints take of a parameter, by its name."""
    ending = "/".join(path.split("/")[-2:])
    stacked = "/layers/" in path and "scanned layers" not in family.lacks
    return {path: _sample(array, ending, stacked, mesh, family)}


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _sample(
    array: jax.Array, ending: str, stacked: bool, mesh: Mesh, family: Family
) -> dict[str, jax.Array]:
    """The parts of an array, or of each layer of a stack, that the family samples.

    They are on every device.

    Args:
        ending: of the name, so that the layers of a network share one program.
    """
    layers = (slice(None),) if stacked else ()
    parts = family.fingerprint_parts(ending, array.shape[len(layers) :])
    taken = {kind: array[layers + part].astype(jnp.bfloat16) for kind, part in parts.items()}
    return jax.lax.with_sharding_constraint(taken, replicated(mesh))
