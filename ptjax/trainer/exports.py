"""Exports: the prompts or models that a run writes to MODEL_DIR, by step, and the best of them."""

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
    """The exports of one member: one per evaluation, and a copy of the best one.

    Only the first process calls the methods that remove, restore or copy files.

    Attributes:
        directory: contains the exports; such as `ModelDir.prompts()`.
        suffix: of an export's name; "" if an export is a folder.
        write: `(path, trainable, metadata)` writes an export atomically. All processes call it
            together; the first one writes.
        read: `(path)` returns the metadata of an export, {} if its kind has none. It raises an
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
        """Removes exports: of steps after `newer_than` if it is set, else of steps not in `keep`.

        The copy of the best one stays.
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
        """Restores a missing or damaged export from the copy of the best one, if it has that step.

        Returns:
            why the export still cannot be read; None if it can be read now.
        """
        problem, best = self.problem(step), self.path(BEST)
        if problem is None or self.problem(BEST) or self.read(best).get("step") != step:
            return problem
        logging.warning("%s; restored from %s", problem, best)
        files.write_bytes(self.path(step), best.read_bytes())
        return None

    def remove_leftovers(self) -> None:
        """Removes half-written files of a killed run from the folder and from exports in it."""
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
        """The steps of the existing exports, ascending; without the copy of the best one."""
        return steps_in(self.directory, self.suffix)
