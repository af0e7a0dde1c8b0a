"""Reads gin files, and returns what they bind; every mistake in them is reported in one line."""

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
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import gin
import gin.config
from absl import logging
from etils import epath

import ptjax
from ptjax import gin_text
from ptjax.cli import gin_types, old_config, t5x_names, trust
from ptjax.cli.gin_includes import ReadFiles, is_remote
from ptjax.cli.gin_macros import check_macros, macro, used_and_set
from ptjax.cli.gin_mistakes import IMPORTS, PUBLIC_NAMES, check_depth, explained
from ptjax.errors import InputError, near
from ptjax.files import JsonObject, Metadata, gin_configs

# gin's registry, its bindings and its printer have no public names.
_gin: Any = gin.config

_left_out: dict[str, str] = {}
"""Settings that the gin files leave out, as a file of a run from Python may -> why, in words."""

TASK = "ptjax.Task"
"""The public name of the class of tasks, for `declared`."""


def load_gin(
    arguments: argparse.Namespace,
    macros: Metadata | None = None,
    *,
    defaults: Metadata | None = None,
    of_run: str | None = None,
    trusted: bool = False,
) -> None:
    """Reads the gin files and bindings into gin's config, and checks macros and types of values.

    It replaces what gin's config contained before. A file is included once: runs/sweep.gin, behind
    runs/lora.gin, does not bring back the defaults of runs/prompt_tune.gin, which both include.

    Args:
        arguments: the parsed flags, from `parse`.
        macros: maps names of macros to values, which override those of files and flags. Macros that
            the files do not use are ignored.
        defaults: maps names of macros that this command does not need, such as MODEL_DIR if it
            writes nothing, to values. A value is used if the files use the macro and nothing sets
            it.
        of_run: the path in `arguments.gin_file` that is the config.gin of a MODEL_DIR, if there is
            one. That file may be malicious, and an older ptjax may have written it.
        trusted: whether `of_run` may name anything; otherwise only ptjax's own settings.

    Raises:
        InputError: a file or binding contains a mistake; the message has its place and, for a
            misspelt name, the nearest valid one.
    """
    gin.clear_config()
    _left_out.clear()
    paths = ["", *filter(None, arguments.gin_search_paths.split(",")), os.fspath(gin_configs())]
    for path in paths:
        gin.add_config_file_search_path(path)
    files: list[epath.Path] = []
    with _reading_once(of_run) as read_files:
        for file in arguments.gin_file:
            with explained(paths, file):
                if file == of_run and not trusted:
                    with _open(file, of_run) as stream:
                        trust.check(stream, file)
                # Named by the user, it is read once more, and overrides.
                for path in paths:
                    read_files.remove(os.path.join(path, file))
                with _warning_of_mixed_tasks(file):
                    named, *inner = _flat(gin.parse_config_file(file), paths)
                    # Later ones override; an included file that was read before was left out.
                    files = [named, *(path for path in inner if path not in files), *files]
    imports = [line for line in arguments.gin_bindings if re.match(r"(import|from)\s", line)]
    for line in arguments.gin_bindings:
        with explained(paths, f"command line, {line}", line):
            _bind(line, IMPORTS + "\n".join(x for x in imports if "__gin__" not in x))
    _apply_t5x_flags(arguments)
    used, known = used_and_set()
    for name in sorted((known - set(used)) & set(t5x_names.ACCEPTED)):
        if macro(name) in t5x_names.ACCEPTED[name]:
            del _gin._CONFIG[name, "gin.macro"]
            known.remove(name)
    for name in set(macros or ()) & set(used):
        gin.bind_parameter((name, "gin.macro", "value"), (macros or {})[name])
        known.add(name)
    given = {line.partition("=")[0].strip() for line in arguments.gin_bindings}
    check_macros(used, known, files, given, optional=list(defaults or ()))
    try:
        gin_types.check_finite(files, arguments.gin_bindings)
        gin_types.check_types(files, arguments.gin_bindings, optional=list(defaults or ()))
    except RecursionError:
        raise InputError("a macro refers to itself (A = %B and B = %A); give it a value") from None
    for name in (set(defaults or ()) & set(used)) - known:
        gin.bind_parameter((name, "gin.macro", "value"), (defaults or {})[name])


