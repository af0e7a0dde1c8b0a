"""What a person reads on stderr: plain lines of ptjax, and of others what matters."""

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


# Besides control characters, those that turn the direction of what follows.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
LONGEST_MESSAGE = 1500
"""Characters of an error that a person is still willing to read."""


def printable(text: str) -> str:
    """Text of a file, such as a name, that cannot steer the terminal; lines and tabs stay."""
    return _UNPRINTABLE.sub(lambda c: c[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """An error as one line, the middle of a long one left out: its end says what to do."""
    text = printable(text).replace("\n", "\\n")
    if len(text) <= LONGEST_MESSAGE:
        return text
    head, tail = LONGEST_MESSAGE * 2 // 3, LONGEST_MESSAGE // 3
    return f"{text[:head]} ... {text[-tail:]}"


_process: int | None = None
"""The number of this process where it is one of several."""


class _Plain(logging.Formatter):
    """The message, behind "warning: " or "error: " where it is one, and whose."""

    def format(self, record: logging.LogRecord) -> str:
        message = printable(record.getMessage())
        if record.levelno < logging.WARNING:
            return message
        return f"{speaker()}{record.levelname.lower()}: {message}"


class _Stderr(logging.StreamHandler):
    """Writes to whatever `sys.stderr` is now: a progress bar puts itself in its place."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        del value


def _matters(record: logging.LogRecord) -> bool:
    """Ours; of JAX warnings (an unused GPU); of all others errors.

    Orbax, Grain and TFDS log every step of their work through absl, as ptjax does. gin reports
    every folder in which it does not find a file as an error. Orbax logs an error in each of its
    threads that it passes, and raises it in ours as well.
    """
    if os.path.abspath(record.pathname).startswith(_PACKAGE + os.sep):
        # Of several processes the first one tells what happens; the others what is wrong.
        return not _process or record.levelno >= logging.WARNING
    if any(f"{os.sep}{name}{os.sep}" in record.pathname for name in ("gin", "orbax")):
        return False
    jax = record.name.split(".")[0] == "jax"
    return record.levelno >= (logging.WARNING if jax else logging.ERROR)


def name_process(number: int) -> None:
    """Says that this process is one of several."""
    global _process
    _process = number


def speaker() -> str:
    """What stands before a warning or an error: of several processes, which one."""
    return "" if _process is None else f"process {_process}: "


def prepare() -> None:
    """Logging to stderr, and a compile cache that later runs start from."""
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
