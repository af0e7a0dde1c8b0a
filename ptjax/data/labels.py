"""Labels of records as texts: the verbalizer that they imply, and how often each occurs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ptjax.data.templates import RecordError, as_text, find_field
from ptjax.files import Metadata

NO_LABEL = "none"
"""The target of a record whose list of labels is empty."""


def label_text(value: object) -> str:
    """The target text of a label: True is 'true', 1 and 1.0 are '1', white space is one space."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():  # a column of integers with a gap
        value = int(value)
    return " ".join(str(value).split())  # SentencePiece writes no other white space


def verbalized(verbalizer: Mapping[str, str], value: object, label: str) -> str:
    """The verbalizer's text for a value of the field `label`.

    Raises:
        RecordError: it has none, or the value is missing or not a label.
    """
    key = as_text(value, label).strip()
    for spelling in (key, key.lower()) if isinstance(value, bool) else (key,):
        if spelling in verbalizer:
            return verbalizer[spelling]
    keys = ", ".join(map(repr, verbalizer))
    raise RecordError(f"the label {value!r} in field '{label}' is not in the verbalizer ({keys})")


def infer_verbalizer(values: Iterable[object], names: Iterable[str] = ()) -> dict[str, str]:
    """Label value -> text for all values that occur, numbers and texts each in order.

    Args:
        names: of the classes, if they are known; they come first, in their order.
    """

    def order(value: Any) -> tuple[bool, Any]:
        return (False, float(value)) if isinstance(value, int | float) else (True, str(value))

    pairs = {name: name for name in names}
    for value in sorted({(type(value), value): value for value in values}.values(), key=order):
        pairs.setdefault(str(value).strip(), label_text(value))
    return pairs


def find_values(fields: Metadata, label: str) -> list[object]:
    """The labels of a record: its list, or the only one.

    Raises:
        RecordError: it has none, or one that is not a text or a number.
    """
    value = find_field(fields, label)
    values = value if isinstance(value, list) else [value]
    for item in values:
        if not as_text(item, label).strip():
            raise RecordError(f"the field '{label}' is empty")
    return values


def joined(words: Iterable[str]) -> str:
    """Several labels as one target: sorted, without duplicates, separated by commas.

    >>> joined(["urgent", "billing"]), joined([])
    ('billing, urgent', 'none')
    """
    return ", ".join(sorted(set(words))) or NO_LABEL


def counted(labels: Iterable[tuple[str, ...]]) -> Counter[str]:
    """How often each label occurs."""
    return Counter(label for of_record in labels for label in of_record)
