"""Settings made in Python as the text of a gin file, for `MODEL_DIR/config.gin`.

`describe_call` is the inverse of what the commands do with such a file: the text names the public
names of ptjax and optax's schedules alone, so that it is read without trusting its author. What a
gin file cannot say (a custom function or method, an array, records in memory) is left out,
with a comment; `left_out` reads these comments.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ptjax
from ptjax.data import catalogue

MACROS: Mapping[str, str] = {
    "ptjax.tune.model_dir": "MODEL_DIR",
    "ptjax.load_backbone.path": "INITIAL_CHECKPOINT_PATH",
    "ptjax.Task.data_dir": "DATA_DIR",
    "ptjax.TrainSchedule.train_steps": "TRAIN_STEPS",
    "ptjax.RunSettings.seed": "RANDOM_SEED",
}
"""Settings that the text names by a macro, as ptjax's own gin files do. So `--gin.MODEL_DIR=...`
works, and a command that is given a moved MODEL_DIR finds its files."""

_COMMENT = re.compile(r"^# (?:\w+/)?(\w+(?:\.\w+)+) is left out: (.*)$", re.MULTILINE)
_HEADER = """\
# The settings of a run started from Python, as a gin file. For example
#   python -m ptjax.evaluate --model_dir=MODEL_DIR
from __gin__ import dynamic_registration

