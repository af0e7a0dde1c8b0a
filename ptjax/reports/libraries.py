"""What reports need beyond ptjax's own dependencies, and what to do where it is missing."""

from __future__ import annotations

import importlib.util

from ptjax.errors import InputError

LIBRARIES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
"""The modules that make statistics and figures, and the packages that bring them."""


def missing_libraries() -> str | None:
    """Returns what is missing and the command that installs it; None if reports can be made."""
    missing = [LIBRARIES[name] for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"a report needs {' and '.join(missing)}; run: pip install 'ptjax[report]'"


def check_libraries() -> None:
    """Raises InputError if a library that reports need is not installed."""
    if (problem := missing_libraries()) is not None:
        raise InputError(problem)
