"""Reads state dicts written by torch.save (`pytorch_model.bin`), without torch or trust in them.

Such a file is a zip with a pickle (`data.pkl`) and one uncompressed member per storage (`data/0`,
...). A pickle can call anything, so this unpickler accepts only the names that rebuild a tensor; a
tensor becomes a `LazyArray` and its bytes stay in the file.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import math
import os
import pickle
import zipfile
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
from etils import epath

from ptjax import untrusted
from ptjax.errors import InputError
from ptjax.interop import bytes_on_disk
from ptjax.interop.bytes_on_disk import numpy_dtype
from ptjax.interop.lazy_array import Index, LazyArray, one_by_one

_STORAGES = {
    ("torch", "FloatStorage"): "float32",
    ("torch", "BFloat16Storage"): "bfloat16",
    ("torch", "HalfStorage"): "float16",
    ("torch", "DoubleStorage"): "float64",
}
_STEPS: dict[int, Any] = pickle._Unpickler.dispatch
_OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.GLOBAL, pickle.STACK_GLOBAL),
    *(pickle.REDUCE, pickle.BUILD, pickle.BINPERSID, pickle.MEMOIZE),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINFLOAT),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS),
    *(pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
)
_MAX_PICKLE = 1 << 26  # bytes; a T5 of 11B has 200,000
_SMALL = 1 << 24


@dataclasses.dataclass
class _CheckedMember:
    """A zip member whose checksum is verified once, when it is small or half of it is read.

    A process that loads a slice of a large array thus does not read the rest for the checksum.
    """

    path: epath.Path
    member: untrusted.Member
    checked: bool = False

    def check(self, read: int) -> None:
        """InputError if the member is damaged; `read` is the number of bytes just read."""
        if self.checked or (2 * read < self.member.size and self.member.size > _SMALL):
            return
        try:
            self.member.check(bytes_on_disk.crc32(self.path, self.member.offset, self.member.size))
        except ValueError as error:
            raise InputError(f"{self.path}: {error}; copy the file again") from error
        self.checked = True


@dataclasses.dataclass(frozen=True)
class _Storage:
    """`count` numbers in a member of the zip."""

    dtype: str
    source: _CheckedMember
    count: int


def open_torch(path: str | os.PathLike[str]) -> dict[str, LazyArray]:
    """Opens a state dict written by torch.save; executes no code from the file.

    Returns:
        the arrays by name; their data stays in the file until it is read.

    Raises:
        InputError: the file is missing, truncated or in one of torch's older formats, or its
            pickle refers to anything other than tensors.
    """
    path = epath.Path(path)
    if not path.exists():
        raise InputError(f"{path}: the file is missing")
    with path.open("rb") as stream:
        start = stream.read(2)
        stream.seek(0)
        if start != b"PK":
            raise InputError(
                f"{path}: not a zip: the file is truncated, not torch's, or from an old (before "
                "1.6) torch; load it in torch and save it again with model.save_pretrained(...)"
            )
        try:
            with zipfile.ZipFile(stream) as archive:
                tensors = _unpickle(archive, path)
        except InputError:
            raise
        except Exception as error:  # a damaged zip directory raises more than BadZipFile
            raise InputError(
                f"{path}: the file is truncated or damaged ({error}); copy it again"
            ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, LazyArray) for name, tensor in tensors.items()
    ):
        raise InputError(f"{path}: this is not a state dict (names -> tensors)")
    return {
        name: dataclasses.replace(tensor, where=f"{path} ({name})")
        for name, tensor in tensors.items()
    }


def _unpickle(archive: zipfile.ZipFile, path: epath.Path) -> object:
    """The content of `data.pkl`, with tensors as `LazyArray`s."""
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise InputError(f"{path}: torch.save did not write this file (it has no data.pkl)")
    folder = pickles[0].removesuffix("data.pkl")
    size = path.stat().length
    try:
        if f"{folder}byteorder" in archive.namelist():
            order = untrusted.read_member(archive, f"{folder}byteorder", size, 16)
            if order != b"little":
                raise InputError(
                    f"{path}: the file is from a big-endian machine; save it as safetensors"
                )
        data = untrusted.read_member(archive, pickles[0], size, _MAX_PICKLE)
        return _Unpickler(data, archive, folder, path).load()
    except InputError:
        raise
    except Exception as error:  # a hostile or damaged pickle can raise anything
        raise InputError(
            f"{path}: the pickle in the file is damaged ({type(error).__name__}: {error})"
        ) from error


class _Opcodes(dict[int, Any]):
    """The opcodes of a state dict's pickle; all others are refused."""

    def __missing__(self, opcode: int) -> NoReturn:
        raise ValueError(f"the opcode {bytes([opcode])!r} is not allowed in a file of weights")


