"""The file formats of backbones: `FORMATS`, of which the first that matches a folder opens it."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import NamedTuple, Protocol

from absl import logging
from etils import epath

from ptjax.errors import InputError
from ptjax.files import JsonObject
from ptjax.interop import huggingface, own_names, t5x
from ptjax.interop.huggingface_format import load_config
from ptjax.interop.lazy_array import LazyArray
from ptjax.models.family import Family


class Opened(NamedTuple):
    """The content of a backbone's folder.

    Attributes:
        arrays: maps parameter names (ptjax's) to arrays, which are still on disk.
        from_config: the fields of the network's config that the files state.
        name: the backbone's name.
        folders: where to look for a tokenizer, nearest first.
    """

    arrays: dict[str, LazyArray]
    from_config: JsonObject
    name: str
    folders: tuple[epath.Path, ...]


class Format(Protocol):
    """The protocol of a file format of backbones; `FORMATS` are the implementations."""

    def matches(self, directory: epath.Path, family: Family) -> bool:
        """Whether `directory` has this format, complete or damaged."""
        ...

    def open(
        self, directory: epath.Path, name: str, chosen: Collection[str], family: Family
    ) -> Opened:
        """Opens the folder; weights stay on disk.

        Args:
            name: the backbone's name as the user wrote it, for messages.
            chosen: the config fields that the user sets; files may contradict each other about
                them.
            family: the kind of network that the folder must hold.

        Raises:
            InputError: the folder is incomplete, damaged, or holds another network.
        """
        ...


class T5XFormat:
    """Opens a T5X checkpoint, a tree saved by Orbax, or the newest of a folder of several."""

    def matches(self, directory: epath.Path, family: Family) -> bool:
        """Whether `directory` is a T5X or Orbax checkpoint, or a folder of checkpoints."""
        return t5x.is_t5x(directory)

    def open(
        self, directory: epath.Path, name: str, chosen: Collection[str], family: Family
    ) -> Opened:
        """Opens the checkpoint; see `Format.open`."""
        checkpoint = t5x.find_checkpoint(directory)
        if checkpoint.parent == directory and len(t5x.checkpoints_in(directory)) > 1:
            logging.warning("%s: loading the newest of its checkpoints, %s", name, checkpoint.name)
        folders = (checkpoint, checkpoint.parent)
        with_config = (x for x in folders if (x / "config.json").exists())
        from_config = next((load_config(x, chosen) for x in with_config), {})
        arrays = t5x.load_t5x(checkpoint, family)
        return Opened(arrays, from_config, os.fspath(checkpoint), folders)


class HuggingFaceFormat:
    """Opens a folder with `config.json` and weights under Hugging Face's names, made T5X's."""

    def matches(self, directory: epath.Path, family: Family) -> bool:
        """Whether `directory` contains a `config.json`."""
        return (directory / "config.json").exists()

    def open(
        self, directory: epath.Path, name: str, chosen: Collection[str], family: Family
    ) -> Opened:
        """Opens the weights and the config; see `Format.open`."""
        arrays = huggingface.load_huggingface(directory)
        return Opened(arrays, load_config(directory, chosen), name, (directory,))


class OwnNamesFormat:
    """Opens a folder whose `model.safetensors` has the parameters' own names; see `own_names`.

    It matches only for families without Hugging Face names.
    """

    def matches(self, directory: epath.Path, family: Family) -> bool:
        """Whether `directory` contains a `model.safetensors`; False for other families."""
        return not family.tensor_names({}) and (directory / own_names.WEIGHTS).exists()

    def open(
        self, directory: epath.Path, name: str, chosen: Collection[str], family: Family
    ) -> Opened:
        """Opens the weights, which come without a config; see `Format.open`."""
        return Opened(own_names.load_own_names(directory), {}, name, (directory,))


FORMATS: tuple[Format, ...] = (T5XFormat(), HuggingFaceFormat(), OwnNamesFormat())
"""The formats in the order in which `open_directory` tries them."""


def open_directory(
    directory: epath.Path, name: str, chosen: Collection[str], family: Family
) -> Opened:
    """Opens a folder with the first format of `FORMATS` that matches; arguments as `Format.open`.

    Raises:
        InputError: no format matches, or as `Format.open`.
    """
    for file_format in FORMATS:
        if file_format.matches(directory, family):
            return file_format.open(directory, name, chosen, family)
    own = "" if family.tensor_names({}) else f", nor {own_names.WEIGHTS} under its own names"
    raise InputError(
        f"{name} holds no backbone that ptjax knows: neither a T5X checkpoint "
        f"(checkpoint_N) nor a Hugging Face directory (config.json beside *.safetensors){own}"
    )
