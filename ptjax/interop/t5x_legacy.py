"""Reads T5X checkpoints older than Orbax: a msgpack and zarr 2 folders.

`checkpoint_N/checkpoint` is a flax msgpack whose leaves are arrays or tensorstore specs that point
to the folders. The formats follow `t5x/checkpoints.py`. Of the optimizer's state, only the
parameter names are used.
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from ptjax import untrusted
from ptjax.errors import InputError
from ptjax.files import Metadata
from ptjax.interop.lazy_array import LazyArray, one_by_one
from ptjax.interop.zarr_arrays import ArrayLocation, file_size, kvstore_spec, open_zarrs
from ptjax.trees import flatten_paths

Contents = Mapping[str, Any]
"""A tree of arrays, JSON values and tensorstore specs, as read from a msgpack."""

DTYPES = ("float32", "bfloat16")
"""The dtypes of parameters that ptjax reads from T5X's checkpoints."""
SLOTS = {"m", "v", "v_row", "v_col"}
"""Names of the state that T5X's Adafactor keeps for a parameter."""


def read_container(file: epath.Path) -> Contents:
    """Reads the tree in a `checkpoint` file (a msgpack) of T5X or of an early Orbax.

    Raises:
        InputError: the file is TensorFlow's, damaged, or does not hold a tree.
    """
    data = file.read_bytes()
    if data.startswith(b"model_checkpoint_path"):
        raise InputError(
            f"{file}: this is a TensorFlow checkpoint (Mesh TensorFlow T5), not T5X's; use the T5X "
            "version of it, under gs://t5-data/pretrained_models/t5x"
        )
    try:
        contents = untrusted.unpack_msgpack(data)
    except ValueError as error:
        raise InputError(
            f"{file}: the file is truncated or not a T5X checkpoint ({error}); copy it again"
        ) from error
    if not isinstance(contents, dict):
        raise InputError(f"{file}: this is not a T5X checkpoint")
    return contents


def load_legacy(file: epath.Path, contents: Contents) -> dict[str, LazyArray]:
    """Opens the parameters of a T5X checkpoint; those in zarr folders stay on disk.

    Args:
        file: the `checkpoint` file.
        contents: its tree, from `read_container`.

    Returns:
        the arrays by parameter name.

    Raises:
        InputError: the checkpoint's version is not supported, a parameter is neither an array nor
            the tensorstore spec of one, a spec's path is outside of the checkpoint, or a zarr array
            is missing or damaged (see `open_zarrs`).
    """
    leaves = _leaves(_target(contents, file), file)
    arrays = {
        name: LazyArray(
            leaf.shape, leaf.dtype.name, one_by_one(leaf.__getitem__), f"{file} ({name})"
        )
        for name, leaf in leaves.items()
        if isinstance(leaf, np.ndarray)
    }
    specs = {name: leaf for name, leaf in leaves.items() if name not in arrays}
    folders = {name: file.parent / _folder_of(spec, name, file) for name, spec in specs.items()}
    keys = _list_folders(folders.values())
    lazy_arrays = open_zarrs(
        {
            name: ArrayLocation(
                kvstore_spec(folder), names, os.fspath(folder), False, file_size(folder)
            )
            for (name, folder), names in zip(folders.items(), keys, strict=True)
        }
    )
    for name, spec in specs.items():
        _check_spec(name, spec, lazy_arrays[name], file)
    return {name: arrays.get(name) or lazy_arrays[name] for name in leaves}


def check_dtype(name: str, dtype: str, where: str) -> None:
    """Raises InputError if a parameter of this dtype is not supported.

    Args:
        name: the parameter's name, for the message.
        where: its file, for the message.
    """
    if dtype == "uint16":
        raise InputError(
            f"{where}: parameter {name} is uint16, T5X's bfloat16 of checkpoint version 2, which "
            "T5X itself refuses; load and save the checkpoint with a T5X of 2021"
        )
    if dtype not in DTYPES:
        raise InputError(f"{where}: parameter {name} is {dtype}, not one of {', '.join(DTYPES)}")


def check_trained(trained: Iterable[str], kept: set[str], where: epath.Path) -> None:
    """Raises InputError if the optimizer has state for a parameter that the checkpoint lacks.

    Otherwise a network that lost the logits' kernel would silently be loaded with tied logits.

    Args:
        trained: the parameters that the optimizer has state for.
        kept: the parameters in the checkpoint.
        where: the checkpoint, for the message.
    """
    if lost := sorted(set(trained) - kept):
        raise InputError(
            f"{where}: parameter {lost[0]} is missing, but the optimizer's state has it; copy the "
            "checkpoint again"
        )


