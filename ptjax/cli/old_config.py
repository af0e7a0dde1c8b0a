"""Translates a config.gin that was written before gin files named ptjax's public API.

The prompt of such a run can still be used: backbone, task and evaluation settings are read from its
file. Everything else is dropped, since the run itself cannot be resumed.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from typing import Any

from gin import config_parser

import ptjax
from ptjax.cli import gin_types
from ptjax.data.catalogue import CATALOGUE

_MODULES = re.compile(r"^[ \t]*(?:from[ \t]+ptjax[\w.]*[ \t]+import\b|import[ \t]+ptjax\.)", re.M)
_MOVED = {
    ("tune", "evaluation"): "ptjax.RunSettings.evaluation",
    ("tune", "feature_lengths"): "ptjax.Batching.feature_lengths",
}
"""Arguments that infer, evaluate and export read -> the setting that replaces them."""


def line_of_module(text: str) -> int | None:
    """The number of the first line that imports a module of ptjax, as only old files do, or None.

    Newer files import ptjax itself.
    """
    match = _MODULES.search(text)
    return text.count("\n", 0, match.end()) + 1 if match else None


class _Reference:
    """`@scope/name()`, `@name` or `%MACRO`; its `repr` is the text in a gin file."""

    def __init__(self, mark: str, scope: str, name: str, call: str) -> None:
        self.mark, self.scope, self.name, self.call = mark, scope, name, call

    def __repr__(self) -> str:
        return f"{self.mark}{self.scope}{self.name}{self.call}"


class _Names(config_parser.ParserDelegate):
    """Parses references without resolving them."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Any:
        scope, slash, name = scoped_configurable_name.rpartition("/")
        return _Reference("@", scope + slash, name, "()" if evaluate else "")

    def macro(self, macro_name: str) -> Any:
        return _Reference("%", "", macro_name, "")


def translate(text: str) -> str:
    """Translates the text of an old config.gin: settings that still exist, under public names.

    `backbone.load_backbone.path` becomes `ptjax.load_backbone.path`: the last two parts decide.
    What is not ptjax's own stays unchanged, for `trust.check` to reject.

    Raises:
        SyntaxError, tokenize.TokenError: what gin raises for a file that it cannot read.
    """
    modules, macros, lines = set[str](), dict[str, str](), list[str]()
    others = ["from __gin__ import dynamic_registration", "import ptjax"]
    for statement in config_parser.ConfigParser(io.StringIO(text), _Names()):
        if isinstance(statement, config_parser.ImportStatement):
            if statement.module.split(".")[0] == "ptjax":
                modules.add(statement.bound_name())
            elif not statement.module.startswith("__gin__"):
                others.append(statement.format())
        elif isinstance(statement, config_parser.IncludeStatement):
            others.append(f"include {statement.filename!r}")
        elif isinstance(statement, config_parser.BindingStatement):
            used = [_public(reference, modules) for reference in _references(statement.value)]
            value = f" = {statement.value!r}"
            if not statement.arg_name or statement.selector in ("gin.macro", "macro"):
                macros[statement.selector if not statement.arg_name else statement.scope] = value
            elif all(used) and (setting := _public_setting(statement, modules)):
                lines.append(setting + value)
        else:
            raise SyntaxError(f"cannot read {statement.selector}")
    kept = _used_macros("\n".join(lines), macros)
    return "\n".join([*others, *(f"{name}{macros[name]}" for name in kept), *lines]) + "\n"


def _public_setting(statement: config_parser.BindingStatement, modules: set[str]) -> str | None:
    """ "scope/ptjax.NAME.argument" of a binding; None if the setting no longer exists."""
    head, _, _ = statement.selector.partition(".")
    scope = f"{statement.scope}/" if statement.scope else ""
    if head not in modules:
        return f"{scope}{statement.selector}.{statement.arg_name}"
    name = statement.selector.rpartition(".")[2]
    if moved := _MOVED.get((name, statement.arg_name)):
        return scope + moved
    function = getattr(ptjax, name) if name in ptjax.__all__ else None
    if function is None or statement.arg_name not in gin_types.argument_types(function):
        return None
    return f"{scope}ptjax.{name}.{statement.arg_name}"


def _public(reference: _Reference, modules: set[str]) -> bool:
    """Renames a reference to its public name; False if it has none."""
    if reference.mark == "%" or reference.name.split(".")[0] not in modules:
        return True
    name = reference.name.rpartition(".")[2]
    for public in (f"ptjax.{name}", f"ptjax.preprocessors.{name}"):
        if name in ptjax.__all__ or public in CATALOGUE:
            reference.name = public
            return True
    return False


def _references(value: object) -> Iterator[_Reference]:
    if isinstance(value, _Reference):
        yield value
    elif isinstance(value, dict):
        for item in value.items():
            yield from _references(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _references(item)


def _used_macros(text: str, macros: Mapping[str, str]) -> list[str]:
    """The macros that the settings use, directly or through other macros."""
    used: list[str] = []
    texts = [text]
    while texts:
        names = [name for name in re.findall(r"%(\w+)", texts.pop()) if name in macros]
        new = [name for name in dict.fromkeys(names) if name not in used]
        used += new
        texts += [macros[name] for name in new]
    return used
