"""`load_backbone`: finds out what a path holds and returns a frozen T5."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from ptjax.data.tokenizer import Tokenizer, check_vocabulary, find_tokenizer, load_tokenizer
from ptjax.errors import InputError
from ptjax.interop import huggingface, t5x
from ptjax.interop.stored import StoredArray
from ptjax.models.prompted import PromptedT5
from ptjax.models.t5 import T5Config, parameter_shapes
from ptjax.scale import sharding
from ptjax.training.freeze import flatten_paths, sizes, unflatten_paths

PROMPT_PATH = "encoder/prompt/prompt/prompt"
"""Where google-research/prompt-tuning keeps a prompt inside a T5X checkpoint."""

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


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A frozen T5, ready for a prompt.

    Attributes:
        variables: `{"params": ...}` under T5X's names.
        apply_fn: `PromptedT5(config).apply`.
        fingerprint: "sha256:..." of sizes and a sample of the weights; equal whatever file format,
            dtype or number of devices they came through.
        name: what the user called it: a path, a hub id with its revision, "ptjax-nano".
        mesh: where the variables live.
        assumed: config fields that the files do not tell, at T5's values.
    """

    config: T5Config
    variables: dict[str, Any]
    apply_fn: Callable[..., Any]
    tokenizer: Tokenizer | None
    fingerprint: str
    name: str
    mesh: Mesh
    assumed: tuple[str, ...] = ()


def load_backbone(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
    revision: str | None = None,
    **config_overrides: Any,
) -> Backbone:
    """Loads a T5X checkpoint (legacy or Orbax) or a Hugging Face directory or hub id.

    Args:
        path: local or gs://; "ptjax-nano" is the backbone that ptjax ships. A folder of several
            `checkpoint_N` means the newest.
        dtype: of weights and activations; None is bfloat16 on TPU and GPU and float32 on CPU.
        mesh: arrays go straight to their place on it; None is this process's first device.
        tokenizer: a tokenizer, or where to find one; None looks beside the weights.
        revision: of a hub id.
        **config_overrides: fields of `T5Config` that the files do not tell or tell wrongly.

    Raises:
        InputError: the path holds no backbone, or an incomplete one.
    """
    stored, settings, name, directory = _open(path, revision)
    if unknown := set(config_overrides) - {f.name for f in dataclasses.fields(T5Config)}:
        raise InputError(f"T5Config has no field {sorted(unknown)[0]!r}")
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if stored.pop(PROMPT_PATH, None) is not None:
        logging.info("%s also holds a prompt, left out here; load_prompt(path) returns it", name)
    settings = infer_config(stored, name) | settings | config_overrides | {"dtype": dtype}
    config = T5Config(**settings)
    assumed = tuple(
        f.name
        for f in dataclasses.fields(T5Config)
        if f.name not in settings and f.default is not dataclasses.MISSING
    )
    _check(stored, config, name)
    mesh = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
    params = {key: place(key, array, dtype, mesh) for key, array in stored.items()}
    if tokenizer is None:
        found = find_tokenizer(directory)
    elif isinstance(tokenizer, str | os.PathLike):
        found = load_tokenizer(tokenizer)
    else:
        found = tokenizer
    if found is not None:
        check_vocabulary(found, config.vocab_size)
    variables = {"params": unflatten_paths(params)}
    return Backbone(
        config=config,
        variables=variables,
        apply_fn=PromptedT5(config).apply,
        tokenizer=found,
        fingerprint=fingerprint(config, variables["params"], mesh),
        name=name,
        mesh=mesh,
        assumed=assumed,
    )


def _open(
    path: str | os.PathLike[str], revision: str | None
) -> tuple[dict[str, StoredArray], dict[str, Any], str, epath.Path]:
    """(lazy arrays, config fields the files state, name, directory) of whatever `path` is."""
    name = os.fspath(path)
    directory = shipped(name) or epath.Path(path)
    if not directory.exists():
        if name.count("/") > 1 or name.startswith((".", "/", "~", "gs://")):
            raise InputError(f"no backbone at {name}: the path does not exist")
        directory, revision = huggingface.download(name, revision)
        name = f"{name}@{revision}"
    if (directory / "config.json").exists():
        return (
            huggingface.load_huggingface(directory),
            huggingface.load_config(directory),
            name,
            directory,
        )
    if not t5x.is_t5x(directory):
        raise InputError(
            f"{name} holds no backbone that ptjax knows: neither a T5X checkpoint (checkpoint_N) "
            "nor a Hugging Face directory (config.json beside *.safetensors)"
        )
    found = t5x.find_checkpoint(directory)
    if found != directory:
        logging.info("%s: loading the newest checkpoint, %s", name, found.name)
    return t5x.load_t5x(found), {}, os.fspath(found), found


