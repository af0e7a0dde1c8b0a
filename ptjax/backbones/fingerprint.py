"""Fingerprints, which identify a backbone independently of file format, dtype and devices.

There are two, both hashes of sizes and a sample of the weights in bfloat16, the coarsest dtype that
backbones are stored in. `v2` samples every parameter and covers every config field that affects the
logits. `v1` ("sha256:...") samples embeddings, norms and a row of each `wo` kernel, so it does not
distinguish a T5 with merged LoRA from its base. Prompts record both under separate keys: versions
of ptjax that only know v1 can read new prompts, and prompts with v1 alone stay valid.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ptjax.files import JsonObject, Metadata
from ptjax.models.family import Family
from ptjax.models.stacking import UnstackedView
from ptjax.models.t5_family import T5_FAMILY
from ptjax.sharding import processes
from ptjax.trees import Tree, flatten_paths

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

V1_KEY, V2_KEY = "backbone_fingerprint", "backbone_fingerprint_v2"
"""The keys of the two fingerprints in a prompt's metadata."""

V2_PREFIX = "v2:"


class Fingerprints(NamedTuple):
    """The two fingerprints of a backbone: "sha256:..." and "v2:...".

    The methods compare them with the metadata of a prompt, which record the fingerprints of the
    backbone that the prompt was tuned on.
    """

    v1: str
    v2: str

    def compare(self, metadata: Metadata) -> tuple[str, str] | None:
        """Returns the pair (fingerprint in a prompt's metadata, this backbone's fingerprint).

        Both are v2 if the prompt records a v2, else v1. They are equal if the prompt was tuned on
        this backbone. Returns None if the prompt records no fingerprint.

        Args:
            metadata: the prompt's metadata.
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
        """Whether a prompt records this backbone's v1 and no v2, as older ptjax versions did."""
        return self.compare(metadata) == (self.v1, self.v1)

    def as_metadata(self) -> dict[str, str]:
        """The entries for the metadata of a prompt that is tuned on this backbone."""
        return {V1_KEY: self.v1, V2_KEY: self.v2}


class Sample(NamedTuple):
    """The values of one part of a parameter that are in this process's shards.

    A part is a slice of the parameter that a fingerprint hashes (`Family.fingerprint_parts`). If a
    shard is replicated, only the process with the first replica holds its values.

    Attributes:
        shape: the shape of the whole part, with the values of all processes.
        held: for each shard that overlaps the part, (slices into the part, values in bfloat16).
    """

    shape: tuple[int, ...]
    held: list[tuple[tuple[slice, ...], np.ndarray | jax.Array]]


def fingerprint(
    config: DataclassInstance, params: Tree, family: Family = T5_FAMILY
) -> Fingerprints:
    """Computes the v1 and v2 fingerprints of a backbone from its loaded parameters.

    Samples the arrays where they are, on the devices; reads no file. All processes must call it
    together.

    Args:
        config: the network's config.
        params: the parameter tree, with ptjax's parameter names (not Hugging Face's).
    """
    samples = {}
    for path, array in flatten_paths(params).items():
        samples |= sample_of(path, array, family)
    return digest(config, exchange(samples), family)


def digest(
    config: DataclassInstance, samples: Mapping[str, Mapping[str, np.ndarray]], family: Family
) -> Fingerprints:
    """Computes both fingerprints from the samples of the parameters.

    Args:
        config: the network's config.
        samples: maps each parameter name to {name of a part: values in bfloat16}, with the parts
            that `family.fingerprint_parts` names.
        family: the kind of network.
    """
    sizes = {field: getattr(config, field) for field in family.old_fields}
    v1 = hashlib.sha256(json.dumps(sizes).encode())
    v2 = hashlib.sha256(json.dumps(_computed(config, family), sort_keys=True).encode())
    values = UnstackedView(samples)
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


def sample_of(path: str, array: jax.Array, family: Family) -> dict[str, dict[str, Sample]]:
    """Copies the values that the fingerprints hash from this process's shards of one parameter.

    Does not wait for other processes, nor for accelerators. `exchange` then combines the samples of
    all processes. Returns {path: {name of a part: sample}}; see `Sample`.

    Args:
        path: the parameter's name, which determines the parts (`family.fingerprint_parts`).
        array: the parameter; with scanned layers, the stacked parameter of all layers.
        family: the kind of network.
    """
    ending = "/".join(path.split("/")[-2:])
    stacked = "/layers/" in path and "scanned layers" not in family.lacks
    layers = (slice(None),) if stacked else ()
    parts = family.fingerprint_parts(ending, array.shape[len(layers) :])
    return {path: {kind: _sample(array, layers + part) for kind, part in parts.items()}}


def _sample(array: jax.Array, part: tuple[slice, ...]) -> Sample:
    picked = [np.arange(size)[along] for size, along in zip(array.shape, part, strict=True)]
    held = []
    for shard in array.addressable_shards:
        if shard.replica_id:
            continue
        place, local = [], []
        for indices, along in zip(picked, shard.index, strict=True):
            start, stop, _ = along.indices(array.shape[len(place)])
            first, last = np.searchsorted(indices, (start, stop))
            place.append(slice(first, last))
            local.append(indices[first:last] - start)
        if all(map(len, local)):
            held.append((tuple(place), _pick(shard.data, local)))
    return Sample(tuple(map(len, picked)), held)


def _pick(shard: jax.Array, indices: list[np.ndarray]) -> np.ndarray | jax.Array:
    """The values at the crossings of `indices`, in bfloat16."""
    if next(iter(shard.devices())).platform == "cpu":  # compiling would take longer than the rest
        with np.errstate(invalid="ignore"):  # a damaged file may hold any bits
            return np.asarray(shard)[np.ix_(*indices)].astype(jnp.bfloat16)
    return pick_on_device(shard, indices)


@jax.jit
def pick_on_device(shard: jax.Array, indices: list[np.ndarray]) -> jax.Array:
    """As `_pick`, without copying the shard to the host."""
    return shard[jnp.ix_(*indices)].astype(jnp.bfloat16)


def exchange(samples: Mapping[str, Mapping[str, Sample]]) -> dict[str, dict[str, np.ndarray]]:
    """Combines the samples of all processes; returns the whole parts on every process.

    All processes must call it together. A single collective sums all samples: with one collective
    per parameter, processes on CPUs would sometimes wait for each other forever.
    """
    sizes = [math.prod(sample.shape) for parts in samples.values() for sample in parts.values()]
    bits = np.zeros(sum(sizes), np.uint16)
    taken = iter(np.split(bits, np.cumsum(sizes)[:-1]))
    arrays = {
        path: {kind: next(taken).reshape(sample.shape) for kind, sample in parts.items()}
        for path, parts in samples.items()
    }
    for path, parts in samples.items():
        for kind, sample in parts.items():
            for place, values in sample.held:
                arrays[path][kind][place] = np.asarray(values).view(np.uint16)
    bits[:] = processes.sum_of_all(bits)
    return jax.tree.map(lambda array: array.view(jnp.bfloat16), arrays)
