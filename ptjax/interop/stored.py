"""A parameter that still lies in its file: what every reader of foreign weights returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

Index = tuple[slice, ...]
"""One slice per axis; `jax.make_array_from_callback` hands out exactly this."""


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array in a file, of which any part can be read on demand.

    Nothing is in memory before `read`, so that a device's shard is all a host ever holds of it.

    Attributes:
        shape: of the whole array, in T5X's orientation (kernels [in, out]).
        dtype: numpy's name of the stored type; "bfloat16" is ml_dtypes'.
        read: `read(index)` -> numpy array of that part, in `dtype`. Raises `InputError`, with
            file and parameter in the message, when the file turns out to be damaged.
        where: the file (and the name in it), for messages.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[Index], np.ndarray]
    where: str

    def read_all(self) -> np.ndarray:
        """The whole array, `[*shape]` in `dtype`."""
        return self.read(tuple(slice(0, size) for size in self.shape))


def stack(arrays: Sequence[StoredArray]) -> StoredArray:
    """Arrays of one shape as one with a leading axis, of which a part is read from each."""

    def read(index: Index) -> np.ndarray:
        return np.stack([array.read(index[1:]) for array in arrays[index[0]]])

    first = arrays[0]
    where = f"{first.where} and those of {len(arrays) - 1} more layers"
    return StoredArray((len(arrays), *first.shape), first.dtype, read, where)
