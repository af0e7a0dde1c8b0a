"""`load_backbone`: finds out what a path holds and returns a frozen network."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Annotated, Any, Literal, get_args

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ptjax import shipped
from ptjax.data.tokenizer import Tokenizer, check_vocabulary, find_tokenizer, load_tokenizer
from ptjax.errors import InputError, check_choice, check_path, missing, near
from ptjax.fingerprint import Fingerprints, digest, sample_of
from ptjax.interop import huggingface, own_names
from ptjax.interop.formats import Opened, open_directory
from ptjax.interop.prompt_file import T5X_PROMPT
from ptjax.interop.special_ids import check_end_of_sequence
from ptjax.interop.stored import Index, StoredArray, cast
from ptjax.models.config import Dtype, T5Config
from ptjax.models.family import Family, Feature, check_supported
from ptjax.models.layers import Quantized
from ptjax.models.stacking import Gather, Unstacked, stack_paths
from ptjax.models.t5_family import T5_FAMILY
from ptjax.scale import processes, sharding
from ptjax.scale.meshes import choose_mesh
from ptjax.scale.quantize import quantize_sharded
from ptjax.trees import flatten_paths, unflatten_paths

_CHOSEN_FIELDS = {"dtype", "scan_layers", "remat"}
"""Of `T5Config`: how the network is run, which no file could tell."""


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
        self, sees_input: bool, collections: tuple[str, ...] = ()
    ) -> Callable[..., Any]:
        """`apply_fn` for a prompt of that kind.

        Args:
            collections: beside `params`, those in which modules of the network have arrays.
        """
        if not sees_input:
            check_supported(self.family, "blind prompts")
        gather = _gather(self.mesh, self.fsdp)
        kept = {"gather": gather, "collections": collections}
        return self.family.build(self.config, sees_input=sees_input, **kept)

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
            '2x2x2' (replica x data x model) are all devices, see `scale.meshes.choose_mesh`; None
            is the first device or, on several processes, all of them.
        fsdp: weights are divided over `data` too, and gathered layer by layer; needs
            `scan_layers`.
        quantize: "int8" holds the kernels in a byte an entry, see `scale.quantize`.
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
    sharding.check_rules({"params": opened.arrays}, family.sharding_rules)
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


def _gather(mesh: Mesh, fsdp: bool) -> Gather | None:
    return sharding.gather_layer(mesh) if fsdp else None


@dataclasses.dataclass(frozen=True)
class OpenBackbone:
    """A backbone whose weights are still in their files; `prompt` is one beside them."""

    arrays: dict[str, StoredArray]
    prompt: StoredArray | None
    config: Any
    tokenizer: Tokenizer | None
    name: str
    assumed: tuple[str, ...]
    family: Family = T5_FAMILY


def open_backbone(
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
    family: Family = T5_FAMILY,
    **config_overrides: Any,
) -> OpenBackbone:
    """`load_backbone` up to the point where weights would be read; args and errors as there."""
    chosen = _supported(family, config_overrides)
    arrays, told, name, folders = _open(path, chosen, family)
    prompt = arrays.pop(T5X_PROMPT, None)
    config, assumed = _make_config(arrays, told, chosen, dtype, name, family)
    _check(arrays, config, name, family)
    # Before the weights are read: a wrong tokenizer is found in a second, not after minutes.
    found = _tokenizer_of(tokenizer, folders)
    if found is not None:
        check_vocabulary(found, config.vocab_size)
        check_end_of_sequence(found, config)
    return OpenBackbone(arrays, prompt, config, found, name, assumed, family)


def _open(path: str | os.PathLike[str], chosen: Collection[str], family: Family) -> Opened:
    """What `path` holds, wherever that lies."""
    check_path("the path of the backbone", path)
    name = os.fspath(path)
    directory = shipped.find(name) or epath.Path(path).expanduser()
    if not directory.exists():
        if not _may_be_hub_id(name):
            raise missing("backbone", name)
        repo_id, _, revision = name.partition("@")
        directory, revision = huggingface.download(repo_id, revision or None, [shipped.NANO])
        name = f"{repo_id}@{revision}"
    return open_directory(directory, name, chosen, family)


def _may_be_hub_id(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "/", "~", "gs://"))


def would_download(path: str | os.PathLike[str]) -> bool:
    """Whether `path` may be a model of the hub of which this machine has no copy."""
    name = os.fspath(path)
    if shipped.find(name) or not _may_be_hub_id(name) or epath.Path(path).exists():
        return False
    repo_id, _, revision = name.partition("@")
    return not huggingface.is_downloaded(repo_id, revision or None)


def _supported(family: Family, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`overrides` that the family's config has; InputError for what its networks cannot do."""
    chosen = dict(overrides)
    plain: tuple[tuple[Feature, str, Any], ...] = (
        ("scanned layers", "scan_layers", False),
        ("remat", "remat", "none"),
    )
    for feature, field, unused in plain:
        if feature in family.lacks and chosen.pop(field, unused) != unused:
            check_supported(family, feature)
    return chosen


