"""Templates such as 'sentence: {sentence}', which are filled in with the fields of a record."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping
from dataclasses import dataclass

from ptjax.data.sentinels import join_texts, spelt_out
from ptjax.files import Metadata


class RecordError(ValueError):
    """A record cannot be used, for example because a field of the template is missing.

    The message names neither file nor line; the code that catches the error adds them.
    """


@dataclass(frozen=True)
class Template:
    """A text with fields. `parts` are pairs of literal text and the field after it, if any."""

    text: str
    parts: tuple[tuple[str, str | None], ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields that the template contains, without duplicates, in order."""
        return tuple(dict.fromkeys(field for _, field in self.parts if field is not None))

    def render(self, record: Metadata, *, sentinels: bool = False) -> str:
        """Fills in the template with the fields of `record`.

        Args:
            sentinels: treat `<extra_id_N>` in a field as a sentinel, as in the template itself.

        Raises:
            RecordError: a field is missing, None, a list, an object or a number that is not finite.
        """
        pieces = []
        for literal, field in self.parts:
            pieces.append(literal)
            if field is not None:
                value = as_text(find_field(record, field), field)
                pieces.append(value if sentinels else spelt_out(value))
        return join_texts(pieces)


def parse_template(text: str) -> Template:
    """Parses '{field}', '{field.inner}' and '{list.0}'; '{{' and '}}' are literal braces.

    Raises:
        ValueError: unbalanced braces, an empty field name, a conversion or a format.
    """
    parts: list[tuple[str, str | None]] = []
    for literal, field, spec, conversion in string.Formatter().parse(text):
        if field is not None and (not field.strip() or spec or conversion):
            shown = field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ValueError(f"{{{shown}}} is not a field; write {{name}}, and {{{{ for a brace")
        parts.append((literal, field))
    return Template(text, tuple(parts))


def find_field(record: Metadata, field: str) -> object:
    """Returns a field's value: 'a.b' is the field of that name, or else field b of the object a.

    In the same way, 'a.0' is the first entry of the list a.

    Raises:
        RecordError: the record has no such field, or it is None or a number that is not finite.
    """
    value: object = record
    if field in record:
        value = record[field]
    else:
        for name in field.split("."):
            value = _inside(value, name, field, record)
    _check_present(value, field)
    return value


def _inside(value: object, name: str, field: str, record: Metadata) -> object:
    if isinstance(value, Mapping) and name in value:
        return value[name]
    if isinstance(value, list | tuple) and name.isdecimal():
        if int(name) < len(value):
            return value[int(name)]
        raise RecordError(f"no field '{field}': the list has {len(value)} entries")
    names = ", ".join(map(str, record)) or "none"
    raise RecordError(f"no field '{field}' (fields: {names})")


def _check_present(value: object, field: str) -> None:
    if value is None:
        raise RecordError(f"the field '{field}' is null (or NaN)")
    if isinstance(value, float) and not math.isfinite(value):
        raise RecordError(f"the field '{field}' is {value}, not a text or number")


def as_text(value: object, field: str) -> str:
    """Converts a text, number or boolean to text: True to 'True', 1 to '1'.

    Args:
        field: the value's name, for messages.

    Raises:
        RecordError: the value is a list or an object, None, or a number that is not finite.
    """
    _check_present(value, field)
    if isinstance(value, (Mapping, list, tuple)):
        kind = "an object" if isinstance(value, Mapping) else "a list"
        # Suggest an object's fields, or a list's first entry.
        names = [*value][:3] if isinstance(value, Mapping) else ["0"]
        inside = ", ".join(f"{{{field}.{name}}}" for name in names)
        hint = f", such as {inside}" if inside else ""
        raise RecordError(f"the field '{field}' is {kind}; a template takes text and numbers{hint}")
    return str(value)
