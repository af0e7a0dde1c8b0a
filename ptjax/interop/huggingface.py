"""Reads, writes and downloads T5s of Hugging Face. Names are translated by `huggingface_format`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from absl import logging
from etils import epath, epy
from jaxtyping import Array

from ptjax import hub
from ptjax.errors import InputError
from ptjax.files import JsonObject, Metadata, read_json, written_whole
from ptjax.interop import peft, safetensors_file, torch_file
from ptjax.interop.bytes_on_disk import numpy_dtype
from ptjax.interop.huggingface_format import (
    COPIES,
    UNUSED,
    expected_names,
    load_config,
    make_config_json,
    read_config,
    read_logits,
    to_huggingface,
    to_t5x,
)
from ptjax.interop.lazy_array import Index, LazyArray, one_by_one
from ptjax.interop.special_ids import GENERATION_CONFIG, SPECIAL_IDS
from ptjax.models.config import T5Config
from ptjax.models.t5_family import EMBEDDING, LOGITS
from ptjax.sharding.processes import on_host

with epy.lazy_imports():
    import huggingface_hub
    import huggingface_hub.errors

_WEIGHTS = "model.safetensors"
_TORCH = "pytorch_model.bin"
# An adapter beside full weights makes them another model.
_DOWNLOADS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    *hub.TOKENIZER_FILES,
)


def load_huggingface(directory: str | os.PathLike[str]) -> dict[str, LazyArray]:
    """Opens a Hugging Face T5; its weights stay on disk until they are read.

    Args:
        directory: contains `config.json` and the weights: `model.safetensors`, or else
            `pytorch_model.bin`. Either may be one file, or shards with an index
            (`model.safetensors.index.json`).

    Returns:
        the arrays by T5X's parameter names, in T5X's orientation (kernels [in, out]).
        `decoder/logits_dense/kernel` is absent if the logits are computed from the embedding and
        scaled by 1/sqrt(d_model), as in T5 1.0; otherwise it is present.

    Raises:
        InputError: a file or tensor is missing, damaged, quantized or unexpected; the folder also
            holds an adapter; or transformers 4 and 5 would compute different logits, and the
            files do not determine which are right (see `read_logits`).
    """
    directory = epath.Path(directory)
    config = read_config(directory)
    fields = load_config(directory, SPECIAL_IDS)
    _check_adapter(directory)
    tensors = _open_float_tensors(directory, config)
    for name in UNUSED:
        tensors.pop(name, None)
    for copy in [tensors.pop(name) for name in COPIES if name in tensors]:
        # Writers keep an arbitrary one of a shared tensor's names. transformers 5 can also untie
        # the encoder's and decoder's embeddings, which ptjax's T5 does not support.
        if not _equal(tensors.setdefault("shared.weight", copy), copy):
            raise InputError(
                f"{copy.where}: this embedding differs from shared.weight; in a T5, encoder and "
                "decoder share one"
            )
    arrays = {}
    for name, tensor in tensors.items():
        translated = to_t5x(name, relpos_per_layer=fields["relpos_per_layer"])
        if translated is None:
            raise InputError(f"{tensor.where}: unexpected tensor {name}: not part of a T5 model")
        ours, transposed = translated
        if len(tensor.shape) != (1 if ours.endswith("/scale") else 2):
            raise InputError(
                f"{tensor.where}: the tensor {name} has shape {list(tensor.shape)}; a T5 has "
                f"{'a 1-D' if ours.endswith('/scale') else 'a 2-D'} tensor here"
            )
        arrays[ours] = _transpose(tensor) if transposed else tensor
    _decide_logits(arrays, config, directory)
    for name in expected_names(fields):
        if name not in arrays:
            theirs, _ = to_huggingface(name) or (name, False)
            raise InputError(
                f"{directory}: the tensor {theirs} (parameter {name}) is missing from the weights"
            )
    return arrays


def _decide_logits(arrays: dict[str, LazyArray], config: Metadata, directory: epath.Path) -> None:
    """Keeps `LOGITS` in `arrays` if and only if T5X's network would have it.

    T5X scales tied logits by 1/sqrt(D) and leaves untied ones unscaled. transformers 5 also has
    tied unscaled and untied scaled logits; both become a `LOGITS` kernel with the factor applied.
    """
    embedding, head = arrays.get(EMBEDDING), arrays.pop(LOGITS, None)
    if embedding is None:
        return
    # No comparison for an untied, unscaled head: a head that equals the embedding is loaded as any
    # other, and comparing would read rows that belong to other processes.
    untied = config.get("tie_word_embeddings") is False and not config.get("scale_decoder_outputs")
    kind = "none"
    if head is not None:
        kind = "own" if untied or not _equal(embedding, _transpose(head)) else "equal"
    logits = read_logits(config, kind, directory / "config.json")
    if not logits.own and not logits.scaled:
        arrays[LOGITS] = _transpose(embedding)
    elif logits.own:
        assert head is not None
        arrays[LOGITS] = _scaled(head, embedding.shape[1] ** -0.5) if logits.scaled else head
        if logits.scaled:
            # No released T5 is like this. transformers 5.0.0 scales every T5 and 5.3 every umT5,
            # and both save that setting.
            logging.warning(
                "%s: lm_head.weight is scaled by 1/sqrt(d_model), as config.json states. If the "
                "model was not scaled before transformers saved it (T5 1.1, Flan-T5, ByT5 and umT5 "
                "were not), set scale_decoder_outputs to false there",
                directory,
            )


def _equal(left: LazyArray, right: LazyArray) -> bool:
    """Whether two [V, D] arrays are equal, compared a few rows at a time."""
    if left.shape != right.shape or len(left.shape) != 2:
        return False
    rows = 1024
    return all(
        np.array_equal(left.read(part), right.read(part))
        for start in range(0, left.shape[0], rows)
        for part in [(slice(start, min(start + rows, left.shape[0])), slice(0, left.shape[1]))]
    )


def _transpose(array: LazyArray) -> LazyArray:
    def read_parts(indices: Sequence[Index]) -> list[np.ndarray]:
        return [part.T for part in array.read_parts([index[::-1] for index in indices])]

    return LazyArray(array.shape[::-1], array.dtype, read_parts, array.where)


def _scaled(array: LazyArray, factor: float) -> LazyArray:
    def read(index: Index) -> np.ndarray:
        return array.read(index).astype(np.float32) * np.float32(factor)

    return LazyArray(array.shape, "float32", one_by_one(read), array.where)


def _check_adapter(directory: epath.Path) -> None:
    """Refuses a folder with an adapter: transformers would silently apply it to the weights."""
    file = directory / peft.CONFIG
    if not file.exists():
        return
    method = peft.method_of(directory)
    if method in peft.PROMPTS:
        logging.warning(
            "%s also holds a prompt (%s), which is ignored here; load_prompt(path) returns it",
            directory,
            method,
        )
        return
    raise InputError(
        f"{file}: the folder also holds an adapter ({method}), which transformers would apply and "
        "ptjax does not. Merge it (PEFT's merge_and_unload) and save the model, or move adapter_* "
        "to another folder to load the model without it"
    )


def _open_float_tensors(directory: epath.Path, config: Metadata) -> dict[str, LazyArray]:
    """`_open_tensors`, with an error or a warning if config.json asks for quantization."""
    settings = config.get("quantization_config")
    if settings is None:
        return _open_tensors(directory)
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    try:
        tensors = _open_tensors(directory)
    except InputError as error:
        raise InputError(
            f"{directory}: config.json has a quantization_config ({method}); ptjax reads floating-"
            f"point weights: use the original model, or dequantize this one ({error})"
        ) from error
    logging.warning(
        "%s: config.json has a quantization_config (%s), which transformers would apply on "
        "loading; ptjax loads the weights as stored. To save memory use "
        "load_backbone(quantize='int8')",
        directory,
        method,
    )
    return tensors


def _open_tensors(directory: epath.Path) -> dict[str, LazyArray]:
    """Every tensor of the weight files, under Hugging Face's names."""
    for name in (_WEIGHTS, f"{_WEIGHTS}.index.json", _TORCH, f"{_TORCH}.index.json"):
        if (directory / name).exists():
            return (_open_shards if name.endswith(".json") else _open_file)(directory / name)
    raise InputError(
        f"{directory}: no weights here, neither {_WEIGHTS} nor {_TORCH} nor an index of shards; "
        "copy the directory again"
    )


