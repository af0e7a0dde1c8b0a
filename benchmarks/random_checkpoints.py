"""Checkpoints of random bfloat16 weights in the three formats that `load_backbone` reads.

Every parameter is made when its turn comes to be written: the largest is all that is in memory. The
weights depend on names and shapes alone, so that all formats hold the same backbone.
"""

from __future__ import annotations

import functools
import itertools
import math
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts
from flax import serialization

from ptjax.interop.huggingface import save_huggingface
from ptjax.models.config import T5Config
from ptjax.models.t5 import parameter_shapes
from ptjax.sharding.rules import spec_of
from ptjax.trees import flatten_paths, unflatten_paths

LEGACY_CHUNK_BYTES = 64 << 20
"""T5X divides what is larger."""
HUGGINGFACE_FILE_BYTES = 2 * 10**9


class RandomParams(Mapping[str, np.ndarray]):
    """T5X's name -> bfloat16 array, made anew each time.

    Uniform in sign, mantissa and two bits of the exponent, 0.008 to 0.125: ten random bits of
    sixteen, about what a trained weight has, so that compression works as on one.
    """

    def __init__(self, config: T5Config) -> None:
        leaves = flatten_paths(parameter_shapes(config))
        self.shapes = {name: leaf.shape for name, leaf in leaves.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        shape = self.shapes[name]
        noise = np.random.default_rng(zlib.crc32(name.encode())).bytes(2 * math.prod(shape))
        bits = np.frombuffer(noise, np.uint16) & 0x81FF | 0x3C00
        return bits.view(ml_dtypes.bfloat16).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def write_legacy(directory: Path, config: T5Config) -> None:
    """T5X's msgpack with zarr folders beside it, as one host without a model axis writes it."""
    params = RandomParams(config)
    leaves = {}
    for name, shape in params.shapes.items():
        folder = f"target.{name.replace('/', '.')}"
        metadata = _metadata(shape, _legacy_chunks(shape), "gzip")
        kvstore = {"driver": "file", "path": f"{(directory / folder).absolute()}/"}
        _write_zarr(kvstore, metadata, params[name])
        leaves[name] = {
            "driver": "zarr",
            "dtype": "bfloat16",
            "kvstore": {"driver": "file", "path": f"{folder}/"},
            "metadata": {key: metadata[key] for key in ("chunks", "compressor", "shape")},
        }
    contents = {"version": 3, "optimizer": {"target": unflatten_paths(leaves), "state": {}}}
    (directory / "checkpoint").write_bytes(serialization.msgpack_serialize(contents))


def write_orbax(directory: Path, config: T5Config, model: int = 1) -> None:
    """T5X's Orbax: one OCDBT database; a chunk is a shard, on a model axis of that size."""
    params = RandomParams(config)
    base = {"driver": "file", "path": f"{(directory / 'state').absolute()}/"}
    for name, shape in params.shapes.items():
        dotted = f"target.{name.replace('/', '.')}/"
        kvstore = {"driver": "ocdbt", "base": base, "path": dotted}
        spec = spec_of(f"params/{name}", len(shape))
        parts = [model if axis == "model" else 1 for axis in spec]
        chunks = tuple(n // m for n, m in itertools.zip_longest(shape, parts, fillvalue=1))
        _write_zarr(kvstore, _metadata(shape, chunks, "zstd"), params[name])


def write_huggingface(directory: Path, config: T5Config) -> None:
    """safetensors in several files, with `config.json`."""
    save_huggingface(
        directory, RandomParams(config), config, max_shard_bytes=HUGGINGFACE_FILE_BYTES
    )


FORMATS: dict[str, tuple[str, Callable[[Path, T5Config], None]]] = {
    "T5X legacy": ("legacy/checkpoint_0", write_legacy),
    "T5X Orbax": ("orbax/checkpoint_0", write_orbax),
    "T5X Orbax, 8 shards": ("shards/checkpoint_0", functools.partial(write_orbax, model=8)),
    "Hugging Face": ("huggingface", write_huggingface),
}
"""Name -> (folder, what writes it)."""


def written(data_dir: Path, name: str, config: T5Config) -> Path:
    """The checkpoint of a format, written if it is not there as a whole."""
    folder, write = FORMATS[name]
    target = data_dir / folder
    if not target.exists():
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial, config)
        partial.rename(target)
    return target


def _metadata(shape: tuple[int, ...], chunks: tuple[int, ...], compressor: str) -> dict[str, Any]:
    return {
        "shape": list(shape),
        "chunks": list(chunks),
        "dtype": "bfloat16",
        "compressor": {"id": compressor, "level": 1},
    }


def _write_zarr(kvstore: dict[str, Any], metadata: dict[str, Any], array: np.ndarray) -> None:
    spec = {"driver": "zarr", "kvstore": kvstore, "metadata": metadata}
    ts.open(spec, create=True, context=ts.Context()).result().write(array).result()


def _legacy_chunks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """T5X's `choose_chunk_shape`: the longest axis to its next smaller divisor, until it fits."""
    chunks = list(shape)
    while 2 * math.prod(chunks) > LEGACY_CHUNK_BYTES:
        axis = int(np.argmax(chunks))
        smaller = range(1, chunks[axis])
        chunks[axis] = max(size for size in smaller if shape[axis] % size == 0)
    return tuple(chunks)
