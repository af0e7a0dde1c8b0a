"""The prompts or models that a run leaves in MODEL_DIR, by step, and the best of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from absl import logging
from etils import epath

from ptjax import files
from ptjax.errors import InputError
from ptjax.model_dir import BEST, steps_in


@dataclasses.dataclass(frozen=True)
class Exports:
    """What a run leaves behind at each evaluation.

    Attributes:
        directory: such as `ModelDir.prompts()`.
        suffix: of one export's name, "" when it is a folder.
        write: `(path, trainable, metadata)` writes one, whole or not at all; all processes call it
            together, and the first one writes.
        read: `(path)` gives the metadata of one, {} of a kind that has none.
            Raises InputError: it is missing or damaged.
    """

    directory: epath.Path
    suffix: str
    write: Callable[[epath.Path, Any, dict[str, Any]], None]
    read: Callable[[epath.Path], dict[str, Any]]

    def path(self, name: int | str) -> epath.Path:
        return self.directory / f"{name}{self.suffix}"

    def prune(self, keep: set[int | None], *, newer_than: int | None = None) -> None:
        """Removes exports by step: those not in `keep`, or those ahead of `newer_than`."""
        for step in self.steps():
            ahead = newer_than is not None and step > newer_than
            if ahead or (newer_than is None and step not in keep):
                path = self.path(step)
                path.rmtree() if path.is_dir() else path.unlink()

    def problem(self, name: int | str) -> str | None:
        """What is wrong with an export, which may be missing; None if nothing is."""
        try:
            self.read(self.path(name))
        except InputError as error:
            return str(error)
        return None

    def recover(self, step: int) -> str | None:
        """Takes the export of `step` from the best one, if it is damaged; what is wrong if not."""
        problem, best = self.problem(step), self.path(BEST)
        if problem is None or self.problem(BEST) or self.read(best).get("step") != step:
            return problem
        logging.warning("%s; made again from %s", problem, best)
        files.write_bytes(self.path(step), best.read_bytes())
        return None

    def remove_leftovers(self) -> None:
        """Removes what a kill left of files that were being written."""
        files.remove_leftovers(self.directory)
        for folder in self.directory.iterdir() if self.directory.exists() else ():
            if folder.is_dir() and not self.suffix:  # an export, or the best one
                files.remove_leftovers(folder)

    def promote(self, step: int) -> None:
        """Makes the export of `step` the best one."""
        source, target = self.path(step), self.path(BEST)
        if not source.is_dir():
            files.write_bytes(target, source.read_bytes())
            return
        if target.exists():
            target.rmtree()
        for path in sorted(source.iterdir()):
            files.write_bytes(target / path.name, path.read_bytes())

    def steps(self) -> list[int]:
        """The steps of what is there, ascending."""
        return steps_in(self.directory, self.suffix)
