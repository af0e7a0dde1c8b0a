"""Prompts given as paths, and what is said of prompts that tell nothing of themselves."""

from __future__ import annotations

import numpy as np
import pytest

from ptjax.errors import InputError
from ptjax.inference import prompts
from ptjax.inference.bank import make_bank
from ptjax.inference.forward import forward, loss_and_prompt_gradient
from ptjax.inference.generate import generate
from ptjax.inference.predict import rank
from ptjax.inference.prompts import check_bank
from ptjax.interop.prompt_file import PromptFile, load_prompt, load_prompts, save_prompt


@pytest.fixture
def matrix() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    """What was said before is forgotten."""
    monkeypatch.setattr(prompts, "WARNED", set())


def test_case_4_12_a_prompt_may_be_a_path(backbone, matrix, tmp_path):
    path = tmp_path / "p.safetensors"
    metadata = {"backbone_fingerprint": backbone.fingerprint, "target_length": 3}
    save_prompt(path, matrix, metadata)
    loaded = PromptFile(matrix, metadata)
    for given in (path, str(path)):
        assert generate(backbone, ["a b"], given) == generate(backbone, ["a b"], prompt=loaded)
        assert rank(backbone, ["a"], ["b", "c"], given) == rank(backbone, ["a"], ["b", "c"], loaded)
        bank = make_bank({"p": given})
        np.testing.assert_array_equal(bank.arrays.prompt[0], matrix)
        assert bank.metadata == make_bank({"p": loaded}).metadata
        for function in (forward, loss_and_prompt_gradient):  # it is the batch that is refused
            with pytest.raises(InputError, match="the batch has no 'encoder_input_tokens'"):
                function(backbone, {}, given)


def test_case_4_12_a_path_without_a_prompt_is_said(backbone, tmp_path):
    with pytest.raises(InputError, match=r"no prompt at .*gone: the path does not exist"):
        generate(backbone, ["a"], prompt=tmp_path / "gone")


def test_case_4_11_a_prompt_without_metadata_is_said_once(backbone, matrix, caplog):
    def count() -> int:
        return caplog.text.count("does not say which backbone")

    bare = PromptFile(matrix, {})
    for _ in range(3):
        generate(backbone, ["a"], bare, max_new_tokens=1)
    # The same prompt, loaded again.
    generate(backbone, ["a"], PromptFile(matrix.copy(), {}), max_new_tokens=1)
    assert count() == 1
    generate(backbone, ["a"], PromptFile(matrix + 1, {}), max_new_tokens=1)
    assert count() == 2
    bank = make_bank({"a": bare, "b": PromptFile(matrix[:2], {})})
    for _ in range(2):
        check_bank(backbone, bank)
    assert count() == 4 and "prompt 'b' does not say" in caplog.text


def test_the_folder_of_a_sweeps_member_is_a_prompt(matrix, tmp_path):
    member = tmp_path / "run" / "prompts" / "a"
    save_prompt(member / "best.safetensors", matrix, {})
    np.testing.assert_array_equal(load_prompt(member).prompt, matrix)
    assert list(load_prompts(member.parent)) == ["a"]
