"""`load_backbone`: a path becomes a frozen network on a mesh."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

import jax
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ptjax.backbones.fingerprint import Fingerprints, digest, sample_of
from ptjax.backbones.open import OpenBackbone, open_backbone
from ptjax.data.tokenizer import Tokenizer
from ptjax.errors import check_choice
from ptjax.interop.lazy_array import Index, LazyArray, cast
from ptjax.models.config import Dtype, T5Config
from ptjax.models.family import Family, check_supported
from ptjax.models.layers import Quantized
from ptjax.models.stacking import GatherFn, stack_paths
from ptjax.models.t5_family import T5_FAMILY
from ptjax.sharding.arrays import gather_layer, stack_layers
from ptjax.sharding.meshes import choose_mesh
from ptjax.sharding.quantize import quantize_sharded
from ptjax.sharding.rules import check_rules, sharding_of
from ptjax.trees import unflatten_paths


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A frozen network, ready for a prompt.

    Attributes:
        variables: `{"params": ...}`, of a T5 under T5X's names.
        apply_fn: `make_apply_fn(True)`, for prompts that see their input.
        fingerprint: "v2:..." of sizes and a sample of every parameter; equal whatever file format,
            dtype or number of devices they came through.
        name: what the user called it: a path, a hub id with its revision, "ptjax-nano".
        mesh: where the variables live; with `fsdp` each divided over its `data` axis too.
        quantize: "int8" where kernels are `Quantized`.
        assumed: config fields that the files do not tell, at the family's values.
        fingerprint_v1: "sha256:...", of the part that older prompts know; see `fingerprint`.
        family: what kind of network it is.
    """

    config: Any
    variables: dict[str, Any]
    apply_fn: Callable[..., Any]
    tokenizer: Tokenizer | None
    fingerprint: str
    name: str
    mesh: Mesh
    fsdp: bool = False
    quantize: str | None = None
    assumed: tuple[str, ...] = ()
    fingerprint_v1: str = ""
    family: Family = T5_FAMILY

    @property
    def fingerprints(self) -> Fingerprints:
        """Both, for what a prompt records."""
        return Fingerprints(self.fingerprint_v1, self.fingerprint)

    def make_apply_fn(
        self, attends_to_input: bool, collections: tuple[str, ...] = ()
    ) -> Callable[..., Any]:
        """`apply_fn` for a prompt of that kind.

        Args:
            collections: beside `params`, those in which modules of the network have arrays.
        """
        if not attends_to_input:
            check_supported(self.family, "blind prompts")
        gather = _gather(self.mesh, self.fsdp)
        kept = {"gather": gather, "collections": collections}
        return self.family.build(self.config, attends_to_input=attends_to_input, **kept)

    @property
    def embedding(self) -> jax.Array:
        """The table [V, D] of the input's tokens."""
        return self.family.embedding(self.variables["params"])


def load_backbone(
    path: str | os.PathLike[str],
    *,
    dtype: Dtype | None = None,
    mesh: Mesh | str | None = None,
    fsdp: bool = False,
    quantize: Literal["int8"] | None = None,
    tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
    family: Family | None = None,
    **config_overrides: Annotated[Any, T5Config],
) -> Backbone:
    """Loads a T5X checkpoint (legacy or Orbax) or a Hugging Face directory or hub id.

    A tree under T5X's names that Orbax (0.4 or newer, also its v1) saved is read as T5X's are:
    bare, or below `params` or `target`.

    Args:
        path: local or gs://; "ptjax-nano" is the backbone that ptjax ships; a hub id may end in
            "@revision". A folder of several `checkpoint_N`, or steps of Orbax, means the newest.
        dtype: of weights and activations; None is bfloat16 on TPU and GPU and float32 on CPU.
        mesh: arrays go straight to their place on it; 'auto', '8x1', '2x4' (data x model) or
            '2x2x2' (replica x data x model) are all devices (`meshes.choose_mesh`); None is
            the first device or, on several processes, all of them.
        fsdp: weights are divided over `data` too, and gathered layer by layer; needs
            `scan_layers`.
        quantize: "int8" holds the kernels in a byte an entry, see `sharding.quantize`.
        tokenizer: a tokenizer, or where to find one; None looks beside the weights.
        family: of a network that is not ptjax's own T5, such as `flax_module(...)`; it takes a
            `model.safetensors` under its parameters' own names too.
        **config_overrides: fields of `T5Config`, or of the family's config, that the files do not
            tell or tell wrongly.

    Raises:
        InputError: the path holds no backbone, or an incomplete or damaged one; a setting does
            not fit it, or the mesh does not divide it.
    """
    first = mesh.devices.flat[0] if isinstance(mesh, Mesh) else jax.local_devices()[0]
    dtype = dtype or ("float32" if first.platform == "cpu" else "bfloat16")
    check_dtypes(dtype, quantize)
    family = family or T5_FAMILY
    if fsdp:
        check_supported(family, "fsdp")
    if quantize:
        check_supported(family, "int8")
    opened = open_backbone(
        path, dtype=dtype, tokenizer=tokenizer, family=family, **config_overrides
    )
    if opened.prompt is not None:
        logging.warning(
            "%s also holds a prompt, left out here; load_prompt(path) returns it", opened.name
        )
    check_rules({"params": opened.arrays}, family.sharding_rules)
    mesh = choose_mesh(mesh, opened.config, dtype, fsdp=fsdp, quantize=quantize, family=family)
    params, samples = _load_params(opened, dtype, mesh, fsdp, quantize)
    fingerprints = digest(opened.config, samples, family)
    return Backbone(
        config=opened.config,
        variables={"params": unflatten_paths(params)},
        apply_fn=family.build(opened.config, gather=_gather(mesh, fsdp)),
        tokenizer=opened.tokenizer,
        fingerprint=fingerprints.v2,
        name=opened.name,
        mesh=mesh,
        fsdp=fsdp,
        quantize=quantize,
        assumed=opened.assumed,
        fingerprint_v1=fingerprints.v1,
        family=family,
    )


