"""Prompt tuning: a learned matrix in front of the embedded input (Lester et al. 2021)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ptjax.errors import check_at_least
from ptjax.models.prompt import Initializer


@dataclasses.dataclass(frozen=True)
class PromptTuning:
    """A soft prompt trains; the backbone is frozen.

    Attributes:
        length: P.
        initializer: None takes class labels for a closed label set, else the sampled vocabulary.
        attends_to_input: as in the paper. Without it the prompt's positions attend to the prompt
            alone, so its states are computed once a step (`models.prompt.Prompt`).
    """

    name: ClassVar[str] = "prompt_tuning"

    length: int = 100
    initializer: Initializer | None = None
    attends_to_input: bool = True

    def __post_init__(self) -> None:
        check_at_least(1, PROMPT_LENGTH=self.length)
