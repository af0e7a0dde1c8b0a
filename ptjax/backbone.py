"""`load_backbone`: finds out what a path holds and returns a frozen T5."""

from __future__ import annotations

import collections
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
from ptjax.interop import huggingface, t5x
from ptjax.interop.huggingface_format import load_config
from ptjax.interop.prompt_file import T5X_PROMPT
from ptjax.interop.special_ids import check_end_of_sequence
from ptjax.interop.stored import Index, StoredArray, cast
from ptjax.models.config import Dtype, T5Config
from ptjax.models.layers import Quantized
from ptjax.models.prompted import make_apply_fn
from ptjax.models.stacking import Gather, Unstacked, stack_paths
from ptjax.models.t5 import parameter_shapes
from ptjax.scale import processes, sharding
from ptjax.scale.meshes import choose_mesh
from ptjax.scale.quantize import is_quantized, quantize_sharded
from ptjax.trees import flatten_paths, unflatten_paths

_CHOSEN_FIELDS = {"dtype", "scan_layers", "remat"}
"""Of `T5Config`: how the network is run, which no file could tell."""


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A frozen T5, ready for a prompt.

    Attributes:
        variables: `{"params": ...}` under T5X's names.
        apply_fn: `make_apply_fn(True)`, for prompts that see their input.
        fingerprint: "v2:..." of sizes and a sample of every parameter; equal whatever file format,
            dtype or number of devices they came through.
        name: what the user called it: a path, a hub id with its revision, "ptjax-nano".
        mesh: where the variables live; with `fsdp` each divided over its `data` axis too.
        quantize: "int8" where kernels are `Quantized`.
        assumed: config fields that the files do not tell, at T5's values.
        fingerprint_v1: "sha256:...", of the part that older prompts know; see `fingerprint`.
    """

    config: T5Config
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

    @property
    def fingerprints(self) -> Fingerprints:
        """Both, for what a prompt records."""
        return Fingerprints(self.fingerprint_v1, self.fingerprint)

    def make_apply_fn(self, sees_input: bool) -> Callable[..., Any]:
        """`apply_fn` for a prompt of that kind."""
        return make_apply_fn(self.config, sees_input, _gather(self.mesh, self.fsdp))


def load_backbone(
    path: str | os.PathLike[str],
    *,
    dtype: Dtype | None = None,
    mesh: Mesh | str | None = None,
    fsdp: bool = False,
    quantize: Literal["int8"] | None = None,
    tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
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
        **config_overrides: fields of `T5Config` that the files do not tell or tell wrongly.

    Raises:
        InputError: the path holds no backbone, or an incomplete or damaged one; a setting does
            not fit it, or the mesh does not divide it.
    """
    first = mesh.devices.flat[0] if isinstance(mesh, Mesh) else jax.local_devices()[0]
    dtype = dtype or ("float32" if first.platform == "cpu" else "bfloat16")
    check_dtypes(dtype, quantize)
    opened = open_backbone(path, dtype=dtype, tokenizer=tokenizer, **config_overrides)
    if opened.prompt is not None:
        logging.warning(
            "%s also holds a prompt, left out here; load_prompt(path) returns it", opened.name
        )
    sharding.check_rules({"params": opened.arrays})
    mesh = choose_mesh(mesh, opened.config, dtype, fsdp=fsdp, quantize=quantize)
    params, samples = _load_params(opened, dtype, mesh, fsdp, quantize)
    fingerprints = digest(opened.config, samples)
    return Backbone(
        config=opened.config,
        variables={"params": unflatten_paths(params)},
        apply_fn=make_apply_fn(opened.config, gather=_gather(mesh, fsdp)),
        tokenizer=opened.tokenizer,
        fingerprint=fingerprints.v2,
        name=opened.name,
        mesh=mesh,
        fsdp=fsdp,
        quantize=quantize,
        assumed=opened.assumed,
        fingerprint_v1=fingerprints.v1,
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
    config: T5Config
    tokenizer: Tokenizer | None
    name: str
    assumed: tuple[str, ...]


def open_backbone(
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
    **config_overrides: Any,
) -> OpenBackbone:
    """`load_backbone` up to the point where weights would be read; args and errors as there."""
    arrays, told, name, folders = _open(path, config_overrides)
    prompt = arrays.pop(T5X_PROMPT, None)
    config, assumed = _make_config(arrays, told, config_overrides, dtype, name)
    _check(arrays, config, name)
    # Before the weights are read: a wrong tokenizer is found in a second, not after minutes.
    found = _tokenizer_of(tokenizer, folders)
    if found is not None:
        check_vocabulary(found, config.vocab_size)
        check_end_of_sequence(found, config)
    return OpenBackbone(arrays, prompt, config, found, name, assumed)


def _open(
    path: str | os.PathLike[str], chosen: Collection[str] = ()
) -> tuple[dict[str, StoredArray], dict[str, Any], str, tuple[epath.Path, ...]]:
    """(lazy arrays, config fields the files state, name, folders of the files beside) of `path`."""
    check_path("the path of the backbone", path)
    name = os.fspath(path)
    directory = shipped.find(name) or epath.Path(path).expanduser()
    if not directory.exists():
        if not _may_be_hub_id(name):
            raise missing("backbone", name)
        repo_id, _, revision = name.partition("@")
        directory, revision = huggingface.download(repo_id, revision or None, [shipped.NANO])
        name = f"{repo_id}@{revision}"
    if not t5x.is_t5x(directory):
        if not (directory / "config.json").exists():
            raise InputError(
                f"{name} holds no backbone that ptjax knows: neither a T5X checkpoint "
                "(checkpoint_N) nor a Hugging Face directory (config.json beside *.safetensors)"
            )
        arrays = huggingface.load_huggingface(directory)
        return arrays, load_config(directory, chosen), name, (directory,)
    found = t5x.find_checkpoint(directory)
    if found.parent == directory and len(t5x.checkpoints_in(directory)) > 1:
        logging.warning("%s: loading the newest of its checkpoints, %s", name, found.name)
    folders = (found, found.parent)
    with_config = (x for x in folders if (x / "config.json").exists())
    told = next((load_config(x, chosen) for x in with_config), {})
    return t5x.load_t5x(found), told, os.fspath(found), folders


def _may_be_hub_id(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "/", "~", "gs://"))


