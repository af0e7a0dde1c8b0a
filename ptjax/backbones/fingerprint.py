"""Fingerprints: identify a backbone independently of file format, dtype and devices.

There are two, both over sizes and a sample of the weights in bfloat16, the coarsest dtype that
backbones are stored in. `v2` samples every parameter and covers every config field that affects the
logits. `v1` ("sha256:...") samples embeddings, norms and a row of each `wo` kernel, so it does not
distinguish a T5 with merged LoRA from its base. Prompts record both under separate keys: versions
of ptjax that only know v1 can read new prompts, and prompts with v1 alone stay valid.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ptjax.files import JsonObject, Metadata
from ptjax.models.family import Family
from ptjax.models.stacking import UnstackedView
from ptjax.models.t5_family import T5_FAMILY
from ptjax.sharding.arrays import replicated
from ptjax.trees import Tree, flatten_paths

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

V1_KEY, V2_KEY = "backbone_fingerprint", "backbone_fingerprint_v2"
"""Their keys in a prompt's metadata."""

V2_PREFIX = "v2:"


class Fingerprints(NamedTuple):
    """The two fingerprints of a backbone."""

    v1: str
    v2: str

    def compare(self, metadata: Metadata) -> tuple[str, str] | None:
        """(the fingerprint that a prompt records, this backbone's): equal for the same backbone.

        Uses v2 if it is recorded, else v1; None if the prompt records neither.
        """
        recorded = metadata.get(V2_KEY) or metadata.get(V1_KEY)
        if recorded is None:
            return None
        recorded = str(recorded)
        return recorded, self.v2 if recorded.startswith(V2_PREFIX) else self.v1

    def contradict(self, metadata: Metadata) -> bool:
        """Whether a prompt records that it was tuned on a different backbone."""
        pair = self.compare(metadata)
        return pair is not None and pair[0] != pair[1]

    def match_v1_alone(self, metadata: Metadata) -> bool:
        """Whether a prompt records this backbone's v1 and no v2."""
        return self.compare(metadata) == (self.v1, self.v1)

    def as_metadata(self) -> dict[str, str]:
        """The entries in the metadata of a prompt that is tuned on this backbone."""
        return {V1_KEY: self.v1, V2_KEY: self.v2}


def fingerprint(
    config: DataclassInstance, params: Tree, mesh: Mesh, family: Family = T5_FAMILY
) -> Fingerprints:
    """Both fingerprints of parameters under ptjax's names.

    Takes the sample from the arrays on their devices, so no file is read again.
    """
    samples = {}
    for path, array in flatten_paths(params).items():
        samples |= sample_of(path, array, mesh, family)
    return digest(config, samples, family)


def digest(
    config: DataclassInstance, samples: Mapping[str, Mapping[str, jax.Array]], family: Family
) -> Fingerprints:
    """Both fingerprints, from the result of `sample_of` for each parameter."""
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


def _computed(config: DataclassInstance, family: Family) -> JsonObject:
    """The fields that affect the logits.

    Fields at their default are omitted, so that a field added later changes no old fingerprint.
    """
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in family.not_computed and getattr(config, field.name) != field.default
    }


def sample_of(
    path: str, array: jax.Array, mesh: Mesh, family: Family
) -> dict[str, dict[str, jax.Array]]:
    """{path: the sample of the parameter}."""
    ending = "/".join(path.split("/")[-2:])
    stacked = "/layers/" in path and "scanned layers" not in family.lacks
    return {path: _sample(array, ending, stacked, mesh, family)}


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _sample(
    array: jax.Array, ending: str, stacked: bool, mesh: Mesh, family: Family
) -> dict[str, jax.Array]:
    """The parts of an array, or of each layer of a stack, that the family samples; replicated.

    Args:
        ending: the last two names of the path, so that all layers share one compiled program.
    """
    layers = (slice(None),) if stacked else ()
    parts = family.fingerprint_parts(ending, array.shape[len(layers) :])
    taken = {kind: array[layers + part].astype(jnp.bfloat16) for kind, part in parts.items()}
    return jax.lax.with_sharding_constraint(taken, replicated(mesh))
