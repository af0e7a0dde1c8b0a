"""Prompt tuning: a learned matrix is prepended to the embedded input (Lester et al. 2021)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float

from ptjax.errors import check_at_least
from ptjax.methods.base import InitContext
from ptjax.methods.initializers import Initializer
from ptjax.methods.prompt_method import PromptMethod, initial_prompt
from ptjax.models.family import ApplyFn, Config
from ptjax.training.optimizer import Adafactor
from ptjax.trees import Tree, Variables


@dataclasses.dataclass(frozen=True)
class PromptTuning(PromptMethod):
    """Trains a soft prompt; the backbone is frozen.

    Attributes:
        length: P, the number of rows of the prompt.
        initializer: None means `ClassLabels` if the task has labels, else `SampledVocabulary`.
        attends_to_input: True, as in the paper: the prompt's positions attend to the input. With
            False they attend to the prompt alone, so that its states are computed once for all
            rows (`models.prompt.Prompt`).
    """

    name: ClassVar[str] = "prompt_tuning"
    collection: ClassVar[str] = "prompt"

    length: int = 100
    initializer: Initializer | None = None
    attends_to_input: bool = True  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self) -> None:
        check_at_least(1, PROMPT_LENGTH=self.length)

    def variable_shapes(self, config: Config) -> Variables:
        size = (self.length, config.emb_dim)
        return {"prompt": {"prompt": jax.ShapeDtypeStruct(size, np.float32)}}

    def init(self, key: Array, context: InitContext) -> Variables:
        """Makes the initial prompt: {"prompt": {"prompt": a numpy array, float32 [P, D]}}.

        Raises:
            InputError: as for `initial_prompt`.
        """
        return {"prompt": {"prompt": initial_prompt(self.initializer, self.length, key, context)}}

    def matrix(self, own: Tree) -> Float[Array, "P D"]:
        return own["prompt"]

    def suggested_optimizer(self) -> Adafactor:
        # On T5 1.1, whose embedding has an RMS of 10, it is the paper's 0.3.
        return Adafactor(0.03, "embedding_rms")

    def wrap(self, apply_fn: ApplyFn) -> ApplyFn:
        """Returns the network itself, which reads the prompt."""
        return apply_fn
