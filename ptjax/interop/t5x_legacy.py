"""T5X checkpoints of before Orbax: a msgpack, and zarr 2 folders beside it.

`checkpoint_N/checkpoint` is a flax msgpack whose leaves are arrays or tensorstore specs that point
at the folders. Formats after `t5x/checkpoints.py`; of the optimizer only names are looked at.
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
from ptjax.interop.lazy_array import LazyArray, one_by_one
from ptjax.interop.zarr_arrays import ArrayLocation, file_size, kvstore_spec, open_zarrs
from ptjax.trees import flatten_paths

DTYPES = ("float32", "bfloat16")
SLOTS = {"m", "v", "v_row", "v_col"}
"""What T5X's Adafactor keeps of a parameter."""


def read_container(file: epath.Path) -> dict[str, Any]:
    """The tree in a `checkpoint` file, T5X's or an early Orbax's.

    Raises:
        InputError: it is TensorFlow's, damaged, or no tree.
    """
    data = file.read_bytes()
    if data.startswith(b"model_checkpoint_path"):
        raise InputError(
            f"{file}: this is a TensorFlow checkpoint (Mesh TensorFlow T5), not T5X's; use T5X's "
            "conversion of it, under gs://t5-data/pretrained_models/t5x"
        )
    try:
        contents = untrusted.unpack_msgpack(data)
    except ValueError as error:
        raise InputError(
            f"{file}: the file is truncated or is no T5X checkpoint ({error}); copy it again"
        ) from error
    if not isinstance(contents, dict):
        raise InputError(f"{file}: this is no T5X checkpoint")
    return contents


