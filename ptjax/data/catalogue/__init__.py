"""Preprocessing functions that tasks use to convert records to the fields of their templates.

Gin files and the headers of prompts call them `ptjax.preprocessors.NAME`, so that inference
prepares records like training did. A header's name is only looked up in `CATALOGUE`, never
imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ptjax.data.catalogue.reviews import sentences, without_line_breaks
from ptjax.data.catalogue.squad import squad
from ptjax.data.catalogue.super_glue import multirc, record, record_answers, wsc, wsc_referents

Preprocess = Callable[[dict[str, Any]], Iterable[dict[str, Any]]]

_PUBLIC = "ptjax.preprocessors."

CATALOGUE: Mapping[str, Preprocess] = {
    _PUBLIC + function.__name__: function
    for function in (
        sentences,
        without_line_breaks,
        squad,
        multirc,
        record,
        record_answers,
        wsc,
        wsc_referents,
    )
}
"""The preprocessing functions of ptjax by their public names."""


def name_of(function: Preprocess) -> str:
    """Returns a function's public name if it is in the catalogue, else its path in Python.

    Inverse, for functions in the catalogue: `find`.
    """
    ours = inspect.unwrap(function)  # gin wraps functions that its files name
    name = _PUBLIC + getattr(ours, "__name__", "")
    if CATALOGUE.get(name) is ours:
        return name
    return f"{function.__module__}.{function.__qualname__}"


def find(name: str) -> Preprocess | None:
    """Returns the catalogue's function that a prompt's header names, or None if it has none.

    Older headers have its path in the package, whose last part is the function's name.
    """
    return CATALOGUE.get(_PUBLIC + name.rpartition(".")[2]) if name.startswith("ptjax.") else None
