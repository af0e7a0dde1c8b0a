"""The header of ptjax's own prompt files: a checksum over all of the file, and the values' types.

A flipped bit in a prompt would otherwise go unnoticed: another matrix, a `sees_input` of another
kind, labels that are no labels any more.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from ptjax import files
from ptjax.data.batch import SpecialIds
from ptjax.errors import InputError

_FORMAT, _CHECKSUM = "ptjax_format", "ptjax_sha256"
_VERSION = "2"  # 1 had neither of the two
_OURS = {"ptjax_version", "backbone_fingerprint", "tokenizer_fingerprint", "sees_input"}
"""Any of these tells a file of ptjax, sealed or not."""
_OF_A_RUN = {"task", "input_length", "target_length", "seed", "sees_input"}
"""What a run writes into every prompt."""
_TEXTS = {"ptjax_version", "backbone_name", "backbone_fingerprint", "tokenizer_fingerprint"}
_COUNTS = {"input_length", "target_length", "seed", "step"}
SPECIAL_IDS = "special_ids"
"""The backbone's special ids: fields of `data.batch.SpecialIds`, by name."""
_MAX_LENGTH = 1 << 20  # tokens; a claim beyond it would fill the memory with padding


def special_ids(ids: SpecialIds) -> dict[str, Any]:
    """The special ids of its backbone, as a prompt records them: training depends on them.

    The fingerprint does not cover them, since they change no logits of given tokens.
    """
    values = dataclasses.asdict(ids)
    return {SPECIAL_IDS: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}


def other_ids(metadata: Mapping[str, Any], ids: SpecialIds) -> tuple[str, str] | None:
    """The ids that differ, in the prompt and in the backbone: ("eos_ids = [1]", "eos_ids = [2]").

    None if they agree, or if the prompt records none (older versions did not).
    """
    own = special_ids(ids)[SPECIAL_IDS]
    recorded = metadata.get(SPECIAL_IDS) or {}
    differing = [name for name in own if name in recorded and recorded[name] != own[name]]
    if not differing:
        return None
    old, new = (", ".join(f"{name} = {of[name]}" for name in differing) for of in (recorded, own))
    return old, new


def seal(header: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The header with the checksum of itself and of the tensors in it.

    `unseal` is the inverse. Two entries, of which each demands the other, so that no single damaged
    name takes the file for one of before.
    """
    header = {key: text for key, text in header.items() if key != _CHECKSUM}
    header |= {_FORMAT: _VERSION}
    return header | {_CHECKSUM: _digest(header, tensors)}


def unseal(
    header: Mapping[str, str], tensors: Mapping[str, np.ndarray], where: str
) -> dict[str, Any]:
    """The metadata of a header, without the two entries of `seal`.

    Values are JSON. In a file of somebody else, a text that is none stays a text.

    Args:
        tensors: all of the file's, as they are stored.

    Raises:
        InputError: a file of ptjax that was damaged, or written by a later ptjax.
    """
    sealed = is_sealed(header)
    if sealed:
        _check_seal(header, tensors, where)
    ours = sealed or not _OURS.isdisjoint(header)
    metadata: dict[str, Any] = {}
    for key, text in header.items():
        if key in (_FORMAT, _CHECKSUM):
            continue
        try:
            metadata[key] = files.parse_json(text)
        except ValueError as error:
            if ours:
                raise _damaged(where, f"its {key!r} is no JSON") from error
            metadata[key] = text
    check_types(metadata, where)
    if ours and not sealed and len(lost := sorted(_OF_A_RUN - set(metadata))) == 1:
        raise _damaged(where, f"it lacks {lost[0]!r}")
    return metadata


def is_sealed(header: Mapping[str, str]) -> bool:
    """Whether a header carries a checksum, or what is left of one."""
    return _FORMAT in header or _CHECKSUM in header


def check_types(metadata: Mapping[str, Any], where: str) -> None:
    """Looks at the values that ptjax's readers rely on, in metadata that ptjax wrote.

    Raises:
        InputError: one is of another type than ptjax writes, so the file is damaged.
    """
    if not _OURS.isdisjoint(metadata) and (problem := wrong_value(metadata)):
        raise _damaged(where, problem)


def wrong_value(metadata: Mapping[str, Any]) -> str | None:
    """What is wrong with the first value that no reader of ptjax could use, if there is one."""
    for key, value in metadata.items():
        limit = _MAX_LENGTH if key.endswith("_length") else 1 << 64
        bad = (
            (key == "sees_input" and type(value) is not bool)
            or (key in _TEXTS and not isinstance(value, str | None))
            or (key == SPECIAL_IDS and not _are_ids(value))
            or (key in _COUNTS and (type(value) is not int or not 0 <= value < limit))
        )
        if bad:
            return f"its {key!r} is {json.dumps(value)[:40]}"
    task = metadata.get("task")
    return _wrong_task(task) if isinstance(task, dict) else None


def _are_ids(value: Any) -> bool:
    def is_id(index: Any) -> bool:
        return index is None or (type(index) is int and index >= 0)

    return isinstance(value, dict) and all(
        all(map(is_id, ids)) if isinstance(ids, list) else is_id(ids) for ids in value.values()
    )


def _wrong_task(task: Mapping[str, Any]) -> str | None:
    """The same for the description of a task, `Task.describe()`."""
    verbalizer = task.get("verbalizer")
    pairs = verbalizer.items() if isinstance(verbalizer, dict) else [("", verbalizer or "")]
    texts = [task.get(key) for key in ("name", "inputs", "targets", "label", "answers", "group")]
    if not all(isinstance(text, str | None) for text in [*texts, *(text for _, text in pairs)]):
        return "its 'task' has a value of another type"
    # A label is read by a verbalizer, or beside open targets by metrics alone.
    label, closed = task.get("label"), verbalizer is not None
    if (closed and label is None) or (label is not None and not closed and not task.get("targets")):
        return "its 'task' lost the labels"
    return None


def _check_seal(header: Mapping[str, str], tensors: Mapping[str, np.ndarray], where: str) -> None:
    rest = {key: text for key, text in header.items() if key != _CHECKSUM}
    if _FORMAT not in header or header.get(_CHECKSUM) != _digest(rest, tensors):
        raise _damaged(where, "its checksum is another")
    if header[_FORMAT] != _VERSION:
        raise InputError(
            f"{where}: a prompt file of format {header[_FORMAT]}, ptjax reads {_VERSION} and "
            "before; update ptjax"
        )


def _damaged(where: str, what: str) -> InputError:
    return InputError(
        f"{where}: the prompt file was damaged or changed after ptjax wrote it ({what}); copy it "
        "again, or write it anew with ptjax.save_prompt"
    )


def _digest(header: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> str:
    """sha256 over names, dtypes, shapes, bytes and the header's texts, in sorted order."""
    hashed = hashlib.sha256(json.dumps(sorted(header.items())).encode())
    for name, tensor in sorted(tensors.items()):
        hashed.update(json.dumps([name, tensor.dtype.name, tensor.shape]).encode())
        hashed.update(np.ascontiguousarray(tensor).tobytes())
    return hashed.hexdigest()