import ptjax
"""


def describe_call(function: str, arguments: Mapping[str, object]) -> str:
    """Writes a call of a function as a gin file that binds its arguments.

    Args:
        function: the public name, such as "ptjax.tune".
        arguments: the values by name: settings, tasks, backbones, and containers of them.
            Arguments that are None are not bound.

    Returns:
        the text, which ends in a line feed. Whoever reads it with `ptjax.cli.load_gin` gets equal
        arguments, except for what comments in it name.
    """
    objects = _Objects()
    call = _Object(function, objects.bindings(function, arguments))
    return objects.text([call, *objects.made])


def left_out(text: str) -> dict[str, str]:
    """Returns the settings that `describe_call` left out of a text.

    Returns:
        a setting's name, such as "ptjax.RunSettings.method" -> what it was, in words.
    """
    return dict(_COMMENT.findall(text))


class _UnsayableError(Exception):
    """A gin file cannot name the value; its message says in words what the value is."""


@dataclasses.dataclass(eq=False)
class _Object:
    """A call in the gin file, `@SCOPE/selector()`, with its bindings by argument."""

    selector: str
    bindings: dict[str, Any]
    scope: str = ""

    def __repr__(self) -> str:
        return f"@{self.scope}{self.selector}()"


@dataclasses.dataclass(frozen=True)
class _Function:
    """A function that is passed on, `@name`."""

    name: str

    def __repr__(self) -> str:
        return f"@{self.name}"


@dataclasses.dataclass(frozen=True)
class _LeftOut:
    """The reason why a setting is not in the file."""

    reason: str


class _Objects:
    """Collects the objects that the arguments of a call are made of; equal ones are one."""

    def __init__(self) -> None:
        self.made: list[_Object] = []
        self._known: dict[str, _Object] = {}

    def bindings(self, selector: str, arguments: Mapping[str, object]) -> dict[str, Any]:
        """The arguments as gin's values; a `_LeftOut` in place of one that cannot be said."""
        bindings = {}
        for name, value in arguments.items():
            if value is None:
                continue
            try:
                bindings[name] = self.value(value)
            except _UnsayableError as error:
                bindings[name] = _LeftOut(str(error))
        return bindings

    def value(self, value: Any) -> Any:
        """A value as a literal, an `_Object` or a `_Function`, or containers of them."""
        if hasattr(value, "__array__") and getattr(value, "ndim", None) == 0:
            value = value.item()  # a number of NumPy or JAX
        if isinstance(value, float) and not math.isfinite(value):
            raise _UnsayableError(f"the number {value}")
        if type(value) in (bool, int, float, str) or value is None:
            return value
        if isinstance(value, Mapping):
            return {self.value(key): self.value(item) for key, item in value.items()}
        if type(value) is list:
            return [self.value(item) for item in value]
        if type(value) is tuple:
            return tuple(map(self.value, value))
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if dataclasses.is_dataclass(value) and (selector := _public_name(type(value))):
            return self._dataclass(value, selector)
        if hasattr(value, "fingerprint") and hasattr(value, "encode_batch"):
            return _tokenizer_path(value)
        if callable(value):
            return self._function(value)
        raise _UnsayableError(_words(value))

    def _dataclass(self, value: Any, selector: str) -> _Object:
        if selector == "ptjax.Backbone":
            if not value.arguments:
                raise _UnsayableError("a backbone that load_backbone did not load")
            return self._whole("a backbone", "ptjax.load_backbone", value.arguments)
        fields = {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if not _is_empty_default(field, getattr(value, field.name))
        }
        if selector != "ptjax.Task":
            return self._object(selector, self.bindings(selector, fields))
        from ptjax.data.memory import RecordsInMemory, in_memory  # late: it imports NumPy

        splits = {
            name: in_memory(source) if isinstance(source, RecordsInMemory) else source
            for name, source in value.splits.items()
        }
        return self._whole("a task", selector, fields | ({"splits": splits} if splits else {}))

    def _function(self, function: Callable[..., Any]) -> _Object | _Function:
        if (name := catalogue.name_of(function)) in catalogue.CATALOGUE:
            return _Function(name)
        if (schedule := _schedule_call(function)) is not None:
            return self._whole("a schedule", *schedule)
        raise _UnsayableError(_words(function))

    def _whole(self, what: str, selector: str, arguments: Mapping[str, object]) -> _Object:
        """An object that would be another one without one of its arguments."""
        bindings = self.bindings(selector, arguments)
        for name, value in bindings.items():
            if isinstance(value, _LeftOut):
                raise _UnsayableError(f"{what} whose {name} is {value.reason}")
        return self._object(selector, bindings)

    def _object(self, selector: str, bindings: dict[str, Any]) -> _Object:
        # By id: a nested object is itself already the one of its kind.
        key = f"{selector} {_inline(bindings, lambda item: f'<{id(item)}>')}"
        if key not in self._known:
            self._known[key] = _Object(selector, bindings)
            self.made.append(self._known[key])
        return self._known[key]

    def text(self, calls: list[_Object]) -> str:
        """The gin file that binds the arguments of these calls."""
        by_selector: dict[str, list[_Object]] = {}
        for call in calls:
            by_selector.setdefault(call.selector, []).append(call)
        for selector, several in by_selector.items():
            # None of several may go without a scope: its bindings would apply to the others too.
            for number, call in enumerate(several if len(several) > 1 else (), 1):
                call.scope = f"{selector.rpartition('.')[2]}_{number}/"
        macros: dict[str, str] = {}
        lines: list[str] = []
        for call in calls:
            lines += ["", f"# {call.scope}{call.selector}", *_lines(call, macros)]
        imports = "import optax\n" * any(call.selector.startswith("optax.") for call in calls)
        heads = [f"{name} = {value}" for name, value in macros.items()]
        return "\n".join([_HEADER + imports, *heads, *lines]) + "\n"


def _lines(call: _Object, macros: dict[str, str]) -> Iterator[str]:
    """The bindings of a call; the values of macros go into `macros`."""
    for name, value in call.bindings.items():
        setting = f"{call.scope}{call.selector}.{name}"
        macro = MACROS.get(setting)
        if isinstance(value, _LeftOut):
            yield f"# {setting} is left out: {value.reason}"
        elif macro is not None:
            macros[macro] = _inline(value)
            yield f"{setting} = %{macro}"
        else:
            yield f"{setting} = {_in_lines(value)}"


