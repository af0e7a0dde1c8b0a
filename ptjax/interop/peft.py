"""Prompts of Hugging Face PEFT: reads PROMPT_TUNING and P_TUNING directories, writes the former.

PEFT's prompt for a T5 stands where ours does, in front of the embedded encoder input, unscaled: the
matrix is copied as it is. Where PEFT is silent (a prompt that it never applies, rows that it never
uses) this is not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from ptjax.atomic import written_whole
from ptjax.errors import InputError
from ptjax.interop import safetensors_file, torch_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_TENSOR = "prompt_embeddings"
_PEFT_VERSION = "0.21.2"  # the version whose layout `export_peft` writes
_REFUSED = {
    "PREFIX_TUNING": "it holds keys and values for the decoder's layers, which no input prompt can "
    "express; train with PROMPT_TUNING instead",
    "CARTRIDGE": "it holds keys and values for the decoder's layers, which no input prompt can "
    "express; train with PROMPT_TUNING instead",
    "MULTITASK_PROMPT_TUNING": "it holds a prompt per task; in PEFT, multiply prompt_embeddings by "
    "prefix_task_cols[t] @ prefix_task_rows[t] and save that as PROMPT_TUNING",
}


def is_peft(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a directory of PEFT."""
    return (epath.Path(path) / CONFIG).exists()


def load_peft(directory: str | os.PathLike[str]) -> np.ndarray:
    """The prompt, [P, D] in the dtype of the file, of a PEFT directory for T5.

    PEFT keeps two prompts for encoder-decoders by default (`num_transformer_submodules` 2) and uses
    the first alone; the second is dropped.

    Raises:
        InputError: another method, another kind of model, sizes that contradict each other, a
            missing or damaged file.
    """
    directory = epath.Path(directory)
    file = directory / CONFIG
    config = _read_config(file)
    method, task = config.get("peft_type"), config.get("task_type")
    if method not in ("PROMPT_TUNING", "P_TUNING"):
        why = _REFUSED.get(str(method), "it is no soft prompt")
        raise InputError(f"{file}: the adapter is of {method}, which cannot be read: {why}")
    if task != "SEQ_2_SEQ_LM":
        raise InputError(
            f"{file}: task_type is {task!r} where a T5's prompt has 'SEQ_2_SEQ_LM' (PEFT silently "
            "leaves a prompt without task_type out); set it if this prompt was trained on a T5"
        )
    if config.get("modules_to_save"):
        raise InputError(
            f"{file}: modules_to_save names {config['modules_to_save']}, parts of the backbone that"
            " were trained with this prompt; without them it is another model"
        )
    length = _size(config, "num_virtual_tokens", None, file)
    copies = _size(config, "num_transformer_submodules", 2, file)
    tensors, weights = _open_weights(directory)
    if _TENSOR not in tensors:
        raise InputError(f"{weights}: the tensor {_TENSOR} is missing")
    shape = tensors[_TENSOR].shape
    if len(shape) != 2 or shape[0] != length * copies:
        raise InputError(
            f"{weights}: {_TENSOR} has shape {list(shape)}, {CONFIG} wants {length * copies} rows "
            f"(num_virtual_tokens {length} x num_transformer_submodules {copies})"
        )
    if config.get("token_dim") not in (None, shape[1]):
        raise InputError(
            f"{weights}: {_TENSOR} has rows of {shape[1]}, {CONFIG} says {config['token_dim']}"
        )
    return tensors[_TENSOR].read((slice(0, length), slice(0, shape[1])))


def export_peft(
    directory: str | os.PathLike[str],
    prompt: np.ndarray,
    *,
    num_heads: int,
    num_layers: int,
    base_model: str | None = None,
    revision: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a directory that `peft.PeftModel.from_pretrained(t5, directory)` loads.

    Args:
        prompt: [P, D], written as float32.
        num_heads: of the backbone; with `num_layers` (the encoder's) for the config's sake.
        base_model: the backbone's name on the hub, which PEFT records and does not check.
        revision: its commit there.
        metadata: goes into the header of the weights file, where PEFT does not look; keys of
            its config that PEFT does not know would make it warn.
    """
    prompt = np.asarray(prompt, np.float32)
    length, width = prompt.shape
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "modules_to_save": None,
        "num_attention_heads": num_heads,
        "num_layers": num_layers,
        "num_transformer_submodules": 1,  # PEFT's default, 2, would want 2 * P rows
        "num_virtual_tokens": length,
        "peft_type": "PROMPT_TUNING",
        "peft_version": _PEFT_VERSION,
        "prompt_tuning_init": "RANDOM",  # TEXT would want a tokenizer, even to load
        "prompt_tuning_init_text": None,
        "revision": revision,
        "task_type": "SEQ_2_SEQ_LM",
        "token_dim": width,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    header = {key: json.dumps(value) for key, value in (metadata or {}).items()}
    safetensors_file.save_safetensors(
        directory / WEIGHTS,
        [(_TENSOR, prompt)],
        {_TENSOR: (prompt.shape, "float32")},
        header | {"format": "pt"},
    )
    with written_whole(directory / CONFIG) as stream:
        stream.write(json.dumps(config, indent=2, sort_keys=True).encode())


def _read_config(file: epath.Path) -> dict[str, Any]:
    if not file.exists():
        raise InputError(f"{file}: the file is missing; a PEFT directory has one")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file}: the file is truncated or no JSON ({error})") from error
    if not isinstance(config, dict):
        raise InputError(f"{file}: the file is no JSON object")
    return config


def _size(config: Mapping[str, Any], key: str, default: int | None, file: epath.Path) -> int:
    value = default if config.get(key) is None else config[key]
    if type(value) is not int or value < 1:
        raise InputError(f"{file}: {key} is {config.get(key)!r}, not a number of 1 or more")
    return value


def _open_weights(directory: epath.Path):
    """(name -> array, the file)."""
    for name, open_file in (
        (WEIGHTS, lambda file: safetensors_file.open_safetensors(file)[0]),
        ("adapter_model.bin", torch_file.open_torch),
    ):
        if (directory / name).exists():
            return open_file(directory / name), directory / name
    raise InputError(f"{directory}: neither {WEIGHTS} nor adapter_model.bin is here")