@contextlib.contextmanager
def _warning_of_mixed_tasks(file: str) -> Iterator[None]:
    """Warns if `file` declares a task, but keeps settings of another task in an earlier file."""
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
                "%s declares the task %s, but an earlier gin file declares the task %s, whose %s "
                "it keeps; name one task's file, or set these too",
                file,
                new,
                old,
                ", ".join(f"Task.{name}" for name in left),
            )


@contextlib.contextmanager
def _reading_once(of_run: str | None) -> Iterator[ReadFiles]:
    """Replaces gin's readers, one of which reads from Python packages; of one file once, inside.

    It takes a local folder `runs`, which any run may create, for a package and fails on
    `include 'runs/x.gin'`.
    """
    read_files = ReadFiles()
    try:
        _use_reader(functools.partial(_open, of_run=of_run, read_files=read_files))
        yield read_files
    finally:
        _use_reader(functools.partial(_open, of_run=of_run))


def _use_reader(read: Callable[[str], IO[str]]) -> None:
    _gin._FILE_READERS = [(read, os.path.isfile), (read, _is_remote)]


def _open(path: str, of_run: str | None = None, read_files: ReadFiles | None = None) -> IO[str]:
    """Opens and checks a gin file; gin calls it for included files too.

    Args:
        of_run: the file that an older ptjax may have written.
        read_files: those that were read before, which are empty now; this one is added.
    """
    if read_files is not None and path in read_files:
        return io.StringIO()
    try:
        text = epath.Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: a gin file must be UTF-8 text ({error.reason})") from None
    check_depth(text, path)
    t5x_names.check_gin_file(text, path)
    if (line := old_config.line_of_module(text)) is not None:
        if path != of_run:
            raise InputError(f"{path}:{line}: {PUBLIC_NAMES}")
        text = old_config.translate(text)
    for name, what in gin_text.left_out(text).items():
        _left_out[name] = (
            f"{path}: the run was started from Python, and {name} was {what}, which no gin file "
            "can say"
        )
    stream = io.StringIO(text)
    stream.name = path  # type: ignore[attr-defined]  # gin's parser uses it in its messages
    if read_files is not None:
        read_files.add(path, stream)
    return stream


def _apply_t5x_flags(arguments: argparse.Namespace) -> None:
    """--tfds_data_dir: overrides the folder of all tasks that read TFDS, as in T5X."""
    folder = getattr(arguments, "tfds_data_dir", None)
    if folder is None:
        return
    settings = []
    for (scope, selector), bindings in _gin._CONFIG.items():
        splits = bindings.get("splits") if _full_name(selector) == TASK else None
        splits = gin_types.macro_value(splits) if gin_types.is_macro(splits) else splits
        if isinstance(splits, dict) and any(str(s).startswith("tfds:") for s in splits.values()):
            settings.append((scope, selector, "data_dir"))
    if not settings:
        raise InputError(
            f"--tfds_data_dir={folder}: no task here reads TFDS; set the folder of its files with "
            "--gin.DATA_DIR=\"'DIR'\""
        )
    for setting in settings:
        gin.bind_parameter(setting, folder)


def _is_remote(path: str) -> bool:
    # gin prepends the search paths to any name: "folder/gs://..." is not a remote file.
    return is_remote(path) and epath.Path(path).exists()


def _bind(line: str, imports: str) -> None:
    """Applies a binding of the command line, which may name things that no gin file imports."""
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
    """A gin file and all files that it includes."""
    candidates = [epath.Path(os.path.join(path, parsed.filename)) for path in paths]
    files = [path for path in candidates if path.exists()][:1]
    return files + [file for inner in parsed.includes for file in _flat(inner, paths)]


