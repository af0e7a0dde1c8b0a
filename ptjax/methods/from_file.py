"""The initialiser that starts a prompt from a file."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
from jaxtyping import Array

from ptjax.errors import InputError, gin_flag
from ptjax.files import JsonObject
from ptjax.interop.prompt_file import load_prompt
from ptjax.methods.base import InitContext


@dataclasses.dataclass(frozen=True)
class FromFile:
    """Initialises a prompt from any file that `load_prompt` reads, as SPoT (Vu et al. 2022) does.

    A `FromFile` is called to make the initial prompt. It raises an `InputError` if the prompt in
    the file does not have the run's prompt length.
    """

    path: str | os.PathLike[str]

    def __call__(self, key: Array, length: int, context: InitContext) -> np.ndarray:
        prompt = np.asarray(load_prompt(self.path).prompt)
        if len(prompt) != length:
            raise InputError(
                f"{self.path}: {len(prompt)} rows, but the run expects {length}; set "
                + gin_flag("PROMPT_LENGTH", len(prompt))
            )
        return prompt

    def identity(self) -> JsonObject:
        """Returns {"path": array}: the prompt in the file, in place of the file's path.

        `identity.describe` adds it to the identity of a run. Only a run with the same identity can
        resume a MODEL_DIR; the file may have moved, but must hold the same prompt.
        """
        return {"path": load_prompt(self.path).prompt}
