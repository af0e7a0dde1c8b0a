"""Arrays in zarr 2 and zarr 3, in folders or in an OCDBT database, by tensorstore.

tensorstore reads a chunk that does not exist as the array's fill value, mostly zeros. So nothing is
returned before every chunk is known to be there, or to be left out on purpose.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from ptjax.errors import InputError
from ptjax.interop.lazy_array import Index, LazyArray, ReadParts

# A checkpoint does not change under its reader: no request asks whether what is cached is stale.
_FINISHED = {"open": True, "recheck_cached_data": False, "recheck_cached_metadata": False}
_SMALL = 1 << 26
_MAX_RATIO = 2000
"""What compression may make of an array over 64 MiB; weights give 1.1, ones and zeros under gzip
1,000. Beyond it a file claims an array that it does not hold."""


@dataclasses.dataclass(frozen=True)
class ArrayLocation:
    """Where an array lies.

    Attributes:
        kvstore: tensorstore's description of the folder (or of the prefix in a database).
        keys: the names below it: ".zarray" or "zarr.json", and the chunks.
        where: the same for messages.
        may_omit: whether the writer left out chunks that hold nothing but the fill value.
        size_of: key -> bytes of that chunk's file, compressed.
    """

    kvstore: dict[str, Any]
    keys: set[str]
    where: str
    may_omit: bool
    size_of: Callable[[str], int]


def kvstore_spec(folder: epath.Path) -> dict[str, Any]:
    """tensorstore's description of a local or gs:// folder."""
    text = os.fspath(folder)
    if text.startswith("gs://"):
        bucket, _, path = text.removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}
    return {"driver": "file", "path": f"{os.fspath(folder.expanduser().absolute())}/"}


def file_size(folder: epath.Path) -> Callable[[str], int]:
    """`ArrayLocation.size_of` for an array in a folder of its own."""
    return lambda key: (folder / key).stat().length


def open_zarrs(requests: Mapping[str, ArrayLocation]) -> dict[str, LazyArray]:
    """Parameter name -> array, all opened at once and none read.

    With futures, not asyncio: a notebook's event loop is already running.

    Raises:
        InputError: an array's metadata or one of its chunks is missing or damaged.
    """
    opening = {}
    context = ts.Context()  # caches of its own: the next load looks at the files anew
    for name, stored in requests.items():
        driver = "zarr3" if "zarr.json" in stored.keys else "zarr"
        if driver == "zarr" and ".zarray" not in stored.keys:
            raise InputError(
                f"{stored.where}/.zarray: the file of parameter {name} is missing; copy the "
                "checkpoint again, dotfiles included"
            )
        spec = {"driver": driver, "kvstore": stored.kvstore, **_FINISHED}
        opening[name] = ts.open(spec, read=True, context=context)
    arrays = {}
    for name, stored in requests.items():
        try:
            array = opening[name].result()
        except ValueError as error:
            raise InputError(
                f"{stored.where}: parameter {name} cannot be opened ({reason_of(error)})"
            ) from error
        chunks = _present_chunks(array, name, stored)
        arrays[name] = LazyArray(
            array.shape, array.dtype.name, _reader(array, name, stored, chunks), stored.where
        )
    return arrays


def _present_chunks(array: ts.TensorStore, name: str, stored: ArrayLocation) -> list[str]:
    """The keys of the chunks that are there, all of them unless some may be left out."""
    metadata = array.spec().to_json()["metadata"]
    if stored.may_omit and metadata.get("fill_value") is not None:
        return sorted(key for key in stored.keys if key not in (".zarray", "zarr.json"))
    # Orbax 0.6 to 0.8 left such chunks out of folders too, where nothing tells them from lost ones.
    filled = metadata.get("fill_value") is not None
    hint = " (if it was all zeros, save it with a newer Orbax)" if filled else ""
    present = []
    for chunk in _chunk_keys(array.shape, metadata):
        if chunk not in stored.keys:
            raise InputError(
                f"{stored.where}/{chunk}: a chunk of parameter {name} is missing; copy the "
                f"checkpoint again{hint}"
            )
        present.append(chunk)
    return present


