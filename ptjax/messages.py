"""Messages: what ptjax and the libraries below it log, as plain lines on standard error.

ptjax logs through absl, as Orbax and others do, and absl shows no progress until it is told to. The
first use of a public name calls `show`; the commands call `take_over`.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import TextIO

from absl import logging as absl_logging

PACKAGE = os.path.dirname(os.path.abspath(__file__))
"""The folder of ptjax's own code."""

# Control characters, surrogates, and characters that change the direction of text.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_LIBRARIES = ("etils", "flax", "gin", "grain", "orbax", "tensorboardX", "tensorstore", "tfds")


def printable(text: str) -> str:
    """Returns untrusted text with control characters escaped, except line feeds and tabs."""
    return _UNPRINTABLE.sub(lambda c: c[0].encode("unicode_escape").decode(), text)


_process: int | None = None
"""The number of this process; None if it is the only one."""


class _Plain(logging.Formatter):
    """The message; warnings and errors get a prefix with their level and process."""

    def format(self, record: logging.LogRecord) -> str:
        message = printable(record.getMessage())
        if record.levelno < logging.WARNING:
            return message
        return f"{speaker()}{record.levelname.lower()}: {message}"


class _Stderr(logging.StreamHandler):
    """Writes to the current `sys.stderr`, which a progress bar may have replaced."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        del value


def _is_ours(record: logging.LogRecord) -> bool:
    return os.path.abspath(record.pathname).startswith(PACKAGE + os.sep)


def _matters_to_a_command(record: logging.LogRecord) -> bool:
    """Whether to show a record: all of ptjax, warnings of JAX, errors of other libraries.

    Orbax, Grain and TFDS log every step of their work through absl, as ptjax does. gin logs an
    error for every folder that lacks a file. Orbax logs an error in each thread that it passes,
    and then raises it.
    """
    if _is_ours(record):
        # The first of several processes reports progress, all of them report problems.
        return not _process or record.levelno >= logging.WARNING
    if any(f"{os.sep}{name}{os.sep}" in record.pathname for name in ("gin", "orbax")):
        return False
    jax = record.name.split(".")[0] == "jax"
    return record.levelno >= (logging.WARNING if jax else logging.ERROR)


def _matters_to_python(record: logging.LogRecord) -> bool:
    """Whether to show a record: all of ptjax and of the user's own code, no chatter of others."""
    if _is_ours(record):
        return True
    if any(f"{os.sep}{name}{os.sep}" in record.pathname for name in _LIBRARIES):
        return False
    return record.name != "absl" or record.levelno >= logging.WARNING


def name_process(number: int) -> None:
    """Sets the number of this process, one of several.

    Warnings and errors start with the number, and only process 0 logs progress.
    """
    global _process
    _process = number


def speaker() -> str:
    """The prefix of warnings and errors, "process 3: "; "" if this process is the only one."""
    return "" if _process is None else f"process {_process}: "


def take_over() -> None:
    """Shows the messages of a command, which owns its process; replaces an earlier setup."""
    root = logging.getLogger()
    root.handlers[:] = [h for h in root.handlers if not isinstance(h, _Stderr)]
    root.addHandler(_handler(_matters_to_a_command))
    absl_logging.set_verbosity(absl_logging.INFO)
    _ignore_warnings()


def show() -> None:
    """Lets ptjax's messages reach a Python user, and no chatter of the libraries below it.

    Where the user has set up logging, the messages go there. `absl.logging.set_verbosity` makes
    ptjax silent again. A second call changes nothing.
    """
    absl_logger = absl_logging.get_absl_logger()
    if _matters_to_python in absl_logger.filters:
        return
    absl_logger.addFilter(_matters_to_python)
    root = logging.getLogger()
    if not root.handlers:  # else absl would add its own to it at the first message
        root.addHandler(_handler(_matters_to_python))
    if absl_logging.get_verbosity() == absl_logging.WARNING:  # absl's default
        absl_logging.set_verbosity(absl_logging.INFO)
    _ignore_warnings()


def _handler(matters: Callable[[logging.LogRecord], bool]) -> logging.Handler:
    handler = _Stderr()
    handler.setFormatter(_Plain())
    handler.addFilter(matters)
    return handler


def _ignore_warnings() -> None:
    warnings.filterwarnings("ignore", module=rf"({'|'.join(_LIBRARIES)})\b")
