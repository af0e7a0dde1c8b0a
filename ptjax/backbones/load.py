"""`load_backbone`: loads a frozen network from a path onto a mesh."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args

import jax
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ptjax.backbones.fingerprint import Fingerprints, Sample, digest, exchange, sample_of
from ptjax.backbones.open import OpenBackbone, open_backbone
from ptjax.data.tokenizer import Tokenizer
from ptjax.errors import InputError, check_choice, kind_of
from ptjax.files import JsonObject
from ptjax.interop.lazy_array import Index, LazyArray, cast
from ptjax.models.config import Dtype, T5Config
from ptjax.models.family import ApplyFn, Family, Feature, check_supported
from ptjax.models.quantized import Quantization, Quantized, has_factors
from ptjax.models.stacking import stack_paths
from ptjax.models.t5_family import T5_FAMILY
from ptjax.sharding.arrays import gather_layer, stack_layers
from ptjax.sharding.attention import Attention, Kind, choose_attention, make_attend
from ptjax.sharding.devices import use_compile_cache
from ptjax.sharding.meshes import choose_mesh, mesh_name
from ptjax.sharding.quantize import quantize_sharded
from ptjax.sharding.rules import check_rules, sharding_of
from ptjax.trees import unflatten_paths


@dataclasses.dataclass(frozen=True, repr=False)
class Backbone:
    """A frozen network, ready for a prompt.

    Attributes:
        config: the network's config; for ptjax's own T5 a `T5Config`.
        variables: `{"params": ...}`; the parameters of a T5 have T5X's names.
        apply_fn: applies the network, with a prompt that attends to its input; `make_apply_fn`
            makes others.
        tokenizer: None if no tokenizer was set or found beside the weights.
        fingerprint: "v2:..." over sizes and a sample of every parameter; independent of file
            format, dtype and number of devices.
        name: where it was loaded from: a path, a hub id with its revision, or "ptjax-nano".
        mesh: the mesh of the variables.
        fsdp: whether the variables are sharded over the mesh axis `data` too.
        quantize: the `Quantization` if kernels are `Quantized`, else None.
        attention: "plain", "fused" or, on GPUs, "gpu".
        assumed: config fields that the files do not state, set to the family's defaults.
        fingerprint_v1: "sha256:...", the only fingerprint that older prompts record; see the
            module `fingerprint`.
        family: the kind of network.
        arguments: the arguments of `load_backbone`, without defaults, that loaded it; empty if it
            was made otherwise.
    """

    config: Any
    variables: dict[str, Any]
    apply_fn: ApplyFn
    tokenizer: Tokenizer | None
    fingerprint: str
    name: str
    mesh: Mesh
    fsdp: bool = False
    quantize: str | None = None
    attention: str = "plain"
    assumed: tuple[str, ...] = ()
    fingerprint_v1: str = ""
    family: Family = T5_FAMILY
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        """Its name and size; the weights would fill the screen."""
        count = sum(x.size for x in jax.tree.leaves(self.variables.get("params")))
        return f"<Backbone {self.name}: {count:,} parameters, width {self.config.emb_dim}>"

    @property
    def fingerprints(self) -> Fingerprints:
        """Both fingerprints, to compare with those in a prompt's metadata."""
        return Fingerprints(self.fingerprint_v1, self.fingerprint)

    def make_apply_fn(self, attends_to_input: bool, collections: tuple[str, ...] = ()) -> ApplyFn:
        """Makes a function that is called like `apply_fn`, but with other settings.

        Args:
            attends_to_input: whether prompt positions attend to the input.
            collections: names of further variable collections, in addition to `params`, from which
                the network's modules read arrays.

        Raises:
            InputError: the family does not support prompts that do not attend to their input.
        """
        if not attends_to_input:
            check_supported(self.family, "blind prompts")
        kept: JsonObject = {"collections": collections}
        kept |= _on_mesh(self.mesh, self.fsdp, self.attention)
        return self.family.build(self.config, attends_to_input=attends_to_input, **kept)

    @property
    def embedding(self) -> jax.Array:
        """The embedding [V, D] of the input's tokens."""
        return self.family.embedding(self.variables["params"])


