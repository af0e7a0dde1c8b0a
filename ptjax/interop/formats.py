"""The file formats of backbones, a list: the first that matches a folder opens it."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any, NamedTuple, Protocol

from absl import logging
from etils import epath

from ptjax.errors import InputError
from ptjax.interop import huggingface, own_names, t5x
from ptjax.interop.huggingface_format import load_config
from ptjax.interop.lazy_array import LazyArray
from ptjax.models.family import Family


class Opened(NamedTuple):
    """What a folder holds.

    Attributes:
        arrays: parameter -> its array, which is still on disk.
        told: fields of the config that the files state.
        name: of the backbone.
        folders: where a tokenizer may lie, nearest first.
    """

    arrays: dict[str, LazyArray]
    told: dict[str, Any]
    name: str
    folders: tuple[epath.Path, ...]


class Format(Protocol):
    """One way to store a backbone."""

    def matches(self, directory: epath.Path, family: Family) -> bool:
        """Whether `directory` is of this format, whole or damaged."""
        ...

    def open(
        self, directory: epath.Path, name: str, chosen: Collection[str], family: Family
    ) -> Opened:
        """Opens it; weights stay on disk.

        Args:
            name: what the user called it.
            chosen: fields that the user sets; contradictions about them do not matter.

        Raises:
            InputError: it is incomplete, damaged, or holds another network.
        """
        ...


class T5XFormat:
    """A checkpoint of T5X, or a tree that Orbax saved; or a folder of several."""

    def matches(self, directory: epath.Path, family: Family) -> bool:
        return t5x.is_t5x(directory)

    def open(
        self, directory: epath.Path, name: str, chosen: Collection[str], family: Family
    ) -> Opened:
        found = t5x.find_checkpoint(directory)
        if found.parent == directory and len(t5x.checkpoints_in(directory)) > 1:
            logging.warning("%s: loading the newest of its checkpoints, %s", name, found.name)
        folders = (found, found.parent)
        with_config = (x for x in folders if (x / "config.json").exists())
        told = next((load_config(x, chosen) for x in with_config), {})
        return Opened(t5x.load_t5x(found, family), told, os.fspath(found), folders)


class HuggingFaceFormat:
    """`config.json` beside weights under Hugging Face's names, which come out under T5X's."""

    def matches(self, directory: epath.Path, family: Family) -> bool:
        return (directory / "config.json").exists()

    def open(
        self, directory: epath.Path, name: str, chosen: Collection[str], family: Family
    ) -> Opened:
        arrays = huggingface.load_huggingface(directory)
        return Opened(arrays, load_config(directory, chosen), name, (directory,))


class OwnNamesFormat:
    """`model.safetensors` under the parameters' own names, see `own_names`."""

    def matches(self, directory: epath.Path, family: Family) -> bool:
        return not family.tensor_names({}) and (directory / own_names.WEIGHTS).exists()

    def open(
        self, directory: epath.Path, name: str, chosen: Collection[str], family: Family
    ) -> Opened:
        return Opened(own_names.load_own_names(directory), {}, name, (directory,))


FORMATS: tuple[Format, ...] = (T5XFormat(), HuggingFaceFormat(), OwnNamesFormat())


def open_directory(
    directory: epath.Path, name: str, chosen: Collection[str], family: Family
) -> Opened:
    """`Format.open` of the first format that matches; args and errors as there.

    Raises:
        InputError: none matches.
    """
    for form in FORMATS:
        if form.matches(directory, family):
            return form.open(directory, name, chosen, family)
    own = "" if family.tensor_names({}) else f", nor {own_names.WEIGHTS} under its own names"
    raise InputError(
        f"{name} holds no backbone that ptjax knows: neither a T5X checkpoint "
        f"(checkpoint_N) nor a Hugging Face directory (config.json beside *.safetensors){own}"
    )
