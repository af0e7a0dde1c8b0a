"""Reads T5X checkpoints, legacy (msgpack + zarr) and Orbax (OCDBT), without T5X.

Legacy, `checkpoint_N/checkpoint`: a flax msgpack whose leaves are arrays or tensorstore specs that
point at zarr v2 folders beside it. Orbax, `checkpoint_N/state/`: one OCDBT database with one zarr
array per parameter. Formats after `t5x/checkpoints.py`; only `target` is read, never the optimizer.

tensorstore reads a chunk that does not exist as zeros, so both readers check that every chunk is
there before they return anything.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath
from flax import serialization

from ptjax.errors import InputError
from ptjax.interop.stored import Index, ReadParts, StoredArray, one_by_one

DTYPES = ("float32", "bfloat16")
_NUMBERED = re.compile(r"checkpoint_(\d+)")
_PLACEHOLDER = "PLACEHOLDER://"
_TARGET, _STATES = "target/", "state/param_states/"
_SLOTS = {"m", "v", "v_row", "v_col"}  # what T5X's Adafactor keeps of a parameter
# A checkpoint does not change under its reader: no request asks whether what is cached is stale.
_FINISHED = {"open": True, "recheck_cached_data": False, "recheck_cached_metadata": False}
# Files of `state/` that tell Orbax's formats, the first one also that saving came to its end.
_ORBAX_FILES = ("manifest.ocdbt", "_METADATA", "checkpoint", "ocdbt.process_0")


def is_t5x(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a T5X checkpoint or a folder that holds some; says nothing on health."""
    path = epath.Path(path)
    if path.is_file():
        return path.name == "checkpoint"
    return path.is_dir() and (_is_checkpoint(path) or _is_state(path) or any(_numbered(path)))


def find_checkpoint(path: str | os.PathLike[str]) -> epath.Path:
    """The checkpoint folder that `path` means.

    A checkpoint (or the `checkpoint` file or `state` folder in it) means itself. A folder of
    several `checkpoint_N` means the largest N whose saving came to its end.

    Raises:
        InputError: there is none.
    """
    path = epath.Path(path)
    if path.name == "checkpoint" and path.is_file():
        return path.parent
    if _is_state(path):
        return path.parent
    if _is_checkpoint(path):
        return path
    complete = [(step, folder) for step, folder in _numbered(path) if _is_complete(folder)]
    if not complete:
        raise InputError(
            f"{path}: no T5X checkpoint here, neither a `checkpoint` file, nor a `state` folder, "
            "nor a complete checkpoint_N folder"
        )
    return max(complete)[1]


def load_t5x(path: str | os.PathLike[str]) -> dict[str, StoredArray]:
    """Opens a T5X checkpoint; its weights stay on disk until they are read.

    Args:
        path: whatever `find_checkpoint` takes, local or gs://.

    Returns:
        T5X parameter name ("encoder/layers_0/attention/query/kernel") -> array, float32 or
        bfloat16; with the prompt, `encoder/prompt/prompt/prompt`, where there is one.

    Raises:
        InputError: the checkpoint is incomplete, damaged, or of a kind that is not read.
    """
    checkpoint = find_checkpoint(path)
    legacy = checkpoint / "checkpoint"
    arrays = _load_legacy(legacy) if legacy.exists() else _load_orbax(checkpoint / "state")
    if not arrays:
        raise InputError(
            f"{checkpoint}: the checkpoint holds no model (`target` is empty); is it one of a run "
            "of ptjax, which keeps only what trains?"
        )
    for name, array in arrays.items():
        _refuse_scanned(name, array)
        _check_dtype(name, array.dtype, array.where)
    return arrays


def _numbered(path: epath.Path) -> Iterator[tuple[int, epath.Path]]:
    if path.is_dir():
        for child in path.iterdir():
            # Half-saved folders carry a suffix (.tmp-..., .orbax-checkpoint-tmp-...).
            if (match := _NUMBERED.fullmatch(child.name)) and _is_checkpoint(child):
                yield int(match[1]), child


def _is_checkpoint(path: epath.Path) -> bool:
    if (path / "checkpoint").is_file():
        return True
    return any((path / "state" / name).exists() for name in _ORBAX_FILES)


