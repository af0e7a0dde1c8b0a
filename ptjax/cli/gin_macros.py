"""Macros of gin files (NAME = value, used as %NAME): their values, and mistakes with them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import gin
import gin.config
from etils import epath

from ptjax.cli import gin_types, t5x_names
from ptjax.cli.gin_mistakes import own_files
from ptjax.errors import InputError, near
from ptjax.files import gin_configs

_gin: Any = gin.config


def used_and_set() -> tuple[dict[str, str], set[str]]:
    """Lists the macros in gin's current config.

    Returns:
        (used, bound): `used` maps the name of each macro that is used to an argument that uses it,
        such as "RunSettings.seed"; `bound` contains the names of the macros that are set.
    """
    config = _gin._CONFIG
    used = {
        reference.scoped_selector.rsplit("/", 1)[0]: f"{selector.rsplit('.', 1)[-1]}.{argument}"
        for (_, selector), bindings in config.items()
        for argument, value in bindings.items()
        for reference in _gin.iterate_references(value)
        if gin_types.is_macro(reference)
    }
    return used, {scope for scope, selector in config if selector == "gin.macro"}


def check_macros(
    used: Mapping[str, str],
    bound: set[str],
    files: Sequence[epath.Path],
    given: set[str],
    optional: Sequence[str],
) -> None:
    """Raises InputError for a macro that is set but never used, or used but never set.

    If a gin file binds an argument to a macro and a later file overrides that binding, the macro
    may be set but unused; it is then removed from gin's config. A macro that is set on the command
    line (`given`) must always be used, or the setting would be lost silently.

    Args:
        used, bound: the two results of `used_and_set`.
        files: the gin files, by descending precedence.
        given: the names of the macros that are set on the command line.
        optional: the names of macros that are exempt from both checks.
    """

    def use(name: str) -> str:
        return gin_types.line_of(rf"^[^#]*%{re.escape(name)}\b", files)

    for name in sorted(bound - set(used) - set(optional)):
        if name in given or not use(name):
            raise InputError(
                ("" if name in given else gin_types.line_of(rf"^\s*{re.escape(name)}\s*=", files))
                + (_of_t5x(name) or _unused(name, used))
            )
        del _gin._CONFIG[name, "gin.macro"]  # no line of config.gin would use it
    if missing := sorted(set(used) - bound - set(optional)):
        name = missing[0]
        raise InputError(
            use(name)
            + f"the macro {name} ({used[name]}) has no value; set it with {gin_types.flag_of(name)}"
        )


def _unused(name: str, used: Iterable[str]) -> str:
    return f"the macro {name} is set but nothing uses it" + (near(name, used) or "; remove it")


def _of_t5x(name: str) -> str:
    """The message for a macro that only T5X has; "" for any other."""
    here = t5x_names.advice(name)
    if here is None:
        return ""
    value = macro(name)
    file = t5x_names.task_file(value, own_files(gin_configs())) if isinstance(value, str) else None
    hint = f", of this task --gin_file={file}" if name == "MIXTURE_OR_TASK_NAME" and file else ""
    if name in t5x_names.ACCEPTED:
        hint = f" ({name} = {t5x_names.ACCEPTED[name][0]!r} is accepted, {value!r} is not)"
    return t5x_names.replacement_message(f"the macro {name}", here) + hint


def macro(name: str) -> Any:
    """The value of a macro in gin's current config; None if it is not set."""
    try:
        return copy.deepcopy(gin.query_parameter(f"%{name}"))
    except ValueError:
        return None


def has_macro(name: str) -> bool:
    """Whether a gin file or flag sets the macro, to any value (None too)."""
    return name in used_and_set()[1]
