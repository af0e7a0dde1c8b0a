"""Metrics on cases counted by hand, their edges, and properties that hold for all inputs."""

from __future__ import annotations

import json
import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
from conftest import FIXTURES
from rouge_score import rouge_scorer

from ptjax.data import metrics

LABELS = ("no", "maybe", "yes")


def test_accuracy():
    assert metrics.accuracy(["a", " b ", "x"], ["a", "b", "c"]) == pytest.approx(2 / 3)
    assert metrics.accuracy(["A"], ["a"]) == 0.0


def test_mean_f1_is_over_the_tasks_classes():
    targets = ["no", "no", "yes", "yes"]
    # no: precision 1/2, recall 1/2; yes: 1, 1/2; maybe: never seen, 0.
    predictions = ["no", "maybe", "yes", "no"]
    expected = (1 / 2 + 2 / 3 + 0) / 3
    assert metrics.mean_f1(predictions, targets, labels=LABELS) == pytest.approx(expected)
    assert metrics.mean_f1(targets, targets, labels=("no", "yes")) == 1.0


def test_mean_f1_counts_an_invalid_prediction_as_missed():
    # no: 1, 1/2 -> 2/3; yes: 1.
    value = metrics.mean_f1(["no", "??", "yes"], ["no", "no", "yes"], labels=("no", "yes"))
    assert value == pytest.approx((2 / 3 + 1) / 2)


def test_f1_is_of_the_last_label():
    targets = ["no", "yes", "yes", "yes"]
    predictions = ["yes", "yes", "yes", "no"]  # precision 2/3, recall 2/3
    assert metrics.f1(predictions, targets, labels=("no", "yes")) == pytest.approx(2 / 3)
    # The other way round: the one 'no' is missed.
    assert metrics.f1(predictions, targets, labels=("yes", "no")) == 0.0


def test_f1_counts_an_invalid_prediction_as_the_wrong_label():
    # On 'yes' a miss, on 'no' a false alarm: precision 1/2, recall 1/2.
    value = metrics.f1(["yes", "?", "?"], ["yes", "yes", "no"], labels=("no", "yes"))
    assert value == pytest.approx(1 / 2)


def test_matthews():
    targets = ["yes", "yes", "yes", "no", "no", "no"]
    predictions = ["yes", "yes", "no", "no", "no", "yes"]  # tp 2, fn 1, tn 2, fp 1
    expected = (2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3)
    assert metrics.matthews(predictions, targets, labels=("no", "yes")) == pytest.approx(expected)
    inverted = ["no" if t == "yes" else "yes" for t in targets]
    assert metrics.matthews(inverted, targets, labels=("no", "yes")) == pytest.approx(-1)


def test_correlations():
    targets, predictions = ["1", "2", "3", "4"], ["1", "4", "9", "16"]
    assert metrics.spearman(predictions, targets) == pytest.approx(1)
    assert metrics.pearson(predictions, targets) == pytest.approx(0.984374, abs=1e-6)
    assert metrics.pearson(["4", "3", "2", "1"], targets) == pytest.approx(-1)


@pytest.mark.parametrize("text", ["", "good", "nan", "inf", "1e999"])
def test_correlations_count_what_is_no_number_as_minus_one(text):
    targets = ["1", "2", "3"]
    for metric in (metrics.pearson, metrics.spearman):
        assert metric(["1", "2", text], targets) == metric(["1", "2", "-1"], targets)


def test_undefined_values_are_zero_and_nothing_warns():
    same, targets = ["yes"] * 3, ["yes", "no", "yes"]
    assert metrics.matthews(same, targets, labels=("no", "yes")) == 0.0
    assert metrics.matthews(same, same, labels=("no", "yes")) == 0.0
    assert metrics.f1(["no"] * 3, ["no"] * 3, labels=("no", "yes")) == 0.0
    for metric in (metrics.pearson, metrics.spearman):
        assert metric(["1", "1", "1"], ["1", "2", "3"]) == 0.0
        assert metric(["1", "2", "3"], ["2", "2", "2"]) == 0.0
        assert metric(["1"], ["1"]) == 0.0
        assert math.isfinite(metric(["1e308", "-1e308", "1"], ["1e308", "2", "1"]))