def _chunk_keys(shape: tuple[int, ...], metadata: Mapping[str, Any]) -> Iterator[str]:
    """The key of each chunk; the last one of an axis may stick out.

    zarr 2: "0.1", and "0" of a scalar. zarr 3: "c/0/1", and "c" of a scalar, or as zarr 2.
    """
    if "chunk_grid" in metadata:
        sizes = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        encoding = metadata["chunk_key_encoding"]
        default = encoding["name"] == "default"
        separator = encoding.get("configuration", {}).get("separator", "/" if default else ".")
        first = ["c"] if default else []
    else:
        sizes, first = metadata["chunks"], []
        separator = metadata.get("dimension_separator", ".")
    counts = [-(-size // chunk) for size, chunk in zip(shape, sizes, strict=True)]
    # Not itertools.product: it would first list what a damaged shape claims, before any is missed.
    for number in range(math.prod(counts)):
        index: list[str] = []
        for count in reversed(counts):
            number, along = divmod(number, count)
            index.insert(0, str(along))
        yield separator.join([*first, *index]) or "0"


def _reader(
    array: ts.TensorStore, name: str, stored: ArrayLocation, chunks: list[str]
) -> ReadParts:
    claimed = math.prod(array.shape) * array.dtype.numpy_dtype.itemsize

    def read_parts(indices: Sequence[Index]) -> list[np.ndarray]:
        if claimed > _SMALL:
            held = sum(map(stored.size_of, chunks))
            if claimed > _MAX_RATIO * held:
                raise InputError(
                    f"{stored.where}: parameter {name} claims {claimed:,} bytes, its files hold "
                    f"{held:,}; the checkpoint is damaged, copy it again"
                )
        try:
            with ts.Batch() as batch:  # a chunk is fetched and decompressed once for all parts
                reading = [array[index].read(batch=batch) for index in indices]
            return [part.result() for part in reading]
        except ValueError as error:
            raise InputError(
                f"{stored.where}: parameter {name} cannot be read ({reason_of(error)}); the file "
                "is truncated or damaged, copy it again"
            ) from error

    return read_parts


# OCDBT


def open_database(folder: epath.Path) -> tuple[dict[str, Any], dict[str, int]]:
    """(tensorstore's description of an OCDBT database, key -> bytes of its value).

    Every data file that the index names is known to be there, at its full length: opening and
    listing touch the index alone, and a missing `ocdbt.process_0/d/` file would come to light in
    the middle of loading.

    Raises:
        InputError: the database is damaged, or one of its files is missing or truncated.
    """
    base = kvstore_spec(folder)
    try:
        sizes = _check_files(base, folder)
        ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    except InputError:
        raise
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{folder}: the checkpoint is damaged ({reason_of(error)})") from error
    return {"driver": "ocdbt", "base": base}, sizes


def _check_files(base: dict[str, Any], folder: epath.Path) -> dict[str, int]:
    """Key -> bytes of each value in the newest version of a database."""
    store = ts.KvStore.open(base).result()
    manifest = ts.ocdbt.dump(store).result()
    needed: dict[str, int] = {}
    sizes: dict[str, int] = {}
    pending = [(b"", manifest["versions"][-1]["root"]["location"])]
    seen: set[str] = set()
    while pending:
        prefix, location = pending.pop()  # the keys of a node lack what all of them begin with
        if location in seen:  # a node has one parent: the file was made to be read forever
            raise InputError(f"{folder}: the checkpoint is damaged (its index goes in a circle)")
        seen.add(location)
        node = ts.ocdbt.dump(store, location).result()
        for entry in node["entries"]:
            key = (prefix + entry["key"]).decode()
            if "indirect_value" in entry:
                sizes[key] = _need(entry["indirect_value"], needed, folder)
            elif "location" in entry:
                pending.append((prefix + entry["subtree_common_prefix"], entry["location"]))
            else:
                sizes[key] = len(entry["inline_value"])
    for file, size in needed.items():
        path = folder / file
        if not path.exists():
            raise InputError(f"{path}: the file is missing, parameters lie in it; copy it again")
        if path.stat().length < size:
            raise InputError(f"{path}: the file is truncated, parameters lie in it; copy it again")
    return sizes


def _need(location: str, needed: dict[str, int], folder: epath.Path) -> int:
    """Notes which file holds a value, and how much of it; the value's length.

    "value:ocdbt.process_0/:d/5858be...:0:1034": kind, folder, file, offset, length.
    """
    _, inside, name, offset, length = location.split(":")
    file = inside + name
    if file.startswith("/") or ".." in file.split("/"):
        raise InputError(
            f"{folder}: the index names {file!r}, which leaves the checkpoint; refused"
        )
    needed[file] = max(needed.get(file, 0), int(offset) + int(length))
    return int(length)


def reason_of(error: Exception) -> str:
    """The first sentence of tensorstore's message, without the spec and source lines after it."""
    text = re.split(r" \[(?:tensorstore_spec|source locations)", str(error))[0]
    return json.dumps(text)[1:-1].replace('\\"', "'")