def _open_file(file: epath.Path) -> dict[str, LazyArray]:
    if file.suffix == ".safetensors":
        return safetensors_file.open_safetensors(file)[0]
    return torch_file.open_torch(file)


def _open_shards(index: epath.Path) -> dict[str, LazyArray]:
    try:
        files = read_json(index)["weight_map"]
        by_file: dict[str, list[str]] = {}
        for tensor, name in files.items():
            by_file.setdefault(name, []).append(tensor)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{index}: the index is truncated or damaged ({error!r})") from error
    tensors = {}
    for name, listed in by_file.items():
        if not isinstance(name, str) or "/" in name or name in ("", ".", ".."):
            raise InputError(f"{index}: the file {name!r} of {listed[0]} is not beside the index")
        if not (index.parent / name).exists():
            raise InputError(
                f"{index.parent / name}: the file of tensor {listed[0]} and {len(listed) - 1} more "
                "is missing"
            )
        shard = _open_file(index.parent / name)
        for tensor in listed:
            if tensor not in shard:
                raise InputError(f"{index.parent / name}: the tensor {tensor} is missing from it")
            tensors[tensor] = shard[tensor]
    return tensors


# Weights out


def save_huggingface(
    directory: str | os.PathLike[str],
    params: Mapping[str, Array | np.ndarray],
    config: T5Config,
    *,
    dtype: str = "bfloat16",
    max_shard_bytes: int | None = None,
) -> None:
    """Writes a directory for `transformers.T5ForConditionalGeneration.from_pretrained`.

    `config.json` is removed first and written last: a directory without it is incomplete.

    Existing weights in the directory are replaced. With several processes use `save_backbone`.

    Args:
        params: maps T5X's parameter names to arrays.
        config: written to `config.json`.
        dtype: the dtype of the file, "float32" or "bfloat16" (T5 overflows in float16).
        max_shard_bytes: split the weights into files of at most this size; None: one file.

    Raises:
        InputError: a name is not a T5 parameter's, Hugging Face's T5 does not have the config's
            activations, the dtype is not supported, or a tensor is larger than `max_shard_bytes`.
    """
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"a T5 can be saved in float32 or bfloat16, not in {dtype}")
    config_json = make_config_json(config, dtype)
    layout: dict[str, tuple[tuple[int, ...], str]] = {}
    sources: dict[str, tuple[str, bool]] = {}
    for name in sorted(params):
        if (translated := to_huggingface(name)) is None:
            raise InputError(f"parameter {name} has no equivalent in Hugging Face's T5")
        theirs, transposed = translated
        # `eval_shape`: indexing alone would slice a layer out of a stack, on this process only.
        shape = jax.eval_shape(lambda name=name: params[name]).shape
        layout[theirs] = (shape[::-1] if transposed else shape, dtype)
        sources[theirs] = (name, transposed)
    shards = _plan_shards(layout, max_shard_bytes)
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    stale = ["config.json", GENERATION_CONFIG, f"{_WEIGHTS}.index.json", _WEIGHTS]
    for name in [*stale, *(p.name for p in directory.glob("model-*-of-*.safetensors"))]:
        (directory / name).unlink(missing_ok=True)
    files = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if shards[1:] else _WEIGHTS
        files |= dict.fromkeys(shard, file)
        safetensors_file.save_safetensors(
            directory / file,
            ((name, _converted(params, *sources[name], dtype)) for name in shard),
            shard,
            metadata={"format": "pt"},
        )
    if len(shards) > 1:
        total = sum(safetensors_file.nbytes(*entry) for entry in layout.values())
        index = {"metadata": {"total_size": total}, "weight_map": files}
        _write_json(directory / f"{_WEIGHTS}.index.json", index)
    _write_json(directory / "config.json", config_json)


