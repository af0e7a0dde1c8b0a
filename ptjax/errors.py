"""The exceptions for bad input and for a run that fails, and the checks that settings share."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: what is wrong, where (file, line, name), and what to do. The command
    line prints it without a traceback and exits with code 2.
    """


class TrainingError(RuntimeError):
    """The run cannot go on; what it saved before is good. Exit code 1."""


def check_at_least(least: float, of: str = "", **settings: float | None) -> None:
    """InputError for the first setting (of the class `of`) below `least`; None is left out.

    >>> check_at_least(1, "Pace", keep=0)
    Traceback (most recent call last):
    ptjax.errors.InputError: Pace.keep = 0: it has to be at least 1
    """
    for name, value in settings.items():
        if value is not None and not value >= least:
            name = f"{of}.{name}" if of else name
            raise InputError(f"{name} = {value}: it has to be at least {least}")


def check_share(of: str, **settings: float) -> None:
    """InputError for the first setting of the class `of` that is not in [0, 1)."""
    for name, value in settings.items():
        if not 0 <= value < 1:
            raise InputError(f"{of}.{name} = {value}: it has to be at least 0 and less than 1")
