"""Flags -> gin -> a library function, shared by the thin commands.

The library has no `@gin.configurable`: gin files name functions through dynamic registration.
Errors of the user end as one line and exit code 2, failures as exit code 1.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any, NoReturn

import gin
from absl import logging
from etils import epath

from ptjax.errors import InputError

EPILOG = """\
gin:  a gin file binds arguments of Python functions and names macros (NAME = value).
      --gin.NAME=VALUE sets a macro or any argument from the command line, for example
        --gin.MODEL_DIR="'/tmp/run'"  --gin.TRAIN_STEPS=1000  --gin.tuning.tune.seed=3
      strings need their own quotes. Files are looked for in the current folder, the
      --gin_search_paths, and ptjax's own gin_configs.
exit codes:  0 finished, 1 failed, 2 bad input, 130 and 143 stopped by Ctrl-C and SIGTERM
      (saved; the same command goes on).
"""


def gin_configs() -> epath.Path:
    """ptjax's own gin files: inside an installed package, or at the top of a clone."""
    package = epath.Path(os.fspath(resources.files("ptjax")))  # type: ignore[arg-type]
    inside = package / "gin_configs"
    return inside if inside.exists() else package.parent / "gin_configs"


class _Parser(argparse.ArgumentParser):
    """One line for what is wrong, with the nearest valid flag."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            name = unknown[1].split("=")[0]
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(name, flags, 1)
            message = f"unknown flag {name}" + (f"; did you mean {near[0]}?" if near else "")
        print(f"error: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)


def make_parser(command: str, description: str, *, gin_help: str = "") -> argparse.ArgumentParser:
    """A parser with the gin flags that all commands share."""
    parser = _Parser(
        prog=f"python -m ptjax.{command}",
        description=description,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="a gin file; may be repeated, later ones win. " + gin_help,
    )
    parser.add_argument(
        "--gin_search_paths", default="", metavar="DIRS", help="comma-separated folders"
    )
    parser.add_argument(
        "--gin_bindings",
        action="append",
        default=[],
        metavar="'NAME = VALUE'",
        help="a line of gin; may be repeated. --gin.NAME=VALUE is the short form",
    )
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags as usual, with `--gin.NAME=VALUE` turned into a binding."""
    argv, rest = list(sys.argv[1:] if argv is None else argv), []
    bindings = []
    for i, argument in enumerate(argv):
        if not argument.startswith("--gin."):
            rest.append(argument)
        elif "=" not in argument:
            parser.error(f"{argument} needs a value: {argument}=VALUE, argument {i + 1}")
        else:
            name, value = argument.removeprefix("--gin.").split("=", 1)
            bindings.append(f"{name} = {value}")
    arguments = parser.parse_args(rest)
    arguments.gin_bindings += bindings
    return arguments


def load_gin(arguments: argparse.Namespace) -> None:
    """Reads the gin files and bindings, and checks every macro.

    Raises:
        InputError: one line with file, line and the nearest valid name.
    """
    gin.clear_config()
    paths = [p for p in arguments.gin_search_paths.split(",") if p]
    for path in ["", *paths, os.fspath(gin_configs())]:
        gin.add_config_file_search_path(path)
    gin.config.register_file_reader(
        lambda name: epath.Path(name).open(), lambda name: epath.Path(name).exists()
    )
    try:
        gin.parse_config_files_and_bindings(arguments.gin_file, arguments.gin_bindings)
    except (ValueError, NameError, AttributeError, ImportError, OSError, TypeError) as error:
        raise InputError(_one_line(error)) from error
    except SyntaxError as error:
        raise InputError(f"gin syntax: {_one_line(error)}") from error
    check_macros()


def check_macros() -> None:
    """A macro that is bound but never used, or used but never bound, is a mistake."""
    config = gin.config._CONFIG  # gin has no public list of its macros
    bound = {scope for scope, selector in config if selector == "gin.macro"}
    used = {
        reference.scoped_selector.split("/", 1)[0]
        for bindings in config.values()
        for reference in gin.config.iterate_references(bindings)
        if reference.selector == "gin.macro" or reference.selector == "macro"
    }
    if missing := sorted(used - bound):
        raise InputError(
            f"the macro {missing[0]} is used but has no value; set it with "
            f"--gin.{missing[0]}=VALUE"
        )
    if unused := sorted(bound - used):
        near = difflib.get_close_matches(unused[0], sorted(used), 1)
        raise InputError(
            f"the macro {unused[0]} is set but nothing uses it"
            + (f"; did you mean {near[0]}?" if near else "; remove it")
        )


def _one_line(error: BaseException) -> str:
    """gin's message in one line, with the nearest valid name where it says what is unknown."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    if parameter := re.search(r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", text):
        name, wrong = parameter.groups()
        known = gin.config._REGISTRY.get_match(name)
        if known is not None:
            names = list(inspect.signature(known.wrapped).parameters)
            if near := difflib.get_close_matches(wrong, names, 1, 0.0):
                return f"{text}; did you mean '{near[0]}'?"
    return text


def bound(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the arguments that gin binds.

    Raises:
        InputError: an argument without a default is not bound.
    """
    try:
        configured = gin.get_configurable(function)
    except ValueError:
        return function
    given = set(gin.get_bindings(function, resolve_references=False))
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is parameter.empty and name not in given:
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            raise InputError(
                f"{function.__name__} needs `{name}`, which no gin file sets; name a gin file "
                "that does (see --help)"
            )
    return configured


def macro(name: str) -> Any:
    """The value of a macro, or None."""
    try:
        return gin.query_parameter(f"%{name}")
    except ValueError:
        return None


def run(main: Callable[[], Any]) -> NoReturn:
    """Runs a command's body; turns its outcome into an exit code."""
    from ptjax.loop import TrainingFailed

    prepare()
    try:
        main()
    except InputError as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        raise SystemExit(2) from None
    except TrainingFailed as error:
        print(f"failed: {str(error).splitlines()[0]}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(0)


def prepare() -> None:
    """Logging to stderr, and a compile cache that later runs start from."""
    import jax

    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.setFormatter(None)
    handler.use_absl_log_file  # noqa: B018
    for name in ("jax", "orbax", "etils"):
        logging.logging.getLogger(name).setLevel(logging.logging.WARNING)
    if not jax.config.jax_compilation_cache_dir:
        cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "ptjax", "xla"))
