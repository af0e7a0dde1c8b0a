"""Reads and writes prompt files: ptjax's own, and other formats of a prompt for a T5.

ptjax's is a safetensors file with one tensor, `prompt` float32 [P, D]. Its header records where
the prompt was trained, how its inputs are written, and a checksum of the whole file
(`prompt_header`). A compiled prompt's file also holds the precomputed keys and values.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Array

from ptjax import untrusted
from ptjax.errors import InputError, check_path, gin_flag, missing
from ptjax.files import JsonObject, Metadata
from ptjax.interop import peft, prompt_header, safetensors_file, t5x
from ptjax.interop.lazy_array import LazyArray
from ptjax.model_dir import BEST_PROMPTS, PROMPT_SUFFIX, ModelDir
from ptjax.models.t5 import PromptStates

TENSOR = "prompt"
_KINDS = ("keys", "values")
T5X_PROMPT = "encoder/prompt/prompt/prompt"
"""The parameter that holds the prompt in a T5X checkpoint of google-research/prompt-tuning."""
NO_PROMPT = "none"
"""The name that means "no prompt" in commands and records; no prompt may be called that."""
_SUFFIXES = (PROMPT_SUFFIX, ".npy")


@dataclasses.dataclass(frozen=True, eq=False)
class PromptFile:
    """A prompt and the metadata in its file.

    Attributes:
        prompt: float32 [P, D], finite.
        metadata: the header of ptjax's own file, or the metadata that `peft.load_peft` returns;
            empty for other formats.
        states: the precomputed keys and values of a compiled prompt, for the backbone that the
            metadata name; None otherwise.
    """

    prompt: np.ndarray | Array
    metadata: JsonObject
    states: PromptStates | None = None

    @property
    def attends_to_input(self) -> bool:
        """Whether prompt positions attend to the input; True unless the metadata deny it."""
        return bool(self.metadata.get("sees_input", True))


def save_prompt(
    path: str | os.PathLike[str],
    prompt: np.ndarray,
    metadata: Metadata,
    states: PromptStates | None = None,
) -> None:
    """Writes ptjax's prompt file: `prompt` [P, D] as float32, in one atomic write.

    Args:
        metadata: JSON values by name; `load_prompt` returns them.
        states: the keys and values of a compiled prompt, [layers, P, H, K] each; written in their
            own dtype.

    Raises:
        InputError: the prompt is not finite or not [P, D], or a metadata value that ptjax reads
            has the wrong type.
    """
    check_path("the path of the prompt", path)
    if problem := prompt_header.wrong_value(metadata):
        raise InputError(f"{path}: a prompt cannot be saved with this metadata, {problem}")
    tensors = {TENSOR: _checked(np.asarray(prompt), os.fspath(path))}
    if states is not None:
        for stack, arrays in states._asdict().items():
            for kind, array in zip(_KINDS, arrays, strict=True):
                tensors[f"{stack}_{kind}"] = np.asarray(array)
    safetensors_file.save_safetensors(
        path,
        tensors.items(),
        {name: (array.shape, array.dtype.name) for name, array in tensors.items()},
        prompt_header.seal(safetensors_file.to_header(metadata), tensors),
    )


def load_prompt(path: str | os.PathLike[str]) -> PromptFile:
    """Loads a prompt in any supported format.

    Formats are ptjax's file, a numpy file of google-research/prompt-tuning (with or without .npy),
    a PEFT directory (or a file in it), and a T5X checkpoint that holds a prompt; local or gs://.

    Raises:
        InputError: the path has none of these formats, or the prompt is damaged, not finite or
            not [P, D].
    """
    check_path("the path of the prompt", path)
    path = epath.Path(path).expanduser()
    if not path.exists():
        raise missing("prompt", path)
    if path.name in peft.FILES:
        path = path.parent
    if path.is_dir() or path.name == "checkpoint":
        prompt, metadata = _load_directory(path)
        return PromptFile(_checked(prompt, os.fspath(path)), metadata)
    with path.open("rb") as stream:
        start = stream.read(9)
    if start.startswith(b"\x93NUMPY"):
        return PromptFile(_checked(_load_numpy(path), os.fspath(path)), {})
    if start[8:] == b"{":
        return _load_safetensors(path)
    kind = {b"\x80": "a pickle, which could run any code", b"P": "a zip (.npz or torch)"}
    raise InputError(
        f"{path}: not a prompt file: {kind.get(start[:1], 'unknown format')}; ptjax reads "
        "safetensors, .npy, PEFT directories and T5X checkpoints"
    )


def wrong_width(
    called: str, shape: Sequence[int], backbone: str, width: int, tuned_on: object = None
) -> InputError:
    """Makes the exception for a prompt whose width is not the backbone's.

    Args:
        called: the prompt's name in the message.
        shape: the prompt's shape.
        backbone: the backbone's name.
        width: the backbone's D.
        tuned_on: the name of the backbone that the prompt was tuned on, if it is recorded.
    """
    return InputError(
        f"{called} {list(shape)} does not fit {backbone}, whose width is {width}; it was tuned on "
        f"{tuned_on or 'another backbone'}"
    )


def load_prompts(directory: str | os.PathLike[str]) -> dict[str, PromptFile]:
    """Loads every prompt in a directory, local or gs://; returns them by name, sorted.

    Prompts are files (*.safetensors, *.npy), PEFT directories, and folders with a
    `best.safetensors` or `prompts/best.safetensors` (members of a sweep, or runs). A prompt has
    the name of its file without the suffix, or of its folder. Hidden entries are skipped; a
    folder without a prompt is skipped with a warning.

    Raises:
        InputError: the directory holds no prompt, two have the same name, one is called 'none', or
            `load_prompt` refuses one; the message names the path.
    """
    check_path("the folder of the prompts", directory)
    directory = epath.Path(directory).expanduser()
    if not directory.exists():
        raise missing("prompts", directory)
    if not directory.is_dir():
        raise InputError(f"{directory} is a file; name the directory that the prompts are in")
    if peft.is_peft(directory):
        raise InputError(f"{directory}: a PEFT directory holds one prompt; name its parent")
    paths: dict[str, epath.Path] = {}
    for path in sorted(directory.iterdir(), key=os.fspath):
        if path.name.startswith("."):
            continue
        name = path.name if path.is_dir() else path.stem
        for prompt in _prompts_at(path):
            if name in paths:
                raise InputError(f"{paths[name]} and {prompt} have the same name; move one")
            if name == NO_PROMPT:
                raise InputError(f"{prompt}: the name {name!r} is reserved (no prompt); rename it")
            paths[name] = prompt
    if not paths:
        inner = ModelDir(directory).prompts()
        hint = f"; did you mean {inner}?" if inner.is_dir() else ""
        raise InputError(f"{directory}: no prompt in this directory{hint}")
    return {name: load_prompt(paths[name]) for name in sorted(paths)}


def _prompts_at(path: epath.Path) -> list[epath.Path]:
    """The prompts that a file or folder may mean: usually one, or none; several are ambiguous."""
    if not path.is_dir():
        return [path] if path.suffix in _SUFFIXES else []
    inside = [path / best for best in BEST_PROMPTS if (path / best).exists()]
    inside += [path] if peft.is_peft(path) else []
    if not inside:
        logging.warning("%s: no prompt in this folder, skipped", path)
    return inside


def prompts_below(directory: epath.Path) -> list[epath.Path]:
    """Lists prompts below a directory that is not a prompt itself, for "did you mean" messages.

    PEFT saves a named adapter in a subfolder; google-research/prompt-tuning writes
    `numpy_checkpoints/checkpoint_N/encoder.prompt.prompt.prompt`.
    """
    numpy_name = T5X_PROMPT.replace("/", ".")
    prompts = [file for glob in ("", "*/") for file in directory.glob(glob + numpy_name)]
    prompts += [config.parent for config in directory.glob(f"*/{peft.CONFIG}")]
    return sorted(prompts, key=os.fspath)


def _load_directory(path: epath.Path) -> tuple[np.ndarray, JsonObject]:
    """(prompt [P, D] as stored, metadata)."""
    if peft.is_peft(path):
        prompt, metadata = peft.load_peft(path)
        prompt_header.check_types(metadata, os.fspath(path))
        return prompt, metadata
    if not t5x.is_t5x(path):
        below = prompts_below(path)
        raise InputError(
            f"{path}: no prompt in this directory, neither PEFT's {peft.CONFIG} nor a T5X "
            + (f"checkpoint; did you mean {below[0]}?" if below else "checkpoint; name its file")
        )
    checkpoint = t5x.find_checkpoint(path)
    arrays = t5x.load_t5x(checkpoint)
    if T5X_PROMPT not in arrays:
        raise InputError(f"{checkpoint}: the checkpoint holds no prompt (parameter {T5X_PROMPT})")
    return arrays[T5X_PROMPT].read_all(), {}


def _load_numpy(path: epath.Path) -> np.ndarray:
    try:
        array = untrusted.read_numpy(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: the numpy file is truncated or damaged ({error})") from error
    # numpy does not know bfloat16 and writes it as two raw bytes per entry.
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


def _load_safetensors(path: epath.Path) -> PromptFile:
    arrays, header = safetensors_file.open_safetensors(path)
    if TENSOR not in arrays:
        raise InputError(f"{path}: the file holds {sorted(arrays)[:3]}, not the tensor {TENSOR!r}")
    sealed = prompt_header.is_sealed(header)
    tensors = {name: x.read_all() for name, x in arrays.items() if sealed or name == TENSOR}
    metadata = prompt_header.unseal(header, tensors, os.fspath(path))
    prompt = _checked(tensors[TENSOR], os.fspath(path))
    file = PromptFile(prompt, metadata, _load_states(path, arrays))
    if file.states is not None and file.attends_to_input:
        raise InputError(
            f"{path}: a prompt that attends to its input cannot be compiled; compile it again"
        )
    if file.states is not None and file.states.encoder[0].shape[1] != len(prompt):
        raise InputError(
            f"{path}: the states have {file.states.encoder[0].shape[1]} positions, the prompt "
            f"{len(prompt)}; compile it again"
        )
    return file


def _load_states(path: epath.Path, arrays: Mapping[str, LazyArray]) -> PromptStates | None:
    """The states of a compiled prompt, if the file has any."""
    names = [[f"{stack}_{kind}" for kind in _KINDS] for stack in PromptStates._fields]
    if not any(name in arrays for pair in names for name in pair):
        return None
    stacks = []
    for pair in names:
        if missing := [name for name in pair if name not in arrays]:
            raise InputError(f"{path}: the compiled prompt has no tensor {missing[0]!r}")
        keys, values = (arrays[name].read_all() for name in pair)
        if keys.ndim != 4 or keys.shape != values.shape or not len(keys):
            raise InputError(
                f"{path}: {pair[0]} has shape {list(keys.shape)}, not [layers, P, H, K]"
            )
        if not all(np.isfinite(array.astype(np.float32)).all() for array in (keys, values)):
            raise InputError(f"{path}: {pair[0]} or {pair[1]} is not finite")
        stacks.append((keys, values))
    return PromptStates(*stacks)


def _checked(prompt: np.ndarray, where: str) -> np.ndarray:
    """`prompt` as float32 [P, D]."""
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


@dataclasses.dataclass(frozen=True)
class FromFile:
    """Initialises a prompt from any file that `load_prompt` reads, as SPoT (Vu et al. 2022) does.

    Calling it raises an `InputError` if the prompt in the file does not have the run's length.
    """

    path: str | os.PathLike[str]

    def __call__(self, key: Any, length: int, context: Any) -> np.ndarray:
        prompt = np.asarray(load_prompt(self.path).prompt)
        if len(prompt) != length:
            raise InputError(
                f"{self.path}: {len(prompt)} rows, but the run expects {length}; set "
                + gin_flag("PROMPT_LENGTH", len(prompt))
            )
        return prompt

    def identity(self) -> JsonObject:
        """Replaces the path by the prompt in the identity of a run; see `identity.describe`."""
        return {"path": load_prompt(self.path).prompt}