def _is_state(path: epath.Path) -> bool:
    return path.name == "state" and (path / "manifest.ocdbt").exists()


def _is_complete(path: epath.Path) -> bool:
    return (path / "checkpoint").is_file() or (path / "state" / "manifest.ocdbt").exists()


def _refuse_scanned(name: str, array: StoredArray) -> None:
    """Scanned layers (T5X `scalable_t5`, umT5) are one array with a `layers` axis."""
    parts = name.split("/")
    stacked = parts[:2] in (["encoder", "encoder"], ["decoder", "decoder"])
    if stacked or "scan" in parts or "layers" in parts or len(array.shape) > 2:
        raise InputError(
            f"{array.where}: parameter {name} {list(array.shape)} belongs to a scanned model, "
            "whose layers are stacked along a `layers` axis; ptjax reads unscanned T5X checkpoints"
        )


def _check_trained(trained: Iterable[str], kept: set[str], where: epath.Path) -> None:
    """A parameter that was trained and is not there has been lost.

    Logits without weights of their own are otherwise taken for tied ones, without a word.
    """
    if lost := sorted(set(trained) - kept):
        raise InputError(
            f"{where}: parameter {lost[0]} is missing, the optimizer's state has it; copy the "
            "checkpoint again"
        )


def _check_dtype(name: str, dtype: str, where: str) -> None:
    if dtype == "uint16":
        raise InputError(
            f"{where}: parameter {name} is uint16, T5X's bfloat16 of checkpoint version 2, which "
            "T5X itself refuses; load and save the checkpoint with a T5X of 2021"
        )
    if dtype not in DTYPES:
        raise InputError(f"{where}: parameter {name} is {dtype}, not one of {', '.join(DTYPES)}")


# Legacy


def _load_legacy(file: epath.Path) -> dict[str, StoredArray]:
    leaves = dict(_flatten(_restore_target(file), (), file))
    arrays, specs = {}, {}
    for name, leaf in leaves.items():
        if isinstance(leaf, np.ndarray):
            arrays[name] = StoredArray(
                leaf.shape, leaf.dtype.name, one_by_one(leaf.__getitem__), f"{file} ({name})"
            )
        else:
            specs[name] = leaf
    folders = {name: file.parent / _folder_of(spec, name, file) for name, spec in specs.items()}
    keys = _list_folders(folders.values())
    stored = _open_zarrs(
        {
            name: (_kvstore_spec(folder), held, os.fspath(folder))
            for (name, folder), held in zip(folders.items(), keys, strict=True)
        }
    )
    for name, spec in specs.items():
        # T5X keeps the shape in both places; where they differ a folder was swapped.
        wanted = spec.get("metadata", {}).get("shape")
        if wanted is not None and tuple(wanted) != stored[name].shape:
            raise InputError(
                f"{stored[name].where}: parameter {name} has shape {list(stored[name].shape)}, "
                f"{file} says {list(wanted)}"
            )
        _check_dtype(name, spec.get("dtype", stored[name].dtype), stored[name].where)
    return {name: arrays.get(name) or stored[name] for name in leaves}


def _restore_target(file: epath.Path) -> Mapping[str, Any]:
    """`optimizer/target` of the msgpack, after every check of the container."""
    data = file.read_bytes()
    if data.startswith(b"model_checkpoint_path"):
        raise InputError(
            f"{file}: this is a TensorFlow checkpoint (Mesh TensorFlow T5), not T5X's; use T5X's "
            "conversion of it, under gs://t5-data/pretrained_models/t5x"
        )
    try:
        contents = serialization.msgpack_restore(data)
    except Exception as error:  # msgpack has a dozen of them, and all mean a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{file}: the file is truncated or is no T5X checkpoint ({reason}); copy it again"
        ) from error
    if not isinstance(contents, dict):
        raise InputError(f"{file}: this is no T5X checkpoint")
    if _has_placeholder(contents):
        raise InputError(
            f"{file}: this is a checkpoint of the first Orbax in T5X (2022-23, leaves "
            f"{_PLACEHOLDER}...), which ptjax does not read; load and save it with a newer T5X"
        )
    if not {"version", "optimizer"} <= set(contents):
        raise InputError(f"{file}: this is no T5X checkpoint, it lacks `version` or `optimizer`")
    if (version := contents["version"]) != 3:
        raise InputError(
            f"{file}: T5X checkpoint version {version}; ptjax reads version 3, the one T5X has "
            "written since 2021 (version 2 kept bfloat16 as uint16)"
        )
    optimizer = contents["optimizer"]
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("target"), dict):
        raise InputError(f"{file}: the checkpoint has no weights (`optimizer/target`)")
    target, state = optimizer["target"], optimizer.get("state")
    if isinstance(state, dict) and isinstance(state.get("param_states"), dict):
        kept = {name for name, _ in _flatten(target, (), file)}
        _check_trained(_trained(state["param_states"], ()), kept, file)
    return target


