"""Reads trees under T5X's names, written by Orbax 0.4 to 0.12 or its v1, with tensorstore alone.

An *item* is one saved tree: an OCDBT database (`manifest.ocdbt`, `d/`, `ocdbt.process_N/`), or a
folder with one zarr array per leaf ("params.decoder.logits_dense.kernel"); its `_METADATA` lists
the leaves. Orbax 0.5 and older also writes the tree into a msgpack, `checkpoint`, with
"PLACEHOLDER://NAME" or the value itself at each leaf. A checkpoint is an item, or a folder of named
items (`default`, `state`, `params`). A CheckpointManager's root holds one checkpoint per step.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

import numpy as np
from etils import epath, epy

from ptjax import files
from ptjax.errors import InputError
from ptjax.files import JsonObject, Metadata
from ptjax.interop import t5x_legacy
from ptjax.interop.lazy_array import LazyArray, one_by_one
from ptjax.interop.zarr_arrays import (
    ArrayLocation,
    file_size,
    kvstore_spec,
    open_database,
    open_zarrs,
    reason_of,
)
from ptjax.models.family import Family
from ptjax.trees import Tree, flatten_paths

with epy.lazy_imports():
    import tensorstore as ts

COMMITTED = "commit_success.txt"
"""Orbax writes this file last on file systems where it cannot rename a folder."""
_MANIFEST, _METADATA, _AGGREGATE = "manifest.ocdbt", "_METADATA", "checkpoint"
_PROCESS = "ocdbt.process_"
_PLACEHOLDER = "PLACEHOLDER://"
_T5X_TREES = {"target": "state", "_optimizer.target": "_optimizer.state"}
"""T5X's names for its model -> for the optimizer's state; the second pair is from 2022."""
_PROMPT = "encoder.prompt.prompt.prompt"
_WRAPPERS = {"target", "params", "model", "state", "train_state", "variables", "_optimizer"}
_NUMBER = re.compile(r"([A-Za-z][\w-]*_)?(\d+)")


@dataclasses.dataclass(frozen=True)
class Item:
    """One tree of arrays that Orbax saved: what its folder contains. The arrays are not open yet.

    The module's docstring describes the files. Names of arrays are dotted:
    "params.decoder.logits_dense.kernel".

    Attributes:
        folder: the item's folder.
        arrays: maps the name of each zarr array found to its keys (see `ArrayLocation.keys`).
        values: maps the name of each array stored in the msgpack file `checkpoint` to the array.
        listed: the names of the zarr arrays that should exist, by `_METADATA` and the msgpack file.
        kvstore: tensorstore's spec of the OCDBT database, or of the folder of zarr arrays.
        sizes: maps the keys of the database to the sizes of their values in bytes; None if the
            item is a folder of zarr arrays.
        stores_fill: whether the writer stored all chunks, including those equal to the fill value;
            None if it did not record this.
    """

    folder: epath.Path
    arrays: dict[str, set[str]]
    values: dict[str, np.ndarray]
    listed: set[str]
    kvstore: JsonObject
    sizes: dict[str, int] | None
    stores_fill: bool | None

    @property
    def names(self) -> set[str]:
        """The dotted names of all arrays found; arrays that are only `listed` are not included."""
        return {*self.arrays, *self.values}

    def locate(self, name: str) -> ArrayLocation:
        """Returns where a zarr array is stored; `name` is a key of `arrays`."""
        prefix = f"{name}/"
        # A chunk missing from a database was never written; a folder may have lost a file.
        may_omit = self.stores_fill is False or (
            self.stores_fill is None and self.sizes is not None
        )
        if self.sizes is None:
            where = self.folder / name
            return ArrayLocation(
                kvstore_spec(where), self.arrays[name], str(where), may_omit, file_size(where)
            )
        sizes = self.sizes
        return ArrayLocation(
            {**self.kvstore, "path": prefix},
            self.arrays[name],
            f"{self.folder} ({name})",
            may_omit,
            lambda key: sizes[prefix + key],
        )


def step_of(name: str) -> tuple[str, int] | None:
    """Splits the name of a step's folder, "checkpoint_3" or "0003", into ("checkpoint_", 3).

    The prefix may be "". Returns None for other names, such as incomplete saves, which have a
    suffix (.tmp-..., .orbax-checkpoint-tmp-...).
    """
    match = _NUMBER.fullmatch(name)
    return (match[1] or "", int(match[2])) if match else None


def names_in(folder: epath.Path) -> set[str]:
    """The names of the files and folders in `folder`; empty if it is not a folder."""
    return {child.name for child in folder.iterdir()} if folder.is_dir() else set()


def is_item(names: Iterable[str]) -> bool:
    """Whether a folder that contains these names is an item (one saved tree), complete or not."""
    names = set(names)
    return bool(names & {_MANIFEST, _METADATA}) or any(x.startswith(_PROCESS) for x in names)


def items_in(folder: epath.Path) -> list[epath.Path]:
    """The items of a checkpoint: the folder itself, or else the folders in it that are items."""
    names = names_in(folder)
    if is_item(names):
        return [folder]
    candidates = [name for name in sorted(names) if step_of(name) is None and "." not in name]
    items = []
    for name in candidates:
        inside = names_in(folder / name)
        # In 2022 Orbax wrote the msgpack alone, without a list of leaves, for T5X.
        if is_item(inside) or (name in ("state", "default", "params") and _AGGREGATE in inside):
            items.append(folder / name)
    return items


def is_complete(item: epath.Path) -> bool:
    """Whether Orbax finished saving an item, judging by its file names.

    Each process first writes a folder `ocdbt.process_N`; Orbax then merges them and writes
    `manifest.ocdbt`. An item with such folders but no manifest is incomplete.
    """
    names = names_in(item)
    return _MANIFEST in names or not any(name.startswith(_PROCESS) for name in names)


def has_placeholder(tree: Tree) -> bool:
    """Whether a tree read from a msgpack file `checkpoint` has a leaf "PLACEHOLDER://...".

    Only Orbax writes such leaves, for arrays that it stores outside this file.
    """
    if isinstance(tree, dict):
        return any(map(has_placeholder, tree.values()))
    if isinstance(tree, list | tuple):
        return any(map(has_placeholder, tree))
    return _is_placeholder(tree)


def load_orbax(checkpoint: epath.Path, family: Family) -> dict[str, LazyArray]:
    """Opens the network in a checkpoint; its arrays stay on disk.

    Args:
        checkpoint: the folder of the checkpoint.
        family: the kind of network; the checkpoint must contain exactly one of this kind.

    Returns:
        the arrays by T5X's parameter names: joined with "/", without a prefix such as "target".

    Raises:
        InputError: the checkpoint contains none or several such networks, was written by a run of
            ptjax (which saves no backbone), is incomplete, or is damaged.
    """
    return _open(*find_model(checkpoint, family))


def find_model(checkpoint: epath.Path, family: Family) -> tuple[Item, str]:
    """Returns the item that holds the network, and the prefix of its names: "target", or "".

    Arguments and errors are those of `load_orbax`. The arrays are not opened, so a damaged one
    raises no error.
    """
    if (checkpoint / "identity").is_dir() and (checkpoint / "progress").is_dir():
        raise InputError(
            f"{checkpoint}: the checkpoint holds no model; it is a checkpoint of a run of ptjax, "
            "which holds the trainable variables only. Name the backbone of the run"
        )
    # `items_in` is empty for a msgpack without a list of leaves; the caller has read that file.
    items = [open_item(folder) for folder in items_in(checkpoint) or [checkpoint]]
    # A tree that contains one of these is a model.
    markers = (family.embedding_path.replace("/", "."), _PROMPT)
    models = [
        (item, prefix)
        for item in items
        for prefix in sorted(_model_prefixes(item.names | item.listed, markers))
    ]
    if not models:
        raise InputError(
            f"{checkpoint}: this Orbax checkpoint does not hold {family.described}; it holds "
            f"{_summary(items)}"
        )
    if len(models) > 1:
        places = ", ".join(f"{item.folder} ({prefix or 'all of it'})" for item, prefix in models)
        raise InputError(
            f"{checkpoint}: several models in this checkpoint, {places}; name the folder of one"
        )
    return models[0]


def open_item(folder: epath.Path) -> Item:
    """Lists the arrays that a folder of Orbax contains, without opening them.

    If the folder is an OCDBT database, also checks that the database's files exist.

    Raises:
        InputError: the save is incomplete, or files are missing or damaged.
    """
    names = names_in(folder)
    metadata = _read_metadata(folder / _METADATA) if _METADATA in names else {}
    tree = t5x_legacy.read_container(folder / _AGGREGATE) if _AGGREGATE in names else {}
    leaves = flatten_paths(tree, separator=".")
    listed = _listed(metadata) | {name for name, leaf in leaves.items() if _is_placeholder(leaf)}
    values = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, np.ndarray)}
    in_database = metadata.get("use_ocdbt") is True or any(x.startswith(_PROCESS) for x in names)
    if _MANIFEST in names:
        kvstore, sizes = open_database(folder)
        keys: Iterable[str] = sizes
    elif in_database:
        raise InputError(
            f"{folder}: manifest.ocdbt is missing, which Orbax writes last: the save or the copy "
            "is incomplete; copy it again, or use another step"
        )
    else:
        kvstore, sizes = kvstore_spec(folder), None
        keys = _keys_below(folder, kvstore)
    arrays: dict[str, set[str]] = {}
    for key in keys:
        name, slash, rest = key.partition("/")
        if slash:
            arrays.setdefault(name, set()).add(rest)
    if sizes is None:  # `d` and `array_metadatas` are folders too
        arrays = {name: k for name, k in arrays.items() if name in listed or _is_array(k)}
    stores_fill = metadata.get("store_array_data_equal_to_fill_value")
    return Item(folder, arrays, values, listed - set(values), kvstore, sizes, stores_fill)


def _open(item: Item, prefix: str) -> dict[str, LazyArray]:
    """The arrays below `prefix`, under T5X's names."""
    start = f"{prefix}." if prefix else ""
    if lost := sorted(_below(start, item.listed) - item.names):
        raise InputError(
            f"{item.folder}: parameter {_slashed(lost[0], start)} is missing, but the checkpoint's "
            "own list has it; copy the checkpoint again"
        )
    names = _below(start, item.names)
    if prefix in _T5X_TREES:
        states = f"{_T5X_TREES[prefix]}.param_states."
        split = [x.removeprefix(states).rpartition(".") for x in _below(states, item.names)]
        trained = {_slashed(x, "") for x, _, slot in split if slot in t5x_legacy.SLOTS}
        kept = {_slashed(name, start) for name in names}
        t5x_legacy.check_trained(trained, kept, item.folder)
    arrays = open_zarrs(
        {_slashed(x, start): item.locate(x) for x in sorted(names) if x in item.arrays}
    )
    for name in names - set(item.arrays):
        value = item.values[name]
        arrays[_slashed(name, start)] = LazyArray(
            value.shape, value.dtype.name, one_by_one(value.__getitem__), f"{item.folder} ({name})"
        )
    return arrays


