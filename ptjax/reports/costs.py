"""What a run costs, in readable units: the words that text, page and comparison share."""

from __future__ import annotations

import functools
from collections.abc import Callable

from ptjax.files import JsonObject
from ptjax.reports.markup import duration, number, quantity

_bytes = functools.partial(quantity, unit="B")
COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "trainable_parameters": ("trainable parameters", number),
    "export_bytes": ("export", _bytes),
    "optimizer_bytes": ("optimizer state", _bytes),
    "checkpoint_bytes": ("checkpoint", _bytes),
    "flops_per_step": ("FLOPs a step", quantity),
    "step_bytes": ("memory (compiler's plan)", _bytes),
    "examples_per_second": ("examples/s", "{:,.1f}".format),
    "seconds": ("duration", duration),
}
"""By the name in `results.json`: the title, and the format of the value. The memory is planned for
the program of a step on one device, the frozen weights included; it is not measured."""


def costs_of(results: JsonObject) -> dict[str, str]:
    """Returns the costs of a run as far as they are recorded: formatted values by title.

    Args:
        results: the content of `results.json`. A run of an older version has no `costs`.
    """
    values = (results.get("costs") or {}) | {
        name: results.get(name) for name in ("trainable_parameters", "seconds")
    }
    return {
        title: format_(value)
        for name, (title, format_) in COSTS.items()
        if (value := values.get(name)) is not None
    }