def _inline(value: Any, of_object: Callable[[_Object], str] = repr) -> str:
    if isinstance(value, Mapping):
        pairs = (f"{_inline(k, of_object)}: {_inline(v, of_object)}" for k, v in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list | tuple):
        items = ", ".join(_inline(item, of_object) for item in value)
        if isinstance(value, list):
            return f"[{items}]"
        return f"({items},)" if len(value) == 1 else f"({items})"
    return of_object(value) if isinstance(value, _Object) else repr(value)


def _in_lines(value: Any, width: int = 80) -> str:
    """A value on one line or, if it is long, with a line for each of its items."""
    text = _inline(value)
    if len(text) <= width or not isinstance(value, Mapping | list | tuple):
        return text
    if isinstance(value, Mapping):
        items = [f"{_inline(key)}: {_inline(item)}" for key, item in value.items()]
    else:
        items = [_inline(item) for item in value]
    return "\n".join([text[0], *(f"    {item}," for item in items), text[-1]])


def _is_empty_default(field: dataclasses.Field[Any], value: object) -> bool:
    """Whether a field has its default, which is empty: no text, no items."""
    if not isinstance(value, str | Mapping | tuple | list) or value:
        return False
    made = field.default_factory
    return value == (field.default if made is dataclasses.MISSING else made())


def _public_name(class_: type) -> str:
    """ "ptjax.NAME" of a public class of ptjax; "" for any other."""
    name = class_.__name__
    return f"ptjax.{name}" if getattr(ptjax, name, None) is class_ else ""


def _tokenizer_path(tokenizer: Any) -> str:
    """The path that `load_tokenizer` reads this tokenizer from."""
    try:
        if ptjax.load_tokenizer(tokenizer.name).fingerprint == tokenizer.fingerprint:
            return tokenizer.name
    except (ptjax.InputError, OSError):
        pass
    raise _UnsayableError(_words(tokenizer))


def _words(value: object) -> str:
    """A value in words, on one line."""
    if hasattr(value, "__array__"):
        return f"an array of shape {tuple(getattr(value, 'shape', ()))}"
    named = value if hasattr(value, "__qualname__") else type(value)
    name = f"{named.__module__}.{named.__qualname__}"  # pyright: ignore[reportAttributeAccessIssue]
    kind = "the function" if inspect.isroutine(value) else "an object of the class"
    return f"{kind} {name}"


def _schedule_call(schedule: Callable[..., Any]) -> tuple[str, dict[str, Any]] | None:
    """The call of optax that makes a schedule; None if it is not optax's.

    optax's schedules are functions inside of those that make them, so that their free variables
    are the arguments. The call is made again to check that it gives the same rates.
    """
    maker, _, inner = getattr(schedule, "__qualname__", "").partition(".<locals>.")
    if not inner or not getattr(schedule, "__module__", "").startswith("optax."):
        return None
    import optax

    inside = {}
    for name, cell in zip(schedule.__code__.co_freevars, schedule.__closure__ or (), strict=True):
        try:
            inside[name] = cell.cell_contents
        except ValueError:  # a variable that this schedule does not need
            continue
    if inner == "<lambda>" and len(inside) == 1:
        maker, inside = "constant_schedule", {"value": next(iter(inside.values()))}
    if maker == "piecewise_interpolate_schedule":
        kind = getattr(inside.get("interpolate_fn"), "__name__", "")
        inside["interpolate_type"] = "cosine" if "cosine" in kind else "linear"
        inside["boundaries_and_scales"] = dict(
            zip(inside.get("boundaries", ()), inside.get("scales", ()), strict=True)
        )
    make = getattr(optax, maker, None)
    if make is None:
        return None
    arguments = {
        name: _as_whole(inside[name]) if "steps" in name else inside[name]
        for name in inspect.signature(make).parameters
        if name in inside
    }
    try:
        again = make(**arguments)
        if all(float(again(n)) == float(schedule(n)) for n in (0, 1, 10, 99, 1000, 30_000)):
            return f"optax.{maker}", arguments
    except (TypeError, ValueError):
        pass
    return None


def _as_whole(value: Any) -> Any:
    """A number of steps, which optax may have turned into a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