def _trained(states: Mapping[str, Any], prefix: tuple[str, ...]) -> Iterator[str]:
    """Name of each parameter that the optimizer keeps something of: `.../kernel/v_row`."""
    if _SLOTS & set(states):
        yield "/".join(prefix)
        return
    for key, value in states.items():
        if isinstance(value, dict):
            yield from _trained(value, (*prefix, key))


def _has_placeholder(tree: Any) -> bool:
    if isinstance(tree, dict):
        return any(_has_placeholder(value) for value in tree.values())
    return isinstance(tree, str) and tree.startswith(_PLACEHOLDER)


def _flatten(
    tree: Mapping[str, Any], prefix: tuple[str, ...], file: epath.Path
) -> Iterator[tuple[str, Any]]:
    """(name, array or tensorstore spec) of each leaf."""
    for key, value in tree.items():
        path = (*prefix, key)
        if isinstance(value, np.ndarray) or (
            isinstance(value, dict) and {"driver", "kvstore"} <= set(value)
        ):
            yield "/".join(path), value
        elif isinstance(value, dict):
            yield from _flatten(value, path, file)
        else:
            raise InputError(
                f"{file}: parameter {'/'.join(path)} is a {type(value).__name__}, neither an array "
                "nor a tensorstore spec"
            )


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


# Orbax


def _load_orbax(state: epath.Path) -> dict[str, StoredArray]:
    if not (state / "manifest.ocdbt").exists():
        raise InputError(
            f"{state}: manifest.ocdbt is missing; either the copy is incomplete, or the checkpoint "
            "is of the first Orbax in T5X (2022-23), which ptjax does not read"
        )
    base = _kvstore_spec(state)
    try:
        _check_ocdbt_files(base, state)
        database = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
        keys = {key.decode() for key in database.list().result()}
    except InputError:
        raise
    except ValueError as error:  # tensorstore's only exception
        raise InputError(f"{state}: the checkpoint is damaged ({_reason(error)})") from error
    names = {key.rsplit("/", 1)[0].replace(".", "/") for key in keys}
    targets = {name.removeprefix(_TARGET) for name in names if name.startswith(_TARGET)}
    states = [name.removeprefix(_STATES) for name in names if name.startswith(_STATES)]
    trained = {path for path, _, slot in (x.rpartition("/") for x in states) if slot in _SLOTS}
    _check_trained(trained, targets, state)
    requests = {}
    for name in sorted(targets):
        dotted = f"{_TARGET}{name}".replace("/", ".")
        prefix = f"{dotted}/"
        inside = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
        if "zarr.json" in inside:
            raise InputError(f"{state}: {dotted} is in zarr 3; ptjax reads T5X's zarr 2")
        kvstore = {"driver": "ocdbt", "base": base, "path": prefix}
        requests[name] = (kvstore, inside, f"{state} ({dotted})")
    return _open_zarrs(requests)


