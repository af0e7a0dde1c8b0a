"""MODEL_DIR, the folder of one run: what lies where in it, and what it is called."""

from __future__ import annotations

import os
from typing import Any, Literal

from etils import epath

from ptjax import files

BEST = "best"
"""The name of the best export; the others are named by their steps."""
PROMPT_SUFFIX = ".safetensors"
BEST_PROMPT = f"prompts/{BEST}{PROMPT_SUFFIX}"
BEST_PROMPTS = (f"{BEST}{PROMPT_SUFFIX}", BEST_PROMPT)
"""Where the best prompt is in a folder: of a sweep's member, or of a run."""
LOCK = "run.lock"
ExportKind = Literal["prompt", "model", "arrays"]
"""What a run leaves behind: prompts, tuned backbones, or what only its method can read."""
_EXPORTS: dict[ExportKind, tuple[str, str]] = {
    "prompt": ("prompts", PROMPT_SUFFIX),
    "model": ("models", ""),
    "arrays": ("arrays", PROMPT_SUFFIX),
}
"""Kind -> folder, and the suffix of an export in it."""


class ModelDir:
    """The paths of a run; nothing of it need exist.

    Everyone who reads or writes there asks this class. A run writes `config` when it starts, then
    `metrics`, `tensorboard`, `checkpoints` and the exports, `results` when it is over.

    >>> run = ModelDir("runs/quickstart")
    >>> print(run.results, run.best_prompt(), run.best_prompt("seed_0"))
    runs/quickstart/results.json runs/quickstart/prompts/best.safetensors \
runs/quickstart/prompts/seed_0/best.safetensors
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = epath.Path(path)

    @property
    def config(self) -> epath.Path:
        """The settings of the run, as gin."""
        return self.path / "config.gin"

    @property
    def results(self) -> epath.Path:
        """What a finished run scores."""
        return self.path / "results.json"

    @property
    def metrics(self) -> epath.Path:
        """A row for every logged step and every evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> epath.Path:
        """A folder for every checkpoint, named by its step."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> epath.Path:
        return self.path / "tensorboard"

    @property
    def lock(self) -> epath.Path:
        """Held by the process that writes here."""
        return self.path / LOCK

    def exports(self, kind: ExportKind, member: str = "") -> epath.Path:
        """The folder of exports, or that of a sweep's member in it; named by steps, and the best.

        The exports of an ordinary run, whose only member is "", lie in the folder itself.
        """
        return self.path / _EXPORTS[kind][0] / member

    def prompts(self, member: str = "") -> epath.Path:
        """The folder of prompts: `STEP.safetensors` and the best."""
        return self.exports("prompt", member)

    @property
    def models(self) -> epath.Path:
        """The folder of tuned backbones, each a folder of its own."""
        return self.exports("model")

    def best_prompt(self, member: str = "") -> epath.Path:
        return self.prompts(member) / f"{BEST}{PROMPT_SUFFIX}"

    @property
    def best_model(self) -> epath.Path:
        return self.models / BEST

    def is_run(self) -> bool:
        """Whether a run wrote here."""
        return any(path.exists() for path in (self.config, self.results, self.prompts()))

    def members(self) -> list[str]:
        """The members of a bank that have a best prompt, by name."""
        best = self.prompts().glob(f"*/{BEST}{PROMPT_SUFFIX}")
        return [path.parent.name for path in sorted(best)]

    def checkpoint_steps(self) -> list[int]:
        """The steps of the checkpoints, ascending; also of those that are damaged."""
        return steps_in(self.checkpoints)

    def read_results(self) -> dict[str, Any] | None:
        """What `results` holds; None if it is not there.

        Raises:
            InputError: it is damaged.
        """
        return files.read_object(self.results) if self.results.exists() else None


def suffix_of(kind: ExportKind) -> str:
    """Of an export's name; "" where it is a folder."""
    return _EXPORTS[kind][1]


def steps_in(folder: epath.Path, suffix: str = "") -> list[int]:
    """The steps by which things in a folder are named (`STEP` and the suffix), ascending."""
    paths = folder.iterdir() if folder.exists() else ()
    names = (path.name.removesuffix(suffix) for path in paths)
    return sorted(int(name) for name in names if name.isdecimal())
