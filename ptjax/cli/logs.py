"""Logging for the commands: plain lines on stderr, and only problems of other libraries."""

from __future__ import annotations

from ptjax import messages
from ptjax.messages import name_process, printable, speaker

__all__ = ["LONGEST_MESSAGE", "name_process", "one_line", "prepare", "printable", "speaker"]

LONGEST_MESSAGE = 1500
"""The number of characters above which an error message is cut in the middle."""


def one_line(text: str) -> str:
    """Returns an error message as one printable line.

    A message above `LONGEST_MESSAGE` characters loses its middle, because its end says what to do.
    """
    text = printable(text).replace("\n", "\\n")
    if len(text) <= LONGEST_MESSAGE:
        return text
    head, tail = LONGEST_MESSAGE * 2 // 3, LONGEST_MESSAGE // 3
    return f"{text[:head]} ... {text[-tail:]}"


def prepare() -> None:
    """Sets up logging to stderr, replacing an earlier setup, and JAX's persistent compile cache."""
    messages.take_over()
    from ptjax.sharding.devices import use_compile_cache

    use_compile_cache()