def _tokenizer_of(
    tokenizer: str | os.PathLike[str] | Tokenizer | None, folders: Iterable[epath.Path]
) -> Tokenizer | None:
    """The tokenizer that the user names, else the first one in `folders`."""
    if isinstance(tokenizer, str | os.PathLike):
        return load_tokenizer(tokenizer)
    if tokenizer is not None:
        return tokenizer
    return next(filter(None, map(find_tokenizer, folders)), None)


def _make_config(
    stored: Mapping[str, StoredArray],
    told: Mapping[str, Any],
    overrides: Mapping[str, Any],
    dtype: str,
    name: str,
    family: Family,
) -> tuple[Any, tuple[str, ...]]:
    """(config, fields at the family's values that neither files nor user tell).

    What config.json tells stands above what names and shapes tell, and the user above both.
    """
    inferred, kind_of_config = family.infer_config(stored, name), family.config_type
    defaults: dict[str, Any] = {
        f.name: f.default
        for f in dataclasses.fields(kind_of_config)
        if f.default is not dataclasses.MISSING
    }
    kinds: dict[str, Any] = {f: type(value) for f, value in (defaults | inferred).items()}
    kinds |= {"forced_bos_id": int | None, "eos_ids": tuple | list}
    for field, value in overrides.items():
        if field not in kinds:
            owner = kind_of_config.__name__
            raise InputError(f"load_backbone: {owner} has no field {field!r}{near(field, kinds)}")
        if not isinstance(value, (int, float) if kinds[field] is float else kinds[field]):
            kind = getattr(kinds[field], "__name__", kinds[field])
            raise InputError(f"load_backbone: {field} = {value!r} is no {kind}")
    told = {field: value for field, value in told.items() if field in kinds}
    # Names tell one branch from two, not what is applied to them.
    untold = {*defaults} - (set(inferred) - {"mlp_activations"})
    assumed = tuple(sorted(untold - set(told) - set(overrides) - _CHOSEN_FIELDS))
    settings: dict[str, Any] = {**inferred, **told, **overrides, "dtype": dtype}
    if "eos_ids" in settings:
        settings["eos_ids"] = tuple(settings["eos_ids"])
    return kind_of_config(**settings), assumed


def _check(stored: Mapping[str, StoredArray], config: Any, name: str, family: Family) -> None:
    """Every parameter of `config`, each of its shape, and no other."""
    family.check_depth(stored, config, name)
    try:
        of_layers = dataclasses.replace(config, scan_layers=False) if config.scan_layers else config
        expected = flatten_paths(family.parameter_shapes(of_layers))
    except InputError:
        raise
    except Exception as error:  # sizes of 0 or activations unknown to Flax, deep inside the network
        what = family.title.removeprefix("a ")
        raise InputError(f"{name}: these sizes make no {what}: {config} ({error})") from error
    for path, leaf in expected.items():
        if path not in stored:
            raise InputError(f"{name}: parameter {path} is missing; is the checkpoint complete?")
        if stored[path].shape != leaf.shape:
            raise InputError(
                f"{stored[path].where}: parameter {path} has shape {stored[path].shape}, the "
                f"config wants {leaf.shape}"
            )
    if extra := sorted(set(stored) - set(expected)):
        raise InputError(
            f"{name}: parameter {extra[0]} does not belong to {family.title} of this config"
        )


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
        return sharding.sharding_of(f"params/{name}", shape, mesh, fsdp=fsdp, rules=rules)

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
            params[name] = sharding.stack_layers(layers, len(paths))
    return params, samples


def place(stored: StoredArray, where: NamedSharding) -> jax.Array:
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


def save_backbone(
    directory: str | os.PathLike[str],
    config: Any,
    params: Mapping[str, Any],
    *,
    tokenizer: Tokenizer | None = None,
    dtype: str = "bfloat16",
    max_shard_bytes: int | None = None,
    family: Family = T5_FAMILY,
) -> None:
    """Writes the Hugging Face layout (which `load_backbone` and `transformers` read).

    A family without Hugging Face's names writes `model.safetensors` under its parameters' own.

    Several processes call it together; the first one writes.

    Args:
        params: nested dict under T5X's names, layers stacked or not.
        max_shard_bytes: split the weights into files of at most this size.
    """
    check_path("the folder of the backbone", directory)
    own_names_only = not family.tensor_names({})
    flat = flatten_paths(params) if own_names_only else Unstacked(flatten_paths(params))
    if any(isinstance(array, Quantized) for array in flat.values()):
        raise InputError(
            "int8 kernels are a rounded copy; save the backbone as it was loaded without quantize"
        )
    if not processes.first():
        for name in sorted(flat):  # in the order in which the first one writes them
            processes.on_host(flat[name])
        return
    target = epath.Path(directory).expanduser()
    target.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(target)
    if own_names_only:
        return own_names.save_own_names(target, flat, dtype)
    huggingface.save_huggingface(target, flat, config, dtype=dtype, max_shard_bytes=max_shard_bytes)
