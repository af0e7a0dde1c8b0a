"""The identity of a run: everything that determines what it learns, as plain JSON.

A MODEL_DIR is resumed only by a run with the same identity. Every argument of `ptjax.tune` and
`ptjax.pretrain`, and every field of their arguments, is part of it unless `FREE` lists it; so a new
setting is included from the start. Data are identified by their content.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import inspect
import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from ptjax import __version__
from ptjax.errors import InputError
from ptjax.files import JsonObject, Metadata

FORMAT = 3
"""The format of `make_identity`. 1 (not recorded) had few of the settings; 2 had them as arguments
of `tune`."""

_LENGTH = "how long the run is, or what it saves; runs are resumed to change it"
_PLACE = "where the run computes"
_WATCHES = "callbacks only observe"
_CONTENT = "its content counts, not its location"

FREE: Mapping[str, str] = {
    "tune.model_dir": "the folder may be moved",
    "tune.steps": _LENGTH,
    "tune.callbacks": _WATCHES,
    "tune.dry_run": "trains nothing",
    "pretrain.model_dir": "the folder may be moved",
    "pretrain.callbacks": _WATCHES,
    "pretrain.dry_run": "trains nothing",
    "TrainSchedule.train_steps": _LENGTH,
    "TrainSchedule.eval_period": _LENGTH,
    "TrainSchedule.log_period": _LENGTH,
    "TrainSchedule.patience": _LENGTH,
    "TrainSchedule.keep": _LENGTH,
    "Evaluation.batch_size": "changes no prediction",
    "Task.data_dir": _CONTENT,
    "Task.splits": _CONTENT,
    "TextFiles.data_dir": _CONTENT,
    "TextFiles.files": _CONTENT,
    "TextFiles.take_every": "the documents that it selects count",
    "TokenFile.path": _CONTENT,
    "Backbone.variables": "the fingerprint counts",
    "Backbone.apply_fn": "the config counts",
    "Backbone.name": _CONTENT,
    "Backbone.fingerprint_v1": "the newer fingerprint counts",
    "Backbone.arguments": "what they loaded counts",
    "Backbone.assumed": "the config counts",
    "Backbone.family": "the fingerprint and the config count",
    "Backbone.mesh": _PLACE,
    "Backbone.fsdp": _PLACE,
    "Backbone.attention": _PLACE,
    "T5Config.scan_layers": _PLACE,
    "T5Config.remat": _PLACE,
}
"""Settings that may change when a run is resumed -> why; "function.argument" or "Class.field"."""

_OF_BACKBONE = {
    "fingerprint": "the backbone's fingerprint",
    "tokenizer": "the tokenizer's fingerprint",
}
_COMMANDS = {"tune": "python -m ptjax.train", "pretrain": "python -m ptjax.pretrain"}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_ABSENT: Any = object()


def make_identity(
    function: Callable[..., object], arguments: Mapping[str, object], data: Mapping[str, object]
) -> JsonObject:
    """Describes a run as plain JSON: its settings, its data, and the versions of the libraries.

    Args:
        function: `tune` or `pretrain`.
        arguments: the values of its arguments by name, defaults included.
        data: what the run reads. Each key describes a source of data in error messages; its value
            maps names to digests and counts.
    """
    kind = function.__name__
    settings = {
        name: describe(arguments[name])
        for name in inspect.signature(function).parameters
        if f"{kind}.{name}" not in FREE
    }
    return {
        "format": FORMAT,
        "settings": {"is": kind} | settings,
        "data": describe(data),
        "versions": versions(),
    }


def describe(value: object, *, whole: bool = False) -> Any:
    """Converts a setting to plain JSON values that are the same in every process and every run.

    A dataclass becomes a dict with its class name under "is" and its fields, except those that may
    change when a run is resumed (`FREE`). If a field's value does not identify its content (a path,
    a schedule), the method `identity` of the dataclass returns replacements for such fields. A
    tokenizer becomes its fingerprint, an array its digest. A function or any other object becomes
    its qualified name, with the numbers, strings and lists that its closure or its public
    attributes hold.

    Args:
        whole: include the fields in `FREE`, and do not call `identity`.
    """
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else repr(float(value))  # JSON has neither
    if isinstance(value, bytes):
        return f"sha256:{hashlib.sha256(value).hexdigest()}"
    if isinstance(value, Mapping):
        return {str(key): describe(item, whole=whole) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [describe(item, whole=whole) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((describe(item, whole=whole) for item in value), key=repr)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return describe(value.item())
    if hasattr(value, "__array__") and hasattr(value, "shape"):
        return digest_array(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _describe_fields(value, whole)
    fingerprint = getattr(value, "fingerprint", None)
    if isinstance(fingerprint, str):
        return fingerprint
    return _describe_object(value)


def _describe_fields(value: Any, whole: bool) -> JsonObject:
    classes = [base.__name__ for base in type(value).__mro__]
    fields = {
        field.name: getattr(value, field.name)
        for field in dataclasses.fields(value)
        if whole or not any(f"{name}.{field.name}" in FREE for name in classes)
    }
    replaced = value.identity() if hasattr(value, "identity") and not whole else {}
    described = {k: describe(replaced.get(k, v), whole=whole) for k, v in fields.items()}
    return {"is": _name(type(value)), **described}


def _describe_object(value: object) -> JsonObject | str:
    """Describes a function, a class, or an object whose class is not a dataclass."""
    if isinstance(value, functools.partial):
        inside: Mapping[str, object] = {"arguments": value.args, **value.keywords}
        return {"is": _name(value.func), **describe(inside)}
    if inspect.ismethod(value):
        return {"is": _name(value.__func__), "of": describe(value.__self__)}
    if isinstance(value, type):
        return _name(value)
    if inspect.isroutine(value):
        value = inspect.unwrap(value)
        inside = inspect.getclosurevars(value).nonlocals if inspect.isfunction(value) else {}
    else:
        inside = {k: v for k, v in getattr(value, "__dict__", {}).items() if not k.startswith("_")}
        value = type(value)
    plain = {name: describe(item) for name, item in sorted(inside.items()) if _is_plain(item)}
    return {"is": _name(value), **plain} if plain else _name(value)


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | np.generic)


def _name(value: object) -> str:
    """The qualified name; of ptjax's own classes without the module, which may be renamed."""
    name = getattr(value, "__qualname__", None) or type(value).__qualname__
    module = getattr(value, "__module__", None) or ""
    if not module.startswith("ptjax."):
        return f"{module}.{name}"
    return name if isinstance(value, type) else f"{module.rsplit('.', 1)[-1]}.{name}"


