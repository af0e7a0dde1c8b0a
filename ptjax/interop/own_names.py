"""Reads and writes `model.safetensors` with the parameters' own names, "encoder/layer/kernel".

This is the format of networks without Hugging Face names; the folder has no `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from etils import epath
from jaxtyping import Array

from ptjax.errors import InputError
from ptjax.interop import safetensors_file
from ptjax.interop.bytes_on_disk import numpy_dtype
from ptjax.interop.lazy_array import LazyArray
from ptjax.sharding.processes import on_host

WEIGHTS = "model.safetensors"
_MARK = {"format": "ptjax"}
"""Metadata of such a file; Hugging Face's have {"format": "pt"}."""


def has_own_names(directory: epath.Path) -> bool:
    """Whether `save_own_names` wrote the weights in a folder, judging by the file's header.

    Raises:
        InputError: the file is missing or damaged, as for `load_own_names`.
    """
    return safetensors_file.open_safetensors(directory / WEIGHTS)[1] == _MARK


def load_own_names(directory: epath.Path) -> dict[str, LazyArray]:
    """Opens the arrays by parameter name; each stays on disk until it is read.

    Raises:
        InputError: the file is missing, truncated or damaged, or contains tensors that are not
            floating point.
    """
    return safetensors_file.open_safetensors(directory / WEIGHTS)[0]


def save_own_names(
    directory: epath.Path, params: Mapping[str, Array | np.ndarray], dtype: str
) -> None:
    """Writes `model.safetensors` for `load_own_names`; use `save_backbone` with several processes.

    Args:
        params: maps parameter names to arrays.
        dtype: the dtype of the file, "float32" or "bfloat16".

    Raises:
        InputError: the folder holds a `config.json`, so it would be read as Hugging Face's.
    """
    if (directory / "config.json").exists():
        raise InputError(
            f"{directory}: the folder holds the config.json of another model; name a new folder"
        )
    shapes = {name: jax.eval_shape(lambda name=name: params[name]).shape for name in sorted(params)}
    safetensors_file.save_safetensors(
        directory / WEIGHTS,
        ((name, on_host(params[name]).astype(numpy_dtype(dtype))) for name in shapes),
        {name: (shape, dtype) for name, shape in shapes.items()},
        metadata=_MARK,
    )