def load_legacy(file: epath.Path, contents: Mapping[str, Any]) -> dict[str, LazyArray]:
    """Parameter name -> array of a `checkpoint` file with these contents.

    Raises:
        InputError: another version, a leaf that is no array, a spec that leaves the checkpoint,
            or whatever `open_zarrs` finds wrong.
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
    stored = open_zarrs(
        {
            name: ArrayLocation(
                kvstore_spec(folder), held, os.fspath(folder), False, file_size(folder)
            )
            for (name, folder), held in zip(folders.items(), keys, strict=True)
        }
    )
    for name, spec in specs.items():
        _check_spec(name, spec, stored[name], file)
    return {name: arrays.get(name) or stored[name] for name in leaves}


def check_dtype(name: str, dtype: str, where: str) -> None:
    """InputError unless a parameter of this dtype can be read."""
    if dtype == "uint16":
        raise InputError(
            f"{where}: parameter {name} is uint16, T5X's bfloat16 of checkpoint version 2, which "
            "T5X itself refuses; load and save the checkpoint with a T5X of 2021"
        )
    if dtype not in DTYPES:
        raise InputError(f"{where}: parameter {name} is {dtype}, not one of {', '.join(DTYPES)}")


def check_trained(trained: Iterable[str], kept: set[str], where: epath.Path) -> None:
    """A parameter that was trained and is not there has been lost.

    Logits without weights of their own are otherwise taken for tied ones, without a word.
    """
    if lost := sorted(set(trained) - kept):
        raise InputError(
            f"{where}: parameter {lost[0]} is missing, the optimizer's state has it; copy the "
            "checkpoint again"
        )


def _check_spec(name: str, spec: Mapping[str, Any], stored: LazyArray, file: epath.Path) -> None:
    """T5X keeps shape and dtype in both places; where they differ a folder was swapped."""
    metadata = spec.get("metadata", {})
    wanted = metadata.get("shape") if isinstance(metadata, dict) else None
    if wanted is not None and wanted not in (list(stored.shape), stored.shape):
        raise InputError(
            f"{stored.where}: parameter {name} has shape {list(stored.shape)}, {file} says {wanted}"
        )
    check_dtype(name, spec.get("dtype", stored.dtype), stored.where)


def _target(contents: Mapping[str, Any], file: epath.Path) -> Mapping[str, Any]:
    """`optimizer/target`, after every check of the container."""
    if not {"version", "optimizer"} <= set(contents):
        raise InputError(f"{file}: this is no T5X checkpoint, it lacks `version` or `optimizer`")
    version = contents["version"]
    if isinstance(version, np.ndarray) or version != 3:
        raise InputError(
            f"{file}: T5X checkpoint version {version}; ptjax reads version 3, the one T5X has "
            "written since 2021 (version 2 kept bfloat16 as uint16)"
        )
    optimizer = contents["optimizer"]
    target = optimizer.get("target") if isinstance(optimizer, dict) else None
    if not isinstance(target, dict) or _is_spec(target):
        raise InputError(f"{file}: the checkpoint has no weights (`optimizer/target`)")
    state = optimizer.get("state")
    if isinstance(state, dict) and isinstance(state.get("param_states"), dict):
        check_trained(_trained(state["param_states"]), set(_leaves(target, file)), file)
    return target


def _trained(states: Mapping[str, Any]) -> list[str]:
    """Name of each parameter that the optimizer keeps something of: `.../kernel/v_row`."""
    kept = flatten_paths(states, is_leaf=lambda node: bool(SLOTS & set(node)))
    return [name for name, slots in kept.items() if isinstance(slots, dict)]


def _leaves(target: Mapping[str, Any], file: epath.Path) -> dict[str, Any]:
    """Name -> array or tensorstore spec of each leaf."""
    leaves = flatten_paths(target, is_leaf=_is_spec)
    for name, leaf in leaves.items():
        if isinstance(leaf, dict) and _holds_array(leaf):
            raise InputError(
                f"{file}: the spec of parameter {name} is damaged: it holds an array where a text "
                "or a number belongs; copy the checkpoint again"
            )
        if not isinstance(leaf, np.ndarray | dict):
            raise InputError(
                f"{file}: parameter {name} is a {type(leaf).__name__}, neither an array nor a "
                "tensorstore spec"
            )
    return leaves


def _is_spec(node: Mapping[str, Any]) -> bool:
    return {"driver", "kvstore"} <= set(node)


def _holds_array(spec: Any) -> bool:
    """Whether a tensorstore spec contains an array; an intact one is plain JSON."""
    if isinstance(spec, dict):
        return any(map(_holds_array, spec.values()))
    return isinstance(spec, np.ndarray) or (isinstance(spec, list) and any(map(_holds_array, spec)))


def _folder_of(spec: Mapping[str, Any], name: str, file: epath.Path) -> str:
    """The array's folder, relative to the checkpoint.

    Whatever driver the spec names, the array lies beside the msgpack: T5X rewrites the driver and
    its dummy bucket as well. Before tensorstore 0.1.14 the path stood at the spec's top level.
    """
    kvstore = spec["kvstore"]
    driver = kvstore.get("driver") if isinstance(kvstore, dict) else kvstore
    if spec["driver"] != "zarr" or driver not in ("file", "gfile", "gcs"):
        raise InputError(
            f"{file}: parameter {name} is kept by {spec['driver']!r} in {driver!r}; ptjax reads "
            "zarr in file, gfile or gcs"
        )
    folder = kvstore.get("path") or spec.get("path")
    if not isinstance(folder, str) or not folder.strip("/"):
        raise InputError(f"{file}: the spec of parameter {name} has no path")
    # A checkpoint comes from strangers: it may name what lies inside of it and nothing else.
    if folder.startswith("/") or ".." in folder.split("/") or "://" in folder:
        raise InputError(
            f"{file}: the path of parameter {name}, {folder!r}, leaves the checkpoint; refused"
        )
    return folder.rstrip("/")


def _list_folders(folders: Iterable[epath.Path]) -> list[set[str]]:
    """The names in each folder; many at once, for on gs:// each is a request."""

    def names(folder: epath.Path) -> set[str]:
        return {child.name for child in folder.iterdir()} if folder.is_dir() else set()

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        return list(pool.map(names, folders))
