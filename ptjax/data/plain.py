"""Plain values: what tables of Python, numpy, pandas and Arrow hold, as JSON values."""

from __future__ import annotations

import datetime
import decimal
import enum
import math
import os
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from absl import logging

from ptjax.files import JsonObject

_WRITTEN = (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, uuid.UUID)
_MISSING = ("NaTType", "NAType")
"""The classes of pandas' NaT and NA. NaT is a `datetime`, and NA has no truth value."""


class NotPlainError(ValueError):
    """A value that is neither text, a number, a time nor a collection of them."""


def plain(value: object) -> Any:
    """The value as text, number, bool, None, list or dict.

    NaN, NaT and NA are None, times and decimals their text, bytes UTF-8 text, a set a sorted list.

    Raises:
        NotPlainError: an image, a function, bytes that are not text.

    >>> plain({"n": np.int64(3), "f": float("nan"), "day": datetime.date(2024, 5, 1), "b": b"x"})
    {'n': 3, 'f': None, 'day': '2024-05-01', 'b': 'x'}
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if type(value).__name__ in _MISSING:
        return None
    if isinstance(value, np.datetime64 | np.timedelta64):
        return None if np.isnat(value) else str(value)
    if isinstance(value, float):
        return None if math.isnan(value) else float(value)
    if isinstance(value, (str, int, *_WRITTEN)):
        return int(value) if isinstance(value, int) else str(value)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise NotPlainError("bytes") from error
    if isinstance(value, os.PathLike):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value), key=repr)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy's arrays and scalars
        return plain(value.tolist())  # pyright: ignore[reportAttributeAccessIssue]
    raise NotPlainError(type(value).__name__)


def plain_rows(rows: Iterable[Mapping[Any, object]], source: str) -> list[JsonObject]:
    """The rows with plain values. Columns with other values are left out, with a warning.

    Args:
        source: for the warning.
    """
    left_out: dict[str, str] = {}
    made = []
    for row in rows:
        fields = {}
        for name, value in row.items():
            try:
                fields[str(name)] = plain(value)
            except NotPlainError as error:
                left_out.setdefault(str(name), str(error))
        made.append(fields)
    for name, kind in left_out.items():
        logging.warning(
            "%s: column %r holds values of type %s, not text or numbers; it is left out",
            source,
            name,
            kind,
        )
    return [{k: v for k, v in row.items() if k not in left_out} for row in made]
