"""The header of ptjax's prompt files: metadata, whose types are checked, and a checksum.

The checksum covers the whole file. Without it a flipped bit would go unnoticed: a changed matrix,
another `sees_input`, lost labels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping

import numpy as np

from ptjax import files
from ptjax.data.batch import SpecialIds
from ptjax.errors import InputError
from ptjax.files import JsonObject, Metadata

_FORMAT, _CHECKSUM = "ptjax_format", "ptjax_sha256"
_VERSION = "2"  # 1 had neither of the two
_OURS = {"ptjax_version", "backbone_fingerprint", "tokenizer_fingerprint", "sees_input"}
"""A header with any of these was written by ptjax, with or without a checksum."""
_OF_A_RUN = {"task", "input_length", "target_length", "seed", "sees_input"}
"""Keys that a run writes into every prompt."""
_TEXTS = {"ptjax_version", "backbone_name", "backbone_fingerprint", "tokenizer_fingerprint"}
_COUNTS = {"input_length", "target_length", "seed", "step"}
SPECIAL_IDS = "special_ids"
"""The key of the backbone's special ids in the metadata: fields of `data.batch.SpecialIds`."""
_MAX_LENGTH = 1 << 20  # tokens; larger values would fill the memory with padding


def special_ids(ids: SpecialIds) -> JsonObject:
    """Returns the backbone's special ids as an entry of a prompt's metadata.

    Training depends on them, but the fingerprint does not cover them: they do not change the
    logits of given tokens.
    """
    values = dataclasses.asdict(ids)
    return {SPECIAL_IDS: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}


def other_ids(metadata: Metadata, ids: SpecialIds) -> tuple[str, str] | None:
    """Describes the special ids that differ between a prompt and a backbone.

    Args:
        metadata: the prompt's.
        ids: the backbone's.

    Returns:
        (the prompt's, the backbone's) as texts: ("eos_ids = [1]", "eos_ids = [2]"); several are
        separated by ", ". None if they agree, or if the prompt records none (older versions did
        not).
    """
    current = special_ids(ids)[SPECIAL_IDS]
    recorded = metadata.get(SPECIAL_IDS) or {}
    differing = [name for name in current if name in recorded and recorded[name] != current[name]]
    if not differing:
        return None

    def show(values: Metadata) -> str:
        return ", ".join(f"{name} = {values[name]}" for name in differing)

    return show(recorded), show(current)


def seal(header: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Returns the header with a checksum of itself and the tensors. `unseal` is the inverse.

    It adds two entries, a format number and the checksum, each of which requires the other: if one
    of their names is damaged, the file is not mistaken for one of an older version without a
    checksum.
    """
    header = {key: text for key, text in header.items() if key != _CHECKSUM}
    header |= {_FORMAT: _VERSION}
    return header | {_CHECKSUM: _digest(header, tensors)}


def unseal(header: Mapping[str, str], tensors: Mapping[str, np.ndarray], where: str) -> JsonObject:
    """Checks a header, and returns its metadata without the two entries of `seal`.

    Values are parsed as JSON; in a foreign file, a value that is not JSON stays a string.

    Args:
        tensors: all tensors of the file, in their stored dtypes; used only if there is a checksum.
        where: the file, for messages.

    Raises:
        InputError: the file was written by ptjax and is damaged, or by a newer ptjax.
    """
    sealed = is_sealed(header)
    if sealed:
        _check_seal(header, tensors, where)
    ours = sealed or not _OURS.isdisjoint(header)
    metadata: JsonObject = {}
    for key, text in header.items():
        if key in (_FORMAT, _CHECKSUM):
            continue
        try:
            metadata[key] = files.parse_json(text)
        except ValueError as error:
            if ours:
                raise _damaged(where, f"{key!r} is not valid JSON") from error
            metadata[key] = text
    check_types(metadata, where)
    if ours and not sealed and len(lost := sorted(_OF_A_RUN - set(metadata))) == 1:
        raise _damaged(where, f"{lost[0]!r} is missing")
    return metadata


def is_sealed(header: Mapping[str, str]) -> bool:
    """Whether a header has at least one of the two entries of `seal`."""
    return _FORMAT in header or _CHECKSUM in header


def check_types(metadata: Metadata, where: str) -> None:
    """Raises InputError if ptjax wrote the metadata and a value in them has the wrong type.

    The file is damaged then. Only values that ptjax reads are checked; foreign metadata may hold
    anything.
    """
    if not _OURS.isdisjoint(metadata) and (problem := wrong_value(metadata)):
        raise _damaged(where, problem)


def wrong_value(metadata: Metadata) -> str | None:
    """Describes the first value that has the wrong type or is out of range; None if all are valid.

    Only the keys that ptjax reads are checked.
    """
    for key, value in metadata.items():
        limit = _MAX_LENGTH if key.endswith("_length") else 1 << 64
        bad = (
            (key == "sees_input" and type(value) is not bool)
            or (key in _TEXTS and not isinstance(value, str | None))
            or (key == SPECIAL_IDS and not _are_ids(value))
            or (key in _COUNTS and (type(value) is not int or not 0 <= value < limit))
        )
        if bad:
            return f"{key!r} is {json.dumps(value)[:40]}"
    task = metadata.get("task")
    return _wrong_task(task) if isinstance(task, dict) else None


def _are_ids(value: object) -> bool:
    def is_id(index: object) -> bool:
        return index is None or (type(index) is int and index >= 0)

    return isinstance(value, dict) and all(
        all(map(is_id, ids)) if isinstance(ids, list) else is_id(ids) for ids in value.values()
    )


def _wrong_task(task: Metadata) -> str | None:
    """The same for a task's description, `Task.describe()`."""
    verbalizer = task.get("verbalizer")
    pairs = verbalizer.items() if isinstance(verbalizer, dict) else [("", verbalizer or "")]
    texts = [task.get(key) for key in ("name", "inputs", "targets", "label", "answers", "group")]
    if not all(isinstance(text, str | None) for text in [*texts, *(text for _, text in pairs)]):
        return "'task' has a value of the wrong type"
    # A label needs a verbalizer, or open targets (then only metrics read it).
    label, closed = task.get("label"), verbalizer is not None
    if (closed and label is None) or (label is not None and not closed and not task.get("targets")):
        return "'task' lost its labels"
    return None


def _check_seal(header: Mapping[str, str], tensors: Mapping[str, np.ndarray], where: str) -> None:
    rest = {key: text for key, text in header.items() if key != _CHECKSUM}
    if _FORMAT not in header or header.get(_CHECKSUM) != _digest(rest, tensors):
        raise _damaged(where, "the checksum does not match")
    if header[_FORMAT] != _VERSION:
        raise InputError(
            f"{where}: prompt file format {header[_FORMAT]}; this ptjax reads formats up to "
            f"{_VERSION}; update ptjax"
        )


def _damaged(where: str, what: str) -> InputError:
    return InputError(
        f"{where}: the prompt file was damaged or changed after ptjax wrote it ({what}); copy it "
        "again, or rewrite it with ptjax.save_prompt"
    )


def _digest(header: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> str:
    """sha256 over names, dtypes, shapes, bytes and the header's texts, in sorted order."""
    hashed = hashlib.sha256(json.dumps(sorted(header.items())).encode())
    for name, tensor in sorted(tensors.items()):
        hashed.update(json.dumps([name, tensor.dtype.name, tensor.shape]).encode())
        hashed.update(np.ascontiguousarray(tensor).tobytes())
    return hashed.hexdigest()
