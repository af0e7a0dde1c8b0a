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
    """Returns the name by which gin files and prompt headers refer to a function.

    For a function in `CATALOGUE`, this is 'ptjax.preprocessors.NAME', which `find` maps back to
    the function. For any other function, it is 'MODULE.QUALIFIED_NAME'; for an object that is
    called like one, such as a `functools.partial`, that of its class.
    """
    ours = inspect.unwrap(function)  # gin wraps functions that its files name
    name = _PUBLIC + getattr(ours, "__name__", "")
    if CATALOGUE.get(name) is ours:
        return name
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def find(name: str) -> Preprocess | None:
    """Returns the function in `CATALOGUE` with this name, or None if it has none.

    Args:
        name: the name in a prompt's header, 'ptjax.preprocessors.NAME'. Older headers have the
            function's module path instead. Only the first part, 'ptjax', and the last are used.
    """
    return CATALOGUE.get(_PUBLIC + name.rpartition(".")[2]) if name.startswith("ptjax.") else None
