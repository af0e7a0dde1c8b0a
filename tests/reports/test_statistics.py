"""Precision, recall, F1, confusion and calibration, against numbers computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from made_run import EVIL, LABELS, make_record

from ptjax.reports.statistics import OTHER, calibrate, statistics_of


def test_classes_are_those_computed_by_hand():
    found = statistics_of(make_record())
    # Right of those predicted, and of those expected: good 3/4, 3/4; bad 1/2, 1/2; so-so 1/1, 1/2.
    assert found["classes"] == [
        {"label": "good", "precision": 0.75, "recall": 0.75, "f1": 0.75, "support": 4},
        {"label": "bad", "precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2},
        {
            "label": LABELS[2],
            "precision": 1.0,
            "recall": 0.5,
            "f1": pytest.approx(2 / 3, abs=1e-15),
            "support": 2,
        },
    ]
    macro, weighted = found["averages"]
    assert (macro["label"], macro["precision"], macro["recall"]) == ("macro", 0.75, 1.75 / 3)
    assert macro["f1"] == pytest.approx((0.75 + 0.5 + 2 / 3) / 3, abs=1e-15)
    assert (weighted["precision"], weighted["recall"]) == (0.75, 0.625)
    assert weighted["f1"] == pytest.approx((4 * 0.75 + 2 * 0.5 + 2 * 2 / 3) / 8, abs=1e-15)
    assert macro["support"] == weighted["support"] == 8


def test_accuracy_has_its_standard_error():
    found = statistics_of(make_record())
    assert found["accuracy"] == 0.625
    assert found["standard_error"] == pytest.approx(np.sqrt(0.625 * 0.375 / 8), abs=1e-15)


def test_the_confusion_counts_what_is_not_a_label_in_a_column_of_its_own():
    assert statistics_of(make_record())["confusion"] == {
        "rows": LABELS,
        "columns": [*LABELS, OTHER],
        "counts": [[3, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]],
    }


def test_without_other_texts_there_is_no_such_column():
    record = make_record(predictions=["good "] * 8)  # white space does not count
    found = statistics_of(record)
    assert found["confusion"]["columns"] == LABELS
    assert found["confusion"]["counts"] == [[4, 0, 0], [2, 0, 0], [2, 0, 0]]
    assert found["classes"][1] == {
        "label": "bad", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 2,
    }  # fmt: skip


def test_calibration_is_the_one_computed_by_hand():
    found = statistics_of(make_record())["calibration"]
    # 0.35: 1 of 2 is right; 0.55: 1 of 2; 0.85: 2 of 2; 0.95: 1 of 2.
    bins = [(b["low"], b["count"], b["confidence"], b["accuracy"]) for b in found["bins"]]
    assert bins == [
        pytest.approx((0.3, 2, 0.35, 0.5)),
        pytest.approx((0.5, 2, 0.55, 0.5)),
        pytest.approx((0.8, 2, 0.85, 1.0)),
        pytest.approx((0.9, 2, 0.95, 0.5)),
    ]
    assert found["ece"] == pytest.approx((0.15 + 0.05 + 0.15 + 0.45) / 4)
    assert found["confidence"] == pytest.approx(0.675)


@pytest.mark.parametrize(("right", "ece"), [(True, 0.0), (False, 1.0)])
def test_calibration_of_predictions_that_are_all_right_or_all_wrong(right, ece):
    found = calibrate(np.array([right] * 3), [1.0, 1.0, 1.0])
    assert found["ece"] == ece
    [single] = found["bins"]
    assert (single["low"], single["high"], single["count"]) == (0.9, 1.0, 3)


def test_open_text_has_no_classes_and_generated_labels_no_calibration():
    found = statistics_of(make_record(labels=None, ranked=False))
    assert found["classes"] is found["averages"] is found["confusion"] is None
    assert found["calibration"] is None and found["accuracy"] == 0.625
    assert statistics_of(make_record(ranked=False))["calibration"] is None
    assert statistics_of(make_record(confidences=None))["calibration"] is None
    assert EVIL in make_record()["predictions"]
