"""Reads T5X checkpoints and T5X-shaped trees of Orbax, without T5X or Orbax.

Which of the formats a path holds is found out here; `t5x_legacy` reads msgpack + zarr, and
`orbax_folder` what T5X (since 2023) and others save with Orbax. Only the model is read, never the
optimizer.
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


def is_t5x(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a checkpoint of T5X or Orbax, or a folder of some, whole or not."""
    path = epath.Path(path)
    if path.is_file():
        return path.name == "checkpoint"
    return path.is_dir() and (_is_checkpoint(path) or bool(checkpoints_in(path)))


def find_checkpoint(path: str | os.PathLike[str]) -> epath.Path:
    """The checkpoint folder that `path` means.

    A checkpoint (or the `checkpoint` file or an item such as `state` in it) means itself. A folder
    of several means the largest step whose saving came to its end.

    Raises:
        InputError: there is none.
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
        raise InputError(f"{path}: no checkpoint here was saved to its end; copy the folder again")
    raise InputError(
        f"{path}: no T5X checkpoint here, neither a `checkpoint` file, nor a `state` folder, nor a "
        "complete checkpoint_N folder, nor Orbax's folders of steps or items"
    )


def checkpoints_in(path: str | os.PathLike[str]) -> dict[int, epath.Path]:
    """Step -> checkpoint in a folder of them, finished or not.

    Raises:
        InputError: the folder has steps of two kinds, as in `a_1` and `b_1`.
    """
    path = epath.Path(path)
    steps: dict[int, epath.Path] = {}
    prefixes: dict[str, epath.Path] = {}
    for name in sorted(names_in(path)):
        if (numbered := step_of(name)) and _is_checkpoint(path / name):
            prefixes[numbered[0]] = steps[numbered[1]] = path / name
    if len(prefixes) > 1:
        one, other, *_ = prefixes.values()
        raise InputError(f"{path}: {one.name} and {other.name} are of two runs; name one of them")
    return steps


def load_t5x(path: str | os.PathLike[str], family: Family = T5_FAMILY) -> dict[str, LazyArray]:
    """Opens a checkpoint; its weights stay on disk until they are read.

    Args:
        path: whatever `find_checkpoint` takes, local or gs://.
        family: of the network whose tree it is.

    Returns:
        T5X parameter name ("encoder/layers_0/attention/query/kernel") -> array, float32 or
        bfloat16; with the prompt, `encoder/prompt/prompt/prompt`, where there is one.

    Raises:
        InputError: the checkpoint is incomplete, damaged, or of a kind that is not read.
    """
    checkpoint = find_checkpoint(path)
    arrays = _load(checkpoint, family)
    if not arrays:
        raise InputError(
            f"{checkpoint}: the checkpoint holds no model (`target` is empty); is it one of a run "
            "of ptjax, which keeps only what trains?"
        )
    for name, array in arrays.items():
        family.check_name(name, array)
        t5x_legacy.check_dtype(name, array.dtype, array.where)
    return arrays


def _load(checkpoint: epath.Path, family: Family) -> dict[str, LazyArray]:
    names = names_in(checkpoint)
    if "checkpoint" in names and not orbax_folder.is_item(names):
        file = checkpoint / "checkpoint"
        contents = t5x_legacy.read_container(file)
        if not orbax_folder.has_placeholder(contents):
            return t5x_legacy.load_legacy(file, contents)
    return orbax_folder.load_orbax(checkpoint, family)


def _is_checkpoint(path: epath.Path) -> bool:
    return (path / "checkpoint").is_file() or bool(orbax_folder.items_in(path))


def _is_complete(checkpoint: epath.Path) -> bool:
    items = orbax_folder.items_in(checkpoint)
    return all(map(orbax_folder.is_complete, items))
