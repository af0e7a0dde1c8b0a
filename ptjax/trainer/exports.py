"""Exports: the prompts or models that a run writes to MODEL_DIR, one per evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from absl import logging
from etils import epath

from ptjax import files
from ptjax.errors import InputError
from ptjax.files import JsonObject
from ptjax.model_dir import BEST, steps_in
from ptjax.trees import Tree


@dataclasses.dataclass(frozen=True)
class Exports:
    """The prompts or models that a run writes for one of its members.

    A run writes one per evaluation and a copy of the best one. An ordinary run has one member, a
    sweep several. Only the first process calls the methods that remove, restore or copy files.

    Attributes:
        directory: the folder that contains the exports, such as `ModelDir.prompts()`.
        suffix: the file name extension of an export; "" if an export is a folder.
        write: `(path, trainable, metadata)` writes an export atomically. All processes call it
            together; the first one writes.
        read: `(path)` returns the metadata of an export, {} if its format has none. It raises an
            `InputError` if the export is missing or damaged.
    """

    directory: epath.Path
    suffix: str
    write: Callable[[epath.Path, Tree, JsonObject], None]
    read: Callable[[epath.Path], JsonObject]

    def path(self, name: int | str) -> epath.Path:
        """The path of an export; `name` is its step, or `BEST`."""
        return self.directory / f"{name}{self.suffix}"

    def prune(self, keep: set[int | None], *, newer_than: int | None = None) -> None:
        """Removes exports, but not the copy of the best one.

        Args:
            keep: the steps whose exports are kept; None in it is ignored.
            newer_than: if set, removes exactly the exports of later steps; `keep` is then ignored.
        """
        for step in self.steps():
            ahead = newer_than is not None and step > newer_than
            if ahead or (newer_than is None and step not in keep):
                path = self.path(step)
                path.rmtree() if path.is_dir() else path.unlink()

    def problem(self, name: int | str) -> str | None:
        """Reads an export; returns why it cannot be read (missing or damaged), None if it can.

        Args:
            name: its step, or `BEST`.
        """
        try:
            self.read(self.path(name))
        except InputError as error:
            return str(error)
        return None

    def recover(self, step: int) -> str | None:
        """If the export of `step` is missing or damaged, restores it from the copy of the best one.

        It does so only if the metadata of that copy says that it was made at `step`.

        Returns:
            why the export of `step` still cannot be read; None if it can be read.
        """
        problem, best = self.problem(step), self.path(BEST)
        if problem is None or self.problem(BEST) or self.read(best).get("step") != step:
            return problem
        logging.warning("%s; restored from %s", problem, best)
        files.write_bytes(self.path(step), best.read_bytes())
        return None

    def remove_leftovers(self) -> None:
        """Removes half-written files of a killed run from `directory` and the exports in it."""
        files.remove_leftovers(self.directory)
        for folder in self.directory.iterdir() if self.directory.exists() else ():
            if folder.is_dir() and not self.suffix:  # it is an export
                files.remove_leftovers(folder)

    def promote(self, step: int) -> None:
        """Makes the export of `step` the best one: copies it to `path(BEST)`."""
        source, target = self.path(step), self.path(BEST)
        if not source.is_dir():
            files.write_bytes(target, source.read_bytes())
            return
        if target.exists():
            target.rmtree()
        for path in sorted(source.iterdir()):
            files.write_bytes(target / path.name, path.read_bytes())

    def steps(self) -> list[int]:
        """The steps of the existing exports, ascending. The copy of the best one is ignored."""
        return steps_in(self.directory, self.suffix)
