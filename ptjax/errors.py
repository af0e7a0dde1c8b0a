"""The exceptions for bad input and for failed runs, and checks that many settings share."""

from __future__ import annotations

import contextlib
import difflib
import operator
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_LISTED_CHARACTERS = 300
"""Length limit for a list of names in a message, about four lines of a terminal."""

_QUOTED_CHARACTERS = 80
"""Length limit for one text in a message, a line of a terminal."""


class InputError(ValueError):
    """A setting, argument or file of the user cannot be used.

    The message is one line: what is wrong, where (file, line, name), and what to do. Commands print
    it without a traceback and exit with code 2.
    """


class TrainingError(RuntimeError):
    """A run cannot continue; its last checkpoint is intact. Commands exit with code 1."""


def missing(what: str, path: object) -> InputError:
    """Makes the exception for a path that does not exist.

    Args:
        what: the thing that should be there, such as "prompt".
    """
    return InputError(f"no {what} at {path}: the path does not exist; correct it")


def check_system() -> None:
    """Raises InputError on Windows, where `os.kill(pid, 0)` of a run's lock would end processes."""
    if sys.platform == "win32":
        raise InputError("ptjax does not train or run commands on Windows; use it under WSL2")


@contextlib.contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Around the import of a package that the base installation leaves out.

    If a package is missing, raises an InputError that names it and the extra that installs it.

    Args:
        extra: its name in pyproject.toml, such as "tfds".
        what: what the package is needed for, such as "the metric f1".

    >>> with needs("report", "the metric f1"):
    ...     import sklearn_is_missing
    Traceback (most recent call last):
    ptjax.errors.InputError: the metric f1 needs sklearn_is_missing; pip install 'ptjax[report]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or one_line(error)).split(".")[0]
        raise InputError(f"{what} needs {package}; pip install 'ptjax[{extra}]'") from error


def one_line(error: BaseException) -> str:
    """Returns the first line of an error's message, printable and at most 200 characters long.

    For an error without a message, returns the name of its class.
    """
    line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return "".join(c if c.isprintable() else "?" for c in line)


def gin_flag(name: str, value: object) -> str:
    """Returns the command-line flag that sets a gin macro or an argument of a function.

    Args:
        name: the macro, or the argument with its function: "ptjax.Task.name".
        value: the value to set.

    >>> print(gin_flag("MODEL_DIR", "PATH"), gin_flag("TRAIN_STEPS", 100))
    --gin.MODEL_DIR="'PATH'" --gin.TRAIN_STEPS=100
    """
    text = repr(value)
    return f"--gin.{name}=" + (text if re.fullmatch(r"[\w.-]+", text) else f'"{text}"')


def is_empty(path: object) -> bool:
    """Whether a path is an empty or blank string.

    An empty path would mean the current folder, but is usually a mistake: a shell variable that
    was never set.
    """
    return isinstance(path, str) and not path.strip()


def check_path(name: str, path: object) -> None:
    """Raises InputError if a path is empty or none; `name` is the setting's, for the message.

    >>> check_path("MODEL_DIR", "")
    Traceback (most recent call last):
    ptjax.errors.InputError: MODEL_DIR is empty; name a path ('.' is the current folder)
    """
    if is_empty(path):
        raise InputError(f"{name} is empty; name a path ('.' is the current folder)")
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"{name} is {path!r}, not a path; name one")


def setting(name: str, *value: object) -> str:
    """Returns text for a message: how to set a field of `Task` with gin, or a flag of `infer`.

    Args:
        name: the name of the field; the flag of the command `infer` has the same name.
        value: at most one argument, the value to set; without it, the text only names the setting.

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
    """Returns a hint to append to "unknown NAME": the most similar known name, or all of them.

    Only a similar name is suggested: a far-fetched one would mislead the reader.

    Args:
        name: the unknown name.
        known: the valid names.
        listed: whether to list all known names if none is similar; if not, the hint is "".
        compared: maps a name to the part of it that is compared, to ignore parts that many names
            have in common. By default it removes leading "-".

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


