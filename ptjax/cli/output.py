"""The flags and the standard output of commands that write results (see `ptjax.output`)."""

from __future__ import annotations

import argparse
import os
import sys

from ptjax.output import as_json, check, check_place, is_stream, target, write

__all__ = [
    "add_flags",
    "add_prefix_flag",
    "as_json",
    "check",
    "check_place",
    "is_stream",
    "show",
    "target",
    "write",
]


def add_flags(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds the flags --output=PATH and --force; `what` is the help text of --output."""
    parser.add_argument("--output", metavar="PATH", help=what)
    parser.add_argument("--force", action="store_true", help="overwrite PATH if it exists")


def show(text: str) -> None:
    """Prints a result to standard output; a closed pipe (`| head -1`) is not an error."""
    try:
        sys.stdout.write(text + "\n" if text and not text.endswith("\n") else text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python must not flush to the closed pipe when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def add_prefix_flag(parser: argparse.ArgumentParser) -> None:
    """Adds the flag --prefix=TEXT to a command that adds fields to each record of its input.

    The names of the added fields start with TEXT, so that they do not clash with existing ones.
    """
    parser.add_argument(
        "--prefix",
        default="",
        metavar="TEXT",
        help="a prefix for the names of the fields that are added to each record",
    )
