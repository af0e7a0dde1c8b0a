"""`save_backbone`: saves a backbone in Hugging Face's layout."""

from __future__ import annotations

import os
from typing import Any

from etils import epath

from ptjax.data.tokenizer import Tokenizer
from ptjax.errors import InputError, check_path
from ptjax.interop import huggingface, own_names
from ptjax.models.family import Family
from ptjax.models.quantized import Quantized
from ptjax.models.stacking import UnstackedView
from ptjax.models.t5_family import T5_FAMILY
from ptjax.sharding import processes
from ptjax.trees import Tree, flatten_paths


def save_backbone(
    directory: str | os.PathLike[str],
    config: Any,
    params: Tree,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: str = "bfloat16",
    max_shard_bytes: int | None = None,
    family: Family = T5_FAMILY,
) -> None:
    """Writes the Hugging Face layout, which `load_backbone` and `transformers` read.

    For a family without Hugging Face names, writes no config, and a `model.safetensors` with the
    network's parameter names. With several processes, all must call it; the first one writes.

    Args:
        config: the network's config.
        params: the parameters as a nested dict, as in `Backbone.variables["params"]`; the layers of
            a T5 may be stacked or separate.
        tokenizer: written too, if it is not None.
        dtype: the dtype of the files, "float32" or "bfloat16".
        max_shard_bytes: split the weights into files of at most this size; None: one file. Ignored
            for a family without Hugging Face names.
        family: the kind of network.

    Raises:
        InputError: the kernels are int8, or the network or `dtype` cannot be saved.
    """
    check_path("the folder of the backbone", directory)
    own_names_only = not family.tensor_names({})
    flat = flatten_paths(params) if own_names_only else UnstackedView(flatten_paths(params))
    if any(isinstance(array, Quantized) for array in flat.values()):
        raise InputError("int8 kernels are rounded; load the backbone without quantize to save it")
    if not processes.first():
        for name in sorted(flat):  # same order as in the writing process
            processes.on_host(flat[name])
        return
    target = epath.Path(directory).expanduser()
    target.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(target)
    if own_names_only:
        return own_names.save_own_names(target, flat, dtype)
    huggingface.save_huggingface(target, flat, config, dtype=dtype, max_shard_bytes=max_shard_bytes)
