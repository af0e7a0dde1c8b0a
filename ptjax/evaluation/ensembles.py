"""Combines the predictions of several prompts of one task: an ensemble (paper, section 5)."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.special import softmax

from ptjax.data.pipeline import ExampleSource


@dataclasses.dataclass(frozen=True)
class RepeatedSource:
    """An example source in which every example appears `times` times in a row."""

    source: ExampleSource
    times: int

    def __len__(self) -> int:
        return len(self.source) * self.times

    @property
    def input_lengths(self) -> np.ndarray:
        return np.repeat(self.source.input_lengths, self.times)

    @property
    def target_lengths(self) -> np.ndarray:
        return np.repeat(self.source.target_lengths, self.times)

    def tokens(self, index: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        return self.source.tokens(index // self.times, epoch)


@dataclasses.dataclass(frozen=True)
class EnsemblePredictions:
    """The predictions of N prompts, and of their two ensembles, for M examples.

    Attributes:
        members: N lists of M texts.
        majority_vote: M texts, each with more votes of the prompts than any other text.
        mean_likelihood: M texts, the labels with the greatest mean probability. None if texts were
            generated: a prompt has no likelihoods of the texts that the others generated.
    """

    members: list[list[str]]
    majority_vote: list[str]
    mean_likelihood: list[str] | None


def mean_shares(likelihoods: Float[np.ndarray, "M N C"]) -> Float[np.ndarray, "M C"]:
    """Averages each label's probability over N prompts.

    Probabilities are averaged, not log-likelihoods, in which one confident prompt would outweigh
    all others.

    Args:
        likelihoods: log-likelihoods of C labels for M examples, by each prompt.
    """
    return softmax(likelihoods.astype(np.float64), axis=2).mean(axis=1)


def vote_on_labels(likelihoods: Float[np.ndarray, "M N C"]) -> Int[np.ndarray, " M"]:
    """Returns for each example the index of the label that is most frequently a prompt's likeliest.

    `mean_shares` breaks ties; arguments as there.
    """
    votes = (likelihoods.argmax(axis=2)[..., None] == np.arange(likelihoods.shape[2])).sum(axis=1)
    most = votes == votes.max(axis=1, keepdims=True)
    return np.where(most, mean_shares(likelihoods), -1.0).argmax(axis=1)


def vote_on_texts(texts: Sequence[str], scores: Float[np.ndarray, " N"]) -> str:
    """Returns the text that most frequently occurs among those that N prompts generated.

    The mean score of its prompts breaks ties.
    """
    votes: dict[str, list[float]] = collections.defaultdict(list)
    for text, score in zip(texts, scores, strict=True):
        votes[text].append(float(score))
    return max(votes, key=lambda text: (len(votes[text]), float(np.mean(votes[text]))))
