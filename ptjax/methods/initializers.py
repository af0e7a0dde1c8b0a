"""The ways to initialise a soft prompt."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ptjax.errors import InputError
from ptjax.methods.base import InitContext


@runtime_checkable
class Initializer(Protocol):
    """`(key, length, context) -> P [length, D]`, float32."""

    def __call__(self, key: Array, length: int, context: InitContext, /) -> Float[Array, "P D"]: ...


@dataclasses.dataclass(frozen=True)
class Uniform:
    """U(-scale, scale) per entry, as the paper says; its code draws from [0, 0.5)."""

    scale: float = 0.5

    def __call__(self, key: Array, length: int, context: InitContext) -> Float[Array, "P D"]:
        shape = (length, context.embedding.shape[1])
        return jax.random.uniform(key, shape, minval=-self.scale, maxval=self.scale)


@dataclasses.dataclass(frozen=True)
class SampledVocabulary:
    """Embeddings of random tokens among the `population` most common.

    SentencePiece orders a unigram vocabulary by frequency, behind padding, EOS and unknown, which
    are left out. No token is drawn twice unless the prompt is longer than the population.
    """

    population: int = 5000
    special_tokens: int = 3

    def __call__(self, key: Array, length: int, context: InitContext) -> Float[Array, "P D"]:
        end = min(self.special_tokens + self.population, len(context.embedding))
        common = np.arange(self.special_tokens, end)
        ids = jax.random.choice(key, common, (length,), replace=length > len(common))
        return context.rows(ids)


@dataclasses.dataclass(frozen=True)
class ClassLabels:
    """One row per class label, its pieces averaged; other rows by `rest` (paper, section 3.2).

    Attributes:
        labels: texts to use instead of the task's verbalizers (the paper gives ReCoRD and WSC
            words of their own).
    """

    labels: tuple[str, ...] | None = None
    rest: Initializer = SampledVocabulary()

    def __call__(self, key: Array, length: int, context: InitContext) -> Float[Array, "P D"]:
        labels = self.labels or context.labels
        if not labels:
            raise InputError(
                "class-label initialisation needs a closed label set: give the task a verbalizer, "
                "set ClassLabels.labels, or choose SampledVocabulary"
            )
        return _fill([context.phrase(x) for x in labels], self.rest, key, length, context)


@dataclasses.dataclass(frozen=True)
class FromText:
    """The embedded pieces of `text`, cut to the prompt's length; other rows by `rest`."""

    text: str
    rest: Initializer = SampledVocabulary()

    def __call__(self, key: Array, length: int, context: InitContext) -> Float[Array, "P D"]:
        rows = list(context.rows(context.encode(self.text)))
        return _fill(rows, self.rest, key, length, context)


@dataclasses.dataclass(frozen=True)
class FrequentWords:
    """The words that stand most often in the training inputs, each its pieces averaged.

    Stop words, punctuation and numbers do not count; other rows by `rest`.
    """

    minimum_letters: int = 3
    rest: Initializer = SampledVocabulary()

    def __call__(self, key: Array, length: int, context: InitContext) -> Float[Array, "P D"]:
        words = [context.phrase(word) for word in self.words(length, context.texts())]
        return _fill(words, self.rest, key, length, context)

    def words(self, count: int, texts: Iterable[str]) -> list[str]:
        """The `count` most frequent, ties in alphabetical order."""
        # Imported here: scikit-learn takes a second to load and only this initialiser needs it.
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

        pattern = re.compile(rf"[^\W\d_]{{{self.minimum_letters},}}")
        counts = collections.Counter(w for text in texts for w in pattern.findall(text.lower()))
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return [word for word, _ in ranked if word not in ENGLISH_STOP_WORDS][:count]


def _fill(
    rows: list[Array], rest: Initializer, key: Array, length: int, context: InitContext
) -> Float[Array, "P D"]:
    """`rows`, cut to `length` or followed by rows of `rest`."""
    rows = rows[:length]
    others = rest(key, length, context)[len(rows) :]
    return jnp.concatenate([jnp.stack(rows), others]) if rows else others
