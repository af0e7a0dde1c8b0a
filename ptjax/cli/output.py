"""The flags and the standard output of commands that write results (see `ptjax.output`)."""

from __future__ import annotations

import argparse
import os
import sys

from etils import epath

from ptjax import files
from ptjax.model_dir import ModelDir
from ptjax.output import as_json, check, check_place, is_stream, target, write
from ptjax.trainer.callbacks import Callback

__all__ = [
    "ConfigFile",
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


class ConfigFile(Callback):
    """Writes the settings of a run to `MODEL_DIR/config.gin` when it starts.

    Args:
        text: the result of `config_text`.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def on_start(self, model_dir: epath.Path, step: int) -> None:
        """Writes config.gin on the first process; a resumed run replaces its earlier file.

        Args:
            model_dir: the run's folder.
            step: unused.
        """
        from ptjax.sharding import processes

        if processes.first():
            files.write_bytes(ModelDir(model_dir).config, self.text.encode())
