"""Functions that task declarations name to bring records into the form of their templates.

They are `ptjax.preprocessors` in gin files and in the headers of prompts, so that inference
prepares its records as training did. Only names in `CATALOGUE` are looked up: nothing is imported
from a header.
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
"""By public name."""


def name_of(function: Preprocess) -> str:
    """The public name of a function of ours, the path of any other. Inverse: `find`."""
    ours = inspect.unwrap(function)  # gin wraps what its files name
    name = _PUBLIC + getattr(ours, "__name__", "")
    if CATALOGUE.get(name) is ours:
        return name
    return f"{function.__module__}.{function.__qualname__}"


def find(name: str) -> Preprocess | None:
    """The function of ours that a header names.

    Headers of before had its path in the package: whatever that was, its last part is the name.
    """
    return CATALOGUE.get(_PUBLIC + name.rpartition(".")[2]) if name.startswith("ptjax.") else None
