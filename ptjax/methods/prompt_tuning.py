"""Prompt tuning: a learned matrix is prepended to the embedded input (Lester et al. 2021)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import jax
import numpy as np
from jaxtyping import Array

from ptjax.errors import InputError, check_at_least
from ptjax.files import JsonObject, Metadata, PathLike
from ptjax.methods.base import InitContext, Method
from ptjax.methods.initializers import ClassLabels, Initializer, SampledVocabulary
from ptjax.model_dir import ExportKind
from ptjax.models.family import Config
from ptjax.models.prompted import with_prompt
from ptjax.sharding import processes
from ptjax.trees import Variables

if TYPE_CHECKING:
    from ptjax.backbones.load import Backbone


@dataclasses.dataclass(frozen=True)
class PromptTuning(Method):
    """Trains a soft prompt; the backbone is frozen.

    Attributes:
        length: P, the number of the prompt's rows.
        initializer: None means `ClassLabels` if the task has labels, else `SampledVocabulary`.
        attends_to_input: True, as in the paper: the prompt's positions attend to the input. With
            False they attend to the prompt alone, so its states are computed once per step
            (`models.prompt.Prompt`).
    """

    name: ClassVar[str] = "prompt_tuning"
    collection: ClassVar[str] = "prompt"
    exports: ClassVar[ExportKind] = "prompt"
    supports_rows: ClassVar[bool] = True
    supports_sweep: ClassVar[bool] = True

    length: int = 100
    initializer: Initializer | None = None
    attends_to_input: bool = True  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self) -> None:
        check_at_least(1, PROMPT_LENGTH=self.length)

    def variable_shapes(self, config: Config) -> Variables:
        size = (self.length, config.emb_dim)
        return {"prompt": {"prompt": jax.ShapeDtypeStruct(size, np.float32)}}

    def init(self, key: Array, context: InitContext) -> Variables:
        """Makes the initial prompt, float32 [P, D], on the host, as {"prompt": {"prompt": ...}}.

        Raises:
            InputError: the initialiser cannot be used, or its result has another shape.
        """
        initializer = self.initializer
        if initializer is None:
            initializer = ClassLabels() if context.labels else SampledVocabulary()
        prompt = processes.on_host(initializer(key, self.length, context)).astype(np.float32)
        shape = (self.length, context.embedding.shape[1])
        if prompt.shape != shape:
            owner = f" of {context.member}" if context.member else ""
            raise InputError(
                f"the initial prompt{owner} has shape {prompt.shape}, but the run needs {shape}; "
                "change PROMPT_LENGTH or the initialiser"
            )
        return {"prompt": {"prompt": prompt}}

    def freeze_rules(self) -> Mapping[str, bool]:
        return {"params/.*": True, "prompt/.*": False}

    def extra_positions(self) -> int:
        """Returns P, or 0 for a prompt that does not attend to the input: all examples share it."""
        return self.length if self.attends_to_input else 0

    def describe(self) -> Metadata:
        return {"sees_input": self.attends_to_input}

    # Prompt files are imported late: settings and plans do not need them.

    def save(
        self, path: PathLike, trainable: Variables, metadata: Metadata, backbone: Backbone
    ) -> None:
        from ptjax.interop.prompt_file import save_prompt

        if processes.first():
            save_prompt(path, np.asarray(trainable["prompt"]["prompt"]), metadata)

    def read_metadata(self, path: PathLike) -> JsonObject:
        from ptjax.interop.prompt_file import load_prompt

        return load_prompt(path).metadata

    def load(self, path: PathLike, backbone: Backbone) -> Variables:
        from ptjax.interop.prompt_file import load_prompt

        return with_prompt({}, load_prompt(path).prompt)
