"""PEFT directories: what PEFT itself wrote, ours, and what is refused."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy

from ptjax.errors import InputError
from ptjax.interop import safetensors_file
from ptjax.interop.peft import export_peft, is_peft, load_peft

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "peft"


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
    """With one submodule, with PEFT's default of two, an MLP's output, an old pickled file.

    What it writes today, `test_peft_parity` sees.
    """
    expected = np.load(FIXTURES / "expected.npz")[name]
    prompt, metadata = load_peft(FIXTURES / name)
    np.testing.assert_array_equal(prompt, expected)
    assert metadata == {}


def test_our_config_is_peft_s_own_for_the_same_prompt(tmp_path):
    """Byte for byte, but for the name of the backbone."""
    prompt, _ = load_peft(FIXTURES / "prompt_tuning")
    theirs = (FIXTURES / "prompt_tuning/adapter_config.json").read_text()
    base_model = json.loads(theirs)["base_model_name_or_path"]
    export_peft(tmp_path, prompt, num_heads=2, num_layers=1, base_model=base_model)
    assert (tmp_path / "adapter_config.json").read_text() == theirs


def test_an_exported_prompt_comes_back_bitwise(exported, prompt):
    np.testing.assert_array_equal(load_peft(exported)[0], prompt)
    tensors = safetensors.numpy.load_file(exported / "adapter_model.safetensors")
    assert list(tensors) == ["prompt_embeddings"]
    assert tensors["prompt_embeddings"].dtype == np.float32


def test_metadata_stands_in_the_header_and_comes_back(tmp_path, prompt):
    metadata = {"step": 7, "task": {"inputs": "Kritik: {text} →"}, "backbone_fingerprint": None}
    export_peft(tmp_path, prompt, num_heads=2, num_layers=3, metadata=metadata)
    with safetensors.safe_open(tmp_path / "adapter_model.safetensors", "numpy") as file:
        assert file.metadata()["format"] == "pt" and file.metadata()["step"] == "7"
    assert load_peft(tmp_path)[1] == metadata


@pytest.mark.parametrize(
    ("base_model", "revision", "name"),
    [("google/t5", None, "google/t5"), ("google/t5", "main", "google/t5@main"), ("", None, None)],
)
def test_the_config_names_the_backbone(exported, base_model, revision, name):
    change_config(exported, base_model_name_or_path=base_model, revision=revision)
    assert load_peft(exported)[1].get("backbone_name") == name


def test_the_name_that_was_exported_stands_above_the_config_s(tmp_path, prompt):
    metadata = {"backbone_name": "gs://bucket/t5"}
    export_peft(
        tmp_path, prompt, num_heads=2, num_layers=3, base_model="google/t5", metadata=metadata
    )
    assert load_peft(tmp_path)[1] == metadata


def test_an_export_that_was_cut_off_is_no_prompt(exported, prompt, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_file, "save_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_peft(exported, prompt + 1, num_heads=2, num_layers=3)
    with pytest.raises(InputError, match=r"adapter_config\.json: the file is missing"):
        load_peft(exported)


@pytest.mark.parametrize("keys", [{"num_transformer_submodules": 2}, {}])
def test_the_dead_second_half_is_dropped(exported, prompt, keys):
    change_config(exported, **({"num_transformer_submodules": "absent"} | keys))
    change_tensors(exported, prompt_embeddings=np.concatenate([prompt, prompt + 1]))
    np.testing.assert_array_equal(load_peft(exported)[0], prompt)


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "P_TUNING"])
def test_case_1_14_a_second_half_that_prompted_the_decoder_is_refused(exported, prompt, method):
    """PEFT 0.3.0 put it in front of the decoder's input, and wrote no auto_mapping; 0.4.0 is the
    first to write that key, and the first to use the first half alone."""
    both = np.concatenate([prompt, prompt + 1])
    change_tensors(exported, prompt_embeddings=both)
    two = {"num_transformer_submodules": 2, "peft_type": method}
    change_config(exported, auto_mapping="absent", **two)
    with pytest.raises(
        InputError,
        match=r"adapter_config\.json: PEFT 0\.3 or older.*submodules 2.*in front of the decoder",
    ):
        load_peft(exported)
    change_config(exported, num_transformer_submodules="absent")  # its default is two
    with pytest.raises(InputError, match=r"PEFT 0\.3 or older"):
        load_peft(exported)
    change_config(exported, auto_mapping=None, **two)
    np.testing.assert_array_equal(load_peft(exported)[0], prompt)
    # One prompt of 0.3 stood where it does today.
    change_tensors(exported, prompt_embeddings=prompt)
    change_config(exported, auto_mapping="absent", num_transformer_submodules=1)
    np.testing.assert_array_equal(load_peft(exported)[0], prompt)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "type PREFIX_TUNING.* load_adapter .--adapter. reads it"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING"}, r"load_multitask\(path\)\.prompt\(t\)"),
        ({"peft_type": "CARTRIDGE"}, "type CARTRIDGE"),
        ({"peft_type": "LORA"}, "type LORA cannot be read: it changes the network; .*--adapter"),
        ({"peft_type": "LOHA"}, "type LOHA cannot be read: it is not a soft prompt"),
        ({"peft_type": "CPT"}, "type CPT cannot be read: it belongs to decoder-only"),
        ({"peft_type": "absent"}, "peft_type is missing"),
        ({"task_type": "absent"}, 'task_type is missing.* set it to "SEQ_2_SEQ_LM"'),
        ({"task_type": "CAUSAL_LM"}, "task_type is CAUSAL_LM; .*SEQ_2_SEQ_LM"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save names \['lm_head'\]"),
        ({"num_virtual_tokens": "absent"}, "num_virtual_tokens must be an integer >= 1, got None"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be an integer >= 1, got 0"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens must be an integer >= 1, got True"),
        ({"num_virtual_tokens": 3}, r"shape \[4, 6\].* says 3 rows"),
        ({"num_transformer_submodules": "absent"}, r"shape \[4, 6\].* says 8 rows"),
        ({"token_dim": 8}, "has rows of 6, but adapter_config.json says 8"),
    ],
)
def test_where_peft_is_silent_we_are_not(exported, keys, message):
    change_config(exported, **keys)
    with pytest.raises(InputError, match=message):
        load_peft(exported)


def test_weights_of_the_backbone_beside_the_prompt_are_refused(exported, prompt):
    shared = {"base_model.shared.weight": np.ones((9, 6), np.float32)}
    change_tensors(exported, prompt_embeddings=prompt, **shared)
    with pytest.raises(
        InputError, match=r"also holds base_model\.shared\.weight.* save_embedding_layers=False"
    ):
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


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
)
def test_half_a_directory_is_peft_s_too(tmp_path, name):
    """Or the message would be that of a directory of no kind."""
    assert not is_peft(tmp_path)
    (tmp_path / name).touch()
    assert is_peft(tmp_path)
