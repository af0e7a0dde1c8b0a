"""Prompts of Hugging Face PEFT: reads PROMPT_TUNING and P_TUNING, writes PROMPT_TUNING.

PEFT prepends its prompt to a T5's embedded encoder input, unscaled, exactly as ptjax does, so the
matrix is copied unchanged. Prompts that PEFT would silently ignore or use in part are refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping

import numpy as np
from etils import epath

from ptjax import files
from ptjax.errors import InputError, check_path
from ptjax.files import JsonObject, Metadata, written_whole
from ptjax.interop import safetensors_file, torch_file
from ptjax.interop.lazy_array import LazyArray

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TORCH_WEIGHTS = "adapter_model.bin"
FILES = (CONFIG, WEIGHTS, TORCH_WEIGHTS)
PROMPTS = ("PROMPT_TUNING", "P_TUNING")
_TENSOR = "prompt_embeddings"
_FORMAT = {"format": "pt"}  # in every header that PEFT writes
_PEFT_VERSION = "0.21.2"  # the version whose layout is written
_REFUSED = {
    **dict.fromkeys(
        ("LORA", "IA3", "LN_TUNING"),
        "it changes the network; give it as an adapter (ptjax.load_adapter, --adapter)",
    ),
    "PREFIX_TUNING": "it holds keys and values for the decoder's layers, not an input prompt; "
    "load_adapter (--adapter) reads it",
    "CARTRIDGE": "it holds keys and values for the decoder's layers, which no input prompt can "
    "express; train with PROMPT_TUNING instead",
    "MULTITASK_PROMPT_TUNING": "it holds a prompt per task; "
    "ptjax.load_multitask(path).prompt(t).save(file) makes that of task t a prompt",
    "CPT": "it belongs to decoder-only models",
}


@dataclasses.dataclass(frozen=True, eq=False)
class PeftAdapter:
    """An adapter of PEFT under ptjax's names.

    Attributes:
        method: "lora", "ia3", "bitfit" or "prefix_tuning".
        fields: those of the method's class, as JSON values.
        arrays: float32 arrays by path, "lora/encoder/layers_0/attention/query/a".
        metadata: what ptjax wrote with it, if ptjax did, and the backbone's name.
    """

    method: str
    fields: JsonObject
    arrays: dict[str, np.ndarray]
    metadata: JsonObject


def is_peft(path: str | os.PathLike[str]) -> bool:
    """Whether `path` contains one of the files that PEFT writes; others may be missing."""
    return any((epath.Path(path) / name).exists() for name in FILES)


def method_of(directory: str | os.PathLike[str]) -> str:
    """Reads the `peft_type` of a PEFT directory: "PROMPT_TUNING", "LORA", ...

    Raises:
        InputError: its `adapter_config.json` is missing or damaged.
    """
    return str(read_config(epath.Path(directory) / CONFIG).get("peft_type"))


def load_peft(directory: str | os.PathLike[str]) -> tuple[np.ndarray, JsonObject]:
    """Reads (prompt [P, D] in the dtype of the file, metadata) from a PEFT directory for a T5.

    By default PEFT stores two prompts for encoder-decoders (`num_transformer_submodules` 2). Since
    version 0.4 it uses only the first, and the second is dropped here. Up to 0.3 it prepended the
    second to the decoder's input; such prompts are refused. The initialisation
    (`prompt_tuning_init`) is ignored.

    The metadata are those that `export_peft` wrote, if any, plus "backbone_name" ("NAME" or
    "NAME@REVISION") if the config names the backbone.

    Raises:
        InputError: the directory holds an adapter of another method or for another kind of model,
            or trained backbone weights in addition to the prompt; its sizes are inconsistent; or a
            file is missing or damaged.
    """
    directory = epath.Path(directory)
    file = directory / CONFIG
    config = read_config(file)
    _check_method(config, file)
    if config.get("modules_to_save"):
        raise InputError(
            f"{file}: modules_to_save names {config['modules_to_save']}, parts of the backbone that"
            " were trained with this prompt; ptjax cannot load them, and the prompt needs them"
        )
    length = size_of(config, "num_virtual_tokens", None, file)
    copies = size_of(config, "num_transformer_submodules", 2, file)
    # PEFT 0.4, which stopped using the second prompt, is the first to write this key.
    if copies > 1 and "auto_mapping" not in config:
        raise InputError(
            f"{file}: PEFT 0.3 or older wrote it (it has no auto_mapping) with "
            f"num_transformer_submodules {copies}: the second half of the prompt was in front of "
            "the decoder, which ptjax does not support. PEFT since 0.4 uses the first half alone; "
            'to do the same, add "auto_mapping": null'
        )
    tensors, header, weights = open_weights(directory)
    if _TENSOR not in tensors:
        raise InputError(f"{weights}: the tensor {_TENSOR} is missing")
    if others := sorted(set(tensors) - {_TENSOR}):
        raise InputError(
            f"{weights}: the file also holds {', '.join(others)}, which PEFT saves if the "
            "backbone's vocabulary was resized; ptjax cannot load them. If the prompt does not "
            "need them, save it again with save_embedding_layers=False"
        )
    shape = tensors[_TENSOR].shape
    if len(shape) != 2 or shape[0] != length * copies:
        raise InputError(
            f"{weights}: {_TENSOR} has shape {list(shape)}, but {CONFIG} says {length * copies} "
            f"rows (num_virtual_tokens {length} x num_transformer_submodules {copies})"
        )
    if config.get("token_dim") not in (None, shape[1]):
        raise InputError(
            f"{weights}: {_TENSOR} has rows of {shape[1]}, but {CONFIG} says {config['token_dim']}"
        )
    prompt = tensors[_TENSOR].read((slice(0, length), slice(0, shape[1])))
    return prompt, read_metadata(config, header)


def export_peft(
    directory: str | os.PathLike[str],
    prompt: np.ndarray,
    *,
    num_heads: int | None = None,
    num_layers: int | None = None,
    base_model: str | None = None,
    revision: str | None = None,
    metadata: Metadata | None = None,
) -> None:
    """Writes a directory that `peft.PeftModel.from_pretrained(t5, directory)` loads.

    The config is removed first and written last: a directory without it is incomplete.

    Args:
        prompt: [P, D], written as float32.
        num_heads: the backbone's number of attention heads, only recorded in the config; PEFT
            takes it from the backbone if it is None.
        num_layers: the number of layers of its encoder; the same.
        base_model: the backbone's name on the hub; PEFT does not check it.
        revision: its commit there.
        metadata: JSON values for the header of the weights file, which `load_peft` reads and PEFT
            ignores. (PEFT warns about unknown keys in its config.)
    """
    check_path("the path of the PEFT directory", directory)
    prompt = np.asarray(prompt, np.float32)
    length, width = prompt.shape
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "modules_to_save": None,
        "num_attention_heads": num_heads,
        "num_layers": num_layers,
        "num_transformer_submodules": 1,  # PEFT's default, 2, needs 2 * P rows
        "num_virtual_tokens": length,
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",  # TEXT needs a tokenizer, even for loading
        "prompt_tuning_init_text": None,
        "revision": revision,
        "task_type": "SEQ_2_SEQ_LM",
        "token_dim": width,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }
    write_directory(directory, config, {_TENSOR: prompt}, metadata)


def write_directory(
    directory: str | os.PathLike[str],
    config: Metadata,
    tensors: Mapping[str, np.ndarray],
    metadata: Metadata | None = None,
) -> None:
    """Writes the two files of a PEFT directory: its config last.

    Args:
        config: the entries of `adapter_config.json`, without the version of PEFT.
        tensors: float32 arrays by PEFT's names.
        metadata: as for `export_peft`.
    """
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).unlink(missing_ok=True)
    safetensors_file.save_safetensors(
        directory / WEIGHTS,
        tensors.items(),
        {name: (tensor.shape, "float32") for name, tensor in tensors.items()},
        safetensors_file.to_header(metadata or {}) | _FORMAT,
    )
    config = {**config, "peft_version": _PEFT_VERSION}
    with written_whole(directory / CONFIG) as stream:
        stream.write(json.dumps(config, indent=2, sort_keys=True).encode())


def read_config(file: epath.Path) -> JsonObject:
    """Reads `adapter_config.json`.

    Raises:
        InputError: it is missing or damaged.
    """
    if not file.exists():
        raise InputError(f"{file}: the file is missing; a PEFT directory has one")
    return files.read_object(file)


def _check_method(config: Metadata, file: epath.Path) -> None:
    method, task = config.get("peft_type"), config.get("task_type")
    if method is None:
        raise InputError(
            f"{file}: peft_type is missing; for a prompt it is PROMPT_TUNING or P_TUNING"
        )
    if method not in PROMPTS:
        why = _REFUSED.get(str(method), "it is not a soft prompt")
        raise InputError(f"{file}: an adapter of type {method} cannot be read: {why}")
    if task is None:
        raise InputError(
            f"{file}: task_type is missing; without it PEFT silently ignores the prompt. If this "
            'prompt was trained on a T5, set it to "SEQ_2_SEQ_LM"'
        )
    if task != "SEQ_2_SEQ_LM":
        raise InputError(
            f"{file}: task_type is {task}; ptjax reads prompts of a T5 (SEQ_2_SEQ_LM) only"
        )


def size_of(config: Metadata, key: str, default: int | None, file: epath.Path) -> int:
    """Returns the integer `key` of a PEFT config; `default` if it has none.

    Raises:
        InputError: it is not an integer >= 1.
    """
    value = default if config.get(key) is None else config[key]
    if type(value) is not int or value < 1:
        raise InputError(f"{file}: {key} must be an integer >= 1, got {config.get(key)!r}")
    return value


def open_weights(
    directory: epath.Path,
) -> tuple[dict[str, LazyArray], dict[str, str], epath.Path]:
    """Opens the weights of a PEFT directory: (name -> array, header, the file).

    Raises:
        InputError: they are missing or damaged.
    """
    file = directory / WEIGHTS
    if file.exists():
        return *safetensors_file.open_safetensors(file), file
    file = directory / TORCH_WEIGHTS
    if file.exists():
        return torch_file.open_torch(file), {}, file
    raise InputError(f"{directory}: it holds neither {WEIGHTS} nor {TORCH_WEIGHTS}")


def read_metadata(config: Metadata, header: Mapping[str, str]) -> JsonObject:
    """Returns the metadata in the header of a weights file, and the backbone that PEFT names."""
    metadata = safetensors_file.from_header(
        {key: text for key, text in header.items() if key not in _FORMAT}
    )
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if isinstance(name, str) and name:
        metadata.setdefault("backbone_name", f"{name}@{revision}" if revision else name)
    return metadata