def _below(start: str, names: Iterable[str]) -> set[str]:
    return {name for name in names if name.startswith(start)}


def _slashed(name: str, start: str) -> str:
    return name.removeprefix(start).replace(".", "/")


def _model_prefixes(names: Iterable[str], markers: Iterable[str]) -> set[str]:
    """The prefixes of networks in a tree: "", "target", "params", ..."""
    prefixes = set()
    for name in names:
        # T5X's own trees need no marker.
        prefixes |= {tree for tree in _T5X_TREES if name.startswith(f"{tree}.")}
        for marker in markers:
            prefix = name.removesuffix(marker).removesuffix(".")
            if name == marker or name.endswith(f".{marker}"):
                # Not `opt_state.0.mu`: an optimizer's arrays have the parameters' names too.
                prefixes |= {prefix} if set(filter(None, prefix.split("."))) <= _WRAPPERS else set()
    return prefixes


def _summary(items: Iterable[Item]) -> str:
    """The first names of each item's tree."""
    parts = []
    for item in items:
        tops = sorted({".".join(name.split(".")[:2]) for name in item.names})
        shown = ", ".join(tops[:5]) + (", ..." if len(tops) > 5 else "")
        parts.append(f"{shown or 'nothing'} (in {item.folder.name})")
    return "; ".join(parts)


