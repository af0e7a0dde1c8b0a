"""Metrics of predictions, as fractions.

A metric takes the predicted and the target texts, both [N], and the arguments that
`METRICS[name].needs` lists. In a metric of labels, a prediction that is not one of the task's is
wrong. Correlations are in [-1, 1], everything else in [0, 1]; an undefined metric (an F1 without
positives, a correlation with constant predictions) is 0.0, never NaN. Arguments of different
lengths raise a ValueError.
"""

from __future__ import annotations

import collections
import functools
import math
import re
import string
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from ptjax.data.generation_metrics import (
    Texts,
    bleu,
    load_rouge_score,
    load_sacrebleu,
    mean,
    rouge,
    sentence_bleu,
)
from ptjax.errors import needs


def accuracy(predictions: Texts, targets: Texts) -> float:
    """The share of predictions equal to the target up to outer white space (t5's `accuracy`)."""
    return mean([p.strip() == t.strip() for p, t in zip(predictions, targets, strict=True)])


def mean_f1(predictions: Texts, targets: Texts, *, labels: Texts) -> float:
    """The unweighted mean of the F1 of each class (scikit-learn's; SuperGLUE's for CB).

    The classes are `labels`.
    """
    given, wanted = _class_ids(predictions, targets, labels)
    classes = list(range(len(labels)))
    zero: Any = 0.0  # its annotation knows only the default, 'warn'
    f1_score = _sklearn("mean_f1").f1_score
    return float(f1_score(wanted, given, labels=classes, average="macro", zero_division=zero))


def f1(
    predictions: Texts, targets: Texts, *, labels: Texts, positive_label: str | None = None
) -> float:
    """The F1 of one of two labels (scikit-learn's; GLUE's for MRPC, QQP; MultiRC's F1a).

    A prediction that is not in `labels` counts as the label that is not the target, as in t5's
    `f1_score_with_invalid`.

    Args:
        predictions, targets: texts [N].
        labels: the two labels.
        positive_label: the label whose F1 is computed (default: the last of `labels`).
    """
    given, wanted = _class_ids(predictions, targets, labels)
    given = np.where(given < 0, 1 - wanted, given)
    positive = 1 if positive_label is None else list(labels).index(positive_label)
    zero: Any = 0.0  # its annotation knows only the default, 'warn'
    f1_score = _sklearn("f1").f1_score
    return float(f1_score(wanted, given, pos_label=positive, average="binary", zero_division=zero))


def matthews(predictions: Texts, targets: Texts, *, labels: Texts) -> float:
    """Matthews' correlation (scikit-learn's; GLUE's for CoLA).

    The classes are `labels`; predictions that are not in `labels` form one more class. Returns 0
    if all predictions are of one class, or all targets.
    """
    given, wanted = _class_ids(predictions, targets, labels)
    if (given == given[0]).all() or (wanted == wanted[0]).all():
        return 0.0
    return float(_sklearn("matthews").matthews_corrcoef(wanted, given))


def pearson(predictions: Texts, targets: Texts) -> float:
    """Pearson's correlation of the texts as numbers (scipy's; GLUE's for STS-B).

    A text that is not a number counts as -1, as in t5.
    """
    from scipy import stats  # slow to import

    return _correlation(stats.pearsonr, predictions, targets)


def spearman(predictions: Texts, targets: Texts) -> float:
    """Spearman's rank correlation of the texts as numbers (scipy's; GLUE's for STS-B).

    A text that is not a number counts as -1, as in t5.
    """
    from scipy import stats  # slow to import

    return _correlation(stats.spearmanr, predictions, targets)


def exact_match(
    predictions: Texts, targets: Texts, *, answers: Sequence[Texts] | None = None
) -> float:
    """SQuAD's exact match: the share of predictions that equal one of their example's answers.

    Prediction and answer are compared after SQuAD's normalisation, as in the script of SQuAD 1.1
    (and in t5's `squad` and ReCoRD's). For an unanswerable question, which has no answers or only
    empty ones, only an empty prediction is right, as in the script of SQuAD 2.0.

    Args:
        predictions: texts [N].
        targets: texts [N], the only answer of each example if `answers` is None.
        answers: N lists, with all correct answers of each example.
    """
    return _best_over_answers(lambda p, a: float(p == a), predictions, targets, answers)


def squad_f1(
    predictions: Texts, targets: Texts, *, answers: Sequence[Texts] | None = None
) -> float:
    """SQuAD's F1 over words: the F1 with the best answer, averaged over the examples.

    Takes the same arguments as `exact_match`, and treats unanswerable questions alike. As in the
    script of SQuAD 1.1, the F1 with an answer that consists of articles and punctuation is 0, even
    where the exact match is 1.
    """
    return _best_over_answers(_word_f1, predictions, targets, answers)


def group_exact_match(predictions: Texts, targets: Texts, *, groups: Sequence[Hashable]) -> float:
    """The share of groups in which every prediction is right (SuperGLUE's EM for MultiRC).

    Args:
        groups: [N]; examples with equal values form a group.
    """
    right: dict[Hashable, bool] = {}
    for prediction, target, group in zip(predictions, targets, groups, strict=True):
        right[group] = right.get(group, True) and prediction.strip() == target.strip()
    return mean(list(right.values()))