def check_backbone(backbone: object) -> None:
    """Raises InputError for what is not a backbone, such as the path of one."""
    if isinstance(backbone, str | os.PathLike):
        path = os.fspath(backbone)
        raise InputError(
            f"the backbone is {path!r}, which is not loaded; give ptjax.load_backbone({path!r})"
        )
    if not hasattr(backbone, "tokenizer"):
        raise InputError(
            f"the backbone is {kind_of(backbone)}; give the result of ptjax.load_backbone"
        )


def load_backbone(
    path: str | os.PathLike[str],
    *,
    dtype: Dtype | None = None,
    mesh: Mesh | str | None = None,
    fsdp: bool = False,
    quantize: Quantization | None = None,
    attention: Attention = "auto",
    tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
    family: Family | None = None,
    **config_overrides: Annotated[Any, T5Config],
) -> Backbone:
    """Loads a T5X checkpoint (legacy or Orbax) or a Hugging Face directory or hub id.

    An Orbax checkpoint (0.4 or newer, also its v1) must contain a tree with T5X's parameter names,
    at the top level or below `params` or `target`. All processes must call this together.

    Args:
        path: local or gs://; "ptjax-nano" is the backbone that ptjax ships; a hub id may end in
            "@revision". From a folder of several `checkpoint_N` or Orbax steps, the newest
            complete one is loaded.
        dtype: for weights and activations; None is bfloat16 on TPU and GPU and float32 on CPU.
        mesh: the devices to load onto; 'auto', '8x1', '2x4' (data x model) or '2x2x2' (replica x
            data x model) use all devices (docs/sharding.md); None uses the first device or,
            with several processes, all devices.
        fsdp: shard weights over the mesh axis `data` too, and gather them layer by layer; needs
            `scan_layers`.
        quantize: "int8" stores kernels at one byte per entry and casts them for each product;
            "int8_products" rounds what they multiply too, and computes in int8;
            "int8_products_but_wo" casts the kernels `wo` alone. See docs/sharding.md.
        attention: "fused" computes attention in one kernel: ptjax's on a TPU, cuDNN's on GPUs, and
            in a slow interpreter on CPUs. "auto" is "fused" on a TPU and "plain" elsewhere.
        tokenizer: a tokenizer or its path; None looks in the folder of the weights.
        family: the kind of network, if it is not ptjax's own T5, such as `flax_module(...)`.
            A family without Hugging Face names is also loaded from a `model.safetensors` with the
            network's parameter names, as `save_backbone` writes it.
        **config_overrides: fields of `T5Config`, or of the family's config, that the files do not
            state or state incorrectly.

    Raises:
        InputError: the path holds no backbone, or an incomplete or damaged one; a setting does
            not fit the backbone, or its sizes are not divisible by those of the mesh axes.
    """
    use_compile_cache()
    given = dict(path=path, dtype=dtype, mesh=mesh, fsdp=fsdp, quantize=quantize)
    given |= dict(attention=attention, tokenizer=tokenizer, family=family, **config_overrides)
    first = mesh.devices.flat[0] if isinstance(mesh, Mesh) else jax.local_devices()[0]
    dtype = dtype or ("float32" if first.platform == "cpu" else "bfloat16")
    check_numerics(dtype, quantize, attention)
    family = family or T5_FAMILY
    check_supported(family, *_features(fsdp, quantize, attention))
    attention = "plain" if "fused attention" in family.lacks else attention
    kind = _attention_on(first, attention)
    opened = open_backbone(
        path, dtype=dtype, tokenizer=tokenizer, family=family, **config_overrides
    )
    if opened.prompt is not None:
        logging.warning(
            "%s also holds a prompt, which is ignored; load_prompt(path) returns it", opened.name
        )
    check_rules({"params": opened.arrays}, family.sharding_rules)
    mesh = choose_mesh(mesh, opened.config, dtype, fsdp=fsdp, quantize=quantize, family=family)
    params, samples = _load_params(opened, dtype, mesh, fsdp, quantize)
    fingerprints = digest(opened.config, exchange(samples), family)
    return Backbone(
        config=opened.config,
        variables={"params": unflatten_paths(params)},
        apply_fn=family.build(opened.config, **_on_mesh(mesh, fsdp, kind)),
        tokenizer=opened.tokenizer,
        fingerprint=fingerprints.v2,
        name=opened.name,
        mesh=mesh,
        fsdp=fsdp,
        quantize=quantize,
        attention=kind,
        assumed=opened.assumed,
        fingerprint_v1=fingerprints.v1,
        family=family,
        arguments=_arguments(given),
    )


