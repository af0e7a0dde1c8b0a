"""Checks the values that gin binds against the types in the signatures."""

from __future__ import annotations

import collections.abc
import inspect
import math
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import gin.config
from etils import epath

import ptjax
from ptjax.data import catalogue
from ptjax.errors import InputError, gin_flag, is_empty

_gin: Any = gin.config

UNBOUND = object()
"""What `macro_value` returns for a macro that is not set, which some commands allow."""

_WORDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
    types.NoneType: "None",
}


def argument_types(function: Callable[..., object]) -> dict[str, object]:
    """The types of a function's arguments or a dataclass's fields, by name.

    Returns {} if its annotations cannot be resolved. "return" may be among the names.
    """
    try:
        kinds = get_type_hints(function)
        # `**fields: Annotated[Any, C]` means the fields of the class C.
        for kind in get_type_hints(function, include_extras=True).values():
            if get_origin(kind) is Annotated and isinstance(kind.__metadata__[0], type):
                kinds = get_type_hints(kind.__metadata__[0]) | kinds
        return kinds
    except (NameError, TypeError):  # imported for type checkers only, or not a function of Python
        return {}


def name_of(function: Callable[..., Any]) -> str:
    """The name of a function or class in gin files: "ptjax.Task" if public, else "module.name"."""
    name = getattr(function, "__name__", "")
    if name in ptjax.__all__ and getattr(ptjax, name) is function:
        return f"ptjax.{name}"
    ours = catalogue.name_of(function)
    return ours if ours in catalogue.CATALOGUE else f"{_module(function)}.{name}"


def _module(function: object) -> str:
    return function.__module__.rsplit(".", 1)[-1]


def fits(value: Any, kind: Any) -> bool:
    """Whether a value that gin binds has an annotated type.

    A macro is replaced by its value. `@f()` counts as fitting unless f is a class of another type.

    Args:
        kind: the annotation, resolved (see `argument_types`).
    """
    origin, inner = get_origin(kind), get_args(kind)
    if isinstance(value, _gin.ConfigurableReference):
        return _reference_fits(value, kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, member) for member in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple and inner[-1] is not ...:
        same = isinstance(value, (list, tuple)) and len(value) == len(inner)
        return same and all(map(fits, value, inner))
    if origin in (tuple, collections.abc.Sequence):  # gin files may use lists for tuples
        return isinstance(value, (list, tuple)) and all(fits(item, inner[0]) for item in value)
    if origin is collections.abc.Mapping:
        return isinstance(value, dict) and all(
            fits(key, inner[0]) and fits(item, inner[1]) for key, item in value.items()
        )
    if _is_function(kind):
        return callable(value)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    class_ = origin or kind
    return kind is Any or not inspect.isclass(class_) or isinstance(value, class_)


def _reference_fits(reference: Any, kind: Any) -> bool:
    """`fits` for a macro (its value), `@f()` (what f returns) or `@f` (f itself)."""
    if is_macro(reference):
        value = macro_value(reference)
        return value is UNBOUND or fits(value, kind)
    target = reference.configurable.wrapped
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if Any in kinds or (reference.evaluate and not inspect.isclass(target)):
        return True  # what a function returns is only known once it is called
    if reference.evaluate:
        return any(_is_function(k) or (inspect.isclass(k) and issubclass(target, k)) for k in kinds)
    # For a class where its object is expected, the brackets are missing.
    return any(_is_function(k) and not inspect.isclass(target) for k in kinds)


def is_path(kind: object) -> bool:
    """Whether a type is a path's, which means a union that contains `os.PathLike`."""
    return any(get_origin(member) is os.PathLike for member in get_args(kind))


def _is_function(kind: object) -> bool:
    """Whether functions have this type: a `Callable`, or a protocol, which they may implement."""
    return get_origin(kind) is collections.abc.Callable or getattr(kind, "_is_protocol", False)


def is_macro(value: Any) -> bool:
    """Whether a bound value is a macro, `%NAME`."""
    return isinstance(value, _gin.ConfigurableReference) and value.selector in (
        "gin.macro",
        "macro",
    )


def macro_value(reference: Any) -> Any:
    """The value that is set for the macro `reference`; it may be another macro.

    `UNBOUND` if nothing sets it.
    """
    scope = reference.scoped_selector.rsplit("/", 1)[0]
    return _gin._CONFIG.get((scope, "gin.macro"), {}).get("value", UNBOUND)


def numbers(value: object) -> Iterator[float]:
    """Yields the floats in a bound value, including the parts of complex numbers.

    It recurses into dicts (keys and values), lists, tuples and sets.
    """
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, complex):
        yield from (value.real, value.imag)
    elif isinstance(value, float):
        yield value


