"""Initialisers of soft prompts."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ptjax.errors import InputError, needs
from ptjax.methods.base import InitContext


class Initializer(Protocol):
    """The interface of a prompt's initialiser, a function that makes a prompt's first value.

    It is called as `(key, length, context)`: a random key, the number of the prompt's rows and the
    inputs, such as the embedding table. It returns a float32 array [length, D].
    """

    def __call__(self, key: Array, length: int, context: InitContext, /) -> Float[Array, "P D"]: ...


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Draws every entry from U(-scale, scale), as in the paper.

    (The paper's code draws from [0, 0.5).)
    """

    scale: float = 0.5

    def __call__(self, key: Array, length: int, context: InitContext) -> Float[Array, "P D"]:
        shape = (length, context.embedding.shape[1])
        return jax.random.uniform(key, shape, minval=-self.scale, maxval=self.scale)


@dataclasses.dataclass(frozen=True)
class SampledVocabulary:
    """Initialises rows with the embeddings of random tokens.

    No token is drawn twice unless the prompt is longer than the population.

    Attributes:
        population: draw from this many of the most frequent tokens. These are the first ids:
            SentencePiece orders a unigram vocabulary by frequency.
        special_tokens: number of ids before them (padding, EOS, unknown), which are never drawn.
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
    """Initialises one row per class label with the mean embedding of the label's tokens.

    See the paper, section 3.2.

    Attributes:
        labels: texts to use instead of the task's labels, as the paper does for ReCoRD and WSC.
        rest: initialises the other rows.
    """

    labels: tuple[str, ...] | None = None
    rest: Initializer = SampledVocabulary()

    def __call__(self, key: Array, length: int, context: InitContext) -> Float[Array, "P D"]:
        labels = self.labels or context.labels
        if not labels:
            raise InputError(
                "class-label initialisation needs a closed label set: set a verbalizer in the "
                "task or ClassLabels.labels, or choose SampledVocabulary"
            )
        return _fill([context.phrase(x) for x in labels], self.rest, key, length, context)


@dataclasses.dataclass(frozen=True)
class FromText:
    """Initialises one row per token of `text` with the token's embedding, as many as fit.

    `rest` initialises the other rows.
    """

    text: str
    rest: Initializer = SampledVocabulary()

    def __call__(self, key: Array, length: int, context: InitContext) -> Float[Array, "P D"]:
        rows = list(context.rows(context.encode(self.text)))
        return _fill(rows, self.rest, key, length, context)


@dataclasses.dataclass(frozen=True)
class FrequentWords:
    """Initialises one row per word with the mean embedding of the word's tokens.

    The words are the most frequent ones of the training inputs. Numbers, punctuation, English stop
    words and words of fewer than `minimum_letters` letters do not count. If there are fewer words
    than rows, `rest` initialises the other rows.
    """

    minimum_letters: int = 3
    rest: Initializer = SampledVocabulary()

    def __call__(self, key: Array, length: int, context: InitContext) -> Float[Array, "P D"]:
        words = [context.phrase(word) for word in self.words(length, context.texts())]
        return _fill(words, self.rest, key, length, context)

    def words(self, count: int, texts: Iterable[str]) -> list[str]:
        """Returns the `count` most frequent words; ties are in alphabetical order."""
        # Imported here: scikit-learn takes a second to load, and nothing else needs it.
        with needs("report", "ptjax.FrequentWords"):
            from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

        pattern = re.compile(rf"[^\W\d_]{{{self.minimum_letters},}}")
        counts = collections.Counter(w for text in texts for w in pattern.findall(text.lower()))
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return [word for word, _ in ranked if word not in ENGLISH_STOP_WORDS][:count]


def _fill(
    rows: list[Array], rest: Initializer, key: Array, length: int, context: InitContext
) -> Float[Array, "P D"]:
    """`rows`, cut to `length` or filled up with rows of `rest`."""
    rows = rows[:length]
    others = rest(key, length, context)[len(rows) :]
    return jnp.concatenate([jnp.stack(rows), others]) if rows else others
