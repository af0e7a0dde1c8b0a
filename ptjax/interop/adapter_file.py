"""Reads and writes adapter files: what a method other than prompt tuning has trained.

It is a safetensors file. A tensor is named after its variable's path, which begins with the name of
the collection; the layers of a stack have T5X's names, `lora/encoder/layers_0/...`, whether the run
scanned them or not. The header is that of prompt files (`prompt_header`), with its checksum, and
one more entry: "method", the name of the method and its fields.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from ptjax.errors import InputError, check_path, missing
from ptjax.files import JsonObject, Metadata
from ptjax.interop import prompt_header, safetensors_file
from ptjax.interop.write_prompt import TENSOR

METHOD = "method"
"""The entry of the header that makes a file an adapter file."""


def save_adapter(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: Metadata
) -> None:
    """Writes an adapter file, in one atomic write.

    Args:
        arrays: the tuned variables by path.
        metadata: JSON values by name, among them "method".

    Raises:
        InputError: an array is not finite, or a metadata value that ptjax reads has the wrong type.
    """
    check_path("the path of the adapter", path)
    if problem := prompt_header.wrong_value(metadata):
        raise InputError(f"{path}: an adapter cannot be saved with this metadata, {problem}")
    tensors = {name: _checked(array, name, path) for name, array in arrays.items()}
    safetensors_file.save_safetensors(
        path,
        tensors.items(),
        {name: (array.shape, array.dtype.name) for name, array in tensors.items()},
        prompt_header.seal(safetensors_file.to_header(metadata), tensors),
    )


def is_adapter(path: epath.Path) -> bool:
    """Whether a file that exists is an adapter file, intact or not."""
    return _is_safetensors(path) and METHOD in safetensors_file.open_safetensors(path)[1]


def _is_safetensors(path: epath.Path) -> bool:
    """Whether the file starts as one: with the size of a JSON header."""
    with path.open("rb") as stream:
        return stream.read(9)[8:] == b"{"


def read_adapter(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], JsonObject]:
    """Reads an adapter file; returns (arrays by path, metadata).

    Raises:
        InputError: it is missing, damaged, not finite, or a file of another kind.
    """
    file = epath.Path(path)
    if not file.exists():
        raise missing("adapter", file)
    if file.is_dir():
        raise InputError(f"{path} is a folder; name the adapter's file in it")
    if not _is_safetensors(file):
        raise InputError(f"{path}: not an adapter file, which is a safetensors file of ptjax")
    stored, header = safetensors_file.open_safetensors(file)
    if METHOD not in header:
        what = "a prompt: load_prompt (--prompt) reads it" if TENSOR in stored else "no adapter"
        raise InputError(f"{path} holds {what}")
    if not prompt_header.is_sealed(header):
        raise InputError(f"{path}: the file was changed after ptjax wrote it (no checksum)")
    arrays = {name: array.read_all() for name, array in stored.items()}
    metadata = prompt_header.unseal(header, arrays, os.fspath(path))
    if not isinstance(metadata[METHOD], dict):
        raise InputError(f"{path}: the entry {METHOD!r} of its header is damaged; copy it again")
    return {name: _checked(array, name, path) for name, array in arrays.items()}, metadata


def _checked(array: Any, name: str, path: str | os.PathLike[str]) -> np.ndarray:
    """The array in float32, if it is finite."""
    array = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"{path}: {name} is not finite")
    return array
