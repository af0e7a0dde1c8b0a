"""Multitask prompts: one shared prompt times a low-rank matrix of each task (Wang et al. 2023).

The files are those of PEFT's MULTITASK_PROMPT_TUNING, and prompt files of ptjax that hold the
factors of their prompt too.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Float

from ptjax.errors import InputError, check_path, missing
from ptjax.files import JsonObject, PathLike
from ptjax.interop import peft, prompt_header, safetensors_file
from ptjax.interop.prompt_file import PromptFile
from ptjax.interop.write_prompt import hub_id
from ptjax.model_dir import ModelDir

PEFT_TYPE = "MULTITASK_PROMPT_TUNING"
_PEFT_NAMES = ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows")
OWN_NAMES: tuple[str, ...] = ("multitask_shared", "multitask_cols", "multitask_rows")
"""The tensors of a prompt file that holds its factors: shared [P, D], cols [P, r], rows [r, D]."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MultitaskPrompts:
    """The prompts of T tasks: that of task t is `shared * (cols[t] @ rows[t])`.

    Attributes:
        shared: float32 [P, D].
        cols, rows: float32 [T, P, r] and [T, r, D].
        metadata: of the tasks' prompts, such as the name of their backbone.
    """

    shared: Float[np.ndarray, "P D"]
    cols: Float[np.ndarray, "T P r"]
    rows: Float[np.ndarray, "T r D"]
    metadata: JsonObject = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        tasks, length, rank = (*self.cols.shape, 0, 0, 0)[:3]
        needed = [self.shared.shape[:1], (tasks, length, rank), (tasks, rank)]
        given = [(length,), self.cols.shape, self.rows.shape[:2]]
        width = self.shared.shape[1:]
        if needed != given or len(width) != 1 or self.rows.shape[2:] != width or 0 in needed[1]:
            shapes = ", ".join(
                f"{name} {list(getattr(self, name).shape)}" for name in ("shared", "cols", "rows")
            )
            raise InputError(f"the shapes of the factors do not fit together: {shapes}")

    def __repr__(self) -> str:
        """Its sizes; the numbers would fill the screen."""
        tasks, _, rank = self.cols.shape
        return f"<MultitaskPrompts {list(self.shared.shape)} of {tasks} tasks, rank {rank}>"

    def prompt(self, task: int) -> PromptFile:
        """Returns the prompt of a task, an ordinary prompt: use it, or `save` it.

        Raises:
            InputError: the number is not that of a task.
        """
        if not 0 <= task < len(self.cols):
            raise InputError(f"task {task} of multitask prompts of {len(self.cols)} tasks")
        return PromptFile(self.shared * (self.cols[task] @ self.rows[task]), self.metadata)

    @classmethod
    def join(cls, parts: Sequence[MultitaskPrompts]) -> MultitaskPrompts:
        """Makes one of several that have the same shared prompt; their tasks are in this order.

        Raises:
            InputError: they have other shared prompts, or other ranks.
        """
        if not parts:
            raise InputError("MultitaskPrompts.join needs at least one part")
        first = parts[0]
        for number, part in enumerate(parts):
            if not np.array_equal(part.shared, first.shared):
                raise InputError(
                    f"part {number} has another shared prompt than part 0; train the tasks from "
                    "one file with freeze_shared"
                )
            if part.cols.shape[2] != first.cols.shape[2]:
                ranks = [part.cols.shape[2], first.cols.shape[2]]
                raise InputError(f"part {number} has rank {ranks[0]}, part 0 has rank {ranks[1]}")
        cols, rows = (np.concatenate([getattr(x, n) for x in parts]) for n in ("cols", "rows"))
        names = {part.metadata.get("backbone_name") for part in parts}
        metadata = {"backbone_name": first.metadata["backbone_name"]} if None not in names else {}
        return cls(first.shared, cols, rows, metadata)

    def save(self, directory: PathLike) -> None:
        """Writes a directory that `peft.PeftModel.from_pretrained(t5, directory)` loads.

        Its forward pass needs `task_ids`. The prompt is put before the encoder's input alone.
        """
        check_path("the path of the PEFT directory", directory)
        tasks, length, rank = self.cols.shape
        name, revision = hub_id(self.metadata.get("backbone_name"))
        config: JsonObject = {
            "auto_mapping": None,
            "base_model_name_or_path": name,
            "inference_mode": True,
            "modules_to_save": None,
            "num_attention_heads": None,  # PEFT takes them from the backbone
            "num_layers": None,
            "num_ranks": rank,
            "num_tasks": tasks,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": length,
            "peft_type": PEFT_TYPE,
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_state_dict_path": None,
            "prompt_tuning_init_task": 0,
            "prompt_tuning_init_text": None,
            "revision": revision,
            "task_type": "SEQ_2_SEQ_LM",
            "token_dim": self.shared.shape[1],
            "tokenizer_kwargs": None,
            "tokenizer_name_or_path": None,
        }
        arrays = (self.shared, self.cols, self.rows)
        tensors = {
            name: np.asarray(array, np.float32)
            for name, array in zip(_PEFT_NAMES, arrays, strict=True)
        }
        peft.write_directory(epath.Path(directory).expanduser(), config, tensors, self.metadata)


