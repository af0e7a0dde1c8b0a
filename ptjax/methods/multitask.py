"""Multitask prompt tuning: a shared prompt times a low-rank matrix of the task (Wang et al. 2023).

The formula and the files are those of PEFT's MULTITASK_PROMPT_TUNING.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ptjax.errors import InputError, check_at_least, gin_flag
from ptjax.files import JsonObject, Metadata, PathLike
from ptjax.methods.base import InitContext
from ptjax.methods.initializers import Initializer
from ptjax.methods.prompt_method import PromptMethod, initial_prompt
from ptjax.models.family import Config
from ptjax.sharding import processes
from ptjax.trees import Tree, Variables

if TYPE_CHECKING:
    from ptjax.backbones.load import Backbone

_NOISE = 0.02


@dataclasses.dataclass(frozen=True)
class MultitaskPromptTuning(PromptMethod):
    """Trains a prompt `shared * (cols @ rows)`, the factors of one task of a multitask prompt.

    A run trains one task. (Training several tasks in one batch, the first stage of the paper, needs
    mixtures of tasks.) For the second stage, train each task from one file with `freeze_shared`,
    and join the results with `MultitaskPrompts.join`. The export is an ordinary prompt; its file
    holds the factors too, for `load_multitask`.

    Without `start`, cols @ rows starts at about 1, so that step 0 is the initialiser's prompt.

    Attributes:
        length: P, the number of rows of the prompt.
        rank: r, of the task's matrix: cols [P, r], rows [r, D].
        initializer: makes the first shared prompt, as in `PromptTuning`; unused with `start`.
        start: where the shared prompt comes from: what `load_multitask` or `load_prompt` reads.
        start_task: which factors of `start` to begin with: the number of a task, "average" of all
            tasks, or None: about 1.
        freeze_shared: whether the shared prompt is frozen; needs `start`.
        attends_to_input: as in `PromptTuning`.
    """

    name: ClassVar[str] = "multitask_prompt_tuning"
    collection: ClassVar[str] = "multitask_prompt"

    length: int = 100
    rank: int = 1
    initializer: Initializer | None = None
    start: str | os.PathLike[str] | None = None
    start_task: int | Literal["average"] | None = None
    freeze_shared: bool = False
    attends_to_input: bool = True  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self) -> None:
        check_at_least(1, PROMPT_LENGTH=self.length)
        check_at_least(1, "MultitaskPromptTuning", rank=self.rank)
        needs_start = {"freeze_shared": self.freeze_shared or None, "start_task": self.start_task}
        for setting, value in needs_start.items():
            if self.start is None and value is not None:
                raise InputError(
                    f"MultitaskPromptTuning.{setting} = {value!r} needs MultitaskPromptTuning.start"
                )

    def variable_shapes(self, config: Config) -> Variables:
        sizes = {
            "shared": (self.length, config.emb_dim),
            "cols": (self.length, self.rank),
            "rows": (self.rank, config.emb_dim),
        }
        shapes = {k: jax.ShapeDtypeStruct(size, np.float32) for k, size in sizes.items()}
        return {self.collection: shapes}

    def init(self, key: Array, context: InitContext) -> Variables:
        """Makes the shared prompt and the factors, from `start` if there is one.

        Raises:
            InputError: `start` cannot be read, or has another length, width or rank; or as for
                `initial_prompt`.
        """
        prompt_key, cols_key, rows_key = jax.random.split(key, 3)
        if self.start is None:
            prompt = initial_prompt(self.initializer, self.length, prompt_key, context)
            factors: dict[str, np.ndarray] = {}
        else:
            factors = dict(self._started)
            prompt = factors.pop("shared")
            self._check_start(prompt, factors, context.embedding.shape[1])
        width = prompt.shape[1]
        cols = _NOISE * jax.random.normal(cols_key, (self.length, self.rank))
        rows = _NOISE * jax.random.normal(rows_key, (self.rank, width))
        about_one = {"cols": cols.at[:, 0].set(1.0), "rows": rows.at[0].set(1.0)}
        return {self.collection: {"shared": prompt, **about_one, **factors}}

    def _check_start(
        self, prompt: np.ndarray, factors: Mapping[str, np.ndarray], width: int
    ) -> None:
        if prompt.shape != (self.length, width):
            raise InputError(
                f"{self.start}: the shared prompt has shape {list(prompt.shape)}, but the run "
                f"needs {[self.length, width]}; set " + gin_flag("PROMPT_LENGTH", len(prompt))
            )
        if factors and factors["cols"].shape[1] != self.rank:
            raise InputError(
                f"{self.start}: its factors have rank {factors['cols'].shape[1]}; set "
                "MultitaskPromptTuning.rank to it"
            )

    @functools.cached_property
    def _started(self) -> dict[str, np.ndarray]:
        """What `start` gives: "shared", and "cols" and "rows" with `start_task`.

        Read once, so that a run does not depend on the file later on.
        """
        from ptjax.interop.multitask import find_multitask
        from ptjax.interop.prompt_file import load_prompt

        assert self.start is not None
        found = find_multitask(self.start)
        if self.start_task is None:
            prompt = load_prompt(self.start).prompt if found is None else found.shared
            return {"shared": np.asarray(prompt)}
        if found is None:
            raise InputError(
                f"{self.start} is an ordinary prompt, without factors; leave out "
                "MultitaskPromptTuning.start_task"
            )
        if self.start_task == "average":
            return {
                "shared": found.shared,
                "cols": found.cols.mean(axis=0),
                "rows": found.rows.mean(axis=0),
            }
        if self.start_task not in range(len(found.cols)):
            raise InputError(
                f"MultitaskPromptTuning.start_task = {self.start_task!r}: {self.start} has the "
                f"tasks 0 to {len(found.cols) - 1}, and 'average'"
            )
        task = int(self.start_task)
        return {"shared": found.shared, "cols": found.cols[task], "rows": found.rows[task]}

    def identity(self) -> JsonObject:
        """Returns the arrays of `start` in place of its path."""
        return {} if self.start is None else {"start": self._started}

    def freeze_rules(self) -> Mapping[str, bool]:
        return {
            "params/.*": True,
            f"{self.collection}/shared": self.freeze_shared,
            f"{self.collection}/(cols|rows)": False,
        }

    def matrix(self, own: Tree) -> Float[Array, "P D"]:
        return own["shared"] * (jnp.asarray(own["cols"]) @ own["rows"])

    def save(
        self, path: PathLike, trainable: Variables, metadata: Metadata, backbone: Backbone
    ) -> None:
        """Writes the prompt, and its factors as further tensors of the file."""
        from ptjax.interop.multitask import OWN_NAMES
        from ptjax.interop.prompt_file import save_prompt

        if not processes.first():
            return
        own = {name: np.asarray(x) for name, x in trainable[self.collection].items()}
        if self.freeze_shared:
            own["shared"] = self._started["shared"]
        arrays = (own[name] for name in ("shared", "cols", "rows"))
        factors = dict(zip(OWN_NAMES, arrays, strict=True))
        save_prompt(path, np.asarray(self._precise(own)), metadata, factors=factors)