def digest_array(values: object) -> str:
    """Returns "sha256:..." over the dtype, shape and bytes of an array."""
    array = np.asarray(values)
    digest = hashlib.sha256(f"{array.dtype} {array.shape} ".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
    return f"sha256:{digest.hexdigest()}"


def digest_texts(texts: Iterable[str]) -> str:
    """Returns "sha256:..." over a sequence of strings and their lengths."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(f"{len(encoded)}:".encode() + encoded)
    return f"sha256:{digest.hexdigest()}"


def versions() -> dict[str, str]:
    """Returns the versions of ptjax, Python and the main libraries by name, such as "jax"."""
    ours = {"ptjax": __version__, "Python": platform.python_version()}
    return ours | {package: importlib.metadata.version(package) for package in _PACKAGES}


def changed_versions(saved: Metadata, now: Metadata) -> str:
    """Lists the versions that differ between two identities: "jax 0.12.0 (was 0.10.2), ...".

    Returns "" if all are the same.
    """
    old, new = saved.get("versions") or {}, now.get("versions") or {}
    return ", ".join(
        f"{name} {new.get(name, 'none')} (was {old.get(name, 'none')})"
        for name in {**new, **old}
        if old.get(name) != new.get(name)
    )


def check_same(saved: Metadata, now: Metadata, model_dir: str) -> None:
    """Raises InputError unless the run in `model_dir` has the same identity as this run.

    The message gives both values of the first setting that differs or, if the settings agree, of
    the data. Versions are not compared.

    Args:
        saved: the identity of the run in `model_dir`.
        now: the identity of this run.
    """
    written_by = (saved.get("versions") or {}).get("ptjax", "an older version")
    if saved.get("format") != now.get("format"):
        raise InputError(
            f"{model_dir} holds a run of another ptjax ({written_by}), whose checkpoints record "
            "settings in another format, so it cannot be resumed here; choose another MODEL_DIR or "
            "finish it with that version. Its prompts can be used as they are"
        )
    command, ours = saved["settings"].get("is"), now["settings"].get("is")
    if command != ours:
        raise InputError(
            f"{model_dir} holds a run of {_COMMANDS.get(command, command)}, not of "
            f"{_COMMANDS.get(ours, ours)}; choose another MODEL_DIR"
        )
    if difference := _difference(saved["settings"], now["settings"], "", ""):
        name, old, new = difference
        if _ABSENT in (old, new):
            raise InputError(
                f"{model_dir} holds a run of another ptjax ({written_by}): {name} was "
                f"{_shown(old)}, now {_shown(new)}; choose another MODEL_DIR or finish it with "
                "that version"
            )
        old, new = _excerpts(_shown(old), _shown(new))
        raise InputError(
            f"{model_dir} holds a run with {name} = {old}, now {new}; choose another MODEL_DIR or "
            "restore that setting"
        )
    _check_same_data(saved["data"], now["data"], model_dir)


def _check_same_data(saved: Metadata, now: Metadata, model_dir: str) -> None:
    if gone := ", ".join(what for what in saved if what not in now):
        raise InputError(
            f"{model_dir} holds a run that also read {gone}, which this one does not; choose "
            "another MODEL_DIR or restore it"
        )
    if new := ", ".join(what for what in now if what not in saved):
        raise InputError(
            f"{model_dir} holds a run without {new}, which this one has; choose another MODEL_DIR "
            "or remove it"
        )
    for what, parts in now.items():
        for name, new in parts.items():
            old = saved[what].get(name, _ABSENT)
            if old != new:
                raise InputError(
                    f"{model_dir} holds a run on other data: {name} of {what} = {_shown(old)}, now "
                    f"{_shown(new)}; choose another MODEL_DIR or restore the data"
                )


def _difference(
    saved: object, now: object, name: str, place: str
) -> tuple[str, object, object] | None:
    """(name, old value, new value) of the first difference.

    Args:
        name: of the two values.
        place: the mapping or list that contains them, if they are fields of a class.
    """
    if isinstance(saved, dict) and isinstance(now, dict) and saved.get("is") == now.get("is"):
        owner = now.get("is")
        if owner == "schedule":
            return _different_rate(saved, now, name)
        if not owner and list(saved) != list(now):
            # The order counts too: of labels, or of a sweep's members.
            order = "the order of " if set(saved) == set(now) else ""
            return order + name, list(saved), list(now)
        for key in {**now, **saved}:
            child = _setting(owner, key, name) + place if owner else f"{name}[{key!r}]"
            pair = saved.get(key, _ABSENT), now.get(key, _ABSENT)
            within = place if owner else f" (of {child})"
            if difference := _difference(*pair, child, within):
                return difference
        return None
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        for number, pair in enumerate(zip(saved, now, strict=True)):
            child = f"{name}[{number}]"
            if difference := _difference(*pair, child, f" (of {child})"):
                return difference
        return None
    # 1 equals 1.0, but not True.
    same = saved == now and isinstance(saved, bool) == isinstance(now, bool)
    return None if same else (name, saved, now)


def _different_rate(saved: Metadata, now: Metadata, name: str) -> tuple[str, object, object] | None:
    """The first rate of a schedule that differs by more than the float32 rounding of its peak."""
    peak = max((abs(rate) for rate in now.values() if isinstance(rate, float)), default=0.0)
    for step, new in now.items():
        old = saved.get(step, _ABSENT)
        numbers = isinstance(old, float) and isinstance(new, float)
        if old != new and not (numbers and abs(old - new) <= 2e-6 * peak):
            return f"{name} at {step}", old, new
    return None


def _setting(owner: str, field: str, name: str) -> str:
    """The name in gin files of a field of `owner`, an object that is the setting `name`."""
    if owner == "Backbone":
        return _OF_BACKBONE.get(field, f"load_backbone.{field}")
    if owner == "T5Config" and name == "load_backbone.config":
        return f"load_backbone.{field}"
    return f"{owner}.{field}"


def _shown(value: object) -> str:
    """A value as messages show it."""
    if value is _ABSENT:
        return "not recorded"
    if isinstance(value, dict) and "is" in value:
        inside = (f"{name}={_shown(item)}" for name, item in value.items() if name != "is")
        return f"{value['is']}({', '.join(inside)})"
    if isinstance(value, str) and value.startswith("sha256:"):
        return value[:19]
    return repr(value)


def _excerpts(old: str, new: str, longest: int = 160) -> tuple[str, str]:
    """Both values cut to a readable length, around their first difference."""
    if max(len(old), len(new)) <= longest:
        return old, new
    same = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), 0)
    start = max(same - longest // 4, 0)

    def cut(text: str) -> str:
        inside = text[start : start + longest]
        return ("..." if start else "") + inside + ("..." if start + longest < len(text) else "")

    return cut(old), cut(new)