def shortened(text: str) -> str:
    """A text of the user as a message quotes it: on one line, cut after 80 characters."""
    line = text.replace("\n", "\\n")
    return line if len(line) <= _QUOTED_CHARACTERS else line[:_QUOTED_CHARACTERS] + "..."


def listing(names: Iterable[str]) -> str:
    """Joins names with commas.

    After 300 characters, the other names are replaced by "..." and the number of all names. A name
    that is longer alone is `shortened`.
    """
    choices = [shortened(x) if len(x) > _LISTED_CHARACTERS else x for x in names]
    shown: list[str] = []
    for name in choices:
        if sum(map(len, shown)) + len(name) > _LISTED_CHARACTERS:
            return f"{', '.join(shown)}, ... ({len(choices)} in all)"
        shown.append(name)
    return ", ".join(shown)


def check_at_least(least: float, of: str = "", **settings: float | None) -> None:
    """Raises InputError for the first setting below `least`; None passes.

    Args:
        of: the class that the settings are fields of, for the message.
        settings: the values by name.

    >>> check_at_least(1, "TrainSchedule", keep=0)
    Traceback (most recent call last):
    ptjax.errors.InputError: TrainSchedule.keep must be >= 1, got 0
    """
    for name, value in settings.items():
        name = f"{of}.{name}" if of else name
        try:
            large = value is None or value >= least
        except TypeError as error:  # a text, for example
            raise InputError(f"{name} must be a number, got {value!r}") from error
        if not large:
            raise InputError(f"{name} must be >= {least}, got {value}")


def kind_of(value: object) -> str:
    """The name of a value's class with its article, for messages.

    >>> kind_of([]), kind_of(3)
    ('a list', 'an int')
    """
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"


def check_whole(of: str = "", **settings: Any) -> None:
    """Raises InputError for the first setting that is not an integer >= 1; None passes.

    >>> check_whole("TrainSchedule", train_steps=1e4)
    Traceback (most recent call last):
    ptjax.errors.InputError: TrainSchedule.train_steps must be a whole number, got 10000.0
    """
    for name, value in settings.items():
        try:
            operator.index(0 if value is None else value)
        except TypeError as error:
            name = f"{of}.{name}" if of else name
            raise InputError(f"{name} must be a whole number, got {value!r}") from error
        check_at_least(1, of, **{name: value})


def check_choice(choices: Iterable[object], of: str = "", **settings: object) -> None:
    """Raises InputError for the first setting whose value is not in `choices`.

    Args:
        of: the class that the settings are fields of, for the message.
        settings: the values by name.

    >>> check_choice(("none", "full"), "T5Config", remat="x")
    Traceback (most recent call last):
    ptjax.errors.InputError: T5Config.remat must be one of 'none', 'full', got 'x'
    """
    choices = list(choices)
    for name, value in settings.items():
        if value not in choices:
            name = f"{of}.{name}" if of else name
            listed = ", ".join(map(repr, choices))
            raise InputError(f"{name} must be one of {listed}, got {value!r}")


def check_share(of: str, **settings: float) -> None:
    """Raises InputError for the first setting of the class `of` that is not in [0, 1)."""
    for name, value in settings.items():
        if not 0 <= value < 1:
            raise InputError(f"{of}.{name} must be >= 0 and < 1, got {value}")


def check_arguments(function: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises TypeError for an argument that a function with `**settings` does not have.

    >>> check_arguments("predict", {"num_beam": 4}, ["num_beams", "seed"])
    Traceback (most recent call last):
    TypeError: predict() has no argument 'num_beam'; did you mean num_beams?
    """
    choices = sorted(known)
    for name in given:
        if name not in choices:
            raise TypeError(f"{function}() has no argument {name!r}{near(name, choices)}")