def _converted(
    params: Mapping[str, Array | np.ndarray], name: str, transposed: bool, dtype: str
) -> np.ndarray:
    array = on_host(params[name]).astype(numpy_dtype(dtype))
    return array.T if transposed else array


def _plan_shards(
    layout: Mapping[str, tuple[tuple[int, ...], str]], limit: int | None
) -> list[dict[str, tuple[tuple[int, ...], str]]]:
    """Splits `layout` into consecutive parts, each a file of at most `limit` bytes."""

    def size(shard: Mapping[str, tuple[tuple[int, ...], str]]) -> int:
        header = safetensors_file.header_bytes(shard, {"format": "pt"})
        return len(header) + sum(safetensors_file.nbytes(*entry) for entry in shard.values())

    shards: list[dict[str, tuple[tuple[int, ...], str]]] = [{}]
    for name, entry in layout.items():
        if limit is not None and size({name: entry}) > limit:
            raise InputError(
                f"tensor {name} alone takes {size({name: entry}):,} bytes, more than the limit of "
                f"{limit:,} per file"
            )
        if limit is not None and size(shards[-1] | {name: entry}) > limit:
            shards.append({})
        shards[-1][name] = entry
    return shards


def _write_json(path: epath.Path, value: JsonObject) -> None:
    with written_whole(path) as stream:
        stream.write(f"{json.dumps(value, indent=2, sort_keys=True)}\n".encode())


# The hub


def is_downloaded(repo_id: str, revision: str | None = None) -> bool:
    """Whether the hub's cache on this machine holds the `config.json` of a model.

    Args:
        revision: a branch, tag or commit; None: the default branch.
    """
    try:
        file = huggingface_hub.try_to_load_from_cache(repo_id, "config.json", revision=revision)
    except huggingface_hub.errors.HFValidationError:
        return False
    return isinstance(file, str)


def download(
    repo_id: str, revision: str | None = None, ours: Sequence[str] = ()
) -> tuple[epath.Path, str]:
    """Downloads a model from the Hugging Face hub; if offline, takes it from the hub's cache.

    Downloads safetensors, or else `pytorch_model.bin`; variants (`model.fp16.safetensors`) are not
    downloaded.

    Args:
        revision: a branch, tag or commit; None: the default branch.
        ours: names of ptjax's own models; a similar one is suggested in the error.

    Returns:
        (the local directory, the commit).

    Raises:
        InputError: the model does not exist or is private, or the hub cannot be reached.
    """

    def fetch(weights: str, suffix: str) -> epath.Path:
        names = (f"{weights}.{suffix}", f"{weights}-*.{suffix}", f"{weights}.{suffix}.index.json")
        return epath.Path(hub.download(repo_id, [*_DOWNLOADS, *names], revision, ours))

    directory = fetch("model", "safetensors")
    if not any((directory / name).exists() for name in (_WEIGHTS, f"{_WEIGHTS}.index.json")):
        directory = fetch("pytorch_model", "bin")
    return directory, directory.name
