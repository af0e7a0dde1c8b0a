"""State dicts that torch.save wrote (`pytorch_model.bin`), read without torch and without trust.

Such a file is a zip of a pickle (`data.pkl`) and one uncompressed member per storage (`data/0`,
...). A pickle may call anything, so this unpickler knows only the names that rebuild a tensor; a
tensor becomes a `StoredArray` and its bytes stay in the file.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import os
import pickle
import struct
import zipfile
from typing import Any

import numpy as np
from etils import epath

from ptjax.errors import InputError
from ptjax.interop import bytes_on_disk
from ptjax.interop.stored import Index, StoredArray, one_by_one

_STORAGES = {
    ("torch", "FloatStorage"): "float32",
    ("torch", "BFloat16Storage"): "bfloat16",
    ("torch", "HalfStorage"): "float16",
    ("torch", "DoubleStorage"): "float64",
}


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A member of the zip: `count` numbers from byte `offset` of the file."""

    dtype: str
    offset: int
    count: int


def open_torch(path: str | os.PathLike[str]) -> dict[str, StoredArray]:
    """name -> array of a state dict that torch.save wrote; nothing of it is executed.

    Raises:
        InputError: the file is missing or truncated, in torch's older formats, or its pickle asks
            for anything but tensors.
    """
    path = epath.Path(path)
    if not path.exists():
        raise InputError(f"{path}: the file is missing")
    with path.open("rb") as stream:
        start = stream.read(2)
        stream.seek(0)
        if start != b"PK":
            raise InputError(
                f"{path}: this is no zip, so an old (before 1.6) or no torch file, or truncated; "
                "load it in torch and save it again with model.save_pretrained(...)"
            )
        try:
            with zipfile.ZipFile(stream) as archive:
                tensors = _unpickle(archive, path)
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            raise InputError(
                f"{path}: the file is truncated or damaged ({error}); copy it again"
            ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, StoredArray)
        for name, tensor in tensors.items()
    ):
        raise InputError(f"{path}: this is no state dict (names -> tensors)")
    return {
        name: dataclasses.replace(tensor, where=f"{path} ({name})")
        for name, tensor in tensors.items()
    }


def _unpickle(archive: zipfile.ZipFile, path: epath.Path) -> Any:
    """What `data.pkl` holds, with tensors as `StoredArray`s."""
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise InputError(f"{path}: this is no file of torch.save (it has no data.pkl)")
    folder = pickles[0].removesuffix("data.pkl")
    byteorder = f"{folder}byteorder"
    if byteorder in archive.namelist() and archive.read(byteorder) != b"little":
        raise InputError(f"{path}: the file is of a big-endian machine; save it as safetensors")
    try:
        return _Unpickler(archive, folder, path).load()
    except InputError:
        raise
    except Exception as error:  # a hostile or damaged pickle can raise anything
        raise InputError(
            f"{path}: the pickle in the file is damaged ({type(error).__name__}: {error})"
        ) from error


class _Unpickler(pickle.Unpickler):
    """Knows tensors, and refuses every other name before it is even looked up."""

    def __init__(self, archive: zipfile.ZipFile, folder: str, path: epath.Path):
        super().__init__(io.BytesIO(archive.read(f"{folder}data.pkl")))
        self._archive, self._folder, self._path = archive, folder, path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _STORAGES:
            return _STORAGES[module, name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return self._rebuild_parameter
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        raise InputError(
            f"{self._path}: the pickle in the file asks for {module}.{name}, which has no place in "
            "a file of weights; refused"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count = pid
        if kind != "storage" or dtype not in _STORAGES.values():
            raise InputError(f"{self._path}: unknown kind of storage {kind!r} {dtype!r}")
        member = f"{self._folder}data/{key}"
        try:
            info = self._archive.getinfo(member)
        except KeyError:
            raise InputError(
                f"{self._path}: {member} is missing from the file; copy it again"
            ) from None
        if info.compress_type != zipfile.ZIP_STORED:
            raise InputError(f"{self._path}: {member} is compressed, which torch never does")
        if count < 0 or count * bytes_on_disk.numpy_dtype(dtype).itemsize > info.file_size:
            raise InputError(
                f"{self._path}: {member} has {info.file_size:,} bytes, too few for {count:,} "
                f"numbers of {dtype}"
            )
        return _Storage(dtype, self._data_offset(info), count)

    def _data_offset(self, info: zipfile.ZipInfo) -> int:
        """First byte of a member's data: after its local header, of which the names vary."""
        stream = self._archive.fp
        assert stream is not None
        stream.seek(info.header_offset)
        signature, name_length, extra_length = struct.unpack("<4s22xHH", stream.read(30))
        if signature != b"PK\x03\x04":
            raise InputError(f"{self._path}: the entry of {info.filename} is damaged")
        offset = info.header_offset + 30 + name_length + extra_length
        if offset + info.file_size > self._path.stat().length:
            raise InputError(f"{self._path}: {info.filename} points outside of the file; refused")
        return offset

    def _rebuild_tensor(
        self,
        storage: _Storage,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        *_: Any,
    ) -> StoredArray:
        """A view on a storage, checked to lie inside of it."""
        if len(shape) != len(strides) or min(offset, *shape, *strides, 0) < 0:
            raise InputError(f"{self._path}: a tensor with sizes {shape} and strides {strides}")
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if 0 not in shape and offset + last >= storage.count:
            raise InputError(
                f"{self._path}: a tensor {list(shape)} reaches outside of its storage of "
                f"{storage.count:,} numbers; refused"
            )
        path = self._path
        begin = storage.offset + offset * bytes_on_disk.numpy_dtype(storage.dtype).itemsize

        def read(index: Index) -> np.ndarray:
            try:
                return bytes_on_disk.read_part(path, begin, shape, storage.dtype, index, strides)
            except (OSError, TypeError, ValueError) as error:
                raise InputError(
                    f"{path}: the file was changed or cut off while it was read ({error})"
                ) from error

        return StoredArray(tuple(shape), storage.dtype, one_by_one(read), os.fspath(path))

    def _rebuild_parameter(self, tensor: StoredArray, *_: Any) -> StoredArray:
        return tensor
