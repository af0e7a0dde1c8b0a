"""Reading gin files: what they bind, and one line for whatever is wrong with them."""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.util  # noqa: F401  (gin uses it and leaves the import to others)
import inspect
import io
import os
import pprint
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from typing import IO, Any

import gin
import gin.config
from absl import logging
from etils import epath

import ptjax
from ptjax.cli import gin_types, old_config, t5x_names, trust
from ptjax.cli.gin_mistakes import IMPORTS, PUBLIC_NAMES, check_depth, explained, own_files
from ptjax.errors import InputError, near

# What gin has no public names for: its registry, its bindings, how it writes values.
_gin: Any = gin.config

TASK = "ptjax.Task"


def gin_configs() -> epath.Path:
    """ptjax's own gin files: inside an installed package, or at the top of a clone."""
    package = epath.Path(os.fspath(resources.files("ptjax")))  # type: ignore[arg-type]
    inside = package / "gin_configs"
    return inside if inside.exists() else package.parent / "gin_configs"


def load_gin(
    arguments: argparse.Namespace,
    macros: Mapping[str, Any] | None = None,
    *,
    defaults: Mapping[str, Any] | None = None,
    of_run: str | None = None,
    trusted: bool = False,
) -> None:
    """Reads the gin files and bindings, and checks every macro.

    Args:
        macros: set last, where the files use them.
        defaults: of macros that this command can do without, such as MODEL_DIR where nothing is
            written; for those that the files use and nothing sets.
        of_run: the one of the files that is the config.gin of a MODEL_DIR, which an older ptjax
            may have written.
        trusted: it may name more than ptjax's settings.

    Raises:
        InputError: one line with file, line and the nearest valid name; or what `of_run` may
            not name.
    """
    gin.clear_config()
    paths = ["", *filter(None, arguments.gin_search_paths.split(",")), os.fspath(gin_configs())]
    for path in paths:
        gin.add_config_file_search_path(path)
    # Without gin's own reader of Python packages: a folder `runs` here, which every run may make,
    # is a package to it, and it fails on `include 'runs/prompt_tune.gin'`.
    read = functools.partial(_open, of_run=of_run)
    _gin._FILE_READERS = [(read, os.path.isfile), (read, _is_remote)]
    files = []
    for file in arguments.gin_file:
        with explained(paths, file):
            if file == of_run and not trusted:
                with read(file) as stream:
                    trust.check(stream, file)
            with _mixed_tasks_said(file):
                files = _flat(gin.parse_config_file(file), paths) + files  # later ones win
    imports = [line for line in arguments.gin_bindings if re.match(r"(import|from)\s", line)]
    for line in arguments.gin_bindings:
        with explained(paths, f"command line, {line}", line):
            _bind(line, IMPORTS + "\n".join(x for x in imports if "__gin__" not in x))
    _apply_t5x_flags(arguments)
    used, known = _macros()
    for name in sorted((known - set(used)) & set(t5x_names.ACCEPTED)):
        if macro(name) in t5x_names.ACCEPTED[name]:
            del _gin._CONFIG[name, "gin.macro"]
            known.remove(name)
    for name in set(macros or ()) & set(used):
        gin.bind_parameter((name, "gin.macro", "value"), (macros or {})[name])
        known.add(name)
    given = {line.partition("=")[0].strip() for line in arguments.gin_bindings}
    _check_macros(used, known, files, given, optional=list(defaults or ()))
    try:
        gin_types.check_finite(files, arguments.gin_bindings)
        gin_types.check_types(files, arguments.gin_bindings, optional=list(defaults or ()))
    except RecursionError:
        raise InputError("a macro stands for itself (A = %B and B = %A); give it a value") from None
    for name in (set(defaults or ()) & set(used)) - known:
        gin.bind_parameter((name, "gin.macro", "value"), (defaults or {})[name])


@contextlib.contextmanager
def _mixed_tasks_said(file: str) -> Iterator[None]:
    """Warns where `file` declares a task and keeps settings of an earlier file's other task."""
    keys = [key for key in _gin._CONFIG if _full_name(key[1]) == TASK]
    before = {key: _gin._CONFIG.pop(key) for key in keys}
    try:
        yield
    finally:
        now = {key: dict(_gin._CONFIG.get(key, {})) for key in before}
        for key, bindings in before.items():
            _gin._CONFIG[key] = bindings | now[key]
    for key, bindings in before.items():
        old, new = bindings.get("name"), now[key].get("name")
        left = [name for name in bindings if name not in now[key]]
        if left and None not in (old, new) and old != new and "inputs" in now[key]:
            logging.warning(
                "%s declares the task %s, but an earlier gin file the task %s, whose %s it keeps; "
                "name one task's file, or bind these anew",
                file,
                new,
                old,
                ", ".join(f"Task.{name}" for name in left),
            )


