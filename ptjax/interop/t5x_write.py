"""Puts a prompt into a T5X checkpoint, as the parameter of google-research/prompt-tuning.

The result is a new checkpoint. Its other files are the original's: hard links to them where the
file system has these, else copies; no array but the prompt is read. The prompt is stored as the
original stores its embedding: in the msgpack, in a zarr folder or in an OCDBT database, with the
same version of zarr and compression, and is added to every list that the original keeps of its
arrays. The optimizer's state is left as it is, without an entry for the prompt.
"""

from __future__ import annotations

import base64
import copy
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
from etils import epath

from ptjax import files, untrusted
from ptjax.errors import InputError
from ptjax.files import JsonObject, Metadata
from ptjax.interop import orbax_folder, t5x, t5x_legacy
from ptjax.interop.orbax_folder import Item
from ptjax.interop.t5x import T5X_PROMPT
from ptjax.interop.zarr_arrays import kvstore_spec
from ptjax.models.t5_family import T5_FAMILY

_FOLDER = f"target.{T5X_PROMPT.replace('/', '.')}"
"""The prompt's folder in a checkpoint older than Orbax."""
_MSGPACK = "checkpoint"


def write_t5x(
    checkpoint: str | os.PathLike[str], prompt: np.ndarray, output: str | os.PathLike[str]
) -> None:
    """Writes a copy of a T5X checkpoint that also holds a prompt; an older prompt is replaced.

    Args:
        checkpoint: as for `t5x.find_checkpoint`, local or gs://.
        prompt: [P, D], written as float32.
        output: a new local folder, which becomes the checkpoint; complete or not there.

    Raises:
        InputError: the checkpoint cannot be read, its width is not D, or `output` exists, is remote
            or is inside of the checkpoint.
    """
    source, target = t5x.find_checkpoint(checkpoint), epath.Path(output).expanduser()
    _check_target(target, source)
    prompt = np.asarray(prompt, np.float32)
    embedding = t5x.load_t5x(source).get(T5_FAMILY.embedding_path)
    if embedding is None or embedding.shape[1:] != prompt.shape[1:]:
        width = "no embedding" if embedding is None else f"width {embedding.shape[-1]}"
        raise InputError(f"{source}: {width}, but the prompt is {list(prompt.shape)}")
    if (contents := t5x.legacy_contents(source)) is not None:
        skipped, copied = _FOLDER, {_MSGPACK}
        write = functools.partial(_write_legacy, contents=contents, prompt=prompt)
    else:
        item, prefix = orbax_folder.find_model(source, T5_FAMILY)
        inside = os.path.relpath(item.folder, source)
        names = _Names(_dotted(prefix, T5_FAMILY.embedding_path), _dotted(prefix, T5X_PROMPT))
        skipped = os.path.normpath(os.path.join(inside, names.prompt))
        copied = {os.path.normpath(os.path.join(inside, file)) for file in _LISTS}
        write = functools.partial(
            _write_orbax, inside=inside, item=item, names=names, prompt=prompt
        )
    with files.folder_written_whole(target) as new:
        _link(source, new, copied=copied, skipped=skipped)
        write(new)


def _check_target(target: epath.Path, source: epath.Path) -> None:
    if "://" in os.fspath(target):
        raise InputError(f"{target}: a T5X checkpoint is written to a local folder; name one")
    if target.exists():
        raise InputError(f"{target} already exists; name a new folder for the checkpoint")
    real = pathlib.Path(target).resolve()
    if "://" not in os.fspath(source) and pathlib.Path(source).resolve() in real.parents:
        raise InputError(f"{target} is inside of the checkpoint {source}; name another folder")


def _link(
    source: epath.Path, new: pathlib.Path, *, copied: Collection[str], skipped: str, at: str = ""
) -> None:
    """Links the files of a folder, and of those in it, into `new`.

    Args:
        copied: paths of files that are copied, because they will be changed.
        skipped: the path of a folder that is left out.
        at: the path of `source` in the checkpoint.
    """
    for path in source.iterdir():
        name = os.path.join(at, path.name)
        if path.is_dir():
            if name != skipped:
                (new / name).mkdir()
                _link(path, new, copied=copied, skipped=skipped, at=name)
            continue
        if "://" in os.fspath(path):
            path.copy(new / name)
            continue
        try:
            if name in copied:
                raise OSError
            os.link(os.path.realpath(path), new / name)
        except OSError:  # another disk, or a file system without links
            shutil.copyfile(path, new / name)


# Checkpoints older than Orbax


def _write_legacy(new: pathlib.Path, *, contents: t5x_legacy.Contents, prompt: np.ndarray) -> None:
    tree: Any = copy.deepcopy(contents)
    target = tree["optimizer"]["target"]
    embedding = target["token_embedder"]["embedding"]
    leaf: Any = prompt
    if isinstance(embedding, dict):
        leaf = _legacy_spec(embedding, prompt)
        # The spec in the msgpack may lack the dtype.
        metadata = {**leaf["metadata"], "dtype": prompt.dtype.str}
        kvstore = kvstore_spec(epath.Path(new / _FOLDER))
        _write_zarr({"driver": "zarr", "kvstore": kvstore, "metadata": metadata}, prompt)
    _put(target, T5X_PROMPT.split("/"), leaf)
    (new / _MSGPACK).write_bytes(untrusted.pack_msgpack(tree))