def _check_ocdbt_files(base: dict[str, Any], state: epath.Path) -> None:
    """Every data file that the database's index names is there, at its full length.

    Opening and listing touch the index alone: without this a missing `ocdbt.process_0/d/` file
    would come to light in the middle of loading.
    """
    store = ts.KvStore.open(base).result()
    manifest = ts.ocdbt.dump(store).result()
    needed: dict[str, int] = {}

    def need(location: str) -> None:
        # "value:ocdbt.process_0/:d/5858be...:0:1034": kind, folder, file, offset, length.
        _, folder, file, offset, length = location.split(":")
        end = int(offset) + int(length)
        needed[folder + file] = max(needed.get(folder + file, 0), end)

    pending = [manifest["versions"][-1]["root"]["location"]]
    while pending:
        node = ts.ocdbt.dump(store, pending.pop()).result()
        for entry in node["entries"]:
            if "indirect_value" in entry:
                need(entry["indirect_value"])
            elif "location" in entry:
                pending.append(entry["location"])
    for file, size in needed.items():
        path = state / file
        if not path.exists():
            raise InputError(f"{path}: the file is missing, parameters lie in it; copy it again")
        if path.stat().length < size:
            raise InputError(f"{path}: the file is truncated, parameters lie in it; copy it again")


# Both


def _kvstore_spec(folder: epath.Path) -> dict[str, Any]:
    """tensorstore's description of a local or gs:// folder."""
    text = os.fspath(folder)
    if text.startswith("gs://"):
        bucket, _, path = text.removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}
    return {"driver": "file", "path": f"{os.fspath(folder.expanduser().absolute())}/"}


def _list_folders(folders: Iterable[epath.Path]) -> list[set[str]]:
    """The names in each folder; many at once, for on gs:// each is a request."""

    def names(folder: epath.Path) -> set[str]:
        return {child.name for child in folder.iterdir()} if folder.is_dir() else set()

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        return list(pool.map(names, folders))


def _open_zarrs(
    requests: Mapping[str, tuple[dict[str, Any], set[str], str]],
) -> dict[str, StoredArray]:
    """name -> (kvstore, keys in it, where) to name -> array, all opened at once.

    With futures, not asyncio: a notebook's event loop is already running.
    """
    opening = {}
    context = ts.Context()  # caches of its own: the next load looks at the files anew
    for name, (kvstore, keys, where) in requests.items():
        if ".zarray" not in keys:
            raise InputError(
                f"{where}/.zarray: the file of parameter {name} is missing; copy the checkpoint "
                "again, dotfiles included"
            )
        spec = {"driver": "zarr", "kvstore": kvstore, **_FINISHED}
        opening[name] = ts.open(spec, read=True, context=context)
    arrays = {}
    for name, (_, keys, where) in requests.items():
        try:
            array = opening[name].result()
        except ValueError as error:
            raise InputError(
                f"{where}: parameter {name} cannot be opened ({_reason(error)})"
            ) from error
        for chunk in _chunks(array):
            if chunk not in keys:
                raise InputError(
                    f"{where}/{chunk}: a chunk of parameter {name} is missing; copy the "
                    "checkpoint again"
                )
        arrays[name] = StoredArray(
            array.shape, array.dtype.name, _reader(array, name, where), where
        )
    return arrays


def _chunks(array: ts.TensorStore) -> Iterator[str]:
    """File name of each chunk: "0.0", "0.1", ... The last one of an axis may stick out."""
    metadata = array.spec().to_json()["metadata"]
    separator = metadata.get("dimension_separator", ".")
    counts = [
        -(-size // chunk) for size, chunk in zip(array.shape, metadata["chunks"], strict=True)
    ]
    for index in itertools.product(*map(range, counts)):
        yield separator.join(map(str, index)) or "0"


def _reader(array: ts.TensorStore, name: str, where: str) -> ReadParts:
    def read_parts(indices: Sequence[Index]) -> list[np.ndarray]:
        try:
            with ts.Batch() as batch:  # a chunk is fetched and decompressed once for all parts
                reading = [array[index].read(batch=batch) for index in indices]
            return [part.result() for part in reading]
        except ValueError as error:
            raise InputError(
                f"{where}: parameter {name} cannot be read ({_reason(error)}); the file is "
                "truncated or damaged, copy it again"
            ) from error

    return read_parts


def _reason(error: Exception) -> str:
    """The first sentence of tensorstore's message, without the spec and source lines after it."""
    text = re.split(r" \[(?:tensorstore_spec|source locations)", str(error))[0]
    return json.dumps(text)[1:-1].replace('\\"', "'")
