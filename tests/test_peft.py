"""PEFT directories: what PEFT itself wrote, ours, and what is refused."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy

from ptjax.errors import InputError
from ptjax.interop.peft import export_peft, load_peft

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "peft"


@pytest.fixture
def prompt():
    return np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)


@pytest.fixture
def exported(tmp_path, prompt):
    export_peft(tmp_path, prompt, num_heads=2, num_layers=3, base_model="google/t5-base-lm-adapt")
    return tmp_path


def change_config(directory, **keys):
    file = directory / "adapter_config.json"
    config = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def change_tensors(directory, **tensors):
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["prompt_tuning", "prompt_tuning_two", "p_tuning", "bin"])
def test_what_peft_wrote(name):
    """With one submodule, with PEFT's default of two, an MLP's output, an old pickled file."""
    expected = np.load(FIXTURES / "expected.npz")[name]
    np.testing.assert_array_equal(load_peft(FIXTURES / name), expected)


def test_our_config_is_peft_s_own_for_the_same_prompt(tmp_path):
    """Byte for byte, but for the name of the backbone."""
    prompt = load_peft(FIXTURES / "prompt_tuning")
    theirs = (FIXTURES / "prompt_tuning/adapter_config.json").read_text()
    base_model = json.loads(theirs)["base_model_name_or_path"]
    export_peft(tmp_path, prompt, num_heads=2, num_layers=1, base_model=base_model)
    assert (tmp_path / "adapter_config.json").read_text() == theirs


def test_an_exported_prompt_comes_back_bitwise(exported, prompt):
    np.testing.assert_array_equal(load_peft(exported), prompt)
    tensors = safetensors.numpy.load_file(exported / "adapter_model.safetensors")
    assert list(tensors) == ["prompt_embeddings"]
    assert tensors["prompt_embeddings"].dtype == np.float32


def test_metadata_stands_in_the_header(tmp_path, prompt):
    export_peft(tmp_path, prompt, num_heads=2, num_layers=3, metadata={"step": 7, "task": "sst2"})
    with safetensors.safe_open(tmp_path / "adapter_model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt", "step": "7", "task": '"sst2"'}


@pytest.mark.parametrize("keys", [{"num_transformer_submodules": 2}, {}])
def test_the_dead_second_half_is_dropped(exported, prompt, keys):
    change_config(exported, **({"num_transformer_submodules": "absent"} | keys))
    change_tensors(exported, prompt_embeddings=np.concatenate([prompt, prompt + 1]))
    np.testing.assert_array_equal(load_peft(exported), prompt)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "of PREFIX_TUNING.* train with PROMPT_TUNING"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING"}, r"prefix_task_cols\[t\] @ prefix_task_rows"),
        ({"peft_type": "CARTRIDGE"}, "of CARTRIDGE"),
        ({"peft_type": "LORA"}, "of LORA, which cannot be read: it is no soft prompt"),
        ({"peft_type": "absent"}, "of None"),
        ({"task_type": "absent"}, "task_type is None"),
        ({"task_type": "CAUSAL_LM"}, "task_type is 'CAUSAL_LM'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save names \['lm_head'\]"),
        ({"num_virtual_tokens": "absent"}, "num_virtual_tokens is None"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens is True"),
        ({"num_virtual_tokens": 3}, r"shape \[4, 6\].* wants 3 rows"),
        ({"num_transformer_submodules": "absent"}, r"shape \[4, 6\].* wants 8 rows"),
        ({"token_dim": 8}, "has rows of 6, adapter_config.json says 8"),
    ],
)
def test_where_peft_is_silent_we_are_not(exported, keys, message):
    change_config(exported, **keys)
    with pytest.raises(InputError, match=message):
        load_peft(exported)


def test_broken_directories(exported, prompt):
    change_tensors(exported, something=prompt)
    with pytest.raises(InputError, match="the tensor prompt_embeddings is missing"):
        load_peft(exported)
    change_tensors(exported, prompt_embeddings=prompt[0])
    with pytest.raises(InputError, match=r"has shape \[6\]"):
        load_peft(exported)
    weights = exported / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: the file is truncated"):
        load_peft(exported)
    weights.unlink()
    with pytest.raises(InputError, match=r"neither adapter_model\.safetensors nor"):
        load_peft(exported)
    for text in ("", "[]"):
        (exported / "adapter_config.json").write_text(text)
        with pytest.raises(InputError, match=r"adapter_config\.json: the file is"):
            load_peft(exported)
    (exported / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"adapter_config\.json: the file is missing"):
        load_peft(exported)
