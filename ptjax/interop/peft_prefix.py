"""Prefixes of Hugging Face PEFT for a T5 (PREFIX_TUNING): reads and writes their directories.

PEFT stores one tensor, viewed as slots [P, 2 N, H, K] with N = `num_layers`: the keys and values
themselves, also if an MLP (`prefix_projection`) computed them. It gives them to the decoder's
self-attention alone. For an encoder-decoder it doubles the slots and deals them out by fours, as if
each layer had four: layer l has its keys in slot 4 l mod 2 N and its values in the next one. So if
N is even, half of the slots is never used, and layers l and l + N / 2 share theirs. If N is odd,
every layer has slots of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from etils import epath

from ptjax.errors import InputError
from ptjax.files import Metadata, PathLike
from ptjax.interop import peft

_TENSOR = "prompt_embeddings"
_LAYERS = "ptjax_decoder_layers"
"""The entry of ptjax's own files in the header: how many of the N layers the decoder has."""
_SIZES = ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")
KEY, VALUE = "prefix/decoder/key", "prefix/decoder/value"


def load_peft_prefix(directory: PathLike) -> peft.PeftAdapter:
    """Reads a prefix for a T5 from a PEFT directory.

    Its arrays are the keys and values [N, P, H, K] of the decoder's self-attention.

    Raises:
        InputError: it is of another method or kind of model, its sizes are inconsistent, or a file
            is missing or damaged.
    """
    directory = epath.Path(directory)
    file = directory / peft.CONFIG
    config = peft.read_config(file)
    _check(config, file)
    length, layers, heads, width = (peft.size_of(config, name, None, file) for name in _SIZES)
    tensors, header, weights = peft.open_weights(directory)
    if set(tensors) != {_TENSOR}:
        raise InputError(
            f"{weights}: a prefix is the tensor {_TENSOR}; the file has {sorted(tensors)}"
        )
    shape = tensors[_TENSOR].shape
    if shape != (length, 2 * layers * width) or width % heads:
        raise InputError(
            f"{weights}: {_TENSOR} has shape {list(shape)}, but {peft.CONFIG} says "
            f"{[length, 2 * layers * width]} with {heads} heads (num_virtual_tokens x 2 num_layers "
            "token_dim)"
        )
    slots = tensors[_TENSOR].read_all().astype(np.float32)
    slots = slots.reshape(length, 2 * layers, heads, width // heads).swapaxes(0, 1)
    metadata = peft.read_metadata(config, header)
    used = peft.size_of({_LAYERS: metadata.pop(_LAYERS, layers)}, _LAYERS, None, weights)
    if used > layers:
        raise InputError(f"{weights}: {_LAYERS} is {used}, but the file has {layers} layers")
    keys = [_slot(layer, layers) for layer in range(used)]
    parts = {"encoder": False, "decoder": True, "cross": False}
    arrays = {KEY: slots[keys], VALUE: slots[[slot + 1 for slot in keys]]}
    return peft.PeftAdapter("prefix_tuning", {"length": length, **parts}, arrays, metadata)


def export_peft_prefix(
    directory: PathLike,
    arrays: Mapping[str, np.ndarray],
    *,
    base_model: str | None = None,
    revision: str | None = None,
    metadata: Metadata | None = None,
) -> None:
    """Writes a directory with which PEFT computes what ptjax computes, on the same T5.

    Its N is the decoder's number of layers or, if that is even, one more, so that no two layers
    share slots; the slots of the layer that does not exist are zero.

    Args:
        arrays: as in the result of `load_peft_prefix`.
        base_model, revision, metadata: as for `peft.export_peft`.

    Raises:
        InputError: the prefix has keys and values for the encoder or the cross-attention, which
            PEFT cannot hold.
    """
    if others := sorted(set(arrays) - {KEY, VALUE}):
        raise InputError(
            f"PEFT's prefix of a T5 has no place for {others[0]}, only for the decoder's "
            "self-attention; tune with encoder = cross = False, or use --to=safetensors"
        )
    decoder_layers, length, heads, head_dim = arrays[KEY].shape
    layers = decoder_layers + 1 - decoder_layers % 2
    slots = np.zeros((2 * layers, length, heads, head_dim), np.float32)
    for layer, (keys, values) in enumerate(zip(arrays[KEY], arrays[VALUE], strict=True)):
        slot = _slot(layer, layers)
        slots[slot], slots[slot + 1] = keys, values
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "encoder_hidden_size": None,
        "inference_mode": True,
        "modules_to_save": None,
        "num_attention_heads": heads,
        "num_layers": layers,
        "num_transformer_submodules": 2,
        "num_virtual_tokens": length,
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "revision": revision,
        "task_type": "SEQ_2_SEQ_LM",
        # PEFT divides it by the heads; a T5's own width may be another number.
        "token_dim": heads * head_dim,
    }
    tensor = slots.swapaxes(0, 1).reshape(length, -1)
    more = {**(metadata or {}), _LAYERS: decoder_layers}
    peft.write_directory(directory, config, {_TENSOR: tensor}, more)


def _slot(layer: int, layers: int) -> int:
    """The slot of a decoder layer's keys among 2 `layers`; its values are in the next one."""
    return 4 * layer % (2 * layers)


def _check(config: Metadata, file: epath.Path) -> None:
    method, task = config.get("peft_type"), config.get("task_type")
    if method != "PREFIX_TUNING":
        raise InputError(f"{file}: peft_type is {method}, not PREFIX_TUNING")
    if task != "SEQ_2_SEQ_LM":
        raise InputError(
            f"{file}: task_type is {task}; ptjax reads prefixes of a T5 (SEQ_2_SEQ_LM) only"
        )
    if config.get("modules_to_save"):
        raise InputError(
            f"{file}: modules_to_save names {config['modules_to_save']}, parts of the backbone that"
            " were trained with this prefix; ptjax cannot load them, and the prefix needs them"
        )
    copies = config.get("num_transformer_submodules")
    if copies not in (None, 2):  # PEFT's default for such a model is 2
        raise InputError(
            f"{file}: num_transformer_submodules is {copies}; PEFT itself runs a T5's prefix with 2"
        )
