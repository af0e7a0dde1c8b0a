"""Flags -> gin -> a library function, shared by the thin commands.

The library has no `@gin.configurable`: gin files name functions through dynamic registration.
Errors of the user end as one line and exit code 2, failures as exit code 1. Nothing heavy is
imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import signal
import sys
import textwrap
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ptjax.cli import distributed, gin_types, logs, t5x_names
from ptjax.cli.gin_files import bound, config_text, has_macro, load_gin, macro, settings
from ptjax.errors import InputError, TrainingError, near

__all__ = [
    "EXIT_CODES",
    "RUN_EXIT_CODES",
    "bound",
    "config_text",
    "has_macro",
    "load_gin",
    "macro",
    "make_parser",
    "parse",
    "run",
    "settings",
]

MAY_BE_EMPTY = ("--cache_dir", "--gin_bindings", "--gin_search_paths", "--prefix")
"""Flags that accept an empty value; for the others it is a mistake, such as an unset variable."""

GIN = """\
gin: a gin file binds arguments of Python functions and names macros (NAME = value).
  --gin.NAME=VALUE sets a macro, or any argument of a function, for example
    --gin.MODEL_DIR="'/tmp/run'"  --gin.TRAIN_STEPS=1000  --gin.RunSettings.seed=3
  Strings need quotes of their own. Files are looked for in the current folder, in the
  --gin_search_paths, and among ptjax's own (models/, tasks/, runs/, quickstart.gin).
"""
EXIT_CODES = "exit codes: 0 finished, 1 failed, 2 bad input"
RUN_EXIT_CODES = f"""\
{EXIT_CODES},
  130 and 143 stopped by Ctrl-C and SIGTERM (saved; the same command goes on)"""


class _Parser(argparse.ArgumentParser):
    """One line for what is wrong, with the nearest valid flag."""

    def error(self, message: str) -> NoReturn:
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            name = unknown[1].split("=")[0]
            flags = [flag for action in self._actions for flag in action.option_strings]
            kind = "flag" if name.startswith("-") else "argument"
            here = t5x_names.flag_advice(name)
            message = (
                t5x_names.told(name, here)
                if here
                else f"unknown {kind} {name}{near(name, flags, listed=False)}"
            )
        print(f"error: {logs.one_line(message)} (see --help)", file=sys.stderr)
        raise SystemExit(2)


def make_parser(
    command: str,
    description: str,
    *,
    gin: bool = True,
    gin_help: str = "",
    exit_codes: str = EXIT_CODES,
) -> argparse.ArgumentParser:
    """A parser with the gin flags that all commands share which read gin files.

    Args:
        description: paragraphs, which are filled; lines that start with a space stay as they are.
    """
    _open_standard_streams()
    paragraphs = textwrap.dedent(description).strip().split("\n\n")
    parser = _Parser(
        prog=f"python -m ptjax.{command}",
        description="\n\n".join(
            text if text.startswith(" ") else textwrap.fill(text, 90) for text in paragraphs
        ),
        epilog=(GIN if gin else "") + exit_codes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if not gin:
        return parser
    settings = parser.add_argument_group("settings")
    settings.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="a gin file; may be repeated, later ones win. " + gin_help,
    )
    settings.add_argument(
        "--gin_search_paths",
        default="",
        metavar="DIRS",
        help="comma-separated folders where gin files are looked for too",
    )
    settings.add_argument(
        "--gin_bindings",
        action="append",
        default=[],
        metavar="'NAME = VALUE'",
        help="a line of gin; may be repeated. --gin.NAME=VALUE is the short form",
    )
    # For command lines written for T5X: what they mean here, docs/from_prompt_tuning.md says.
    settings.add_argument("--tfds_data_dir", metavar="DIR", help=argparse.SUPPRESS)
    for name in ("--alsologtostderr", "--logtostderr"):
        settings.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags as usual, with `--gin.NAME=VALUE` turned into a binding."""
    argv, rest, bindings = list(sys.argv[1:] if argv is None else argv), [], []
    for argument in argv:
        if re.search("[\ud800-\udfff]", argument):  # how Python holds bytes that are no text
            parser.error(f"the argument {argument!r} has bytes that are not UTF-8 text")
        name, _, value = argument.removeprefix("--gin.").partition("=")
        if not argument.startswith("--gin."):
            rest.append(argument)
        elif not value.strip():
            parser.error(f"--gin.{name} needs a value: {gin_types.flag_of(name)}")
        else:
            bindings.append(f"{name} = {value}")
    arguments = parser.parse_intermixed_args(rest)
    arguments.gin_bindings += bindings
    for action in parser._actions:
        flag, value = "/".join(action.option_strings), getattr(arguments, action.dest, None)
        empty = "" in value if isinstance(value, list) else value == ""
        if flag and empty and flag not in MAY_BE_EMPTY:
            parser.error(f"{flag} is empty; give it a value or leave it out")
    return arguments


def run(body: Callable[[], Any], processes: argparse.Namespace | None = None) -> NoReturn:
    """Runs a command's body; turns its outcome into an exit code.

    Args:
        processes: with the flags of `distributed.add_flags`, of a command that may be one of
            several processes.
    """
    logs.prepare()
    with distributed.ending(processes):
        _run(body, processes)


def _run(body: Callable[[], Any], processes: argparse.Namespace | None) -> NoReturn:
    # Outside of the loop, which saves first: the exit code is 143 here as there.
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        distributed.start(processes)
        body()
        sys.stdout.flush()
    except InputError as error:
        # gin appends lines to what is raised inside of it.
        raise SystemExit(_say("error", error, 2)) from None
    except BrokenPipeError:
        # In the middle of the work; Python must not flush into the void when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        raise SystemExit(_say("failed", error, 1)) from None
    except TrainingError as error:
        raise SystemExit(_say("failed", error, 1)) from None
    except KeyboardInterrupt:
        print(f"{logs.speaker()}interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    raise SystemExit(0)


def _open_standard_streams() -> None:
    """Gives what the caller closed (`>&-`) somewhere to go, and JSON its encoding.

    Else the next file that is opened would be the one that everybody prints into.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number is this one
        if getattr(sys, name) is None:
            stream = io.FileIO(number, mode, closefd=False)
            buffered = io.BufferedReader(stream) if mode == "r" else io.BufferedWriter(stream)
            setattr(sys, name, io.TextIOWrapper(buffered, encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


def _terminate(number: int, frame: types.FrameType | None) -> NoReturn:
    del frame
    print("terminated", file=sys.stderr)
    raise SystemExit(128 + number)


def _say(what: str, error: BaseException, code: int) -> int:
    text = str(error)
    if isinstance(error, InputError):  # one line, but for what gin appends
        text = re.split(r"\n  In (?:call|file|bindings)\b", text)[0]
    else:
        text = (text.splitlines() or [type(error).__name__])[0]
    with contextlib.suppress(OSError):  # nobody may be reading
        print(f"{logs.speaker()}{what}: {logs.one_line(text)}", file=sys.stderr)
    return code