def _check_spec(name: str, spec: Metadata, lazy_array: LazyArray, file: epath.Path) -> None:
    """T5X records shape and dtype in both places; if they differ, folders were mixed up."""
    metadata = spec.get("metadata", {})
    expected = metadata.get("shape") if isinstance(metadata, dict) else None
    if expected is not None and expected not in (list(lazy_array.shape), lazy_array.shape):
        raise InputError(
            f"{lazy_array.where}: parameter {name} has shape {list(lazy_array.shape)}, but {file} "
            f"says {expected}"
        )
    check_dtype(name, spec.get("dtype", lazy_array.dtype), lazy_array.where)


def _target(contents: Contents, file: epath.Path) -> Contents:
    """`optimizer/target`, after all checks of the container."""
    if not {"version", "optimizer"} <= set(contents):
        raise InputError(f"{file}: not a T5X checkpoint, it lacks `version` or `optimizer`")
    version = contents["version"]
    if isinstance(version, np.ndarray) or version != 3:
        raise InputError(
            f"{file}: T5X checkpoint version {version}; ptjax reads version 3, which T5X has "
            "written since 2021 (version 2 stored bfloat16 as uint16)"
        )
    optimizer = contents["optimizer"]
    target = optimizer.get("target") if isinstance(optimizer, dict) else None
    if not isinstance(target, dict) or is_spec(target):
        raise InputError(f"{file}: the checkpoint has no weights (`optimizer/target`)")
    state = optimizer.get("state")
    if isinstance(state, dict) and isinstance(state.get("param_states"), dict):
        check_trained(_trained(state["param_states"]), set(_leaves(target, file)), file)
    return target


def _trained(states: Contents) -> list[str]:
    """The parameters that the optimizer has state for, such as `.../kernel/v_row`."""
    by_parameter = flatten_paths(states, is_leaf=lambda node: bool(SLOTS & set(node)))
    return [name for name, slots in by_parameter.items() if isinstance(slots, dict)]


def _leaves(target: Contents, file: epath.Path) -> dict[str, Any]:
    """Name -> array or tensorstore spec of each leaf."""
    leaves = flatten_paths(target, is_leaf=is_spec)
    for name, leaf in leaves.items():
        if isinstance(leaf, dict) and _holds_array(leaf):
            raise InputError(
                f"{file}: the spec of parameter {name} is damaged: it holds an array instead of a "
                "string or number; copy the checkpoint again"
            )
        if not isinstance(leaf, np.ndarray | dict):
            raise InputError(
                f"{file}: parameter {name} is a {type(leaf).__name__}, neither an array nor a "
                "tensorstore spec"
            )
    return leaves


def is_spec(node: Mapping[Any, Any]) -> bool:
    """Whether a node of the tree is the tensorstore spec of an array."""
    return {"driver", "kvstore"} <= set(node)


def _holds_array(spec: object) -> bool:
    """Whether a tensorstore spec contains an array; an intact one is plain JSON."""
    if isinstance(spec, dict):
        return any(map(_holds_array, spec.values()))
    return isinstance(spec, np.ndarray) or (isinstance(spec, list) and any(map(_holds_array, spec)))


def _folder_of(spec: Metadata, name: str, file: epath.Path) -> str:
    """The array's folder, relative to the checkpoint.

    Whatever driver the spec names, the array is in a folder next to the msgpack: T5X too rewrites
    the driver and its dummy bucket. Before tensorstore 0.1.14 the path was at the spec's top level.
    """
    kvstore = spec["kvstore"]
    driver = kvstore.get("driver") if isinstance(kvstore, dict) else kvstore
    if spec["driver"] != "zarr" or driver not in ("file", "gfile", "gcs"):
        raise InputError(
            f"{file}: parameter {name} is stored by driver {spec['driver']!r} in {driver!r}; ptjax "
            "reads zarr in file, gfile or gcs"
        )
    folder = kvstore.get("path") or spec.get("path")
    if not isinstance(folder, str) or not folder.strip("/"):
        raise InputError(f"{file}: the spec of parameter {name} has no path")
    # A checkpoint is untrusted input: it must not name files outside of itself.
    if folder.startswith("/") or ".." in folder.split("/") or "://" in folder:
        raise InputError(
            f"{file}: the path of parameter {name}, {folder!r}, points outside of the checkpoint"
        )
    return folder.rstrip("/")


def _list_folders(folders: Iterable[epath.Path]) -> list[set[str]]:
    """The names in each folder, listed concurrently: on gs:// each is a request."""

    def names(folder: epath.Path) -> set[str]:
        return {child.name for child in folder.iterdir()} if folder.is_dir() else set()

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        return list(pool.map(names, folders))
