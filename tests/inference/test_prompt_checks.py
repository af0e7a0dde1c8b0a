"""What a prompt says of its origin against the backbone that it is used with."""

from __future__ import annotations

import dataclasses
import logging
import types
from typing import Any

import numpy as np
import pytest
from frozen import assert_frozen
from letters import LETTERS, make_backbone

from ptjax.errors import InputError
from ptjax.inference import prompts
from ptjax.inference.bank import PromptBank, make_bank
from ptjax.inference.model import bind
from ptjax.inference.prompts import check_bank, check_prompt, open_prompt
from ptjax.interop.prompt_file import PromptFile
from ptjax.models.t5 import PromptStates
from ptjax.models.t5_family import T5_FAMILY

MATRIX = np.ones((3, 16), np.float32)
OWN = {"backbone_fingerprint": "sha256:0", "backbone_fingerprint_v2": "v2:0"}
"""What `make_backbone`'s has."""


@pytest.fixture(scope="module")
def backbone(tiny):
    return make_backbone(tiny)


def changed(backbone: Any, **attributes: Any) -> Any:
    return types.SimpleNamespace(**{**vars(backbone), **attributes})


# Prompts of before the second fingerprint


@pytest.mark.parametrize(
    ("count", "listed"),
    [
        (1, "prompts p0"),
        (5, "prompts p0, p1, p2, p3, p4"),
        (6, "prompts p0, p1, p2, p3, p4 and 1 more"),
    ],
)
def test_prompts_of_a_bank_that_are_compared_in_part_are_listed(backbone, caplog, count, listed):
    caplog.set_level(logging.INFO, logger="absl")
    old, new = (PromptFile(MATRIX, {"backbone_fingerprint": "sha256:0"}), PromptFile(MATRIX, OWN))
    check_bank(backbone, make_bank({f"p{i}": old for i in range(count)} | {"new": new}))
    [said] = [line.getMessage() for line in caplog.records]
    assert said.startswith(f"{listed}: recorded before fingerprints covered every parameter; of ti")


def test_a_whole_comparison_is_not_spoken_of(backbone, caplog):
    caplog.set_level(logging.INFO, logger="absl")
    new = PromptFile(MATRIX, OWN)
    check_prompt(backbone, new)
    check_bank(backbone, make_bank({"a": new, "b": MATRIX}))
    assert not caplog.records


# Tokenizers


@pytest.mark.parametrize("recorded", [None, "sha256:letters"])
def test_a_checked_prompt_records_the_backbones_tokenizer(backbone, recorded):
    metadata = OWN | ({"tokenizer_fingerprint": recorded} if recorded else {})
    file = PromptFile(MATRIX, metadata)
    assert check_prompt(backbone, file).metadata["tokenizer_fingerprint"] == "sha256:letters"
    [of_bank] = check_bank(backbone, make_bank({"a": file})).metadata
    assert of_bank is not None and of_bank["tokenizer_fingerprint"] == "sha256:letters"


def test_a_backbone_without_a_tokenizer_takes_a_prompt_that_records_one(backbone):
    mute = changed(backbone, tokenizer=None)
    file = PromptFile(MATRIX, OWN | {"tokenizer_fingerprint": "sha256:1"})
    assert check_prompt(mute, file).metadata["tokenizer_fingerprint"] == "sha256:1"


def test_another_tokenizer_is_refused_and_a_former_name_of_it_is_not(backbone, monkeypatch):
    file = PromptFile(MATRIX, OWN | {"tokenizer_fingerprint": "sha256:1"})
    said = "tuned on a backbone with the tokenizer sha256:1, not with that of tiny, sha256:letters"
    with pytest.raises(InputError, match=said):
        check_prompt(backbone, file)
    monkeypatch.setattr(type(LETTERS), "former_fingerprints", ("sha256:1",))
    assert check_prompt(backbone, file).metadata["tokenizer_fingerprint"] == "sha256:letters"


# Precomputed keys and values


def states_of(encoder: tuple[int, int, int], decoder: tuple[int, int, int]) -> PromptStates:
    """Zeros, from the numbers of (layers, heads, entries of a head)."""
    shapes = ((layers, len(MATRIX), *heads) for layers, *heads in (encoder, decoder))
    return PromptStates(*((np.zeros(x, np.float32),) * 2 for x in shapes))


def test_states_of_this_backbone_are_kept(backbone):
    states = states_of((2, 4, 8), (2, 4, 8))
    assert check_prompt(backbone, PromptFile(MATRIX, OWN, states)).states is states
    # Of another backbone they mean nothing; the prompt itself may be used all the same.
    other = PromptFile(MATRIX, {"backbone_fingerprint": "sha256:1"}, states)
    assert check_prompt(backbone, other, allow_mismatch=True).states is None


@pytest.mark.parametrize(
    ("encoder", "decoder", "said"),
    [
        ((1, 4, 8), (2, 4, 8), r"1 encoder layers with heads \[4, 8\]"),
        ((2, 4, 8), (5, 4, 8), r"5 decoder layers with heads \[4, 8\]"),
        ((2, 4, 8), (2, 2, 8), r"2 decoder layers with heads \[2, 8\]"),
        ((2, 4, 9), (2, 4, 8), r"2 encoder layers with heads \[4, 9\]"),
    ],
)
def test_states_of_another_shape_are_refused(backbone, encoder, decoder, said):
    file = PromptFile(MATRIX, OWN, states_of(encoder, decoder))
    with pytest.raises(
        InputError,
        match="the prompt's keys and values were computed for another backbone: "
        rf"{said}, tiny has 2 with \[4, 8\]",
    ):
        check_prompt(backbone, file)


# Banks


def test_a_bank_that_lacks_the_origin_of_a_prompt_is_not_taken(backbone):
    whole = make_bank({"a": MATRIX, "b": MATRIX})
    with pytest.raises(ValueError, match="shorter"):
        check_bank(backbone, PromptBank(whole.names, whole.arrays, whole.metadata[:1]))


def test_a_family_without_blind_prompts_takes_all_others(backbone):
    """Also a bank with room for further prompts: what stands there sees the input."""

    def build(attends_to_input: bool) -> Any:
        assert attends_to_input  # another network than the family has
        return backbone.apply_fn

    family = dataclasses.replace(T5_FAMILY, lacks=("blind prompts",), title="a network")
    lacking = changed(backbone, family=family, make_apply_fn=build)
    for prompt in (None, MATRIX, make_bank({str(i): MATRIX for i in range(5)})):
        assert bind(lacking, open_prompt(lacking, prompt)).apply_fn is backbone.apply_fn
    blind = make_bank({"a": MATRIX, "b": PromptFile(MATRIX, OWN | {"sees_input": False})})
    with pytest.raises(InputError, match="SEES_INPUT = False is not supported by a network"):
        bind(lacking, open_prompt(lacking, blind))


def test_a_warning_is_about_one_prompt_on_one_backbone(backbone, caplog, monkeypatch):
    monkeypatch.setattr(prompts, "WARNED", set())
    for name in ("tiny", "other"):
        for _ in range(2):
            check_prompt(changed(backbone, name=name), PromptFile(MATRIX, {"backbone_name": "x"}))
    assert [line.getMessage().split("cannot be verified ")[1] for line in caplog.records] == [
        f"against {name}; only the width was checked" for name in ("tiny", "other")
    ]


def test_prompts_settings_and_predictions_are_frozen():
    assert_frozen("ptjax.inference")
