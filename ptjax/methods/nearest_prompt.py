"""SPoT's retrieval: which prompts are similar to a task's own, and a start from them (Vu 2022)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np
from jaxtyping import Array, Float

from ptjax.errors import InputError, check_at_least, check_choice, gin_flag
from ptjax.files import JsonObject, PathLike
from ptjax.interop.prompt_file import PromptFile, load_prompt, load_prompts
from ptjax.methods.base import InitContext

SimilarityBy = Literal["average", "per_token"]


def prompt_similarity(
    prompt: PromptFile | PathLike,
    sources: Mapping[str, PromptFile] | PathLike,
    by: SimilarityBy = "average",
) -> dict[str, float]:
    """Ranks prompts by their cosine similarity to a prompt, the most similar one first.

    A prompt [P, D] serves as the embedding of its task (Vu et al. 2022, section 3.3). Prompts of
    one backbone can be compared; their lengths may differ.

    Args:
        prompt: the prompt of the target task, or its path. The paper takes one after a few steps of
            training.
        sources: prompts by name, or a folder of them, as for `load_prompts`.
        by: "average" is the cosine of the averages of the two prompts' rows; "per_token" is the
            average cosine over all pairs of a row of each.

    Returns:
        The similarities, in [-1, 1], by name.

    Raises:
        InputError: a prompt cannot be read or has another width, or the sources are empty.
    """
    check_choice(get_args(SimilarityBy), "prompt_similarity", by=by)
    target = prompt if isinstance(prompt, PromptFile) else load_prompt(prompt)
    named = sources if isinstance(sources, Mapping) else load_prompts(sources)
    if not named:
        raise InputError("prompt_similarity needs at least one source prompt")
    mine = _summary(target.prompt, by)
    found: dict[str, float] = {}
    for name, source in named.items():
        theirs = _summary(source.prompt, by)
        if theirs.shape != mine.shape:
            raise InputError(
                f"the source prompt {name} has rows of {len(theirs)}, the target of {len(mine)}; "
                "only prompts of one backbone can be compared"
            )
        found[name] = float(mine @ theirs)
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _summary(prompt: np.ndarray | Array, by: SimilarityBy) -> Float[np.ndarray, " D"]:
    """A vector for each prompt, such that their similarity is the product of two of these."""
    rows = np.asarray(prompt, np.float64)
    return _unit(rows.mean(axis=0)) if by == "average" else _unit(rows).mean(axis=0)


def _unit(vectors: Float[np.ndarray, "*n D"]) -> Float[np.ndarray, "*n D"]:
    """Vectors of length 1; zeros stay zeros, which are similar to nothing."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norms == 0, 1, norms)


@dataclasses.dataclass(frozen=True)
class NearestPrompt:
    """Initialises a prompt from those that are most similar to the task's own, as in SPoT.

    With `top_k` 1 it is the most similar source prompt. With more it is the average of the `top_k`
    most similar ones, weighted by their similarity (the paper's top-k weighted average). For the
    best of the top k, train from each in a sweep of `FromFile`. A source that equals the target is
    left out.

    Attributes:
        sources: a folder of prompts, as for `load_prompts`.
        target: a prompt of this task, for example after a few steps of training.
        by: as for `prompt_similarity`.
        top_k: the number of source prompts.
    """

    # First, so that a run with another choice is refused by its name, not by that of `sources`.
    by: SimilarityBy = dataclasses.field(default="average", kw_only=True)
    top_k: int = dataclasses.field(default=1, kw_only=True)
    sources: str | os.PathLike[str]
    target: str | os.PathLike[str]

    def __post_init__(self) -> None:
        check_choice(get_args(SimilarityBy), "NearestPrompt", by=self.by)
        check_at_least(1, "NearestPrompt", top_k=self.top_k)

    def __call__(self, key: Array, length: int, context: InitContext) -> np.ndarray:
        """Makes the prompt; raises InputError for sources that are too few or of another length."""
        chosen = self._choose()
        for name, (prompt, _) in chosen.items():
            if len(prompt) != length:
                raise InputError(
                    f"{self.sources}: the prompt {name} has {len(prompt)} rows, but the run "
                    f"expects {length}; set " + gin_flag("PROMPT_LENGTH", len(prompt))
                )
        weights = np.array([weight for _, weight in chosen.values()])
        if len(chosen) > 1 and weights.min() <= 0:
            raise InputError(
                f"{self.sources}: not {self.top_k} prompts are similar to {self.target} (the "
                f"smallest similarity is {weights.min():.2g}); set NearestPrompt.top_k lower"
            )
        prompts = np.stack([prompt for prompt, _ in chosen.values()])
        if len(chosen) == 1:
            return prompts[0]
        return np.tensordot(weights / weights.sum(), prompts, axes=1).astype(np.float32)

    def _choose(self) -> dict[str, tuple[np.ndarray, float]]:
        """(prompt, similarity) of the chosen sources by name."""
        target = load_prompt(self.target)
        sources = {
            name: source
            for name, source in load_prompts(self.sources).items()
            if not np.array_equal(source.prompt, target.prompt)
        }
        if len(sources) < self.top_k:
            raise InputError(
                f"{self.sources} holds {len(sources)} prompts other than the target, and "
                f"NearestPrompt.top_k is {self.top_k}"
            )
        ranked = list(prompt_similarity(target, sources, self.by).items())[: self.top_k]
        return {name: (np.asarray(sources[name].prompt), weight) for name, weight in ranked}

    def identity(self) -> JsonObject:
        """Returns the chosen prompts and the target's in place of their paths.

        As for `FromFile`, the folder may have moved when the run is resumed. It may also hold other
        prompts than before, as long as the same ones are chosen.
        """
        chosen = [prompt for prompt, _ in self._choose().values()]
        return {"sources": chosen, "target": load_prompt(self.target).prompt}