def would_download(path: str | os.PathLike[str]) -> bool:
    """Whether `path` may be a model of the hub of which this machine has no copy."""
    name = os.fspath(path)
    if shipped.find(name) or not _may_be_hub_id(name) or epath.Path(path).exists():
        return False
    repo_id, _, revision = name.partition("@")
    return not huggingface.is_downloaded(repo_id, revision or None)


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
) -> tuple[T5Config, tuple[str, ...]]:
    """(config, fields at T5's values that neither files nor user tell).

    What config.json tells stands above what names and shapes tell, and the user above both.
    """
    inferred = infer_config(stored, name)
    defaults: dict[str, Any] = {
        f.name: f.default
        for f in dataclasses.fields(T5Config)
        if f.default is not dataclasses.MISSING
    }
    kinds: dict[str, Any] = {f: type(value) for f, value in (defaults | inferred).items()}
    kinds |= {"forced_bos_id": int | None, "eos_ids": tuple | list}
    for field, value in overrides.items():
        if field not in kinds:
            raise InputError(f"load_backbone: T5Config has no field {field!r}{near(field, kinds)}")
        if not isinstance(value, (int, float) if kinds[field] is float else kinds[field]):
            kind = getattr(kinds[field], "__name__", kinds[field])
            raise InputError(f"load_backbone: {field} = {value!r} is no {kind}")
    # Names tell one branch from two, not what is applied to them.
    untold = {"mlp_activations", *defaults} - (set(inferred) - {"mlp_activations"})
    assumed = tuple(sorted(untold - set(told) - set(overrides) - _CHOSEN_FIELDS))
    settings: dict[str, Any] = {**inferred, **told, **overrides, "dtype": dtype}
    if "eos_ids" in settings:
        settings["eos_ids"] = tuple(settings["eos_ids"])
    return T5Config(**settings), assumed


def infer_config(stored: Mapping[str, StoredArray], name: str) -> dict[str, Any]:
    """The fields of `T5Config` that parameter names and shapes tell.

    Raises:
        InputError: a parameter that every T5 has is missing.
    """

    def shape(ending: str) -> tuple[int, ...]:
        # The usual one of all layers, so that `_check` names the parameter that differs.
        found = {path: array.shape for path, array in stored.items() if path.endswith(ending)}
        if not found:
            what = ending.removeprefix("/")
            raise InputError(f"{name}: parameter {what} is missing; is the checkpoint complete?")
        [(usual, _)] = collections.Counter(found.values()).most_common(1)
        if len(usual) != 2 or 0 in usual:
            path = next(path for path in found if found[path] == usual)
            raise InputError(
                f"{stored[path].where}: parameter {path} has shape {usual}, which is no T5's"
            )
        return usual

    vocab_size, _ = shape("token_embedder/embedding")
    num_heads, relpos_buckets = shape("/relpos_bias/rel_embedding")
    emb_dim, joined = shape("attention/query/kernel")
    gated = any(path.endswith(("/wi_0/kernel", "/wi_1/kernel")) for path in stored)
    return {
        "vocab_size": vocab_size,
        "emb_dim": emb_dim,
        "num_heads": num_heads,
        "num_encoder_layers": _layers(stored, "encoder"),
        "num_decoder_layers": _layers(stored, "decoder"),
        "head_dim": joined // num_heads,
        "mlp_dim": shape("/mlp/wi_0/kernel" if gated else "/mlp/wi/kernel")[1],
        "mlp_activations": ("gelu", "linear") if gated else ("relu",),
        "logits_via_embedding": "decoder/logits_dense/kernel" not in stored,
        "relpos_buckets": relpos_buckets,
        "relpos_per_layer": "encoder/layers_0/relpos_bias/rel_embedding" in stored,
    }


