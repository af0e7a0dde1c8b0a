"""Reads zarr 2 and zarr 3 arrays, in folders or in an OCDBT database, with tensorstore.

tensorstore reads a missing chunk as the array's fill value, usually zeros. So before an array is
returned, every chunk is checked to exist or to be left out on purpose.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from etils import epath, epy

from ptjax.errors import InputError
from ptjax.files import JsonObject, Metadata
from ptjax.interop.lazy_array import Index, LazyArray, ReadParts

with epy.lazy_imports():
    import tensorstore as ts

# A checkpoint does not change while it is read: skip the requests that revalidate caches.
_FINISHED = {"open": True, "recheck_cached_data": False, "recheck_cached_metadata": False}
_SMALL = 1 << 26
_MAX_RATIO = 2000
"""Highest plausible compression ratio of an array over 64 MiB; weights reach 1.1, constant arrays
under gzip 1,000. Beyond it the metadata claims an array that the file cannot hold."""


@dataclasses.dataclass(frozen=True)
class ArrayLocation:
    """Where a zarr array is stored.

    Attributes:
        kvstore: tensorstore's "kvstore" spec of the array's folder, or of the OCDBT database and
            the prefix of the array's keys in it.
        keys: the names of the array's files (in a database: its keys without the prefix). They are
            ".zarray" or "zarr.json", and one per stored chunk, such as "0.1".
        where: the location as text, for messages.
        may_omit: whether the writer may have left out chunks that hold only the fill value.
        size_of: a function from a chunk's key to its compressed size in bytes.
    """

    kvstore: JsonObject
    keys: set[str]
    where: str
    may_omit: bool
    size_of: Callable[[str], int]


def kvstore_spec(folder: epath.Path) -> JsonObject:
    """Makes tensorstore's spec (a "kvstore") of a local or gs:// folder."""
    text = os.fspath(folder)
    if text.startswith("gs://"):
        bucket, _, path = text.removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}
    return {"driver": "file", "path": f"{os.fspath(folder.expanduser().absolute())}/"}


def file_size(folder: epath.Path) -> Callable[[str], int]:
    """Returns a function from the name of a file in `folder` to its size in bytes.

    It serves as `ArrayLocation.size_of` of an array whose chunks are these files.
    """
    return lambda key: (folder / key).stat().length


def open_zarrs(requests: Mapping[str, ArrayLocation]) -> dict[str, LazyArray]:
    """Opens zarr arrays concurrently; their data stays on disk until it is read.

    Uses futures instead of asyncio, because a notebook's event loop is already running.

    Args:
        requests: the location of each array, by parameter name.

    Returns:
        the arrays by parameter name.

    Raises:
        InputError: an array's metadata or one of its chunks is missing or damaged.
    """
    opening = {}
    context = ts.Context()  # separate caches, so that the next load reads the files again
    for name, location in requests.items():
        driver = "zarr3" if "zarr.json" in location.keys else "zarr"
        if driver == "zarr" and ".zarray" not in location.keys:
            raise InputError(
                f"{location.where}/.zarray: the file of parameter {name} is missing; copy the "
                "checkpoint again, dotfiles included"
            )
        spec = {"driver": driver, "kvstore": location.kvstore, **_FINISHED}
        opening[name] = ts.open(spec, read=True, context=context)
    arrays = {}
    for name, location in requests.items():
        try:
            array = opening[name].result()
        except ValueError as error:
            raise InputError(
                f"{location.where}: parameter {name} cannot be opened ({reason_of(error)})"
            ) from error
        chunks = _present_chunks(array, name, location)
        arrays[name] = LazyArray(
            array.shape, array.dtype.name, _reader(array, name, location, chunks), location.where
        )
    return arrays


def _present_chunks(array: ts.TensorStore, name: str, location: ArrayLocation) -> list[str]:
    """The keys of the chunks that exist: all of them, unless the writer may omit some."""
    metadata = array.spec().to_json()["metadata"]
    if location.may_omit and metadata.get("fill_value") is not None:
        return sorted(key for key in location.keys if key not in (".zarray", "zarr.json"))
    # Orbax 0.6 to 0.8 omitted such chunks in folders too, where they look like lost files.
    filled = metadata.get("fill_value") is not None
    hint = " (if it was all zeros, save it with a newer Orbax)" if filled else ""
    present = []
    for chunk in _chunk_keys(array.shape, metadata):
        if chunk not in location.keys:
            raise InputError(
                f"{location.where}/{chunk}: a chunk of parameter {name} is missing; copy the "
                f"checkpoint again{hint}"
            )
        present.append(chunk)
    return present


