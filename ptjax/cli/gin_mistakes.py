"""Turns exceptions that gin raises into messages of one line, with file and line number."""

from __future__ import annotations

import inspect
import os
import pkgutil
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gin.config
from etils import epath

from ptjax.cli import gin_types, t5x_names
from ptjax.errors import InputError, listing, near

_gin: Any = gin.config

# Imported for bindings on the command line that name a module which no gin file imports.
IMPORTS = """\
from __gin__ import dynamic_registration
import optax
import ptjax
"""
PUBLIC_NAMES = (
    "gin files name ptjax's public API: `import ptjax`, then ptjax.RunSettings.seed, "
    "@ptjax.Task() and so on; see docs/gin.md"
)


MAX_DEPTH = 100
"""Allowed levels of nesting in a value; real values have fewer than ten."""
_MARKS = re.compile(
    r"""(?s)\'{3}.*?\'{3}|"{3}.*?"{3}|'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"|\#[^\n]*|[][(){}]"""
)
"""Matches strings, comments, and brackets outside of them."""


def check_depth(text: str, source: str) -> None:
    """Raises InputError if a value in gin's syntax is nested deeper than `MAX_DEPTH`.

    gin's parser recurses into values, and so does the code that copies or prints them.

    Args:
        text: the content of a gin file, or one binding.
        source: the file, or "command line" with the name of the setting, for the message.
    """
    depth = 0
    for mark in _MARKS.finditer(text):
        depth += (mark[0] in "[({") - (mark[0] in "])}")
        if depth > MAX_DEPTH:
            line = text.count("\n", 0, mark.start()) + 1
            place = source if source.startswith("command line") else f"{source}:{line}"
            raise InputError(f"{place}: a value is nested deeper than {MAX_DEPTH} levels")


def own_files(folder: epath.Path) -> list[str]:
    """Lists the gin files in `folder` and its subfolders, as `--gin_file` takes them.

    Args:
        folder: the result of `gin_configs`.
    """
    files = [path for glob in ("*.gin", "*/*.gin") for path in folder.glob(glob)]
    return sorted(os.path.relpath(path, folder) for path in files)


def _stem(file: str) -> str:
    return os.path.basename(file).removesuffix(".gin")


_MISTAKES = (
    ValueError, NameError, AttributeError, ImportError, OSError, SyntaxError, RecursionError,
    tokenize.TokenError,
)  # fmt: skip


@contextmanager
def explained(paths: Sequence[str], source: str, line: str = "") -> Iterator[None]:
    """A context manager: an exception that gin raises in it becomes an InputError of one line.

    Args:
        paths: the search paths of gin files, for the message.
        source: where the mistake is, for the message: the file, or "command line, BINDING".
        line: the binding on the command line; "" for a file.
    """
    try:
        yield
    except InputError:
        raise
    except _MISTAKES as error:
        text = _explain(error, paths, line)
        place = (not line and _place(error, source)) or source
        missing = isinstance(error, OSError) and place == source
        raise InputError(text if missing else f"{place}: {text}") from error


def _place(error: BaseException, file: str) -> str:
    """ "file:line" of a mistake in a gin file."""
    if isinstance(
        error, tokenize.TokenError
    ):  # an open bracket is only noticed at the end of the file
        message, (number, _) = error.args
        return "" if "EOF" in message else f"{file}:{number}"
    if isinstance(error, SyntaxError):
        place = error.args[1] if len(error.args) > 1 else None
        filename, number = getattr(place, "filename", None), getattr(place, "line_num", None)
        return f"{filename}:{number}" if filename else ""
    # The innermost of nested includes is mentioned first.
    found = re.search(r'\n  In file "([^"]+)",? line (\d+)', str(error))
    return f"{found[1]}:{found[2]}" if found else ""


def _explain(error: BaseException, paths: Sequence[str], line: str) -> str:
    """gin's message in one line, with the nearest valid name where something is unknown."""
    if isinstance(error, SyntaxError | tokenize.TokenError):
        if match := re.search(r" = ([+-]?(inf|infinity|nan))$", line, re.IGNORECASE):
            return f"{match[1]} is not a finite number; give one"
        if match := re.match(r"([\w./]+) = ([^'\"@%\[({\d\s].*)$", line):
            return f"a string needs its own quotes: --gin.{match[1]}=\"'{match[2]}'\""
        return (
            "gin cannot parse this; check for a missing quote or bracket, and that every string "
            "has quotes"
        )
    if isinstance(error, RecursionError):
        return "it includes itself; remove one of the includes"
    setting = line.partition("=")[0].strip()
    if here := t5x_names.advice(setting):
        return t5x_names.replacement_message(setting, here)
    text = str(error).split("\n  In ")[0].replace("\n", " ")
    if text.startswith("not enough values to unpack"):
        return "this names a function; a binding sets one of its arguments, module.name.argument"
    if match := re.match(r"Configurable '([\w./]+)' doesn't have a parameter named '(\w+)'", text):
        function = _gin._REGISTRY.get_match(match[1])  # gin accepts the last part alone
        function = function or _gin._REGISTRY.get_match(match[1].rsplit(".", 1)[-1])
        names = inspect.signature(function.wrapped).parameters if function else ()
        name = gin_types.name_of(function.wrapped) if function else match[1]
        return f"{name} has no parameter {match[2]}" + near(match[2], names)
    if match := re.match(
        r"Couldn't resolve selector ([\w.]+); <module '([\w.]+)'.* (\w+)\.$", text
    ):
        module = sys.modules[match[2]]
        names = getattr(module, "__all__", None) or [
            n for n, v in vars(module).items() if callable(v) and not n.startswith("_")
        ]
        return f"{match[2]} has no {match[3]}" + near(match[3], names)
    if match := re.match(r"No module named '([\w.]+)'", text):
        package, _, name = match[1].rpartition(".")
        folder = getattr(sys.modules.get(package), "__path__", None)
        known = [module.name for module in pkgutil.iter_modules(folder)] if folder else []
        return f"module {match[1]} not found" + near(name, known)
    if match := re.match(r"'(\w+)' was not provided by an import", text):
        if match[1] in t5x_names.MODULES:
            listed = "what docs/from_prompt_tuning.md lists"
            return t5x_names.replacement_message(setting or match[1], listed)
        known = re.findall(r"import (\w+)\n", IMPORTS.partition("\n")[2])
        hint = near(match[1], known, listed=False) or f"; {PUBLIC_NAMES}"
        return f"{match[1]} is not imported here{hint}"
    if match := re.match(r"No configurable matching (?:reference )?'@?([\w./]+)", text):
        known = [f"{c.module}.{c.name}" for _, c in _gin._REGISTRY.items()]
        return f"gin does not know {match[1]}" + near(match[1], known)
    if match := re.match(r"Unable to open file: (\S+)\. Searched", text):
        if here := t5x_names.advice(match[1]):
            return f"no gin file {match[1]}: it {t5x_names.replacement_message('', here).lstrip()}"
        looked = ", ".join(path or "the current folder" for path in dict.fromkeys(paths))
        known = own_files(epath.Path(paths[-1]))
        folder = os.path.dirname(match[1])
        beside = [file for file in known if folder and os.path.dirname(file) == folder]
        folders = dict.fromkeys(f"{os.path.dirname(file)}/*.gin" for file in known if "/" in file)
        there = beside or [*(file for file in known if "/" not in file), *folders]
        return f"no gin file {match[1]} (looked in {looked})" + (
            near(match[1], known, listed=False, compared=_stem) or f"; there are {listing(there)}"
        )
    return text
