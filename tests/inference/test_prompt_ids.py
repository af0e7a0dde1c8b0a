"""A prompt records the special ids that it was tuned with; a backbone must have the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import tune

from ptjax.errors import InputError
from ptjax.inference.bank import make_bank
from ptjax.inference.prompts import check_bank, check_prompt
from ptjax.interop.peft import export_peft
from ptjax.interop.prompt_file import PromptFile, load_prompt, save_prompt
from ptjax.settings import TrainSchedule

IDS = {"pad_id": 0, "eos_ids": [1], "decoder_start_id": 0, "forced_bos_id": None}
OTHERS = {"pad_id": 3, "eos_ids": [1, 7], "decoder_start_id": 5, "forced_bos_id": 9}


def with_ids(backbone, **ids):
    return dataclasses.replace(backbone, config=dataclasses.replace(backbone.config, **ids))


@pytest.fixture(scope="module")
def tuned(backbone, task, tmp_path_factory) -> PromptFile:
    """The prompt of a run of one step."""
    folder = tmp_path_factory.mktemp("run")
    tune(folder, task, backbone, schedule=TrainSchedule(train_steps=1, eval_period=1))
    return load_prompt(folder / "prompts" / "best.safetensors")


def test_a_run_records_the_ids_in_its_prompts(tuned, backbone):
    assert tuned.metadata["special_ids"] == IDS
    assert check_prompt(backbone, tuned).metadata == tuned.metadata


@pytest.mark.parametrize("name", IDS)
def test_a_prompt_tuned_with_other_ids_is_refused_naming_both(tuned, backbone, name):
    value = OTHERS[name]
    other = with_ids(backbone, **{name: tuple(value) if isinstance(value, list) else value})
    said = (
        f"the prompt was tuned on {backbone.name} with {name} = {IDS[name]}; {backbone.name} has "
        f"{name} = {OTHERS[name]}; load its own, or override with --allow_mismatch "
        "(allow_mismatch=True)"
    )
    with pytest.raises(InputError) as raised:
        check_prompt(other, tuned)
    assert str(raised.value) == said
    with pytest.raises(InputError, match=rf"prompt 'a' was tuned on .* with {name} = "):
        check_bank(other, make_bank({"a": tuned}))
    used = check_prompt(other, tuned, allow_mismatch=True)
    assert used.metadata["special_ids"] == IDS | {name: OTHERS[name]}


def test_several_ids_that_differ_stand_in_one_line(tuned, backbone):
    with pytest.raises(InputError, match=r"pad_id = 0, eos_ids = \[1\]; .* pad_id = 3, eos_ids = "):
        check_prompt(with_ids(backbone, pad_id=3, eos_ids=(1, 7)), tuned)


def test_a_prompt_without_ids_or_with_some_of_them_stays_valid(tuned, backbone):
    other = with_ids(backbone, pad_id=3)
    older = {k: v for k, v in tuned.metadata.items() if k != "special_ids"}
    checked = check_prompt(other, PromptFile(tuned.prompt, older))
    assert checked.metadata["special_ids"] == IDS | {"pad_id": 3}
    check_prompt(other, PromptFile(tuned.prompt, older | {"special_ids": {"eos_ids": [1]}}))


def test_a_peft_directory_keeps_them(tuned, backbone, tmp_path):
    export_peft(tmp_path, tuned.prompt, num_heads=2, num_layers=1, metadata=tuned.metadata)
    assert load_prompt(tmp_path).metadata["special_ids"] == IDS


@pytest.mark.parametrize("ids", [[0], {"pad_id": "0"}, {"eos_ids": [True]}, {"pad_id": -1}])
def test_ids_that_are_none_are_not_written(tmp_path, ids):
    with pytest.raises(InputError, match="metadata, 'special_ids' is "):
        save_prompt(tmp_path / "x.safetensors", np.ones((1, 2)), {"special_ids": ids})
    assert list(tmp_path.iterdir()) == []
