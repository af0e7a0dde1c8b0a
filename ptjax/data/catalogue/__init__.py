"""Functions that task declarations name to bring records into the form of their templates.

A prompt's header stores such a function by its name here, so that inference prepares its records
as training did; only names in `CATALOGUE` are looked up, nothing is imported from a header.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ptjax.data.catalogue import reviews, squad, super_glue

Preprocess = Callable[[dict[str, Any]], Iterable[dict[str, Any]]]

CATALOGUE: Mapping[str, Preprocess] = {
    f"{function.__module__}.{function.__qualname__}": function
    for function in (
        reviews.sentences,
        reviews.without_line_breaks,
        squad.squad,
        super_glue.multirc,
        super_glue.record,
        super_glue.record_answers,
        super_glue.wsc,
        super_glue.wsc_referents,
    )
}