def _legacy_spec(embedding: Metadata, prompt: np.ndarray) -> JsonObject:
    """The spec of the prompt in the msgpack, in the form of the embedding's.

    T5X's versions differ in where the path and the dtype stand, and in the path's last slash.
    """
    spec: JsonObject = copy.deepcopy(dict(embedding))
    holder = spec["kvstore"] if spec["kvstore"].get("path") else spec
    holder["path"] = _FOLDER + "/" * holder["path"].endswith("/")
    metadata = spec.setdefault("metadata", {})
    metadata |= {"shape": [*prompt.shape], "chunks": [*prompt.shape]}
    metadata.setdefault("compressor", {"id": "gzip", "level": 1})
    if "dtype" in metadata:
        metadata["dtype"] = prompt.dtype.str
    if "dtype" in spec:
        spec["dtype"] = prompt.dtype.name
    return spec


def _put(tree: dict[str, Any], path: Sequence[str], leaf: object) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


# Orbax


class _Names(NamedTuple):
    """The dotted names in an item of the embedding, which the prompt follows, and of the prompt."""

    embedding: str
    prompt: str


def _dotted(prefix: str, path: str) -> str:
    return ".".join(filter(None, [prefix, path.replace("/", ".")]))


def _write_orbax(
    new: pathlib.Path, *, inside: str, item: Item, names: _Names, prompt: np.ndarray
) -> None:
    """Adds the prompt to an item.

    Args:
        new: the new checkpoint's folder.
        inside: the item's folder in it.
        item: the original.
    """
    folder = new / inside
    inline = names.embedding in item.values
    if not inline:
        _write_zarr(_like_embedding(item, folder, names, prompt), prompt)
    if (folder / _MSGPACK).exists():
        tree = untrusted.unpack_msgpack((folder / _MSGPACK).read_bytes())
        _put(tree, names.prompt.split("."), prompt if inline else f"PLACEHOLDER://{names.prompt}")
        (folder / _MSGPACK).write_bytes(untrusted.pack_msgpack(tree))
    for file, add in _LISTS.items():
        if add is not None and (folder / file).exists():
            lists = files.read_object(epath.Path(folder / file))
            add(lists, names, [*prompt.shape])
            (folder / file).write_text(json.dumps(lists))


def _like_embedding(
    item: Item, folder: pathlib.Path, names: _Names, prompt: np.ndarray
) -> JsonObject:
    """The tensorstore spec of the prompt in `folder`, after that of the original's embedding."""
    location = item.locate(names.embedding)
    driver = "zarr3" if "zarr.json" in location.keys else "zarr"
    array = ts.open({"driver": driver, "kvstore": location.kvstore}, read=True).result()
    metadata = array.spec().to_json()["metadata"]
    shape = list(prompt.shape)
    metadata["shape"] = shape
    if driver == "zarr":
        metadata |= {"chunks": shape, "dtype": prompt.dtype.str}
    else:
        metadata["data_type"] = prompt.dtype.name
        metadata["chunk_grid"]["configuration"]["chunk_shape"] = shape
        for codec in metadata.get("codecs", []):
            if "chunk_shape" in codec.get("configuration", {}):  # a shard of smaller chunks
                codec["configuration"]["chunk_shape"] = shape
    if item.sizes is None:
        kvstore = kvstore_spec(epath.Path(folder / names.prompt))
    else:
        base = kvstore_spec(epath.Path(folder))
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{names.prompt}/"}
    return {"driver": driver, "kvstore": kvstore, "metadata": metadata}


def _write_zarr(spec: Metadata, prompt: np.ndarray) -> None:
    # A chunk of zeros would be left out otherwise, and T5X's own writers differ in this.
    stored = {**spec, "store_data_equal_to_fill_value": True}
    context = ts.Context()  # separate caches, so that the next reader sees the new files
    array = ts.open(stored, create=True, delete_existing=True, context=context).result()
    array.write(prompt).result()


# An item's own lists of its arrays


def _add_to_tree(lists: JsonObject, names: _Names, shape: list[int]) -> None:
    """Adds the prompt to `_METADATA`, as the embedding is there."""
    tree = lists.get("tree_metadata", {})
    beside = tree.get(str(tuple(names.embedding.split("."))))
    if beside is None:
        return
    entry = copy.deepcopy(beside)
    kind = entry["key_metadata"][0]["key_type"]
    path = names.prompt.split(".")
    entry["key_metadata"] = [{"key": key, "key_type": kind} for key in path]
    if "write_shape" in entry["value_metadata"]:
        entry["value_metadata"]["write_shape"] = shape
    tree[str(tuple(path))] = entry


def _add_sharding(lists: JsonObject, names: _Names, shape: list[int]) -> None:
    """Adds the prompt to `_sharding`: on the embedding's devices, replicated."""
    beside = lists.get(_key(names.embedding))
    if isinstance(beside, str):
        sharding = files.parse_json(beside)
        if "partition_spec" in sharding:
            sharding["partition_spec"] = []
        lists[_key(names.prompt)] = json.dumps(sharding)


def _key(name: str) -> str:
    return base64.b64encode(name.encode()).decode()


def _add_array(lists: JsonObject, names: _Names, shape: list[int]) -> None:
    """Adds the prompt to `array_metadatas`, as the embedding is there."""
    entries = [entry["array_metadata"] for entry in lists.get("array_metadatas", [])]
    for entry in entries:
        if entry["param_name"] == names.embedding:
            changes = {"param_name": names.prompt, "write_shape": shape, "chunk_shape": shape}
            kept = [x for x in entries if x["param_name"] != names.prompt]
            lists["array_metadatas"] = [{"array_metadata": x} for x in [*kept, entry | changes]]
            return


_LISTS: dict[str, Callable[[JsonObject, _Names, list[int]], None] | None] = {
    "_METADATA": _add_to_tree,
    "_sharding": _add_sharding,
    "array_metadatas/process_0": _add_array,
    _MSGPACK: None,
    "manifest.ocdbt": None,
}
"""The files of an item that change, and what adds the prompt to those in JSON."""
