"""Templates: what they accept, what they make, what they refuse."""

from __future__ import annotations

import pytest

from ptjax.data.templates import RecordError, parse_template


def test_fields_and_literals():
    template = parse_template("a: {a} b: {b.c} {a}{{x}}")
    assert template.fields == ("a", "b.c")
    assert template.render({"a": 1, "b": {"c": True}}) == "a: 1 b: True 1{x}"


def test_names_of_official_headers_are_fields():
    assert parse_template("{#1 String}").render({"#1 String": "x"}) == "x"
    # A field that is called so goes before the field of an object.
    assert parse_template("{a.b}").render({"a.b": "flat", "a": {"b": "deep"}}) == "flat"


def test_text_of_a_field_is_no_template():
    assert parse_template("{a}").render({"a": "{b} {"}) == "{b} {"


@pytest.mark.parametrize("text", ["{a", "a}", "{}", "{ }", "{a!r}", "{a:>9}", "{a{b}}"])
def test_broken_templates(text):
    with pytest.raises(ValueError):
        parse_template(text)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"b": 1, "c": 2}, r"no field 'a\.x' \(fields: b, c\)"),
        ({}, r"no field 'a\.x' \(fields: none\)"),
        ({"a": {"y": 1}}, r"no field 'a\.x'"),
        ({"a": "text"}, r"no field 'a\.x'"),
        ({"a": {"x": None}}, r"'a\.x' is null"),
        ({"a": {"x": [1]}}, r"'a\.x' is a list"),
        ({"a": {"x": {}}}, r"'a\.x' is an object"),
    ],
)
def test_records_that_do_not_fit(record, message):
    with pytest.raises(RecordError, match=message):
        parse_template("{a.x}").render(record)
