"""Writes prompts: ptjax's own file, and the folder in which a prompt is shared."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import ml_dtypes
import numpy as np
from etils import epath

from ptjax import files
from ptjax.errors import InputError, check_path
from ptjax.files import JsonObject, Metadata
from ptjax.interop import hub, model_card, peft, prompt_header, safetensors_file
from ptjax.model_dir import ModelDir
from ptjax.models.t5 import PromptStates

TENSOR = "prompt"
KINDS = ("keys", "values")
_HUB_ID = re.compile(r"(.+)@([0-9a-f]{40})")
"""How ptjax records a model of the hub."""


def save_prompt(
    path: str | os.PathLike[str],
    prompt: np.ndarray,
    metadata: Metadata,
    states: PromptStates | None = None,
    *,
    factors: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes ptjax's prompt file: `prompt` [P, D] as float32, in one atomic write.

    Args:
        metadata: JSON values by name; `load_prompt` returns them.
        states: the keys and values from `precompute_prompt_kv`, [layers, P, H, K] each, to store
            with the prompt; written in their own dtype.
        factors: further float32 tensors by name, from which the prompt was computed.

    Raises:
        InputError: the prompt is not finite or not [P, D], or a metadata value that ptjax reads
            has the wrong type or is out of range.
    """
    check_path("the path of the prompt", path)
    if problem := prompt_header.wrong_value(metadata):
        raise InputError(f"{path}: a prompt cannot be saved with this metadata, {problem}")
    tensors = {TENSOR: checked(np.asarray(prompt), os.fspath(path)), **(factors or {})}
    if states is not None:
        for stack, arrays in states.present().items():
            for kind, array in zip(KINDS, arrays, strict=True):
                tensors[f"{stack}_{kind}"] = np.asarray(array)
    safetensors_file.save_safetensors(
        path,
        tensors.items(),
        {name: (array.shape, array.dtype.name) for name, array in tensors.items()},
        prompt_header.seal(safetensors_file.to_header(metadata), tensors),
    )


def checked(prompt: np.ndarray, where: str) -> np.ndarray:
    """Returns `prompt` as float32 [P, D].

    Args:
        where: its file, for messages.

    Raises:
        InputError: it has another shape or dtype, or is not finite.
    """
    floating = np.issubdtype(prompt.dtype, np.floating) or prompt.dtype == ml_dtypes.bfloat16
    if not floating:
        raise InputError(f"{where}: the prompt has dtype {prompt.dtype}, not floating point")
    if prompt.ndim != 2 or 0 in prompt.shape:
        raise InputError(f"{where}: the prompt has shape {list(prompt.shape)}, not [P, D]")
    with np.errstate(over="ignore"):
        prompt = np.ascontiguousarray(prompt, np.float32)
    if not np.isfinite(prompt).all():
        row = int(np.flatnonzero(~np.isfinite(prompt).all(axis=1))[0])
        raise InputError(f"{where}: the prompt is not finite (row {row})")
    return prompt


def with_run(metadata: Metadata, source: str | None) -> JsonObject:
    """Returns a prompt's metadata with what its model card says of the run.

    It is read from `results.json` if the prompt is the best one of a run that has finished.

    Args:
        metadata: the prompt's metadata.
        source: the file that the prompt was loaded from.

    Raises:
        InputError: `results.json` is damaged.
    """
    of_run = None if source is None else ModelDir.of_best_prompt(source)
    if of_run is None:
        return dict(metadata)
    run, member = of_run
    results = run.read_results() or {}
    # After a restart the results may be those of an earlier best prompt.
    own = model_card.results_of(results, member)
    if not own or own.get("step") != metadata.get("step"):
        return dict(metadata)
    return {**metadata, model_card.RUN: model_card.record_of_run(results, member)}


def save_folder(
    folder: epath.Path,
    prompt: np.ndarray,
    metadata: Metadata,
    states: PromptStates | None,
    *,
    name: str,
) -> None:
    """Writes the folder in which a prompt is shared: `prompt.safetensors`, PEFT's files, README.md.

    PEFT's files are left out, and removed if they exist, for a prompt that PEFT would use in
    another way: one whose positions do not attend to the input.

    Args:
        prompt, metadata, states: as for `save_prompt`.
        name: what the model card calls the prompt in code.

    Raises:
        InputError: `folder` is a file, or holds a README.md that is not a model card of ptjax.
    """
    check_folder(folder)
    for_peft = bool(metadata.get("sees_input", True))
    save_prompt(folder / hub.PROMPT, prompt, metadata, states)
    if for_peft:
        base_model, revision = hub_id(metadata.get("backbone_name"))
        peft.export_peft(
            folder, prompt, base_model=base_model, revision=revision, metadata=metadata
        )
    else:
        for file in peft.FILES:
            (folder / file).unlink(missing_ok=True)
    write_card(folder, prompt, metadata, name=name, for_peft=for_peft)


def check_folder(folder: epath.Path) -> None:
    """Raises InputError if `save_folder` cannot write to a folder, which may exist."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder, or a file that ends in .safetensors")
    card = folder / model_card.CARD
    if card.exists() and not model_card.is_card(card.read_bytes().decode(errors="replace")):
        raise InputError(f"{card} exists, and is not a model card of ptjax; name another folder")


def write_card(
    folder: epath.Path, prompt: np.ndarray, metadata: Metadata, *, name: str, for_peft: bool = True
) -> None:
    """Writes the model card of a prompt.

    Args:
        name: what it calls the prompt in code.
        for_peft: whether the folder holds PEFT's files.
    """
    length, width = prompt.shape
    text = model_card.make_card(name, (length, width), metadata, peft=for_peft)
    files.write_bytes(folder / model_card.CARD, text.encode())


def hub_id(backbone: object) -> tuple[str | None, str | None]:
    """Splits a backbone's name, "id@commit" or a path, into (id or path, commit or None)."""
    if not isinstance(backbone, str):
        return None, None
    match = _HUB_ID.fullmatch(backbone)
    return (match[1], match[2]) if match else (backbone, None)
