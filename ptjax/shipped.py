"""Backbones that come with ptjax, or with the package ptjax-models, by name."""

from __future__ import annotations

import importlib.util
import os
from importlib import resources

from etils import epath

from ptjax.errors import InputError, near

NANO = "ptjax-nano"


def find(name: str) -> epath.Path | None:
    """Directory of a backbone that ptjax or the package ptjax-models brings, by its name.

    "ptjax-micro-span" is a stage of ptjax-micro, "ptjax-micro" its last one.

    Raises:
        InputError: one of ptjax's names, but neither package has it.
    """
    if name == NANO:
        return _in_package("ptjax") / "assets" / "nano"
    if not name.startswith("ptjax-") or "/" in name or epath.Path(name).exists():
        return None
    if importlib.util.find_spec("ptjax_models") is None:
        raise InputError(
            f"{name} is not a path here; of the backbones ptjax-*, ptjax itself has {NANO} and the "
            "package ptjax-models the others: `pip install ./models` in a clone of ptjax"
        )
    stages = {folder.name: folder for folder in _in_package("ptjax_models").iterdir()}
    short = name.removeprefix("ptjax-")
    found = stages.get(short) or stages.get(f"{short}-lm")
    if found is None:
        known = [NANO, *(f"ptjax-{stage}" for stage in sorted(stages) if "-" in stage)]
        raise InputError(
            f"{name} is neither a path here nor a backbone of ptjax{near(name, known)}"
        )
    return found


def _in_package(package: str) -> epath.Path:
    return epath.Path(os.fspath(resources.files(package)))  # type: ignore[arg-type]