# An item's own list of leaves


def _read_metadata(file: epath.Path) -> JsonObject:
    metadata = files.read_object(file)
    if not isinstance(metadata.get("tree_metadata", {}), dict):
        raise InputError(f"{file}: the file is damaged (no list of leaves); copy it again")
    return metadata


def _listed(metadata: Metadata) -> set[str]:
    """The dotted names of the arrays in `_METADATA`; None, {} and strings are skipped."""
    names = set()
    for entry in metadata.get("tree_metadata", {}).values():
        try:
            kind = entry["value_metadata"]["value_type"]
            if kind in ("jax.Array", "np.ndarray"):
                names.add(".".join(str(key["key"]) for key in entry["key_metadata"]))
        except (KeyError, TypeError):  # a leaf that a later Orbax describes differently
            continue
    return names


def _is_placeholder(leaf: object) -> bool:
    return isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER)


def _is_array(keys: set[str]) -> bool:
    return bool(keys & {".zarray", "zarr.json"})


def _keys_below(folder: epath.Path, kvstore: JsonObject) -> list[str]:
    try:
        return [key.decode() for key in ts.KvStore.open(kvstore).result().list().result()]
    except ValueError as error:
        raise InputError(f"{folder}: the folder cannot be listed ({reason_of(error)})") from error