# Words that do not decide whether two phrases name the same thing (t5's wsc_simple).
# fmt: off
_DETERMINERS = frozenset({
    "a", "an", "few", "her", "his", "each", "every", "many", "much", "my", "our", "some", "that",
    "the", "their", "these", "this", "those", "which", "whose", "your",
})
# fmt: on


def referent_accuracy(
    predictions: Texts, targets: Texts, *, label_values: Sequence[object]
) -> float:
    """The accuracy on WSC, where the model writes what the pronoun refers to (t5's `wsc_simple`).

    A target is the candidate that the record asks about. A prediction means 'yes' if it names the
    candidate: the words of one, without determiners ('the', 'his', ...), are a subset of the
    other's, and an apostrophe occurs in both or in neither. The prediction is right if this agrees
    with the record's label. An empty prediction is wrong.

    Args:
        label_values: the records' labels [N]. True, 1 and these as text mean that the candidate is
            right; anything else, that it is not.
    """
    right = []
    for prediction, target, label in zip(predictions, targets, label_values, strict=True):
        given, wanted = _referent_words(prediction), _referent_words(target)
        same = given <= wanted or wanted <= given
        # 'Bob' is not "Bob's hat".
        same = same and ("'" in " ".join(given)) == ("'" in " ".join(wanted))
        right.append(bool(given) and same == (str(label).lower() in ("true", "1")))
    return mean(right)


@dataclass(frozen=True)
class Metric:
    """A metric and the keyword arguments that it takes in addition to predictions and targets.

    Attributes:
        needs: the names of these arguments: 'labels' (the task's label texts), 'positive_label'
            (one of them), 'answers', 'groups' or 'label_values' (each with one entry per example).
        load: imports the package that computes it, for one that the base installation leaves out.
            Takes the metric's name, for messages.
    """

    function: Callable[..., float]
    needs: tuple[str, ...] = ()
    load: Callable[[str], object] | None = None


def check_installed(names: Iterable[str]) -> None:
    """Raises InputError if a metric needs a package that is not installed.

    Args:
        names: of `METRICS`.
    """
    for name in names:
        if load := METRICS[name].load:
            load(name)


def normalize_answer(text: str) -> str:
    """Applies SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def as_number(text: str) -> float:
    """Returns the number that a text says; -1 if it is not a finite number, as in t5."""
    try:
        value = float(text)
    except ValueError:
        return -1.0
    return value if math.isfinite(value) else -1.0


def _sklearn(metric: str) -> ModuleType:
    with needs("report", f"the metric {metric}"):
        from sklearn import metrics  # slow to import
    return metrics


def _class_ids(predictions: Texts, targets: Texts, labels: Texts) -> tuple[np.ndarray, np.ndarray]:
    """Index [N] of each prediction and each target in the labels, -1 for other texts."""
    if not targets:
        raise ValueError("a metric needs at least one example")
    index = {label.strip(): i for i, label in enumerate(labels)}
    pairs = zip(predictions, targets, strict=True)
    ids = np.array([[index.get(text.strip(), -1) for text in pair] for pair in pairs])
    return ids[:, 0], ids[:, 1]


def _correlation(function: Callable, predictions: Texts, targets: Texts) -> float:
    given = np.array([as_number(text) for text in predictions])
    wanted = np.array([as_number(text) for text in targets])
    if len(given) != len(wanted):
        raise ValueError(f"{len(given)} predictions for {len(wanted)} targets")
    if len(given) < 2:
        return 0.0
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of constant and of nearly constant input
        value = float(function(given, wanted).statistic)
    return value if math.isfinite(value) else 0.0


def _best_over_answers(
    score: Callable[[str, str], float],
    predictions: Texts,
    targets: Texts,
    answers: Sequence[Texts] | None,
) -> float:
    if answers is None:
        answers = [[target] for target in targets]
    scores = []
    for prediction, right in zip(predictions, answers, strict=True):
        given = normalize_answer(prediction)
        if any(a.strip() for a in right):
            scores.append(max(score(given, normalize_answer(a)) for a in right))
        else:
            scores.append(float(not given))
    return mean(scores)


def _word_f1(prediction: str, answer: str) -> float:
    given, wanted = prediction.split(), answer.split()
    common = sum((collections.Counter(given) & collections.Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted)) if common else 0.0


def _referent_words(text: str) -> set[str]:
    return {word for word in text.strip().lower().split() if word not in _DETERMINERS}


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric(accuracy),
    "mean_f1": Metric(mean_f1, ("labels",), _sklearn),
    "f1": Metric(f1, ("labels", "positive_label"), _sklearn),
    "matthews": Metric(matthews, ("labels",), _sklearn),
    "pearson": Metric(pearson),
    "spearman": Metric(spearman),
    "exact_match": Metric(exact_match, ("answers",)),
    "squad_f1": Metric(squad_f1, ("answers",)),
    "group_exact_match": Metric(group_exact_match, ("groups",)),
    "referent_accuracy": Metric(referent_accuracy, ("label_values",)),
    **{
        kind: Metric(functools.partial(rouge, kind=kind), ("answers",), load_rouge_score)
        for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")
    },
    "bleu": Metric(bleu, ("answers",), load_sacrebleu),
    "sentence_bleu": Metric(sentence_bleu, ("answers",), load_sacrebleu),
}
