"""PEFT's names of a T5's modules, which are those of `transformers`, and ptjax's."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Literal

from etils import epath

from ptjax.errors import InputError
from ptjax.models.stacking import split_path
from ptjax.models.t5_family import T5_FAMILY

ROOT = "base_model.model."
"""In front of the names of all modules in PEFT's files."""

Kind = Literal["kernel", "scale"]
"""The modules of one kind are those that have a parameter of this name."""
_CALLED: dict[Kind, str] = {"kernel": "linear map", "scale": "layer norm"}


@functools.cache
def module_names(kind: Kind) -> dict[str, str]:
    """PEFT's name of each module of a T5 -> ptjax's, with `{i}` for the number of the layer."""
    return {
        rule.theirs.removesuffix(".weight"): rule.ours.removesuffix(f"/{kind}")
        for rule in T5_FAMILY.tensor_names({})
        if rule.ours.endswith(f"/{kind}")
    }


def our_module(
    name: str, kind: Kind, endings: Iterable[str], weights: epath.Path
) -> tuple[str, str]:
    """Returns (the module's path in ptjax, which of `endings`) of one of PEFT's tensors.

    Raises:
        InputError: no module of this kind has such a tensor. `weights` is the file, for the
            message.
    """
    for ending in endings:
        if not (name.startswith(ROOT) and name.endswith(f".{ending}")):
            continue
        module = name.removeprefix(ROOT).removesuffix(f".{ending}")
        # As many digits as a layer's number may have: a longer one belongs to no network.
        number = re.search(r"\.block\.(0|[1-9]\d{0,4})\.", module)
        general = module.replace(number[0], ".block.{i}.", 1) if number else module
        if general in module_names(kind):
            return module_names(kind)[general].format(i=number and number[1]), ending
    raise InputError(
        f"{weights}: the tensor {name} belongs to no {_CALLED[kind]} of a T5; if it is an "
        "embedding, save the adapter again with save_embedding_layers=False"
    )


def their_module(module: str, kind: Kind) -> str:
    """Returns PEFT's name of the module "encoder/layers_0/attention/query"."""
    general, layer = general_name(module)
    return {ours: theirs for theirs, ours in module_names(kind).items()}[general].format(i=layer)


def general_name(module: str) -> tuple[str, int | None]:
    """Returns ("encoder/layers_{i}/attention/query", 0), or a path without `{i}` and None."""
    stacked, layer = split_path(f"{module}/")
    return stacked.rstrip("/").replace("/layers/", "/layers_{i}/"), layer
