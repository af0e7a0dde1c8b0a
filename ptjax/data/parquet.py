"""Reads Parquet files through pyarrow."""

from __future__ import annotations

import io

from ptjax import untrusted
from ptjax.data.plain import plain_rows
from ptjax.errors import InputError, needs, one_line
from ptjax.files import JsonObject

_ROWS = 1024  # a batch: a dictionary-encoded column may expand a small file without bound


def parquet_rows(data: bytes, name: str) -> list[JsonObject]:
    """The rows of a Parquet file, with plain values; see `ptjax.data.plain`.

    Args:
        data: the bytes of the file.
        name: of the file, for messages.

    Raises:
        InputError: pyarrow is not installed, or the file is damaged, is not a Parquet file or
            expands beyond the limit of `untrusted.inflate`.
    """
    with needs("parquet", f"{name}: Parquet"):
        import pyarrow.parquet as arrow  # slow to import, and few data are Parquet
    limit = max(untrusted.MAX_RATIO * len(data), untrusted.MIN_INFLATED)
    rows, size = [], 0
    try:
        with arrow.ParquetFile(io.BytesIO(data)) as file:
            for batch in file.iter_batches(batch_size=_ROWS):
                size += batch.nbytes
                if size > limit:
                    raise ValueError(f"{len(data):,} bytes expand to more than {limit:,}")
                rows += batch.to_pylist()
    except (OSError, ValueError, NotImplementedError) as error:  # Arrow's own are among them
        raise InputError(
            f"{name}: cannot be read as Parquet ({one_line(error)}); copy it again or correct its "
            "name"
        ) from error
    return plain_rows(rows, name)