def load_multitask(path: PathLike) -> MultitaskPrompts:
    """Loads multitask prompts: PEFT's, or the prompt of a run of `MultitaskPromptTuning`.

    PEFT's default for encoder-decoders is two prompts (`num_transformer_submodules` 2). Its
    training puts the second before the decoder's input, its `generate` leaves it out; it is
    dropped here, with a warning.

    Args:
        path: a PEFT directory; a prompt file, or the MODEL_DIR of a run, whose best one is loaded.

    Raises:
        InputError: it is missing or damaged, or holds no multitask prompts.
    """
    found = find_multitask(path)
    if found is None:
        raise InputError(f"{path} holds no multitask prompts; load_prompt reads an ordinary prompt")
    return found


def find_multitask(path: PathLike) -> MultitaskPrompts | None:
    """The same; None for a path that exists and holds something else."""
    check_path("the path of multitask prompts", path)
    place = epath.Path(path).expanduser()
    if not place.exists():
        raise missing("multitask prompts", place)
    if place.name in peft.FILES:
        place = place.parent
    if place.is_dir() and ModelDir(place).best_prompt().exists():
        place = ModelDir(place).best_prompt()
    if place.is_dir():
        is_multitask = (place / peft.CONFIG).exists() and peft.method_of(place) == PEFT_TYPE
        return _load_peft(place) if is_multitask else None
    with place.open("rb") as stream:
        if stream.read(9)[8:] != b"{":
            return None
    return _load_own(place)


def _load_own(file: epath.Path) -> MultitaskPrompts | None:
    """The factors in a prompt file, if it has any."""
    stored, header = safetensors_file.open_safetensors(file)
    if not set(OWN_NAMES) <= set(stored) or not prompt_header.is_sealed(header):
        return None
    arrays = {name: array.read_all() for name, array in stored.items()}
    metadata = prompt_header.unseal(header, arrays, os.fspath(file))
    shared, cols, rows = (arrays[name] for name in OWN_NAMES)
    factors = zip(OWN_NAMES, (shared, cols[None], rows[None]), strict=True)
    return _from_arrays(dict(factors), metadata, file)


def _load_peft(directory: epath.Path) -> MultitaskPrompts:
    file = directory / peft.CONFIG
    config = peft.read_config(file)
    if config.get("task_type") != "SEQ_2_SEQ_LM":
        raise InputError(f"{file}: task_type is {config.get('task_type')}, not SEQ_2_SEQ_LM")
    length = peft.size_of(config, "num_virtual_tokens", None, file)
    copies = peft.size_of(config, "num_transformer_submodules", 2, file)
    tensors, header, weights = peft.open_weights(directory)
    if absent := sorted(set(_PEFT_NAMES) - set(tensors)):
        raise InputError(f"{weights}: the tensor {absent[0]} is missing")
    arrays = {name: tensors[name].read_all() for name in _PEFT_NAMES}
    found = _from_arrays(arrays, peft.read_metadata(config, header), weights)
    if len(found.shared) != length * copies:
        raise InputError(
            f"{weights}: {_PEFT_NAMES[0]} has {len(found.shared)} rows, but {peft.CONFIG} says "
            f"{length * copies} (num_virtual_tokens {length} x num_transformer_submodules {copies})"
        )
    if copies > 1:
        logging.warning(
            "%s: the prompts were trained with a second half before the decoder's input, which is "
            "left out, as in PEFT's generate; num_transformer_submodules=1 trains without it",
            directory,
        )
    return dataclasses.replace(found, shared=found.shared[:length], cols=found.cols[:, :length])


def _from_arrays(
    arrays: Mapping[str, np.ndarray], metadata: JsonObject, where: epath.Path
) -> MultitaskPrompts:
    """Multitask prompts of the tensors (shared, cols, rows) of a file, checked."""
    for name, array in arrays.items():
        if not np.isfinite(array.astype(np.float32)).all():
            raise InputError(f"{where}: {name} is not finite")
    shared, cols, rows = (np.ascontiguousarray(x, np.float32) for x in arrays.values())
    try:
        return MultitaskPrompts(shared, cols, rows, metadata)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