def _open(path: str, of_run: str | None = None) -> IO[str]:
    """A gin file's text; every one of them, included ones too, comes through here.

    Args:
        of_run: the file that an older ptjax may have written.
    """
    try:
        text = epath.Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: a gin file is UTF-8 text, this is not ({error.reason})"
        ) from None
    check_depth(text, path)
    t5x_names.check_gin_file(text, path)
    if (line := old_config.line_of_module(text)) is not None:
        if path != of_run:
            raise InputError(f"{path}:{line}: {PUBLIC_NAMES}")
        text = old_config.translate(text)
    stream = io.StringIO(text)
    stream.name = path  # type: ignore[attr-defined]  # gin's parser takes it for its messages
    return stream


def _apply_t5x_flags(arguments: argparse.Namespace) -> None:
    """--tfds_data_dir, which overrides the folder of every task that reads TFDS, as in T5X."""
    folder = getattr(arguments, "tfds_data_dir", None)
    if folder is None:
        return
    places = []
    for (scope, selector), bindings in _gin._CONFIG.items():
        splits = bindings.get("splits") if _full_name(selector) == TASK else None
        splits = gin_types.macro_value(splits) if gin_types.is_macro(splits) else splits
        if isinstance(splits, dict) and any(str(s).startswith("tfds:") for s in splits.values()):
            places.append((scope, selector, "data_dir"))
    if not places:
        raise InputError(
            f"--tfds_data_dir={folder}: no task here reads TFDS; where its files are is "
            "--gin.DATA_DIR=\"'DIR'\""
        )
    for place in places:
        gin.bind_parameter(place, folder)


def _is_remote(path: str) -> bool:
    # The search paths are put in front of everything: "folder/gs://..." is no remote file.
    return re.match(r"\w+://", path) is not None and epath.Path(path).exists()


def _bind(line: str, imports: str) -> None:
    """One binding of the command line; it may name what no gin file has named so far."""
    check_depth(line, f"command line, {line.partition('=')[0].strip()}")
    try:
        gin.parse_config(line)
    except ValueError as error:
        if not str(error).startswith("No configurable matching"):
            raise
        if (name := re.match(r"(?:[\w/]+/)?(\w+)\.", line)) and name[1] in ptjax.__all__:
            line = f"{line[: name.start(1)]}ptjax.{line[name.start(1) :]}"
        gin.parse_config(f"{imports}\n{line}")


def _flat(parsed: Any, paths: Sequence[str]) -> list[epath.Path]:
    """A gin file and all that it includes."""
    candidates = [epath.Path(os.path.join(path, parsed.filename)) for path in paths]
    files = [path for path in candidates if path.exists()][:1]
    return files + [file for inner in parsed.includes for file in _flat(inner, paths)]


def _macros() -> tuple[dict[str, str], set[str]]:
    """(macro that is used -> an argument that uses it, macros that are bound)."""
    config = _gin._CONFIG
    used = {
        reference.scoped_selector.rsplit("/", 1)[0]: f"{selector.rsplit('.', 1)[-1]}.{argument}"
        for (_, selector), bindings in config.items()
        for argument, value in bindings.items()
        for reference in _gin.iterate_references(value)
        if gin_types.is_macro(reference)
    }
    return used, {scope for scope, selector in config if selector == "gin.macro"}


def _check_macros(
    used: Mapping[str, str],
    bound: set[str],
    files: Sequence[epath.Path],
    given: set[str],
    optional: Sequence[str],
) -> None:
    """A macro that is bound but never used, or used but never bound, is a mistake.

    A file may use a macro for an argument that another file binds anew; on the command line
    (`given`) that would be lost without a word.
    """

    def use(name: str) -> str:
        return gin_types.line_of(rf"^[^#]*%{re.escape(name)}\b", files)

    for name in sorted(bound - set(used) - set(optional)):
        if name in given or not use(name):
            raise InputError(
                ("" if name in given else gin_types.line_of(rf"^\s*{re.escape(name)}\s*=", files))
                + (_of_t5x(name) or _unused(name, used))
            )
        del _gin._CONFIG[name, "gin.macro"]  # config.gin has no file that says %NAME
    if missing := sorted(set(used) - bound - set(optional)):
        name = missing[0]
        raise InputError(
            use(name)
            + f"the macro {name} ({used[name]}) has no value; set it with {gin_types.flag_of(name)}"
        )


def _unused(name: str, used: Iterable[str]) -> str:
    return f"the macro {name} is set but nothing uses it" + (near(name, used) or "; remove it")


def _of_t5x(name: str) -> str:
    """What to say of a macro that only T5X has."""
    here = t5x_names.advice(name)
    if here is None:
        return ""
    value = macro(name)
    file = t5x_names.task_file(value, own_files(gin_configs())) if isinstance(value, str) else None
    hint = f", of this task --gin_file={file}" if name == "MIXTURE_OR_TASK_NAME" and file else ""
    if name in t5x_names.ACCEPTED:
        hint = f" ({name} = {t5x_names.ACCEPTED[name][0]!r} is accepted, {value!r} is not)"
    return t5x_names.told(f"the macro {name}", here) + hint


