"""Logging for the commands: plain lines on stderr, and only problems of other libraries."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from typing import Any, TextIO

from absl import logging as absl_logging

import ptjax

_PACKAGE = os.path.dirname(os.path.abspath(ptjax.__file__))


# Control characters, surrogates, and characters that change the direction of text.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
LONGEST_MESSAGE = 1500
"""The number of characters above which an error message is cut in the middle."""


def printable(text: str) -> str:
    """Returns untrusted text with control characters escaped, except line feeds and tabs."""
    return _UNPRINTABLE.sub(lambda c: c[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """Returns an error message as one printable line.

    A message above `LONGEST_MESSAGE` characters loses its middle, because its end says what to do.
    """
    text = printable(text).replace("\n", "\\n")
    if len(text) <= LONGEST_MESSAGE:
        return text
    head, tail = LONGEST_MESSAGE * 2 // 3, LONGEST_MESSAGE // 3
    return f"{text[:head]} ... {text[-tail:]}"


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


def _matters(record: logging.LogRecord) -> bool:
    """Whether to show a record: all of ptjax, warnings of JAX, errors of other libraries.

    Orbax, Grain and TFDS log every step of their work through absl, as ptjax does. gin logs an
    error for every folder that lacks a file. Orbax logs an error in each thread that it passes,
    and then raises it.
    """
    if os.path.abspath(record.pathname).startswith(_PACKAGE + os.sep):
        # The first of several processes reports progress, all of them report problems.
        return not _process or record.levelno >= logging.WARNING
    if any(f"{os.sep}{name}{os.sep}" in record.pathname for name in ("gin", "orbax")):
        return False
    jax = record.name.split(".")[0] == "jax"
    return record.levelno >= (logging.WARNING if jax else logging.ERROR)


def name_process(number: int) -> None:
    """Sets the number of this process, one of several: warnings show it, only 0 logs progress."""
    global _process
    _process = number


def speaker() -> str:
    """The prefix of warnings and errors, "process 3: "; "" if this process is the only one."""
    return "" if _process is None else f"process {_process}: "


def prepare() -> None:
    """Sets up logging to stderr, replacing an earlier setup, and JAX's persistent compile cache.

    The cache is in ~/.cache/ptjax/xla (or in XDG_CACHE_HOME) unless the user has set JAX's.
    """
    root = logging.getLogger()
    root.handlers[:] = [h for h in root.handlers if not isinstance(h, _Stderr)]
    handler = _Stderr()
    handler.setFormatter(_Plain())
    handler.addFilter(_matters)
    root.addHandler(handler)
    absl_logging.set_verbosity(absl_logging.INFO)
    warnings.filterwarnings("ignore", module=r"(orbax|flax|grain|etils|tensorstore|tensorboardX)\b")
    import jax

    config: Any = jax.config
    if not config.jax_compilation_cache_dir:
        cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
        config.update("jax_compilation_cache_dir", os.path.join(cache, "ptjax", "xla"))