def shipped(name: str) -> epath.Path | None:
    """Directory of a backbone that ptjax ships, by its name."""
    if name != "ptjax-nano":
        return None
    return epath.Path(os.fspath(resources.files("ptjax") / "assets" / "nano"))  # type: ignore[arg-type]


def infer_config(stored: Mapping[str, StoredArray], name: str) -> dict[str, Any]:
    """The fields of `T5Config` that parameter names and shapes tell.

    Raises:
        InputError: a parameter that every T5 has is missing.
    """

    def shape(path: str) -> tuple[int, ...]:
        if path not in stored:
            raise InputError(f"{name}: parameter {path} is missing; is the checkpoint complete?")
        return stored[path].shape

    def layers(stack: str) -> int:
        return len({p.split("/")[1] for p in stored if p.startswith(f"{stack}/layers_")})

    vocab_size, emb_dim = shape("token_embedder/embedding")
    num_heads, relpos_buckets = shape("encoder/relpos_bias/rel_embedding")
    gated = "encoder/layers_0/mlp/wi_0/kernel" in stored
    wi = "wi_0" if gated else "wi"
    return {
        "vocab_size": vocab_size,
        "emb_dim": emb_dim,
        "num_heads": num_heads,
        "num_encoder_layers": layers("encoder"),
        "num_decoder_layers": layers("decoder"),
        "head_dim": shape("encoder/layers_0/attention/query/kernel")[1] // num_heads,
        "mlp_dim": shape(f"encoder/layers_0/mlp/{wi}/kernel")[1],
        "mlp_activations": ("gelu", "linear") if gated else ("relu",),
        "logits_via_embedding": "decoder/logits_dense/kernel" not in stored,
        "relpos_buckets": relpos_buckets,
    }


def _check(stored: Mapping[str, StoredArray], config: T5Config, name: str) -> None:
    """Every parameter of `config`, each of its shape, and no other."""
    expected = flatten_paths(parameter_shapes(config))
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


def place(path: str, stored: StoredArray, dtype: str, mesh: Mesh) -> jax.Array:
    """`stored` on the mesh as `dtype`; each device's part is read and cast by itself."""
    where = sharding.sharding_of(f"params/{path}", stored.shape, mesh)

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        return np.asarray(stored.read(index or ())).astype(jnp.dtype(dtype))

    return jax.make_array_from_callback(stored.shape, where, read)


def fingerprint(config: T5Config, params: Mapping[str, Any], mesh: Mesh) -> str:
    """"sha256:..." over the sizes and the bfloat16 bytes of a fixed sample of the weights.

    The sample, in sorted T5X names: embedding rows 0, 97, 194, ..., every norm scale, the first
    row of each `wo` kernel. bfloat16 is the coarsest dtype that backbones are kept in.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps({f: getattr(config, f) for f in SIZE_FIELDS}).encode())

    @jax.jit
    def sample(chosen: dict[str, jax.Array]) -> dict[str, jax.Array]:
        rows = {"embedding": np.s_[::97], "scale": np.s_[:], "kernel": np.s_[:1]}
        return {
            path: jax.lax.with_sharding_constraint(
                array[rows[path.rsplit("/", 1)[1]]].astype(jnp.bfloat16), sharding.replicated(mesh)
            )
            for path, array in chosen.items()
        }

    chosen = {
        path: array
        for path, array in flatten_paths(params).items()
        if path.endswith(("/embedding", "/scale", "/wo/kernel"))
    }
    values = jax.device_get(sample(chosen))
    for path in sorted(values):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(values[path]).tobytes())
    return f"sha256:{digest.hexdigest()}"


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

    Args:
        params: nested dict under T5X's names.
        max_shard_bytes: split the weights into files of at most this size.
    """
    target = epath.Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(target)
    huggingface.save_huggingface(
        target, flatten_paths(params), config, dtype=dtype, max_shard_bytes=max_shard_bytes
    )


def describe(backbone: Backbone) -> dict[str, Any]:
    """Sizes, parameter count and bytes, fingerprints: what `inspect` prints."""
    count, size = sizes(backbone.variables)
    return {
        "name": backbone.name,
        "config": dataclasses.asdict(backbone.config),
        "assumed": list(backbone.assumed),
        "parameters": count,
        "bytes": size,
        "fingerprint": backbone.fingerprint,
        "tokenizer": backbone.tokenizer.name if backbone.tokenizer else None,
        "tokenizer_fingerprint": backbone.tokenizer.fingerprint if backbone.tokenizer else None,
    }
