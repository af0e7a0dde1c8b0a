"""The part of the command line that all commands share: flags, gin files, errors, exit codes.

The library has no `@gin.configurable`: gin files name functions through dynamic registration. Bad
input ends with one line and exit code 2, a failure with exit code 1. Nothing heavy is imported
here, so that `--help` is fast.
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
from typing import NoReturn

from ptjax.cli import distributed, gin_types, logs, t5x_names
from ptjax.cli.gin_files import bound, config_text, load_gin, settings
from ptjax.cli.gin_macros import has_macro, macro
from ptjax.errors import InputError, TrainingError, check_system, near

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
"""Flags that accept an empty value. For the others it is rejected: usually an unset variable."""

GIN = """\
gin: a gin file binds arguments of Python functions and names macros (NAME = value).
  --gin.NAME=VALUE sets a macro, or any argument of a function, for example
    --gin.MODEL_DIR="'/tmp/run'"  --gin.TRAIN_STEPS=1000  --gin.RunSettings.seed=3
  Strings need their own quotes. Files are searched in the current folder, in the
  --gin_search_paths, and among ptjax's own (models/, tasks/, runs/, quickstart.gin).
"""
EXIT_CODES = "exit codes: 0 finished, 1 failed, 2 bad input"
RUN_EXIT_CODES = f"""\
{EXIT_CODES},
  130 and 143 stopped by Ctrl-C and SIGTERM (saved; rerun the same command to resume)"""


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, with the nearest valid flag."""

    def error(self, message: str) -> NoReturn:
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            name = unknown[1].split("=")[0]
            flags = [flag for action in self._actions for flag in action.option_strings]
            kind = "flag" if name.startswith("-") else "argument"
            here = t5x_names.flag_advice(name)
            message = (
                t5x_names.replacement_message(name, here)
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
    """Makes the parser of a command, with the flags for gin files. Use it with `parse`.

    It also opens standard streams that the caller closed, and sets UTF-8 for standard output.

    Args:
        command: the command's name: "train" is called as `python -m ptjax.train`.
        description: the text of the help. Its paragraphs are wrapped, except those that start with
            a space.
        gin: whether the command reads gin files.
        gin_help: what the gin files of this command may set, appended to the help of --gin_file.
        exit_codes: what the exit codes mean, appended to the help.
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
        help="a gin file; may be repeated, later ones override earlier ones. " + gin_help,
    )
    settings.add_argument(
        "--gin_search_paths",
        default="",
        metavar="DIRS",
        help="comma-separated folders to search for gin files",
    )
    settings.add_argument(
        "--gin_bindings",
        action="append",
        default=[],
        metavar="'NAME = VALUE'",
        help="a line of gin; may be repeated. --gin.NAME=VALUE is the short form",
    )
    # Accepted for command lines written for T5X, see docs/from_prompt_tuning.md.
    settings.add_argument("--tfds_data_dir", metavar="DIR", help=argparse.SUPPRESS)
    for name in ("--alsologtostderr", "--logtostderr"):
        settings.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the flags; adds `--gin.NAME=VALUE` to `gin_bindings` as "NAME = VALUE".

    Flags with bad values are reported in one line on standard error, with exit code 2.

    Args:
        parser: from `make_parser`, with `gin=True`.
        argv: the arguments; None: those of this process.
    """
    argv, rest, bindings = list(sys.argv[1:] if argv is None else argv), [], []
    for argument in argv:
        if re.search("[\ud800-\udfff]", argument):  # how Python represents bytes that are not UTF-8
            parser.error(f"the argument {argument!r} has bytes that are not UTF-8 text")
        name, _, value = argument.removeprefix("--gin.").partition("=")
        if not argument.startswith("--gin."):
            rest.append(argument)
        elif not value.strip():
            parser.error(f"--gin.{name} needs a value: {gin_types.flag_of(name)}")
        else:
            bindings.append(f"{name} = {value}")
    arguments = parser.parse_intermixed_args(rest)
    if "gin_bindings" in arguments:
        arguments.gin_bindings += bindings
    elif bindings:
        parser.error(f"unknown flag --gin.{bindings[0].split(' =')[0]}: it reads no gin files")
    for action in parser._actions:
        flag, value = "/".join(action.option_strings), getattr(arguments, action.dest, None)
        empty = "" in value if isinstance(value, list) else value == ""
        if flag and empty and flag not in MAY_BE_EMPTY:
            parser.error(f"{flag} is empty; give it a value or leave it out")
    return arguments


def run(body: Callable[[], object], processes: argparse.Namespace | None = None) -> NoReturn:
    """Calls a command's body, then exits with 0, or 2 after an InputError, 1 after other failures.

    Ctrl-C exits with 130, and SIGTERM with 143 unless the body handles it. Expected errors are
    printed as one line on standard error. Before the call it sets up logging
    and joins the other processes, if there are several.

    Args:
        body: the work of the command, a function without arguments.
        processes: the parsed flags, which include those of `distributed.add_flags`; None for a
            command that supports one process only.
    """
    logs.prepare()
    with distributed.ending(processes):
        _run(body, processes)


def _run(body: Callable[[], object], processes: argparse.Namespace | None) -> NoReturn:
    # Outside of the training loop, which saves first and exits with 143 too.
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        check_system()
        distributed.start(processes)
        body()
        sys.stdout.flush()
    except InputError as error:
        # gin appends lines to errors that pass through it.
        raise SystemExit(_say("error", error, 2)) from None
    except ImportError as error:
        if "gcsfs" not in str(error):  # fsspec's own sentence, from wherever a path is used first
            raise
        missing = InputError("paths of gs:// need gcsfs; pip install 'ptjax[gcs]'")
        raise SystemExit(_say("error", missing, 2)) from None
    except BrokenPipeError:
        # The reader is gone; Python must not flush to it when it exits.
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
    """Opens standard streams that the caller closed (`>&-`), and sets UTF-8 for output.

    Otherwise the next file that is opened would get the descriptor of, say, standard output.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
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
    if isinstance(error, InputError):  # one line, without the lines that gin appends
        text = re.split(r"\n  In (?:call|file|bindings)\b", text)[0]
    else:
        text = (text.splitlines() or [type(error).__name__])[0]
    with contextlib.suppress(OSError):  # standard error may be closed
        print(f"{logs.speaker()}{what}: {logs.one_line(text)}", file=sys.stderr)
    return code
