"""What reports need beyond ptjax's own dependencies, and what to do where it is missing."""

from __future__ import annotations

import importlib

from ptjax.errors import InputError, one_line

LIBRARIES = {"sklearn.metrics": "scikit-learn", "matplotlib.figure": "matplotlib"}
"""The modules that make statistics and figures, and the packages that bring them."""


def missing_libraries() -> str | None:
    """Returns what cannot be imported and the command that installs it; None if nothing is missing.

    It imports the modules, which takes a second.
    """
    problems = []
    for module, package in LIBRARIES.items():
        try:
            importlib.import_module(module)
        except ImportError as error:  # also of a library that is damaged
            problems.append(f"{package} ({one_line(error)})")
    if not problems:
        return None
    return f"a report needs {' and '.join(problems)}; run: pip install 'ptjax[report]'"


def check_libraries() -> None:
    """Raises InputError if a library that reports need cannot be imported."""
    if (problem := missing_libraries()) is not None:
        raise InputError(problem)
