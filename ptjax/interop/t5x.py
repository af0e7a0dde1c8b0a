"""Reads T5X checkpoints and T5X-shaped Orbax trees, without T5X or Orbax.

This module determines the format: `t5x_legacy` reads msgpack + zarr, `orbax_folder` what T5X
(since 2023) and others save with Orbax. Only the model is read, never the optimizer.
"""

from __future__ import annotations

import os

from etils import epath

from ptjax.errors import InputError
from ptjax.interop import orbax_folder, t5x_legacy
from ptjax.interop.lazy_array import LazyArray
from ptjax.interop.orbax_folder import COMMITTED, names_in, step_of
from ptjax.models.family import Family
from ptjax.models.t5_family import T5_FAMILY

T5X_PROMPT = "encoder/prompt/prompt/prompt"
"""The parameter that holds the prompt in a checkpoint of google-research/prompt-tuning."""


def is_t5x(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a T5X or Orbax checkpoint, or a folder of checkpoints, complete or not."""
    path = epath.Path(path)
    if path.is_file():
        return path.name == "checkpoint"
    return path.is_dir() and (_is_checkpoint(path) or bool(checkpoints_in(path)))


def find_checkpoint(path: str | os.PathLike[str]) -> epath.Path:
    """Returns the checkpoint folder that `path` refers to.

    `path` is a checkpoint, or the `checkpoint` file or an item such as `state` in one. It may also
    be a folder of several checkpoints; the newest that was saved completely is returned.

    Raises:
        InputError: no checkpoint exists there, or none is complete.
    """
    path = epath.Path(path)
    if path.name == "checkpoint" and path.is_file():
        return path.parent
    if orbax_folder.is_item(names_in(path)) and path.name == "state":
        return path.parent if orbax_folder.items_in(path.parent) == [path] else path
    if _is_checkpoint(path):
        return path
    steps = checkpoints_in(path)
    committed = [folder for folder in steps.values() if (folder / COMMITTED).exists()]
    complete = [
        step
        for step, folder in steps.items()
        if _is_complete(folder) and (not committed or folder in committed)
    ]
    if complete:
        return steps[max(complete)]
    if steps:
        raise InputError(f"{path}: every checkpoint here is incomplete; copy the folder again")
    raise InputError(
        f"{path}: no T5X checkpoint here, neither a `checkpoint` file, nor a `state` folder, nor a "
        "complete checkpoint_N folder, nor Orbax's folders of steps or items"
    )


def checkpoints_in(path: str | os.PathLike[str]) -> dict[int, epath.Path]:
    """Returns the checkpoints in a folder by step, including incomplete ones.

    Raises:
        InputError: their names have different prefixes, as in `a_1` and `b_1`.
    """
    path = epath.Path(path)
    steps: dict[int, epath.Path] = {}
    prefixes: dict[str, epath.Path] = {}
    for name in sorted(names_in(path)):
        if (numbered := step_of(name)) and _is_checkpoint(path / name):
            prefixes[numbered[0]] = steps[numbered[1]] = path / name
    if len(prefixes) > 1:
        first, second, *_ = prefixes.values()
        raise InputError(
            f"{path}: {first.name} and {second.name} are of different runs; name one of them"
        )
    return steps


def load_t5x(path: str | os.PathLike[str], family: Family = T5_FAMILY) -> dict[str, LazyArray]:
    """Opens a checkpoint; its weights stay on disk until they are read.

    Args:
        path: as for `find_checkpoint`, local or gs://.
        family: the kind of network that the checkpoint must hold.

    Returns:
        the arrays, float32 or bfloat16, by T5X's parameter names
        ("encoder/layers_0/attention/query/kernel"); including the prompt,
        `encoder/prompt/prompt/prompt`, if the checkpoint holds one.

    Raises:
        InputError: the checkpoint is incomplete, damaged, or of an unsupported kind.
    """
    checkpoint = find_checkpoint(path)
    arrays = _load(checkpoint, family)
    if not arrays:
        raise InputError(
            f"{checkpoint}: the checkpoint holds no model (`target` is empty); a checkpoint of a "
            "ptjax run holds the trainable variables only: name the backbone instead"
        )
    for name, array in arrays.items():
        family.check_name(name, array)
        t5x_legacy.check_dtype(name, array.dtype, array.where)
    return arrays


def _load(checkpoint: epath.Path, family: Family) -> dict[str, LazyArray]:
    if (contents := legacy_contents(checkpoint)) is not None:
        return t5x_legacy.load_legacy(checkpoint / "checkpoint", contents)
    return orbax_folder.load_orbax(checkpoint, family)


def legacy_contents(checkpoint: epath.Path) -> t5x_legacy.Contents | None:
    """Reads the msgpack of a checkpoint older than Orbax; None if Orbax wrote the checkpoint.

    Raises:
        InputError: the file is damaged, or TensorFlow's.
    """
    names = names_in(checkpoint)
    if "checkpoint" in names and not orbax_folder.is_item(names):
        contents = t5x_legacy.read_container(checkpoint / "checkpoint")
        if not orbax_folder.has_placeholder(contents):
            return contents
    return None


def _is_checkpoint(path: epath.Path) -> bool:
    return (path / "checkpoint").is_file() or bool(orbax_folder.items_in(path))


def _is_complete(checkpoint: epath.Path) -> bool:
    items = orbax_folder.items_in(checkpoint)
    return all(map(orbax_folder.is_complete, items))
