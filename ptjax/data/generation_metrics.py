"""ROUGE and BLEU, for tasks whose answers are generated; see `metrics`.

References are the targets, or with `answers` all correct answers of each example. An example
without answers scores 0.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from ptjax.errors import needs

Texts = Sequence[str]

_NO_SPACES = re.compile(
    "[\u0e00-\u0e7f\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff]"
)
"""Thai, Japanese kana and Chinese characters."""


def rouge(
    predictions: Texts, targets: Texts, *, kind: str, answers: Sequence[Texts] | None = None
) -> float:
    """ROUGE's F1 with the best answer, averaged over the examples (rouge-score's, not stemmed).

    rouge-score drops every letter but a to z; here, words are those of `split_words`. For
    rougeLsum, a line is a sentence, and so is what ends with " . ", as in t5.

    Args:
        predictions, targets, answers: as for `exact_match`.
        kind: 'rouge1', 'rouge2', 'rougeL' or 'rougeLsum'.
    """
    scorer = load_rouge_score(kind).RougeScorer([kind], tokenizer=_Words())

    def score(prediction: str, answer: str) -> float:
        told, wanted = (text.replace(" . ", " .\n") for text in (prediction, answer))
        return scorer.score(wanted, told)[kind].fmeasure

    pairs = zip(predictions, _references(targets, answers), strict=True)
    return mean([max(score(prediction, a) for a in right) for prediction, right in pairs])


def bleu(predictions: Texts, targets: Texts, *, answers: Sequence[Texts] | None = None) -> float:
    """The BLEU of all predictions together (sacreBLEU's, with its tokeniser 13a).

    Longer sequences than the predictions have count as wrong, so three equal words give 0.

    Args:
        predictions, targets, answers: as for `exact_match`; all answers are references.
    """
    references = _references(targets, answers)
    if not references:
        raise ValueError("a metric needs at least one example")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} targets")
    # sacreBLEU takes all examples' first references, then their second ones, and so on.
    streams = [list(stream) for stream in itertools.zip_longest(*references)]
    return min(load_sacrebleu("bleu").corpus_bleu([*predictions], streams).score / 100, 1.0)


def sentence_bleu(
    predictions: Texts, targets: Texts, *, answers: Sequence[Texts] | None = None
) -> float:
    """The mean BLEU of the single predictions (sacreBLEU's, with its tokeniser 13a).

    Leaves out sequences longer than a prediction, so three equal words give 1. Takes the same
    arguments as `bleu`.
    """
    score = load_sacrebleu("sentence_bleu").sentence_bleu
    pairs = zip(predictions, _references(targets, answers), strict=True)
    return mean([min(score(prediction, right).score / 100, 1.0) for prediction, right in pairs])


def split_words(text: str) -> list[str]:
    """Splits a text into words for ROUGE: lower case, letters and digits of any script.

    Chinese, Japanese and Thai, which are written without spaces, are split into letters, with the
    marks on them. Lao, Khmer and Burmese are not. For ASCII these are rouge-score's own words.
    """
    words = [""]
    for c in unicodedata.normalize("NFC", text.lower()):
        kind = unicodedata.category(c)[0]
        if kind not in "LMN":
            words.append("")
        elif kind != "M" and (_NO_SPACES.match(c) or _NO_SPACES.match(words[-1])):
            words.append(c)
        else:
            words[-1] += c
    return [word for word in words if word]


def load_rouge_score(metric: str) -> ModuleType:
    """Imports rouge-score; InputError, which names the metric, if it is not installed."""
    with needs("metrics", f"the metric {metric}"):
        from rouge_score import rouge_scorer  # slow to import: nltk
    return rouge_scorer


def load_sacrebleu(metric: str) -> ModuleType:
    """Imports sacreBLEU; InputError, which names the metric, if it is not installed."""
    with needs("metrics", f"the metric {metric}"):
        import sacrebleu
    return sacrebleu


class _Words:
    """`split_words` as a tokeniser of rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return split_words(text)


def _references(targets: Texts, answers: Sequence[Texts] | None) -> list[list[str]]:
    """Each example's references, at least one: an example without answers has an empty one."""
    if answers is None:
        return [[target] for target in targets]
    return [[*right] or [""] for right in answers]


def mean(values: Sequence[bool | float]) -> float:
    """Returns the mean of an example's or a group's values; ValueError if there is not one."""
    if not values:
        raise ValueError("a metric needs at least one example")
    return float(np.mean(values))
