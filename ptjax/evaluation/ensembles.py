"""Combines the predictions of several prompts for one task: an ensemble (paper, section 5)."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from ptjax.data.pipeline import ExampleSource
from ptjax.inference.labels import label_probabilities


@dataclasses.dataclass(frozen=True)
class RepeatedSource:
    """Repeats each example of a source, so that every prompt of a bank can predict it.

    Attributes:
        source: the examples a, b, ...
        times: how often each is repeated; 2 gives a, a, b, b, ...
    """

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
        members: the predictions of each prompt, N lists of M texts.
        majority_vote: for each example, the text that most prompts predict. Ties go to the label
            with the highest mean probability; if texts were generated, to the text with the highest
            mean score.
        mean_likelihood: for each example, the label with the highest mean probability over prompts.
            None if texts were generated, since each prompt only scores the text that it generates.
    """

    members: list[list[str]]
    majority_vote: list[str]
    mean_likelihood: list[str] | None


def mean_shares(likelihoods: Float[np.ndarray, "M N C"]) -> Float[np.ndarray, "M C"]:
    """Averages each label's probability over N prompts.

    A prompt's probabilities of the labels are normalised to a sum of 1. Log-likelihoods are not
    averaged, because one confident prompt would outweigh all others.

    Args:
        likelihoods: the log-likelihoods of C labels for M examples under each of N prompts.
    """
    return label_probabilities(likelihoods).mean(axis=1)


def vote_on_labels(likelihoods: Float[np.ndarray, "M N C"]) -> Int[np.ndarray, " M"]:
    """Returns each example's majority vote: the index of the label that most prompts rank first.

    Ties go to the label with the highest mean probability.

    Args:
        likelihoods: as for `mean_shares`.
    """
    votes = (likelihoods.argmax(axis=2)[..., None] == np.arange(likelihoods.shape[2])).sum(axis=1)
    most = votes == votes.max(axis=1, keepdims=True)
    return np.where(most, mean_shares(likelihoods), -1.0).argmax(axis=1)


def vote_on_texts(texts: Sequence[str], scores: Float[np.ndarray, " N"]) -> str:
    """Returns the text that most of N prompts generated.

    Ties go to the text with the highest mean score over the prompts that generated it.

    Args:
        texts: the text that each prompt generated.
        scores: the score of each text.
    """
    votes: dict[str, list[float]] = collections.defaultdict(list)
    for text, score in zip(texts, scores, strict=True):
        votes[text].append(float(score))
    return max(votes, key=lambda text: (len(votes[text]), float(np.mean(votes[text]))))