def test_squad_normalisation_and_best_answer():
    answers = [["Paris", "the city of Paris"], ["42"]]
    predictions = ["The Paris!", "forty two"]
    assert metrics.normalize_answer("The Eiffel-Tower, a  landmark.") == "eiffeltower landmark"
    assert metrics.exact_match(predictions, ["", ""], answers=answers) == 0.5
    assert metrics.exact_match(["an answer"], ["Answer"]) == 1.0
    # 'big city' against 'city of paris': precision 1/2, recall 1/3; against 'Paris': 0.
    value = metrics.squad_f1(["big city"], [""], answers=[answers[0]])
    assert value == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    # Words count as often as they stand there.
    assert metrics.squad_f1(["x x x"], ["x"]) == pytest.approx(1 / 2)
    assert metrics.squad_f1(["the"], ["a"]) == 0.0
    assert metrics.squad_f1([""], ["x"]) == 0.0
    assert metrics.squad_f1(["x"], [""], answers=[[]]) == 0.0


SQUAD = json.loads((FIXTURES / "squad_scores.json").read_text())
"""Pairs with the exact match and F1 of the scorers that it names."""


@pytest.mark.parametrize("pair", SQUAD["pairs"], ids=lambda p: f"{p['prediction']}|{p['answers']}")
def test_case_3_4_squad_scores_are_the_official_ones(pair):
    """SQuAD 1.1's script; of unanswerable questions SQuAD 2.0's, where no answer is right."""
    unanswerable = not any(answer.strip() for answer in pair["answers"])
    exact, f1 = pair["squad2" if unanswerable else "squad1"]
    prediction, answers = [pair["prediction"]], [pair["answers"]]
    assert metrics.exact_match(prediction, ["?"], answers=answers) == exact
    # The same formula in another order: off by a rounding or two.
    assert metrics.squad_f1(prediction, ["?"], answers=answers) == pytest.approx(f1, rel=1e-14)


def test_case_3_3_f1_of_the_label_that_is_asked_for():
    targets = ["no", "yes", "yes", "yes"]
    predictions = ["no", "no", "yes", "yes"]
    labels = ("no", "yes")
    # yes: precision 1, recall 2/3; no: precision 1/2, recall 1.
    assert metrics.f1(predictions, targets, labels=labels) == pytest.approx(4 / 5)
    for label, value in {"yes": 4 / 5, "no": 2 / 3}.items():
        found = metrics.f1(predictions, targets, labels=labels, positive_label=label)
        assert found == pytest.approx(value)


def test_group_exact_match():
    predictions, targets = ["a", "b", "x", "c"], ["a", "b", "d", "c"]
    groups = ["p", "p", "q", "q"]
    assert metrics.group_exact_match(predictions, targets, groups=groups) == 0.5
    assert metrics.group_exact_match(predictions, targets, groups=range(4)) == 0.75


@pytest.mark.parametrize(
    ("prediction", "target", "label", "right"),
    [
        ("Bob", "bob", True, True),
        ("the trophy", "trophy", True, True),
        ("trophy", "the big trophy", True, True),
        ("the big trophy", "Trophy", 1, True),
        ("suitcase", "trophy", True, False),
        ("suitcase", "trophy", False, True),
        ("trophy", "trophy", "false", False),
        ("Bob", "Bob's hat", True, False),
        ("hat", "Bob's hat", True, False),
        ("Bob's hat", "hat", True, False),
        ("Bob's hat", "hat", False, True),
        ("Bob's", "Bob's hat", True, True),
        ("", "trophy", False, False),
        ("", "trophy", True, False),
        ("the", "trophy", False, False),
    ],
)
def test_referent_accuracy(prediction, target, label, right):
    value = metrics.referent_accuracy([prediction], [target], label_values=[label])
    assert value == float(right)


ENGLISH = [
    ("the cat sat on the mat", "the cat is on a mat"),
    ("It's a so-so film .\nThe end_of it", "a SO-SO film. The end"),
    ("one . two . three", "three . two . one"),
    ("", "words"),
    ("?!", "words"),
]


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
def test_rouge_is_rouge_score_s_on_english(kind):
    told, wanted = (list(side) for side in zip(*ENGLISH, strict=True))
    lines = [[text.replace(" . ", " .\n") for text in side] for side in (told, wanted)]
    scorer = rouge_scorer.RougeScorer([kind])
    scores = [scorer.score(w, t)[kind].fmeasure for t, w in zip(*lines, strict=True)]
    value = metrics.METRICS[kind].function(told, wanted)
    assert value == pytest.approx(sum(scores) / len(scores), abs=1e-12) and 0 < value < 1


