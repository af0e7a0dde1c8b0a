"""SuperGLUE's records, official and TFDS's, as their templates want them."""

from __future__ import annotations

import json

import pytest

import ptjax
from ptjax.data.catalogue import CATALOGUE, find, name_of, reviews, super_glue


def test_names_lead_to_their_functions():
    assert CATALOGUE["ptjax.preprocessors.multirc"] is super_glue.multirc
    for name, function in CATALOGUE.items():
        assert find(name) is function and name_of(function) == name
        assert getattr(ptjax.preprocessors, name.rpartition(".")[2]) is function
    assert name_of(json.dumps) == "json.dumps" and find("json.dumps") is None


def test_headers_named_functions_by_where_they_were():
    """Up to commit 324cea1 and after it, until they had public names."""
    for module, name in (("super_glue", "wsc_referents"), ("reviews", "sentences")):
        home = {"super_glue": super_glue, "reviews": reviews}[module]
        assert find(f"ptjax.data.catalogue.{module}.{name}") is getattr(home, name)
    assert find("ptjax.data.catalogue.super_glue.gone") is None


def test_multirc_has_one_example_per_answer():
    record = {
        "idx": 7,
        "passage": {
            "text": "<b>Sent 1: </b>It fell.<br><b>Sent 2: </b>It broke.<br>",
            "questions": [
                {"question": "Why?", "idx": 3, "answers": [{"text": "<b>x</b>", "label": 1}]},
                {"question": "Who?", "idx": 4, "answers": [{"text": "y"}, {"text": "z"}]},
            ],
        },
    }
    first, second, third = super_glue.multirc(record)
    assert first == {
        "question": "Why?",
        "answer": "x",
        "paragraph": "Sent 1: It fell. Sent 2: It broke. ",
        "group": "7/3",
        "label": 1,
    }
    assert second["group"] == third["group"] == "7/4"
    assert "label" not in second
    flat = {
        "question": "Why?",
        "answer": "x",
        "paragraph": "a<br>b",
        "label": 0,
        "idx": {"paragraph": 7, "question": 3, "answer": 9},
    }
    assert list(super_glue.multirc(flat)) == [{**flat, "paragraph": "a b", "group": "7/3"}]
    assert flat["paragraph"] == "a<br>b"


def _wsc(text, index, pronoun, **more):
    target = {"span1_text": "Mark", "span1_index": 0, "span2_text": pronoun, "span2_index": index}
    return {"text": text, "target": target, **more}


@pytest.mark.parametrize(
    ("text", "index", "pronoun", "marked"),
    [
        ("Mark said he lied .", 2, "he", "Mark said *he* lied ."),
        ("He lied .", 0, "He", "*He* lied ."),
        ("he said he lied", 2, "he", "he said *he* lied"),
        ('"Good for him," he said.', 2, "him", '"Good for *him* ," he said.'),
        ("want to use it , but", 2, "it", "want to use *it* , but"),
        ("of his own dog", 1, "his own", "of *his own* dog"),
        # The position is that of the word before, even where that is no word.
        ("Mark - he lied .", 1, "he", "Mark - *he* lied ."),
    ],
)
def test_wsc_marks_the_pronoun(text, index, pronoun, marked):
    record = _wsc(text, index, pronoun, label=False)
    (example,) = super_glue.wsc(record)
    assert example == {**record, "marked_text": marked, "referent": "Mark"}
    flat = {"text": text, **record["target"]}
    assert next(super_glue.wsc(flat))["marked_text"] == marked


@pytest.mark.parametrize(("index", "pronoun"), [(0, "he"), (9, "he"), (2, "h"), (1, "it")])
def test_wsc_refuses_a_pronoun_that_is_not_there(index, pronoun):
    with pytest.raises(ValueError, match=f"word {index} of the text is not the pronoun"):
        list(super_glue.wsc(_wsc("Mark said he lied .", index, pronoun)))


def test_wsc_trains_on_true_referents_only():
    text = "Mark said he lied ."
    assert len(list(super_glue.wsc_referents(_wsc(text, 2, "he", label=True)))) == 1
    assert list(super_glue.wsc_referents(_wsc(text, 2, "he", label=False))) == []


def test_record_cleans_highlights_and_lists_entities_once():
    text = 'Ann met Bob\n@highlight\nBob "left."\n@highlight\nAnn stayed'
    entities = [{"start": 8, "end": 10}, {"start": 0, "end": 2}, {"start": 23, "end": 25}]
    answers = [{"text": "Bob"}, {"text": "Ann"}, {"text": "Bob"}]
    official = {
        "passage": {"text": text, "entities": entities},
        "qas": [{"query": "@placeholder stayed", "answers": answers}, {"query": "q2"}],
    }
    first, second = super_glue.record(official)
    assert first == {
        "query": "@placeholder stayed",
        "passage": 'Ann met Bob. Bob "left." Ann stayed',
        "entities": "Ann, Bob",
        "answers": ["Ann", "Bob"],
        "answer": "Ann",
    }
    assert second["answers"] == []
    assert "answer" not in second
    assert [e["answer"] for e in super_glue.record_answers(official)] == ["Ann", "Bob"]
    flat = {
        "query": "@placeholder stayed",
        "passage": text,
        "entities": ["Ann", "Bob"],
        "answers": ["Ann", "Bob"],
    }
    assert list(super_glue.record(flat)) == [first]


def test_reviews_lose_their_line_breaks():
    (clean,) = reviews.without_line_breaks({"text": "a.<br /><br />b<br>c <br/> d", "x": 1})
    assert clean == {"text": "a. b c d", "x": 1}