def _attention_on(device: jax.Device, attention: Attention) -> Kind:
    # Of NVIDIA's GPUs alone.
    capability = getattr(device, "compute_capability", None)
    return choose_attention(attention, device.device_kind, capability)


def _arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """`Backbone.arguments`: a mesh by its name, which only one of all devices has."""
    mesh = given["mesh"]
    if isinstance(mesh, Mesh):
        mesh = mesh_name(mesh) if mesh.size == jax.device_count() else None
    attention = None if given["attention"] == "auto" else given["attention"]
    arguments = {**given, "mesh": mesh, "fsdp": given["fsdp"] or None, "attention": attention}
    return {name: value for name, value in arguments.items() if value is not None}


def check_numerics(dtype: str, quantize: str | None, attention: str = "auto") -> None:
    """Raises InputError unless `load_backbone` supports these values of its arguments."""
    check_choice(get_args(Dtype), "load_backbone", dtype=dtype)  # T5 overflows in float16
    check_choice((*get_args(Quantization), None), "load_backbone", quantize=quantize)
    check_choice(get_args(Attention), "load_backbone", attention=attention)


def _features(fsdp: bool, quantize: str | None, attention: str) -> Iterator[Feature]:
    """What a family has to support for these arguments of `load_backbone`."""
    if fsdp:
        yield "fsdp"
    if quantize:
        yield "int8"
    if attention == "fused":
        yield "fused attention"


def _on_mesh(mesh: Mesh, fsdp: bool, attention: str) -> JsonObject:
    """How the network computes on the mesh: arguments of `Family.build`."""
    gather = gather_layer(mesh) if fsdp else None
    return {"gather": gather, "attend": make_attend(attention, mesh)}


def _load_params(
    opened: OpenBackbone, dtype: str, mesh: Mesh, fsdp: bool, quantize: str | None
) -> tuple[dict[str, jax.Array | Quantized], dict[str, dict[str, Sample]]]:
    """(parameters on the mesh by path, their samples for the fingerprints)."""
    samples: dict[str, dict[str, Sample]] = {}
    family, rules = opened.family, opened.family.sharding_rules

    def load(path: str, sharding: NamedSharding) -> jax.Array | Quantized:
        # Popped to free memory: an array of a T5X msgpack is already in memory.
        array = place(cast(opened.arrays.pop(path), dtype), sharding)
        samples.update(sample_of(path, array, family))
        if quantize and family.is_quantized(path):
            return quantize_sharded(array, has_factors(quantize, path))
        return array

    def find_sharding(name: str, shape: tuple[int, ...]) -> NamedSharding:
        return sharding_of(f"params/{name}", shape, mesh, fsdp=fsdp, rules=rules)

    # Largest first: temporary memory for reading is needed while the devices are still empty.
    shapes = {path: array.shape for path, array in opened.arrays.items()}
    largest_first = sorted(shapes, key=lambda path: -math.prod(shapes[path]))
    names: dict[str, Any] = {path: path for path in largest_first}
    if opened.config.scan_layers:
        names = stack_paths(names, tuple)
    params = {}
    for name, paths in names.items():
        if isinstance(paths, str):
            params[name] = load(paths, find_sharding(name, shapes[paths]))
        else:
            stacked = find_sharding(name, (len(paths), *shapes[paths[0]]))
            of_layer = NamedSharding(mesh, P(*stacked.spec[1:]))
            layers = (load(path, of_layer) for path in paths)
            params[name] = stack_layers(layers, len(paths))
    return params, samples


def place(lazy_array: LazyArray, sharding: NamedSharding) -> jax.Array:
    """Loads an array from its file onto the devices of `sharding`.

    Reads only the shards of this process's devices. A shard that several devices hold is read
    once.
    """
    shape = lazy_array.shape

    def bounds(index: Index | None) -> tuple[tuple[int, int], ...]:
        pairs = zip(index or (), shape, strict=True)
        return tuple(part.indices(size)[:2] for part, size in pairs)

    by_device = sharding.addressable_devices_indices_map(shape)
    shards = dict.fromkeys(map(bounds, by_device.values()))
    read = lazy_array.read_parts([tuple(slice(*bound) for bound in shard) for shard in shards])
    parts = dict(zip(shards, read, strict=True))
    return jax.make_array_from_callback(shape, sharding, lambda index: parts[bounds(index)])