def _layers(stored: Mapping[str, StoredArray], stack: str) -> int:
    return len({path.split("/")[1] for path in stored if path.startswith(f"{stack}/layers_")})


def _check(stored: Mapping[str, StoredArray], config: T5Config, name: str) -> None:
    """Every parameter of `config`, each of its shape, and no other."""
    for stack, layers in (
        ("encoder", config.num_encoder_layers),
        ("decoder", config.num_decoder_layers),
    ):
        # Before the network is traced, which takes as long as a file claims that it is deep.
        if layers > (held := _layers(stored, stack)):
            raise InputError(
                f"{name}: parameter {stack}/layers_{held}/* is missing; the config has {layers:,} "
                f"{stack} layers, the weights {held}; is the checkpoint complete?"
            )
    try:
        of_layers = dataclasses.replace(config, scan_layers=False)
        expected = flatten_paths(parameter_shapes(of_layers))
    except Exception as error:  # sizes of 0 or activations unknown to Flax, deep inside the network
        raise InputError(f"{name}: these sizes make no T5: {config} ({error})") from error
    for path, leaf in expected.items():
        if path not in stored:
            raise InputError(f"{name}: parameter {path} is missing; is the checkpoint complete?")
        if stored[path].shape != leaf.shape:
            raise InputError(
                f"{stored[path].where}: parameter {path} has shape {stored[path].shape}, the "
                f"config wants {leaf.shape}"
            )
    if extra := sorted(set(stored) - set(expected)):
        raise InputError(f"{name}: parameter {extra[0]} does not belong to a T5 of this config")


def _load_params(
    opened: OpenBackbone, dtype: str, mesh: Mesh, fsdp: bool, quantize: str | None
) -> tuple[dict[str, jax.Array | Quantized], dict[str, dict[str, jax.Array]]]:
    """(parameters on the mesh by their paths, what the fingerprints take of them)."""
    samples: dict[str, dict[str, jax.Array]] = {}

    def load(path: str, where: NamedSharding) -> jax.Array | Quantized:
        # Popped, for an array inside of a T5X msgpack is in memory already.
        array = place(cast(opened.arrays.pop(path), dtype), where)
        samples.update(sample_of(path, array, mesh))
        return quantize_sharded(array) if quantize and is_quantized(path) else array

    # The largest first: what reading takes besides its result is free again before memory fills.
    shapes = {path: array.shape for path, array in opened.arrays.items()}
    largest_first = sorted(shapes, key=lambda path: -math.prod(shapes[path]))
    names: dict[str, Any] = {path: path for path in largest_first}
    if opened.config.scan_layers:
        names = stack_paths(names, tuple)
    params = {}
    for name, paths in names.items():
        if isinstance(paths, str):
            where = sharding.sharding_of(f"params/{name}", shapes[paths], mesh, fsdp=fsdp)
            params[name] = load(paths, where)
        else:
            shape = (len(paths), *shapes[paths[0]])
            where = sharding.sharding_of(f"params/{name}", shape, mesh, fsdp=fsdp)
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
    config: T5Config,
    params: Mapping[str, Any],
    *,
    tokenizer: Tokenizer | None = None,
    dtype: str = "bfloat16",
    max_shard_bytes: int | None = None,
) -> None:
    """Writes the Hugging Face layout (which `load_backbone` and `transformers` read).

    Several processes call it together; the first one writes.

    Args:
        params: nested dict under T5X's names, layers stacked or not.
        max_shard_bytes: split the weights into files of at most this size.
    """
    check_path("the folder of the backbone", directory)
    flat = Unstacked(flatten_paths(params))
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
    huggingface.save_huggingface(target, flat, config, dtype=dtype, max_shard_bytes=max_shard_bytes)