def _chunk_keys(shape: tuple[int, ...], metadata: Metadata) -> Iterator[str]:
    """The key of each chunk; the last one along an axis may extend beyond the array.

    zarr 2: "0.1", and "0" for a scalar. zarr 3: "c/0/1", and "c" for a scalar, or as in zarr 2.
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
    # Not itertools.product: with a damaged, huge shape it would first build all of its input lists.
    for number in range(math.prod(counts)):
        index: list[str] = []
        for count in reversed(counts):
            number, along = divmod(number, count)
            index.insert(0, str(along))
        yield separator.join([*first, *index]) or "0"


def _reader(
    array: ts.TensorStore, name: str, location: ArrayLocation, chunks: list[str]
) -> ReadParts:
    claimed = math.prod(array.shape) * array.dtype.numpy_dtype.itemsize

    def read_parts(indices: Sequence[Index]) -> list[np.ndarray]:
        if claimed > _SMALL:
            on_disk = sum(map(location.size_of, chunks))
            if claimed > _MAX_RATIO * on_disk:
                raise InputError(
                    f"{location.where}: parameter {name} claims {claimed:,} bytes, but its files "
                    f"hold {on_disk:,}; the checkpoint is damaged, copy it again"
                )
        try:
            with ts.Batch() as batch:  # a chunk is fetched and decompressed once for all parts
                reading = [array[index].read(batch=batch) for index in indices]
            return [part.result() for part in reading]
        except ValueError as error:
            raise InputError(
                f"{location.where}: parameter {name} cannot be read ({reason_of(error)}); the file "
                "is truncated or damaged, copy it again"
            ) from error

    return read_parts


# OCDBT


def open_database(folder: epath.Path) -> tuple[JsonObject, dict[str, int]]:
    """Opens an OCDBT database (tensorstore's key-value store in a folder), and checks its files.

    Each data file must exist, and be long enough for the values that the index places in it.

    Without that check a missing `ocdbt.process_0/d/` file would fail in the middle of loading,
    because opening and listing read only the index.

    Returns:
        (tensorstore's "kvstore" spec of the database, a dict from each key to the size of its value
        in bytes).

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


def _check_files(base: JsonObject, folder: epath.Path) -> dict[str, int]:
    """Key -> bytes of each value in the newest version of a database."""
    store = ts.KvStore.open(base).result()
    manifest = ts.ocdbt.dump(store).result()
    needed: dict[str, int] = {}
    sizes: dict[str, int] = {}
    pending = [(b"", manifest["versions"][-1]["root"]["location"])]
    seen: set[str] = set()
    while pending:
        prefix, location = pending.pop()  # a node's keys are stored without their common prefix
        if location in seen:  # a node has one parent; a malicious file would loop forever
            raise InputError(f"{folder}: the checkpoint is damaged (its index has a cycle)")
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
            raise InputError(f"{path}: the file is missing, it holds parameters; copy it again")
        if path.stat().length < size:
            raise InputError(f"{path}: the file is truncated, it holds parameters; copy it again")
    return sizes


def _need(location: str, needed: dict[str, int], folder: epath.Path) -> int:
    """Records in `needed` how long the file of a value must be; returns the value's length.

    A location is "value:ocdbt.process_0/:d/5858be...:0:1034": kind, folder, file, offset, length.
    """
    _, inside, name, offset, length = location.split(":")
    file = inside + name
    if file.startswith("/") or ".." in file.split("/"):
        raise InputError(f"{folder}: the index names {file!r}, which is outside of the checkpoint")
    needed[file] = max(needed.get(file, 0), int(offset) + int(length))
    return int(length)


def reason_of(error: Exception) -> str:
    """Returns an error's message, shortened for users and on one line.

    Cuts off the spec and the source locations that tensorstore appends, and escapes line breaks.
    """
    text = re.split(r" \[(?:tensorstore_spec|source locations)", str(error))[0]
    return json.dumps(text)[1:-1].replace('\\"', "'")