def describe(kind: Any) -> str:
    """Describes a type in a message's words: "a whole number or None" for `int | None`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(describe, inner)))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if origin is collections.abc.Mapping:
        return f"a dict {{{describe(inner[0])}: {describe(inner[1])}}}"
    if origin is tuple and inner[-1] is not ...:
        return f"({', '.join(map(describe, inner))})"
    if origin in (tuple, collections.abc.Sequence):
        return f"a list [{describe(inner[0])}, ...]"
    if origin is os.PathLike:
        return _WORDS[str]
    if origin is collections.abc.Callable:
        return "a function such as @module.name"
    if kind in _WORDS:
        return _WORDS[kind]
    if kind is Any:
        return "anything"
    if _is_function(kind):
        ours = kind.__module__.startswith("ptjax.")
        return f"a reference such as @{'ptjax' if ours else _module(kind)}.NAME()"
    return f"a reference such as @{name_of(kind)}()"


def names_path(macro: str) -> bool:
    """Whether a macro's value is a path, judging by its name: ..._DIR or ..._PATH."""
    return macro.endswith(("_DIR", "_PATH"))


def flag_of(macro: str) -> str:
    """Returns the flag that sets a macro, with a placeholder: "--gin.TRAIN_STEPS=VALUE"."""
    return gin_flag(macro, "PATH") if names_path(macro) else f"--gin.{macro}=VALUE"


def line_of(pattern: str, files: Sequence[epath.Path]) -> str:
    """Returns "file:line: " of the last match in the first file that has one; "" without any.

    Args:
        pattern: a regular expression, searched in each line.
        files: gin files, the one with the highest precedence first.
    """
    for file in files:
        lines = file.read_text().splitlines()
        if matches := [n for n, line in enumerate(lines, 1) if re.search(pattern, line)]:
            return f"{file}:{matches[-1]}: "
    return ""


def check_finite(files: Sequence[epath.Path], command_line: Sequence[str]) -> None:
    """Raises InputError if gin binds inf or nan, which it reads (as 1e999) but cannot write.

    Args:
        files: the gin files, the one with the highest precedence first.
        command_line: the bindings on the command line; only for the place in the message, as
            `files` are.
    """
    for (scope, selector), bindings in _gin._CONFIG.items():
        module, _, function = selector.rpartition(".")
        for argument, value in bindings.items():
            bad = next((x for x in numbers(value) if not math.isfinite(x)), None)
            if bad is None:
                continue
            if selector == "gin.macro":
                name, pattern = scope, rf"^\s*{re.escape(scope)}\s*="
            else:
                scoped = f"{scope}/" if scope else ""
                name = f"{scoped}{module.rsplit('.', 1)[-1]}.{function}.{argument}"
                pattern = rf"^\s*{re.escape(scoped)}(\w+\.)*{function}\.{argument}\s*="
            typed = any(re.search(pattern, line) for line in command_line)
            raise InputError(
                ("command line: " if typed else line_of(pattern, files))
                + f"{name} = {value!r}: {bad!r} is not a finite number; give one"
            )


def check_types(
    files: Sequence[epath.Path], command_line: Sequence[str], optional: Sequence[str]
) -> None:
    """Raises InputError for a value that does not have its argument's type, or an empty path.

    Args:
        files, command_line: as for `check_finite`.
        optional: macros whose path may be empty.
    """
    for (scope, selector), bindings in list(_gin._CONFIG.items()):
        function = _gin._REGISTRY.get_match(selector).wrapped
        kinds = argument_types(function)
        scoped = f"{scope}/" if scope else ""
        function_name = scoped + name_of(function)
        for argument, value in bindings.items():
            kind = kinds.get(argument, Any)
            fitting = fits(value, kind)
            name = full_name = f"{function_name}.{argument}"
            pattern = rf"^\s*{re.escape(scoped)}(\w+\.)*{function.__name__}\.{argument}\s*="
            while is_macro(value):
                name = value.scoped_selector.rsplit("/", 1)[0]
                pattern = rf"^\s*{re.escape(name)}\s*="
                value = macro_value(value)
            needed = is_path(kind) or (names_path(name) and name not in optional)
            if fitting and not (needed and is_empty(value)):
                continue
            typed = any(re.search(pattern, line) for line in command_line)
            raise InputError(
                ("command line: " if typed else line_of(pattern, files))
                + (
                    f"{name} is empty; set {gin_flag(name, 'PATH')} ('.' is the current folder)"
                    if fitting
                    else f"{name} = {value!r}: {full_name if name != full_name else 'it'} takes "
                    + describe(kind)
                )
            )
