"""An array still in its file: what every reader of foreign weights returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

Index = tuple[slice, ...]
"""One slice per axis; `jax.make_array_from_callback` hands out exactly this."""
ReadParts = Callable[[Sequence[Index]], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array in a file, whose parts are read on demand.

    A host thus never holds more of an array than the shards of its own devices.

    Attributes:
        shape: of the whole array, in T5X's orientation (kernels [in, out]).
        dtype: numpy's name of the stored type; "bfloat16" is ml_dtypes'.
        read_parts: indices -> one numpy array per index, in `dtype`. Data shared by several
            parts, such as a compressed chunk, is read once. Raises `InputError`, with file and
            parameter in the message, if the file is damaged.
        where: the file (and the name in it), for messages.
    """

    shape: tuple[int, ...]
    dtype: str
    read_parts: ReadParts
    where: str

    def read(self, index: Index) -> np.ndarray:
        """One part, in `dtype`."""
        [part] = self.read_parts([index])
        return part

    def read_all(self) -> np.ndarray:
        """The whole array, `[*shape]` in `dtype`."""
        return self.read(tuple(slice(0, size) for size in self.shape))


def one_by_one(read: Callable[[Index], np.ndarray]) -> ReadParts:
    """Makes a `LazyArray.read_parts` that reads every part separately."""
    return lambda indices: [read(index) for index in indices]


def cast(array: LazyArray, dtype: str) -> LazyArray:
    """`array` in another dtype; each part is cast after it is read."""

    def read_parts(indices: Sequence[Index]) -> list[np.ndarray]:
        parts = array.read_parts(indices)
        for number, part in enumerate(parts):  # in place: frees each original at once
            parts[number] = part.astype(jnp.dtype(dtype), copy=False)
        return parts

    return dataclasses.replace(array, dtype=dtype, read_parts=read_parts)
