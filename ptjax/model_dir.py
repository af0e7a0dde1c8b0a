"""MODEL_DIR, the folder of one run: names and places of its files."""

from __future__ import annotations

from typing import Literal

from etils import epath

from ptjax import files
from ptjax.files import JsonObject, PathLike

BEST = "best"
"""The name of the best export; the others are named after their steps."""
PROMPT_SUFFIX = ".safetensors"
BEST_PROMPT = f"prompts/{BEST}{PROMPT_SUFFIX}"
BEST_PROMPTS = (f"{BEST}{PROMPT_SUFFIX}", BEST_PROMPT)
"""Path of the best prompt within the folder of a sweep's member, or of a run."""
LOCK = "run.lock"
ExportKind = Literal["prompt", "model", "arrays"]
"""The kind of a run's exports: prompts, tuned backbones, or arrays that only its method reads."""
_EXPORTS: dict[ExportKind, tuple[str, str]] = {
    "prompt": ("prompts", PROMPT_SUFFIX),
    "model": ("models", ""),
    "arrays": ("arrays", PROMPT_SUFFIX),
}
"""Kind -> folder, and suffix of an export in it."""


class ModelDir:
    """The paths of a run; they need not exist.

    No other code knows these paths. A run writes `config` when it starts, then `metrics`,
    `tensorboard`, `checkpoints` and the exports, and at the end `results`.

    >>> run = ModelDir("runs/quickstart")
    >>> print(run.results, run.best_prompt(), run.best_prompt("seed_0"))
    runs/quickstart/results.json runs/quickstart/prompts/best.safetensors \
runs/quickstart/prompts/seed_0/best.safetensors
    """

    def __init__(self, path: PathLike) -> None:
        self.path = epath.Path(path)

    @property
    def config(self) -> epath.Path:
        """The settings of the run, as gin."""
        return self.path / "config.gin"

    @property
    def results(self) -> epath.Path:
        """The scores of a finished run."""
        return self.path / "results.json"

    @property
    def metrics(self) -> epath.Path:
        """A row for every logged step and every evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> epath.Path:
        """A folder for each checkpoint, named after its step."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> epath.Path:
        return self.path / "tensorboard"

    @property
    def lock(self) -> epath.Path:
        """The lock file; held by the run that writes to this folder."""
        return self.path / LOCK

    def exports(self, kind: ExportKind, member: str = "") -> epath.Path:
        """The folder of a member's exports: one per step, named after it, and the best.

        An ordinary run has one member, "", whose folder is that of the exports itself.
        """
        return self.path / _EXPORTS[kind][0] / member

    def prompts(self, member: str = "") -> epath.Path:
        """The folder of prompts: `STEP.safetensors` and the best."""
        return self.exports("prompt", member)

    @property
    def models(self) -> epath.Path:
        """The folder of tuned backbones, each of which is a folder."""
        return self.exports("model")

    def best_prompt(self, member: str = "") -> epath.Path:
        return self.prompts(member) / f"{BEST}{PROMPT_SUFFIX}"

    @property
    def best_model(self) -> epath.Path:
        return self.models / BEST

    def is_run(self) -> bool:
        """Whether a run has written to this folder."""
        return any(path.exists() for path in (self.config, self.results, self.prompts()))

    def members(self) -> list[str]:
        """The names of a sweep's members that have a best prompt."""
        best = self.prompts().glob(f"*/{BEST}{PROMPT_SUFFIX}")
        return [path.parent.name for path in sorted(best)]

    def checkpoint_steps(self) -> list[int]:
        """The steps of the checkpoints, also of damaged ones, ascending."""
        return steps_in(self.checkpoints)

    def read_results(self) -> JsonObject | None:
        """The content of `results`; None if the file does not exist.

        Raises:
            InputError: the file is damaged.
        """
        return files.read_object(self.results) if self.results.exists() else None


def suffix_of(kind: ExportKind) -> str:
    """The suffix of an export's name; "" if an export is a folder."""
    return _EXPORTS[kind][1]


def steps_in(folder: epath.Path, suffix: str = "") -> list[int]:
    """The steps in a folder whose entries are named `STEP` and the suffix, ascending."""
    paths = folder.iterdir() if folder.exists() else ()
    names = (path.name.removesuffix(suffix) for path in paths)
    return sorted(int(name) for name in names if name.isdecimal())
