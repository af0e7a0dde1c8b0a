"""The exceptions for bad input and for a run that fails, and what most settings share."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable

_LISTED_CHARACTERS = 300
"""About four lines of a terminal: how much of what there is a message lists."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: what is wrong, where (file, line, name), and what to do. The command
    line prints it without a traceback and exits with code 2.
    """


class TrainingError(RuntimeError):
    """The run cannot go on; what it saved before is good. Exit code 1."""


def missing(what: str, path: object) -> InputError:
    """The error of a path that leads nowhere, alike for everything that a user names by path."""
    return InputError(f"no {what} at {path}: the path does not exist; correct it")


def one_line(error: BaseException) -> str:
    """An error's first line, printable and not too long."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return "".join(c if c.isprintable() else "?" for c in line)


def gin_flag(name: str, value: object) -> str:
    """The flag that sets a macro, or an argument of a function.

    >>> print(gin_flag("MODEL_DIR", "PATH"), gin_flag("TRAIN_STEPS", 100))
    --gin.MODEL_DIR="'PATH'" --gin.TRAIN_STEPS=100
    """
    text = repr(value)
    return f"--gin.{name}=" + (text if re.fullmatch(r"[\w.-]+", text) else f'"{text}"')


def is_empty(path: object) -> bool:
    """Whether a path is an empty string, which would mean the current folder.

    Usually that is a mistake: a shell variable that was never set.
    """
    return isinstance(path, str) and not path.strip()


def check_path(name: str, path: object) -> None:
    """InputError if a path is empty; `name` is that of the setting.

    >>> check_path("MODEL_DIR", "")
    Traceback (most recent call last):
    ptjax.errors.InputError: MODEL_DIR is empty; name a path ('.' is the current folder)
    """
    if is_empty(path):
        raise InputError(f"{name} is empty; name a path ('.' is the current folder)")


def setting(name: str, *value: object) -> str:
    """How to set a field of the task, for a message: the gin flag, and the flag of `infer`.

    >>> setting("quoting", False)
    '--gin.ptjax.Task.quoting=False (infer: --quoting=false)'
    >>> setting("columns")
    'Task.columns (infer: --columns)'
    """
    if not value:
        return f"Task.{name} (infer: --{name})"
    flag = gin_flag(f"ptjax.Task.{name}", value[0])
    return f"{flag} (infer: --{name}={str(value[0]).lower()})"


def near(
    name: str,
    known: Iterable[str],
    *,
    listed: bool = True,
    compared: Callable[[str], str] = lambda name: name.lstrip("-"),
) -> str:
    """What follows "unknown NAME": the nearest known name, else all there are.

    Only a name that is alike is suggested: a far-fetched one sends the reader the wrong way.

    Args:
        listed: whether to list what there is where nothing is alike.
        compared: the part of a name that is compared, without what many names share.

    >>> near("acuracy", ["accuracy", "f1"])
    '; did you mean accuracy?'
    >>> near("rouge", ["accuracy", "f1"])
    '; there are accuracy, f1'
    """
    choices = list(dict.fromkeys(known))
    bare = {compared(choice): choice for choice in choices}
    if alike := difflib.get_close_matches(compared(name), bare, 1, 0.6):
        return f"; did you mean {bare[alike[0]]}?"
    return f"; there are {listing(choices)}" if listed and choices else ""


def listing(names: Iterable[str]) -> str:
    """Names with commas; of very many only the first and their number."""
    choices = list(names)
    shown: list[str] = []
    for name in choices:
        if sum(map(len, shown)) + len(name) > _LISTED_CHARACTERS:
            return f"{', '.join(shown)}, ... ({len(choices)} in all)"
        shown.append(name)
    return ", ".join(shown)


def check_at_least(least: float, of: str = "", **settings: float | None) -> None:
    """InputError for the first setting (of the class `of`) below `least`; None is left out.

    >>> check_at_least(1, "TrainSchedule", keep=0)
    Traceback (most recent call last):
    ptjax.errors.InputError: TrainSchedule.keep = 0: it has to be at least 1
    """
    for name, value in settings.items():
        if value is not None and not value >= least:
            name = f"{of}.{name}" if of else name
            raise InputError(f"{name} = {value}: it has to be at least {least}")


def check_choice(choices: Iterable[object], of: str = "", **settings: object) -> None:
    """InputError for the first setting (of the class `of`) that is none of `choices`.

    >>> check_choice(("none", "full"), "T5Config", remat="x")
    Traceback (most recent call last):
    ptjax.errors.InputError: T5Config.remat = 'x': it takes one of 'none', 'full'
    """
    choices = list(choices)
    for name, value in settings.items():
        if value not in choices:
            name = f"{of}.{name}" if of else name
            listed = ", ".join(map(repr, choices))
            raise InputError(f"{name} = {value!r}: it takes one of {listed}")


def check_share(of: str, **settings: float) -> None:
    """InputError for the first setting of the class `of` that is not in [0, 1)."""
    for name, value in settings.items():
        if not 0 <= value < 1:
            raise InputError(f"{of}.{name} = {value}: it has to be at least 0 and less than 1")
