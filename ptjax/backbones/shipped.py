"""Finds backbones that come with ptjax, or with the package ptjax-models, by their names."""

from __future__ import annotations

import importlib.util
import os
from importlib import resources

from etils import epath

from ptjax.errors import InputError, near

NANO = "ptjax-nano"
"""The name of the backbone in ptjax itself."""


def find(name: str) -> epath.Path | None:
    """Finds the folder of a backbone that ships with ptjax or with the package ptjax-models.

    "ptjax-micro-span" is a training stage of ptjax-micro; "ptjax-micro" means its last one, "-lm".
    "ptjax-nano" is the only backbone in ptjax itself.

    Returns:
        the folder; None if `name` does not start with "ptjax-", or is an existing path.

    Raises:
        InputError: neither package has a backbone of that name.
    """
    if name == NANO:
        return _in_package("ptjax") / "assets" / "nano"
    if not name.startswith("ptjax-") or "/" in name or epath.Path(name).exists():
        return None
    if importlib.util.find_spec("ptjax_models") is None:
        raise InputError(
            f"{name} is not a path here, and of the backbones ptjax-* only {NANO} ships with "
            "ptjax; the package ptjax-models has the others: `pip install ./models` in a clone of "
            "ptjax"
        )
    stages = {folder.name: folder for folder in _in_package("ptjax_models").iterdir()}
    short = name.removeprefix("ptjax-")
    directory = stages.get(short) or stages.get(f"{short}-lm")
    if directory is None:
        names = [NANO, *(f"ptjax-{stage}" for stage in sorted(stages) if "-" in stage)]
        raise InputError(
            f"{name} is neither a path here nor a backbone of ptjax{near(name, names)}"
        )
    return directory


def _in_package(package: str) -> epath.Path:
    return epath.Path(os.fspath(resources.files(package)))  # type: ignore[arg-type]
