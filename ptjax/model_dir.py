"""MODEL_DIR, the folder of one run: the names and places of its files."""

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
"""The paths of the best prompt within the folder of a sweep's member, and of a run."""
LOCK = "run.lock"
ExportKind = Literal["prompt", "adapter", "model", "arrays"]
"""The kind of a run's exports: prompts, adapters, tuned backbones, or arrays that only the run's
method reads."""
_EXPORTS: dict[ExportKind, tuple[str, str]] = {
    "prompt": ("prompts", PROMPT_SUFFIX),
    "adapter": ("adapters", PROMPT_SUFFIX),
    "model": ("models", ""),
    "arrays": ("arrays", PROMPT_SUFFIX),
}
"""Kind -> folder, and suffix of an export in it."""


class ModelDir:
    """The paths of the files of a run; the files need not exist.

    No other code contains these paths. A run writes `metrics`, `tensorboard`, `checkpoints` and the
    exports, and at the end `report_data`, `results` and, if its libraries are installed, `report`.
    A run that a command started first writes `config`, one with trackers `trackers`.

    >>> run = ModelDir("runs/quickstart")
    >>> print(run.results, run.best_prompt(), run.best_prompt("seed_0"))
    runs/quickstart/results.json runs/quickstart/prompts/best.safetensors \
runs/quickstart/prompts/seed_0/best.safetensors
    """

    def __init__(self, path: PathLike) -> None:
        self.path = epath.Path(path)

    @property
    def config(self) -> epath.Path:
        """The gin file with all settings of the run."""
        return self.path / "config.gin"

    @property
    def results(self) -> epath.Path:
        """The JSON file with the scores of a finished run."""
        return self.path / "results.json"

    @property
    def metrics(self) -> epath.Path:
        """The JSON lines file with a row for every logged step and every evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> epath.Path:
        """The page about a finished run: one HTML file."""
        return self.path / "report.html"

    @property
    def report_data(self) -> epath.Path:
        """The JSON file from which `report` is made: the predictions and what follows from them."""
        return self.path / "report.json"

    @property
    def checkpoints(self) -> epath.Path:
        """The folder of checkpoints, each of which is a folder named after its step."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> epath.Path:
        """The folder of TensorBoard's files."""
        return self.path / "tensorboard"

    @property
    def trackers(self) -> epath.Path:
        """The JSON file with the ids of the run in trackers such as MLflow, by package."""
        return self.path / "trackers.json"

    @property
    def lock(self) -> epath.Path:
        """The path of the lock file. The run that writes to this folder holds the lock."""
        return self.path / LOCK

    def exports(self, kind: ExportKind, member: str = "") -> epath.Path:
        """The folder of a run's exports: the prompts, adapters, backbones or arrays that it saves.

        Each evaluation adds one, named after the training step; the best is copied to "best".

        Args:
            kind: "prompt", "adapter", "model" or "arrays", which determines the folder's name.
            member: the name of a member of a sweep, which has its own subfolder; "" in an ordinary
                run.
        """
        return self.path / _EXPORTS[kind][0] / member

    def prompts(self, member: str = "") -> epath.Path:
        """The folder of a member's prompts: `STEP.safetensors` and `best.safetensors`."""
        return self.exports("prompt", member)

    @property
    def models(self) -> epath.Path:
        """The folder of tuned backbones, each of which is a folder."""
        return self.exports("model")

    def best_prompt(self, member: str = "") -> epath.Path:
        """The file of a member's best prompt; `member` is "" in an ordinary run."""
        return self.prompts(member) / f"{BEST}{PROMPT_SUFFIX}"

    def best_adapter(self, member: str = "") -> epath.Path:
        """The file of a member's best adapter, if the run's method exports adapters."""
        return self.exports("adapter", member) / f"{BEST}{PROMPT_SUFFIX}"

    @classmethod
    def of_best_prompt(cls, path: PathLike) -> tuple[ModelDir, str] | None:
        """Returns the run that a best prompt is of, and the member's name; None for other files.

        >>> ModelDir.of_best_prompt("runs/a/prompts/seed_0/best.safetensors")[1]
        'seed_0'
        """
        path, folder = epath.Path(path), _EXPORTS["prompt"][0]
        if path.name == f"{BEST}{PROMPT_SUFFIX}":
            if path.parent.name == folder:
                return cls(path.parent.parent), ""
            if path.parent.parent.name == folder:
                return cls(path.parent.parent.parent), path.parent.name
        return None

    @property
    def best_model(self) -> epath.Path:
        """The folder of the best tuned backbone."""
        return self.models / BEST

    def is_run(self) -> bool:
        """Whether this is the folder of a run: it holds `config`, `results` or prompts."""
        return any(path.exists() for path in (self.config, self.results, self.prompts()))

    def members(self, kind: ExportKind = "prompt") -> list[str]:
        """The names of a sweep's members that have a best prompt (adapter); empty in other runs."""
        best = self.exports(kind).glob(f"*/{BEST}{PROMPT_SUFFIX}")
        return [path.parent.name for path in sorted(best)]

    def checkpoint_steps(self) -> list[int]:
        """The steps of the checkpoints, including damaged ones, ascending."""
        return steps_in(self.checkpoints)

    def read_results(self) -> JsonObject | None:
        """Reads the file `results`; None if it does not exist.

        Raises:
            InputError: the file is damaged.
        """
        return files.read_object(self.results) if self.results.exists() else None


def suffix_of(kind: ExportKind) -> str:
    """Returns the file suffix of exports of a kind: ".safetensors", or "" if they are folders."""
    return _EXPORTS[kind][1]


def steps_in(folder: epath.Path, suffix: str = "") -> list[int]:
    """Lists the training steps after which the entries of a folder are named, ascending.

    An entry counts if its name is a decimal number, with or without `suffix`: with ".safetensors",
    both "100" and "100.safetensors" are step 100. Returns [] if `folder` does not exist.
    """
    paths = folder.iterdir() if folder.exists() else ()
    names = (path.name.removesuffix(suffix) for path in paths)
    return sorted(int(name) for name in names if name.isdecimal())