def bound(function: Callable[..., Any], *, given: Sequence[str] = ()) -> Callable[..., Any]:
    """Returns `function` with the arguments that gin binds to it; the caller passes the others.

    Args:
        given: the names of the arguments that the caller will pass.

    Raises:
        InputError: an argument without a default is neither bound nor in `given`; checked for
            `function`, and for the functions that gin calls for its arguments (`@f()`). Or a gin
            file says that it leaves out a setting.
    """
    selector = _selector(function)
    for name in _left_out:
        if name.startswith("ptjax.") and (reason := left_out(name)):
            raise InputError(f"{reason}; call ptjax.tune there, or set it in another gin file")
    _check_required(function, [], given)
    return function if selector is None else gin.get_configurable(function)


def left_out(name: str) -> str | None:
    """Why the gin files do not set `name`, such as "ptjax.tune.task"; None if they do.

    A file of a run from Python says what it leaves out; another file or a flag may set it.
    """
    selector, _, argument = name.rpartition(".")
    is_set = any(
        _full_name(key) == selector and argument in bindings
        for (_, key), bindings in _gin._CONFIG.items()
    )
    return None if is_set else _left_out.get(name)


def _selector(function: Callable[..., object]) -> str | None:
    configurable = _gin._inverse_lookup(function)
    return configurable.selector if configurable else None


def _check_required(
    function: Callable[..., object], scopes: list[str], given: Sequence[str] = ()
) -> None:
    selector = _selector(function)
    bindings: JsonObject = {}
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
            *inner, _ = reference.scoped_selector.split("/")
            _check_required(reference.configurable.wrapped, inner or scopes)


def _references(value: object) -> Iterator[Any]:
    """All references in a value, with macros replaced by those in their values."""
    for reference in _gin.iterate_references(value):
        if gin_types.is_macro(reference):
            yield from _references(gin_types.macro_value(reference))
        else:
            yield reference


def configured(selector: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` with the arguments that gin binds to it, or unchanged without bindings.

    Args:
        selector: the function's public name, such as "ptjax.load_backbone".
    """
    registered = _gin._REGISTRY.get_match(selector) is not None
    return gin.get_configurable(selector) if registered else function


def settings(function: str | Callable[..., object], *names: str) -> JsonObject:
    """Returns the values that gin binds to some arguments of a function.

    References (`@f()`) are evaluated. Arguments that are not bound are left out.

    Args:
        function: the function, or its public name ("ptjax.tune"), which needs no import.
        names: the names of the arguments.

    Raises:
        InputError: a reference lacks a required argument.
    """
    selector = function if isinstance(function, str) else _selector(function)
    if selector is None or _gin._REGISTRY.get_match(selector) is None:
        return {}
    bindings = gin.get_bindings(selector, resolve_references=False)
    values = {name: bindings[name] for name in names if name in bindings}
    for reference in _references(values):
        if reference.evaluate:
            *scopes, _ = reference.scoped_selector.split("/")
            _check_required(reference.configurable.wrapped, scopes)
    return copy.deepcopy(values)  # gin evaluates references when they are copied


def _full_name(selector: str) -> str:
    """The public name of a selector, under whatever name a gin file imports it."""
    return gin_types.name_of(_gin._REGISTRY.get_match(selector).wrapped)


def declared(selector: str, *, unless_of: str) -> JsonObject:
    """Makes an object of a class for each gin scope in which the gin files bind its arguments.

    `a/ptjax.Task.name = "x"` declares a task in the scope `a`. If there are several scopes, one
    that lacks a required argument is skipped: it holds the settings that the others share.

    Args:
        selector: the public name of the class, such as "ptjax.Task".
        unless_of: the public name of another class, such as "ptjax.TaskComponent". Objects that
            are arguments of that class are left out.

    Returns:
        maps each object's reference, such as "@scope/ptjax.Task()", to the object.

    Raises:
        InputError: there is only one scope, and it lacks a required argument.
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


def config_text() -> str:
    """Returns gin's current config as the text of one self-contained gin file.

    Dicts keep their order, which gin would sort: the order of a verbalizer is that of the labels.
    """
    ordered = functools.partial(pprint.pformat, sort_dicts=False)
    _gin.pprint = types.SimpleNamespace(pformat=ordered)
    try:
        return gin.config_str()
    finally:
        _gin.pprint = pprint
