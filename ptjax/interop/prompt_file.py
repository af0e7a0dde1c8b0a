"""Reads and writes prompt files: ptjax's own, and other formats of a prompt for a T5.

ptjax's is a safetensors file with one tensor, `prompt` float32 [P, D]. Its header records where
the prompt was trained, how its inputs are written, and a checksum of the whole file
(`prompt_header`). A compiled prompt's file also holds the precomputed keys and values.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Array

from ptjax import untrusted
from ptjax.errors import InputError, check_path, missing
from ptjax.files import JsonObject
from ptjax.interop import hub, model_card, peft, prompt_header, safetensors_file, t5x
from ptjax.interop.adapter_file import METHOD
from ptjax.interop.lazy_array import LazyArray
from ptjax.interop.t5x import T5X_PROMPT
from ptjax.interop.write_prompt import KINDS, TENSOR, checked, save_folder, save_prompt, with_run
from ptjax.model_dir import BEST_PROMPTS, PROMPT_SUFFIX, ModelDir
from ptjax.models.t5 import PromptStates
from ptjax.output import check_place

NO_PROMPT = "none"
"""The name that means "no prompt" in commands and records; no prompt may be called that."""
_SUFFIXES = (PROMPT_SUFFIX, ".npy")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PromptFile:
    """A prompt and the metadata in its file.

    Attributes:
        prompt: float32 [P, D], finite.
        metadata: the header of ptjax's own file, or the metadata that `peft.load_peft` returns;
            empty for other formats.
        states: the keys and values from `precompute_prompt_kv`, which hold only for the backbone
            that the metadata name; None if they were not computed.
        source: where it was loaded from: the absolute path of its file or folder, or its name on
            the Hugging Face hub with the commit, "me/tickets-prompt@COMMIT".
    """

    prompt: np.ndarray | Array
    metadata: JsonObject
    states: PromptStates | None = None
    source: str | None = None

    def __repr__(self) -> str:
        """Its shape, task and backbone; the numbers would fill the screen."""
        task, name = self.metadata.get("task"), self.metadata.get("backbone_name")
        of = f", task {task.get('name')}" if isinstance(task, dict) else ""
        on = f", tuned on {name}" if name else ""
        return f"<PromptFile {list(np.shape(self.prompt))}{of}{on}>"

    @property
    def attends_to_input(self) -> bool:
        """Whether prompt positions attend to the input; True unless the metadata say otherwise."""
        return bool(self.metadata.get("sees_input", True))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the prompt to a folder with its model card, or to a single file.

        The folder gets ptjax's `prompt.safetensors`, which `load_prompt` finds there, README.md,
        and the files of PEFT, for `peft.PeftModel.from_pretrained`. (PEFT cannot use a prompt whose
        positions do not attend to the input.) Such files in an existing folder are replaced.

        If the prompt is the best one of a finished run, its scores and recipe are read from there
        and saved too, for the card.

        Args:
            path: a folder; or a file, whose name ends in .safetensors, for the prompt alone.

        Raises:
            InputError: `path` cannot be written, has another suffix of a file, or is a folder with
                a README.md that ptjax did not write; or the results of the run are damaged.
        """
        check_path("the path of the prompt", path)
        check_place(path, "path")
        target = epath.Path(path).expanduser()
        metadata, array = with_run(self.metadata, self.source), np.asarray(self.prompt)
        if target.suffix == PROMPT_SUFFIX and not target.is_dir():
            return save_prompt(target, array, metadata, self.states)
        if target.suffix in _SUFFIXES:
            raise InputError(f"{path}: save() writes .safetensors; ptjax.export writes other files")
        name = target.name or os.path.basename(os.path.abspath(target))
        save_folder(target, array, metadata, self.states, name=name)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a prompt of ptjax",
    ) -> str:
        """Uploads what `save` writes to the Hugging Face hub, in one commit.

        Paths of this machine are not uploaded: a backbone that is not from the hub is recorded with
        the name of its folder alone.

        Args:
            repo_id: namespace/name; the repository is created if it does not exist.
            private: whether a new repository is private; None: as the namespace's settings say.
            token: default: HF_TOKEN, or that of `hf auth login`.
            revision: the branch, created if it does not exist; None: the default branch.

        Returns:
            the URL of the commit.

        Raises:
            InputError: the id is invalid, you are not logged in or may not write there, or the hub
                cannot be reached.
        """
        metadata = with_run(self.metadata, self.source)
        if model_card.hub_model(metadata) is None and isinstance(
            backbone := metadata.get("backbone_name"), str
        ):
            metadata["backbone_name"] = model_card.file_name(backbone)
        with tempfile.TemporaryDirectory() as folder:
            array = np.asarray(self.prompt)
            save_folder(epath.Path(folder), array, metadata, self.states, name=repo_id)
            return hub.upload(
                pathlib.Path(folder),
                repo_id,
                ours=(hub.PROMPT, *peft.FILES),
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message,
            )


def load_prompt(path: str | os.PathLike[str], revision: str | None = None) -> PromptFile:
    """Loads a prompt in any supported format, from a local path, gs:// or the Hugging Face hub.

    Formats are ptjax's file, a folder that `PromptFile.save` wrote, a numpy file of
    google-research/prompt-tuning (with or without .npy), a PEFT directory (or a file in it), a T5X
    checkpoint that holds a prompt, and a MODEL_DIR, or a member's folder in it, whose best prompt
    is loaded.

    Args:
        path: a path; or, if it does not exist, a name on the hub, "me/tickets-prompt" or
            "me/tickets-prompt@REVISION". Only the files of the prompt are downloaded, no pickle.
        revision: a branch, tag or commit on the hub; None: the default branch.

    Raises:
        InputError: the path has none of these formats, or is the MODEL_DIR of a sweep or of model
            tuning; the prompt is damaged, not finite or not [P, D]; or the hub has no such prompt
            or cannot be reached.
    """
    check_path("the path of the prompt", path)
    local = epath.Path(path).expanduser()
    if local.exists():
        if revision is not None:
            raise InputError(f"{path}: a local path has no revisions; leave {revision!r} out")
        return _load(local)
    name = os.fspath(path)
    if not hub.may_be_name(name):
        raise missing("prompt", local)
    folder, name = hub.download(name, revision)
    return dataclasses.replace(_load(folder), source=name)


