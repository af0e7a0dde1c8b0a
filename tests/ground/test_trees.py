"""Nested dicts by their paths, and back."""

from __future__ import annotations

import doctest

import hypothesis.strategies as st
import jax
import numpy as np
from hypothesis import given, settings

from ptjax import trees
from ptjax.trees import flatten_paths, unflatten_paths

names = st.text("abcd_1", min_size=1, max_size=3)
nested = st.recursive(
    st.integers(), lambda child: st.dictionaries(names, child, min_size=1, max_size=3), max_leaves=8
).filter(lambda tree: isinstance(tree, dict))


@settings(max_examples=100)
@given(nested)
def test_unflatten_is_the_inverse_of_flatten(tree) -> None:
    assert unflatten_paths(flatten_paths(tree)) == tree


@settings(max_examples=100)
@given(nested)
def test_paths_are_those_that_jax_gives(tree) -> None:
    named, _ = jax.tree_util.tree_flatten_with_path(tree)
    paths = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in named}
    assert flatten_paths(tree) == paths


def test_leaves_are_kept_as_they_are_and_in_order() -> None:
    array = np.ones(3)
    paths = flatten_paths({"z": [1, {"a": 2}], "a": {"b": array, "none": None}, "empty": {}})
    assert list(paths) == ["z", "a/b", "a/none"]
    assert paths["z"] == [1, {"a": 2}] and paths["a/b"] is array
    assert flatten_paths(array) == {"": array}


def test_names_of_any_kind_and_other_separators() -> None:
    tree = {0: {"": {"c": 1}}, "": {"d": 2}}
    assert flatten_paths(tree) == {"0//c": 1, "/d": 2}
    assert flatten_paths(tree, separator=".") == {"0..c": 1, ".d": 2}


def test_a_mapping_may_be_a_leaf() -> None:
    tree = {"a": {"slot": 1, "inner": {"slot": 2}}, "b": {"c": {"slot": 3}}, "d": 4}
    leaves = {"a": tree["a"], "b/c": {"slot": 3}, "d": 4}
    assert flatten_paths(tree, is_leaf=lambda node: "slot" in node) == leaves


def test_examples_in_the_docstrings_run() -> None:
    result = doctest.testmod(trees)
    assert result.attempted >= 3
    assert result.failed == 0
