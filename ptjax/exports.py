"""The prompts or models that a run leaves in MODEL_DIR, by step, and the best of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from etils import epath

from ptjax import atomic

BEST = "best"


@dataclasses.dataclass(frozen=True)
class Exports:
    """What a run leaves behind at each evaluation.

    Attributes:
        directory: `MODEL_DIR/prompts`, say.
        suffix: of one export's name, "" when it is a folder.
        write: `(path, trainable, metadata)` writes one, whole or not at all; all processes call it
            together, and the first one writes.
    """

    directory: epath.Path
    suffix: str
    write: Callable[[epath.Path, Any, dict[str, Any]], None]

    def path(self, name: int | str) -> epath.Path:
        return self.directory / f"{name}{self.suffix}"

    def prune(self, keep: set[int | None], *, newer_than: int | None = None) -> None:
        """Removes exports by step: those not in `keep`, or those ahead of `newer_than`."""
        for step in self.steps():
            ahead = newer_than is not None and step > newer_than
            if ahead or (newer_than is None and step not in keep):
                path = self.path(step)
                path.rmtree() if path.is_dir() else path.unlink()

    def promote(self, step: int) -> None:
        """Makes the export of `step` the best one."""
        source, target = self.path(step), self.path(BEST)
        if not source.is_dir():
            atomic.write_bytes(target, source.read_bytes())
            return
        if target.exists():
            target.rmtree()
        for path in sorted(source.iterdir()):
            atomic.write_bytes(target / path.name, path.read_bytes())

    def steps(self) -> list[int]:
        """The steps of what is there, ascending."""
        paths = self.directory.iterdir() if self.directory.exists() else ()
        names = (path.name.removesuffix(self.suffix) for path in paths)
        return sorted(int(name) for name in names if name.isdigit())