class _Unpickler(pickle._Unpickler):
    """Accepts tensors and refuses every other name without importing it.

    It extends the unpickler written in Python: the C one allocates a memo table up to the largest
    index that a file names. Keys must be strings or numbers, because hashing or printing deeply
    nested tuples can take forever; for the same reason messages show no values of unknown length.
    """

    stack: list[Any]
    dispatch = _Opcodes({code[0]: _STEPS[code[0]] for code in _OPCODES})

    def __init__(self, data: bytes, archive: zipfile.ZipFile, folder: str, path: epath.Path):
        super().__init__(io.BytesIO(data))
        self._archive, self._folder, self._path = archive, folder, path
        self._members: dict[str, _CheckedMember] = {}

    def _load_setitem(self) -> None:
        self._check_keys(self.stack[-2:-1])
        _STEPS[pickle.SETITEM[0]](self)

    def _load_setitems(self) -> None:
        self._check_keys(self.stack[::2])
        _STEPS[pickle.SETITEMS[0]](self)

    def _load_build(self) -> None:
        """Drops a dict's extra state, such as `_metadata` of a state dict, which is not needed."""
        self.stack.pop()

    dispatch[pickle.SETITEM[0]] = _load_setitem
    dispatch[pickle.SETITEMS[0]] = _load_setitems
    dispatch[pickle.BUILD[0]] = _load_build

    def _check_keys(self, keys: list[object]) -> None:
        if not all(type(key) in (str, int) for key in keys):
            raise ValueError("a key is neither a string nor a number")

    def find_class(self, module: str, name: str) -> str | Callable[..., object]:
        if (module, name) in _STORAGES:
            return _STORAGES[module, name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return self._rebuild_parameter
        if (module, name) == ("collections", "OrderedDict"):
            return _ordered_dict
        raise InputError(
            f"{self._path}: the pickle in the file refers to {module}.{name}, which is not allowed "
            "in a file of weights"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count = pid
        if any(type(x) is not str for x in (kind, dtype, key)) or type(count) is not int:
            raise ValueError("a storage is not described by strings")
        if kind != "storage" or dtype not in _STORAGES.values():
            raise InputError(f"{self._path}: unknown kind of storage {kind!r} {dtype!r}")
        name = f"{self._folder}data/{key}"
        if name not in self._members:
            try:
                member = untrusted.find_member(self._archive, name, self._path.stat().length)
            except ValueError as error:
                raise InputError(f"{self._path}: {error}") from error
            self._members[name] = _CheckedMember(self._path, member)
        member = self._members[name].member
        if not 0 <= count * numpy_dtype(dtype).itemsize <= member.size:
            raise InputError(
                f"{self._path}: {name} has {member.size:,} bytes, too few for {count:,} "
                f"numbers of {dtype}"
            )
        return _Storage(dtype, self._members[name], count)

    def _rebuild_tensor(
        self,
        storage: _Storage,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        *_: object,
    ) -> LazyArray:
        """A view of a storage, checked to be inside of it."""
        if any(type(x) is not int for x in (offset, *shape, *strides)):
            raise ValueError("the sizes of a tensor are not numbers")
        if len(shape) != len(strides) or min(offset, *shape, *strides, 0) < 0:
            raise InputError(f"{self._path}: a tensor with sizes {shape} and strides {strides}")
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if 0 not in shape and offset + last >= storage.count:
            raise InputError(
                f"{self._path}: a tensor {list(shape)} reaches outside of its storage of "
                f"{storage.count:,} numbers"
            )
        # A view may repeat its storage (`expand`), but must not exhaust the memory.
        size = math.prod(shape) * numpy_dtype(storage.dtype).itemsize
        if size > max(untrusted.MIN_INFLATED, self._path.stat().length):
            raise InputError(
                f"{self._path}: a tensor {list(shape)} expands the {storage.count:,} numbers of "
                f"its storage to {size:,} bytes, more than the whole file"
            )
        path, dtype, source = self._path, storage.dtype, storage.source
        begin = source.member.offset + offset * numpy_dtype(dtype).itemsize

        def read(index: Index) -> np.ndarray:
            try:
                part = bytes_on_disk.read_part(path, begin, shape, dtype, index, strides)
                source.check(part.nbytes)
                return part
            except (OSError, TypeError, ValueError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(
                    f"{path}: the file was changed or truncated while it was read ({error})"
                ) from error

        return LazyArray(tuple(shape), dtype, one_by_one(read), os.fspath(path))

    def _rebuild_parameter(self, tensor: LazyArray, *_: object) -> LazyArray:
        return tensor


def _ordered_dict() -> collections.OrderedDict[str, object]:
    """Takes no arguments: a pickle adds the items afterwards, with their keys checked."""
    return collections.OrderedDict()