def bound(function: Callable[..., Any], *, given: Sequence[str] = ()) -> Callable[..., Any]:
    """`function` with the arguments that gin binds.

    Args:
        given: arguments that the caller brings.

    Raises:
        InputError: an argument without a default is not bound, here or in anything bound to it.
    """
    selector = _selector(function)
    _check_required(function, [], given)
    return function if selector is None else gin.get_configurable(function)


def _selector(function: Callable[..., Any]) -> str | None:
    found = _gin._inverse_lookup(function)
    return found.selector if found else None


def _check_required(
    function: Callable[..., Any], scopes: list[str], given: Sequence[str] = ()
) -> None:
    selector = _selector(function)
    bindings: dict[str, Any] = {}
    if selector is not None:
        scoped = "/".join([*scopes, selector])
        bindings = gin.get_bindings(scoped, resolve_references=False)
    for name, parameter in inspect.signature(function).parameters.items():
        variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if (
            parameter.default is parameter.empty
            and not variadic
            and name not in (*bindings, *given)
        ):
            prefix = "".join(f"{scope}/" for scope in scopes)
            unbound = scopes and not any(
                scopes[-1] in scope.split("/") for scope, _ in _gin._CONFIG
            )
            bound = sorted({scope for scope, key in _gin._CONFIG if scope and key == selector})
            raise InputError(
                f"{prefix}{gin_types.name_of(function)} needs `{name}`, which nothing sets; "
                + (
                    f"no gin file has the scope {scopes[-1]}" + near(scopes[-1], bound)
                    if unbound
                    else "add a --gin_file that does (see --help)"
                )
            )
    for reference in _references(bindings):
        if reference.evaluate:
            *own, _ = reference.scoped_selector.split("/")
            _check_required(reference.configurable.wrapped, own or scopes)


def _references(value: Any) -> Iterator[Any]:
    """All references in a value; a macro stands for those in its own."""
    for reference in _gin.iterate_references(value):
        if gin_types.is_macro(reference):
            yield from _references(gin_types.macro_value(reference))
        else:
            yield reference


def configured(selector: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose full name is `selector`, with what gin binds to it, if anything."""
    known = _gin._REGISTRY.get_match(selector) is not None
    return gin.get_configurable(selector) if known else function


def settings(function: str | Callable[..., Any], *names: str) -> dict[str, Any]:
    """Values of the arguments `names` of a function, as far as gin binds them.

    Args:
        function: or its full name, where it need not be imported.
    """
    selector = function if isinstance(function, str) else _selector(function)
    if selector is None or _gin._REGISTRY.get_match(selector) is None:
        return {}
    bindings = gin.get_bindings(selector, resolve_references=False)
    chosen = {name: bindings[name] for name in names if name in bindings}
    for reference in _references(chosen):
        if reference.evaluate:
            *scopes, _ = reference.scoped_selector.split("/")
            _check_required(reference.configurable.wrapped, scopes)
    return copy.deepcopy(chosen)  # which is how gin evaluates references


def _full_name(selector: str) -> str:
    """Of what a selector stands for, under whatever name a gin file imports it."""
    return gin_types.name_of(_gin._REGISTRY.get_match(selector).wrapped)


def declared(selector: str, *, unless_of: str) -> dict[str, Any]:
    """ "@scope/ptjax.Task()" -> what it makes, of a class that the gin files bind, in every scope.

    Args:
        selector: the public name of the class, which need not be imported.
        unless_of: leaves out what this class refers to.

    Raises:
        InputError: the only one lacks a setting. Of several, an incomplete one is their basis.
    """
    names = [name for _, name in _gin._CONFIG if _full_name(name) == selector]
    scopes = [scope for scope, name in _gin._CONFIG if name in names]
    for (_, holder), bindings in _gin._CONFIG.items():
        for reference in _references(bindings) if holder == unless_of else ():
            *inner, _ = reference.scoped_selector.split("/")
            if reference.configurable.selector in names and "/".join(inner) in scopes:
                scopes.remove("/".join(inner))
    made = {}
    for scope in scopes:
        try:
            _check_required(_gin._REGISTRY.get_match(names[0]).wrapped, [scope] if scope else [])
        except InputError:
            if scopes == [scope]:
                raise
            continue
        with gin.config_scope(scope or None):
            made[f"@{scope}{'/' if scope else ''}{selector}()"] = gin.get_configurable(names[0])()
    return made


def macro(name: str) -> Any:
    """The value of a macro, or None."""
    try:
        return copy.deepcopy(gin.query_parameter(f"%{name}"))
    except ValueError:
        return None


def has_macro(name: str) -> bool:
    """Whether the files or flags set the macro, to whatever value."""
    return name in _macros()[1]


def config_text() -> str:
    """All settings as a gin file that needs no other; dicts keep their order.

    gin sorts the keys of dicts, but the order of a verbalizer is the order of the labels.
    """
    ordered = functools.partial(pprint.pformat, sort_dicts=False)
    _gin.pprint = types.SimpleNamespace(pformat=ordered)
    try:
        return gin.config_str()
    finally:
        _gin.pprint = pprint
