"""`LazyArray`: an array that is still in its file. Every reader of weights returns these."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

Index = tuple[slice, ...]
"""One slice per axis, the type that `jax.make_array_from_callback` passes to its callback."""
ReadParts = Callable[[Sequence[Index]], list[np.ndarray]]
"""Maps indices to the parts of an array at these indices, in the same order."""


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array in a file, whose parts are read on demand.

    A host thus needs memory only for the shards of its own devices.

    Attributes:
        shape: the shape of the whole array.
        dtype: numpy's name of the stored type; "bfloat16" is ml_dtypes'.
        read_parts: maps indices to one numpy array per index, in `dtype`. Data shared by several
            parts, such as a compressed chunk, is read once. Raises `InputError`, with file and
            parameter in the message, if the file is damaged.
        where: the file (and the name in it), for messages.
    """

    shape: tuple[int, ...]
    dtype: str
    read_parts: ReadParts
    where: str

    def read(self, index: Index) -> np.ndarray:
        """Reads one part, in `dtype`. Raises `InputError` if the file is damaged."""
        [part] = self.read_parts([index])
        return part

    def read_all(self) -> np.ndarray:
        """Reads the whole array, `[*shape]` in `dtype`."""
        return self.read(tuple(slice(0, size) for size in self.shape))


def one_by_one(read: Callable[[Index], np.ndarray]) -> ReadParts:
    """Makes a `LazyArray.read_parts` that calls `read` for every part separately."""
    return lambda indices: [read(index) for index in indices]


def cast(array: LazyArray, dtype: str) -> LazyArray:
    """Returns `array` in another dtype; each part is cast after it is read.

    Args:
        dtype: the name of the new dtype.
    """

    def read_parts(indices: Sequence[Index]) -> list[np.ndarray]:
        parts = array.read_parts(indices)
        for number, part in enumerate(parts):  # in place: frees each original at once
            parts[number] = part.astype(jnp.dtype(dtype), copy=False)
        return parts

    return dataclasses.replace(array, dtype=dtype, read_parts=read_parts)