def _load(path: epath.Path) -> PromptFile:
    """Loads the prompt at a path that exists."""
    if path.name in peft.FILES:
        path = path.parent
    if path.is_dir() or path.name == "checkpoint":
        path = _file_in(path)
    if path.is_dir() or path.name == "checkpoint":
        prompt, metadata = _load_directory(path)
        file = PromptFile(checked(prompt, os.fspath(path)), metadata)
    else:
        file = _load_file(path)
    source = path if "://" in os.fspath(path) else os.path.abspath(path)
    return dataclasses.replace(file, source=os.fspath(source))


def _load_file(path: epath.Path) -> PromptFile:
    with path.open("rb") as stream:
        start = stream.read(9)
    if start.startswith(b"\x93NUMPY"):
        return PromptFile(checked(_load_numpy(path), os.fspath(path)), {})
    if start[8:] == b"{":
        return _load_safetensors(path)
    kind = {b"\x80": "a pickle, which could run any code", b"P": "a zip (.npz or torch)"}
    raise InputError(
        f"{path}: not a prompt file: {kind.get(start[:1], 'unknown format')}; ptjax reads "
        "safetensors, .npy, PEFT directories and T5X checkpoints"
    )


def _file_in(folder: epath.Path) -> epath.Path:
    """ptjax's own file in a folder that `save` wrote or a run; else `folder` itself."""
    run = ModelDir(folder)
    for file in (folder / hub.PROMPT, *(folder / best for best in BEST_PROMPTS)):
        if file.exists():
            return file
    if names := run.members():
        raise InputError(
            f"{folder}: the run is a sweep of {', '.join(names)}; name the prompt of one, such as "
            f"{run.best_prompt(names[0])}"
        )
    if run.best_model.exists():
        raise InputError(
            f"{folder}: the run tuned the whole model, and has no prompt; load the model, "
            f"{run.best_model}, with ptjax.load_backbone"
        )
    if run.best_adapter().exists():
        raise InputError(
            f"{folder}: the run has an adapter, {run.best_adapter()}, and no prompt; load it with "
            "ptjax.load_adapter"
        )
    # A MODEL_DIR of T5X has a config.gin too.
    if run.config.exists() and not peft.is_peft(folder) and not t5x.is_t5x(folder):
        raise InputError(f"{folder}: the run has saved no best prompt yet; let it evaluate once")
    return folder


def wrong_width(
    called: str, shape: Sequence[int], backbone: str, width: int, tuned_on: object = None
) -> InputError:
    """Makes the exception for a prompt whose width is not the backbone's.

    Args:
        called: what the message calls the prompt, such as "the prompt".
        shape: the prompt's shape.
        backbone: the backbone's name.
        width: the backbone's embedding width, D.
        tuned_on: the name of the backbone that the prompt was tuned on, if it is recorded.
    """
    return InputError(
        f"{called} {list(shape)} does not fit {backbone}, whose width is {width}; it was tuned on "
        f"{tuned_on or 'another backbone'}"
    )


def load_prompts(directory: str | os.PathLike[str]) -> dict[str, PromptFile]:
    """Loads every prompt in a directory, local or gs://; returns them by name, sorted.

    Each entry of the directory may be a prompt: a file (*.safetensors, *.npy), a PEFT directory, or
    a folder that contains `best.safetensors` or `prompts/best.safetensors`, such as a MODEL_DIR. A
    prompt's name is that of the entry; a file's suffix is removed. Hidden entries and other files
    are skipped silently, other folders with a warning.

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
    saved = (path / hub.PROMPT).exists() or peft.is_peft(path)
    inside += [path] if saved else []
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
    if METHOD in header:
        raise InputError(
            f"{path} holds an adapter, not a prompt; give it with --adapter, or load it with "
            "ptjax.load_adapter"
        )
    if TENSOR not in arrays:
        raise InputError(f"{path}: the file holds {sorted(arrays)[:3]}, not the tensor {TENSOR!r}")
    sealed = prompt_header.is_sealed(header)
    tensors = {name: x.read_all() for name, x in arrays.items() if sealed or name == TENSOR}
    metadata = prompt_header.unseal(header, tensors, os.fspath(path))
    prompt = checked(tensors[TENSOR], os.fspath(path))
    file = PromptFile(prompt, metadata, _load_states(path, arrays))
    if file.states is not None and file.attends_to_input:
        raise InputError(
            f"{path}: a prompt that attends to its input cannot be compiled; compile it again"
        )
    for keys, _ in file.states.present().values() if file.states else ():
        if (held := keys.shape[1]) != (length := len(prompt)):
            raise InputError(
                f"{path}: the states have {held} positions, the prompt {length}; compile it again"
            )
    return file


def _load_states(path: epath.Path, arrays: Mapping[str, LazyArray]) -> PromptStates | None:
    """The states of a compiled prompt, if the file has any."""
    names = [[f"{stack}_{kind}" for kind in KINDS] for stack in ("encoder", "decoder")]
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
