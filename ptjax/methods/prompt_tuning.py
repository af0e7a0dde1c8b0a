"""Prompt tuning: a learned matrix in front of the embedded input (Lester et al. 2021)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array

from ptjax.errors import InputError, check_at_least
from ptjax.files import JsonObject, Metadata, PathLike
from ptjax.methods.base import InitContext, Method
from ptjax.methods.initializers import ClassLabels, Initializer, SampledVocabulary
from ptjax.model_dir import ExportKind
from ptjax.models.prompted import with_prompt
from ptjax.sharding import processes
from ptjax.trees import Variables


@dataclasses.dataclass(frozen=True)
class PromptTuning(Method):
    """A soft prompt trains; the backbone is frozen.

    Attributes:
        length: P.
        initializer: None takes class labels for a closed label set, else the sampled vocabulary.
        attends_to_input: as in the paper. Without it the prompt's positions attend to the prompt
            alone, so its states are computed once a step (`models.prompt.Prompt`).
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

    def variable_shapes(self, config: Any) -> Variables:
        size = (self.length, config.emb_dim)
        return {"prompt": {"prompt": jax.ShapeDtypeStruct(size, np.float32)}}

    def init(self, key: Array, context: InitContext) -> Variables:
        """P [P, D], float32, on the host."""
        initializer = self.initializer
        if initializer is None:
            initializer = ClassLabels() if context.labels else SampledVocabulary()
        made = processes.on_host(initializer(key, self.length, context)).astype(np.float32)
        size = (self.length, context.embedding.shape[1])
        if made.shape != size:
            owner = f" of {context.member}" if context.member else ""
            raise InputError(
                f"the initial prompt{owner} has shape {made.shape}, the run wants {size}; change "
                "PROMPT_LENGTH or the initialiser"
            )
        return {"prompt": {"prompt": made}}

    def freeze_rules(self) -> Mapping[str, bool]:
        return {"params/.*": True, "prompt/.*": False}

    def extra_positions(self) -> int:
        """A prompt that does not see its input is there once for all examples."""
        return self.length if self.attends_to_input else 0

    def describe(self) -> Mapping[str, Any]:
        return {"sees_input": self.attends_to_input}

    # Prompt files, and the foreign formats beside them, are imported late: settings and plans need
    # none of it.

    def save(self, path: PathLike, trainable: Variables, metadata: Metadata, backbone: Any) -> None:
        from ptjax.interop.prompt_file import save_prompt

        if processes.first():
            save_prompt(path, np.asarray(trainable["prompt"]["prompt"]), metadata)

    def read_metadata(self, path: PathLike) -> JsonObject:
        from ptjax.interop.prompt_file import load_prompt

        return load_prompt(path).metadata

    def load(self, path: PathLike, backbone: Any) -> Variables:
        from ptjax.interop.prompt_file import load_prompt

        return with_prompt({}, load_prompt(path).prompt)
