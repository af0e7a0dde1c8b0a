"""Hard prompts: texts prepended to the input, as a baseline for tuned prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from ptjax.data.examples import Example
from ptjax.data.sentinels import join_texts
from ptjax.errors import check_at_least


@dataclasses.dataclass(frozen=True)
class HardPrompt:
    """A text before or around the input; nothing is trained.

    Attributes:
        text: inserted before the input, or a template that contains `{inputs}`; may be empty.
        shots: number of training examples prepended as context; sampled with the run's seed.
        separator: between a shot's input and its target, and after each shot.
    """

    text: str
    shots: int = 0
    separator: str = " "

    def __post_init__(self) -> None:
        check_at_least(0, "HardPrompt", shots=self.shots)

    def apply(self, inputs: str) -> str:
        """Puts the text before or around an example's input, without the shots."""
        if not self.text:
            return inputs
        text = self.text if "{inputs}" in self.text else f"{self.text} {{inputs}}"
        before, *behind = text.split("{inputs}")
        return join_texts([before, *(part for literal in behind for part in (inputs, literal))])

    def rewording(self, train: Sequence[Example], seed: int) -> Callable[[str], str]:
        """Samples the shots, and returns a function from an input to the backbone's input text.

        Args:
            train: the examples from which the shots are sampled.
        """
        chosen = np.random.default_rng(seed).permutation(len(train))[: self.shots]
        shots = join_texts(
            part
            for i in chosen
            for text in (self.apply(train[i].inputs), train[i].targets)
            for part in (text, self.separator)
        )
        return lambda inputs: join_texts([shots, self.apply(inputs)])