@pytest.mark.parametrize(
    ("prediction", "target", "share"),
    [
        ("кошка сидит на окне", "Кошка спит на окне", 3 / 4),
        ("我喜欢猫", "我喜欢狗", 3 / 4),
        ("ที่・𠀀", "ที่ 𠀀ab", 2 * 2 / (2 + 3)),  # a letter with its marks; '・' is none
        ("हिन्दी भाषा", "हिन्दी गीत", 1 / 2),  # a vowel sign does not end a word
        ("naïve cafe\u0301", "naïve café", 1),  # composed and decomposed
    ],
)
def test_rouge_keeps_every_script(prediction, target, share):
    assert metrics.METRICS["rouge1"].function([prediction], [target]) == pytest.approx(share)


def test_rouge_takes_the_best_answer():
    rouge1 = metrics.METRICS["rouge1"].function
    answers = [["x y", "a b c d", "a"], []]
    assert rouge1(["a b", "a"], ["", ""], answers=answers) == pytest.approx((2 / 3 + 0) / 2)


def test_bleu_of_a_corpus_and_of_sentences():
    assert metrics.bleu(["a b c"], ["a b c"]) == 0.0
    assert metrics.sentence_bleu(["a b c"], ["a b c"]) == 1.0
    # All of 4 words in a row are right, but the text has half the reference's length: e^(1 - 2).
    half = metrics.bleu(["a b c d"], ["a b c d e f g h"])
    assert half == pytest.approx(math.exp(-1))
    assert metrics.sentence_bleu(["a b c d"], ["a b c d e f g h"]) == pytest.approx(half)
    # No four words in a row are right: sacreBLEU smooths 0 of 2 to 1 of 4.
    smoothed = metrics.bleu(["a b c x y"], ["a b c z w"])
    assert smoothed == pytest.approx((3 / 5 * 2 / 4 * 1 / 3 * 1 / 4) ** (1 / 4))
    # n-grams of the corpus: 7 of 8, 5 of 6, 3 of 4, 1 of 2.
    value = metrics.bleu(["a b c d", "e f g h"], ["a b c d", "e f g x"])
    assert value == pytest.approx((7 / 8 * 5 / 6 * 3 / 4 * 1 / 2) ** (1 / 4))


def test_bleu_takes_all_answers_as_references():
    answers = [["x"], ["a b y y", "z c d e", "w"], []]
    # Of 'a b c d', 'a b' is in one reference and 'c d' in another.
    value = metrics.bleu(["a b c d e f"] * 3, [""] * 3, answers=[["a b c d e f"], *answers[1:]])
    alone = metrics.bleu(["a b c d e f"] * 3, ["a b c d e f", "a b y y", ""])
    assert 0 < alone < value < 1


texts = st.sampled_from(["no", "yes", "maybe", "", "?", "1", "2.5", "-3", "nan", "a b c d e"])


@hypothesis.given(st.lists(st.tuples(texts, texts), min_size=1, max_size=8), st.data())
def test_every_metric_is_a_finite_fraction_and_perfect_is_the_best(pairs, data):
    predictions, targets = (list(side) for side in zip(*pairs, strict=True))
    keywords = {
        "labels": ("no", "yes"),
        "positive_label": "yes",
        "answers": [[target] for target in targets],
        "groups": data.draw(st.lists(st.integers(0, 2), min_size=len(pairs), max_size=len(pairs))),
        "label_values": [True] * len(pairs),
    }
    in_labels = ["yes" if target == "yes" else "no" for target in targets]
    for name, metric in metrics.METRICS.items():
        # f1 takes a task's own targets, which are labels; predictions may be anything.
        wanted = in_labels if "labels" in metric.needs else targets
        needs = {need: keywords[need] for need in metric.needs}
        value = metric.function(predictions, wanted, **needs)
        lowest = -1.0 if name in ("matthews", "pearson", "spearman") else 0.0
        assert lowest - 1e-9 <= value <= 1 + 1e-9, name
        # The one scores against the label, the other needs four words somewhere.
        if name not in ("referent_accuracy", "bleu"):
            assert value <= metric.function(wanted, wanted, **needs) + 1e-9, name


@pytest.mark.parametrize("name", sorted(metrics.METRICS))
def test_no_examples_and_unequal_lengths_are_refused(name):
    metric = metrics.METRICS[name]
    empty = {need: [] for need in metric.needs}
    if name not in ("pearson", "spearman"):
        with pytest.raises(ValueError, match="at least one example"):
            metric.function([], [], **empty)
    one: dict[str, Any] = {need: ["yes"] for need in metric.needs}
    if "labels" in one:
        one["labels"] = ("no", "yes")
    if "positive_label" in one:
        one["positive_label"] = "yes"
    if "answers" in one:
        one["answers"] = [["yes"]]
    with pytest.raises(ValueError):
        metric.function(["yes", "no"], ["yes"], **one)