def check_dtypes(dtype: str, quantize: str | None) -> None:
    """InputError unless a backbone can be held so."""
    check_choice(get_args(Dtype), "load_backbone", dtype=dtype)  # T5 overflows in float16
    check_choice(("int8", None), "load_backbone", quantize=quantize)


def _gather(mesh: Mesh, fsdp: bool) -> GatherFn | None:
    return gather_layer(mesh) if fsdp else None


def _load_params(
    opened: OpenBackbone, dtype: str, mesh: Mesh, fsdp: bool, quantize: str | None
) -> tuple[dict[str, jax.Array | Quantized], dict[str, dict[str, jax.Array]]]:
    """(parameters on the mesh by their paths, what the fingerprints take of them)."""
    samples: dict[str, dict[str, jax.Array]] = {}
    family, rules = opened.family, opened.family.sharding_rules

    def load(path: str, where: NamedSharding) -> jax.Array | Quantized:
        # Popped, for an array inside of a T5X msgpack is in memory already.
        array = place(cast(opened.arrays.pop(path), dtype), where)
        samples.update(sample_of(path, array, mesh, family))
        return quantize_sharded(array) if quantize and family.is_quantized(path) else array

    def place_of(name: str, shape: tuple[int, ...]) -> NamedSharding:
        return sharding_of(f"params/{name}", shape, mesh, fsdp=fsdp, rules=rules)

    # The largest first: what reading takes besides its result is free again before memory fills.
    shapes = {path: array.shape for path, array in opened.arrays.items()}
    largest_first = sorted(shapes, key=lambda path: -math.prod(shapes[path]))
    names: dict[str, Any] = {path: path for path in largest_first}
    if opened.config.scan_layers:
        names = stack_paths(names, tuple)
    params = {}
    for name, paths in names.items():
        if isinstance(paths, str):
            where = place_of(name, shapes[paths])
            params[name] = load(paths, where)
        else:
            shape = (len(paths), *shapes[paths[0]])
            where = place_of(name, shape)
            of_layer = NamedSharding(mesh, P(*where.spec[1:]))
            layers = (load(path, of_layer) for path in paths)
            params[name] = stack_layers(layers, len(paths))
    return params, samples


def place(stored: LazyArray, where: NamedSharding) -> jax.Array:
    """`stored` on the devices.

    Only the parts that this process's devices hold are read, together and each once, however many
    devices hold it.
    """

    def bounds(index: Index | None) -> tuple[tuple[int, int], ...]:
        pairs = zip(index or (), stored.shape, strict=True)
        return tuple(part.indices(size)[:2] for part, size in pairs)

    held = where.addressable_devices_indices_map(stored.shape)
    wanted = dict.fromkeys(map(bounds, held.values()))
    read = stored.read_parts([tuple(slice(*bound) for bound in part) for part in wanted])
    parts = dict(zip(wanted, read, strict=True))
    return jax.make_array_from_callback(stored.shape, where, lambda index: parts[bounds(index)])
