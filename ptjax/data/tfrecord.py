"""Reads TFRecord files by index, without TensorFlow.

A file holds records one after another: the length of the data (8 bytes, little endian), the masked
CRC-32C of these 8 bytes, the data, the masked CRC-32C of the data. TensorFlow documents the layout
in `tensorflow/core/lib/io/record_writer.h`.
"""

from __future__ import annotations

import bisect
import collections
import itertools
import struct
from array import array
from collections.abc import Iterator, Sequence
from typing import IO, Protocol

import google_crc32c
from etils import epath

from ptjax.errors import InputError
from ptjax.files import PathLike

_HEADER = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")
_MASK = 0xA282EAD8
_MOST_BYTES = (1 << 31) - 1
"""Allowed size of a record: protobuf parses no larger message."""
_MOST_OPEN = 16
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x78\x01": "zlib", b"\x78\x9c": "zlib", b"\x78\xda": "zlib"}


class Instruction(Protocol):
    """Records `skip` to `skip + take` of a file, as TFDS's `FileInstruction` names them."""

    @property
    def filename(self) -> str: ...
    @property
    def skip(self) -> int: ...
    @property
    def take(self) -> int: ...
    @property
    def examples_in_shard(self) -> int: ...


def frame(data: bytes) -> bytes:
    """A record as it is in a file; `RecordFile` is the inverse.

    >>> frame(b"data").hex(" ", -4)
    '04000000 00000000 42455204 64617461 8848269e'
    """
    length = struct.pack("<Q", len(data))
    checksums = [_CHECKSUM.pack(_masked(part)) for part in (length, data)]
    return length + checksums[0] + data + checksums[1]


class RecordFile:
    """The records of one file by index.

    Attributes:
        path: of the file.
        count: the number of records that it must have.

    The index of offsets (8 bytes a record) is made once, and only up to the last record that was
    read: to find record i, the headers of the records before it are read. Reading all records in
    order takes a single pass over the file.
    """

    def __init__(self, path: PathLike, count: int) -> None:
        self.path, self.count = path, count
        self._starts = array("q", [0])  # of the records whose predecessors are indexed
        self._size = self._position = 0
        self._stream: IO[bytes] | None = None

    def read(self, index: int) -> bytes:
        """The data of a record.

        Raises:
            InputError: the file cannot be read, is damaged up to this record, or does not have
                `count` records.
        """
        while len(self._starts) <= index + 1:
            self._index_next()
        start, end = self._starts[index], self._starts[index + 1]
        size = end - start - _HEADER.size
        framed = self._read(start + _HEADER.size, size)
        if len(framed) < size:
            raise self._damaged(index, "is cut off (the file became shorter)")
        data, checksum = framed[: -_CHECKSUM.size], framed[-_CHECKSUM.size :]
        if _CHECKSUM.unpack(checksum)[0] != _masked(data):
            raise self._damaged(index, "is damaged (the checksum of its data does not match)")
        return data

    def close(self) -> None:
        """Closes the file and keeps its index; the next `read` opens it again."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def _index_next(self) -> None:
        index, start = len(self._starts) - 1, self._starts[-1]
        header = self._read(start, _HEADER.size)
        if len(header) < _HEADER.size:
            raise self._damaged(index, "is cut off" if header else "is missing")
        length, checksum = _HEADER.unpack(header)
        if checksum != _masked(header[:8]):
            if index == 0 and (format := _COMPRESSED.get(header[:2])):
                raise InputError(
                    f"{self.path}: compressed with {format}, which no reader of TFDS expects; "
                    "decompress it and keep its name"
                )
            raise self._damaged(index, "is damaged (the checksum of its length does not match)")
        left = self._size - start - _HEADER.size - _CHECKSUM.size
        if length > min(left, _MOST_BYTES):
            raise self._damaged(index, f"is cut off ({length:,} bytes, of which {left:,} are left)")
        end = start + _HEADER.size + length + _CHECKSUM.size
        if index + 1 == self.count and end != self._size:
            raise InputError(
                f"{self.path}: it has more than the {self.count:,} records that dataset_info.json "
                "lists; copy the whole data set again"
            )
        self._starts.append(end)

    def _read(self, start: int, size: int) -> bytes:
        try:
            if self._stream is None:
                self._stream = epath.Path(self.path).open("rb")
                self._size = epath.Path(self.path).stat().length
                self._position = 0
            if start != self._position:
                self._stream.seek(start)
            data = self._stream.read(size)
        except FileNotFoundError:
            raise InputError(f"{self.path}: the file is missing; copy all files again") from None
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"{self.path}: cannot be read ({reason}); copy it again") from error
        self._position = start + len(data)
        return data

    def _damaged(self, index: int, problem: str) -> InputError:
        return InputError(
            f"{self.path}: record {index + 1:,} of {self.count:,}, at byte "
            f"{self._starts[index]:,}, {problem}; copy the file again"
        )


class RecordSource:
    """The records of a split by index, from several files; a context manager.

    A few files are open at a time. Threads must not share a source.
    """

    def __init__(self, instructions: Sequence[Instruction]) -> None:
        """Opens no file yet.

        Args:
            instructions: of the split, in order.
        """
        self._skips = [part.skip for part in instructions]
        self._files = [RecordFile(part.filename, part.examples_in_shard) for part in instructions]
        self._ends = list(itertools.accumulate(part.take for part in instructions))
        self._opened: collections.deque[RecordFile] = collections.deque()

    def __enter__(self) -> RecordSource:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        file, position = self._locate(index)
        if file not in self._opened:
            if len(self._opened) == _MOST_OPEN:
                self._opened.popleft().close()
            self._opened.append(file)
        return file.read(position)

    def __iter__(self) -> Iterator[bytes]:
        return map(self.__getitem__, range(len(self)))

    def place(self, index: int) -> str:
        """'FILE: record N' for messages; N counts from 1 within the file."""
        file, position = self._locate(index)
        return f"{file.path}: record {position + 1:,} of {file.count:,}"

    def close(self) -> None:
        """Closes all files; reading a record opens its file again."""
        while self._opened:
            self._opened.pop().close()

    def _locate(self, index: int) -> tuple[RecordFile, int]:
        part = bisect.bisect_right(self._ends, index)
        begin = self._ends[part - 1] if part else 0
        return self._files[part], self._skips[part] + index - begin


def _masked(data: bytes) -> int:
    checksum = google_crc32c.value(data)
    return ((checksum >> 15 | checksum << 17) + _MASK) & 0xFFFFFFFF
