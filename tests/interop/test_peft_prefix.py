"""Prefixes in PEFT's directories: ours come back, and what is refused; PEFT runs in the parity."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy

import ptjax
from ptjax.errors import InputError
from ptjax.interop.peft_prefix import export_peft_prefix, load_peft_prefix
from ptjax.methods.prefix_tuning import PrefixTuning

WEIGHTS = "adapter_model.safetensors"
TENSOR = {"prompt_embeddings": (3, 160)}


@pytest.fixture
def arrays():
    rng, shape = np.random.default_rng(0), (4, 3, 2, 8)
    names = ("prefix/decoder/key", "prefix/decoder/value")
    return {name: rng.normal(size=shape).astype(np.float32) for name in names}


@pytest.fixture
def exported(tmp_path, arrays):
    metadata = {"step": 3, "seed": 1}
    export_peft_prefix(tmp_path, arrays, base_model="a/t5", revision="main", metadata=metadata)
    return tmp_path


def test_every_layer_has_slots_of_its_own(exported, arrays) -> None:
    """Five layers for four: with an even number PEFT lets two layers share keys and values."""
    found = load_peft_prefix(exported)
    read, metadata = found.arrays, found.metadata
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
    assert found.method == "prefix_tuning"
    assert found.fields == {"length": 3, "encoder": False, "decoder": True, "cross": False}
    origin = {"step": 3, "seed": 1, "backbone_name": "a/t5@main"}
    assert metadata == origin
    tensors = safetensors.numpy.load_file(exported / WEIGHTS)
    assert {name: x.shape for name, x in tensors.items()} == {
        "prompt_embeddings": (3, 2 * 5 * 2 * 8)
    }
    slots = tensors["prompt_embeddings"].reshape(3, 10, 2, 8).swapaxes(0, 1)
    unused = [slot for slot in range(10) if not slots[slot].any()]
    assert unused == [4 * 4 % 10, 4 * 4 % 10 + 1]
    adapter = ptjax.load_adapter(exported)
    assert adapter.method == PrefixTuning(3, encoder=False, cross=False)


def test_what_peft_cannot_hold_is_not_written(arrays, tmp_path) -> None:
    arrays["prefix/cross/key"] = arrays["prefix/cross/value"] = arrays["prefix/decoder/key"]
    origin = {"base_model": "a/t5", "revision": None, "metadata": {}}
    with pytest.raises(InputError, match="no place for prefix/cross/key, only for the decoder's"):
        PrefixTuning(3, encoder=False).export_peft(tmp_path / "peft", arrays, **origin)
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORA"}, "peft_type is LORA, not PREFIX_TUNING"),
        ({"task_type": "CAUSAL_LM"}, "task_type is CAUSAL_LM; ptjax reads prefixes of a T5"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save names \['lm_head'\], parts of the"),
        ({"num_transformer_submodules": 1}, "is 1; PEFT itself runs a T5's prefix with 2"),
        ({"num_layers": None}, "num_layers must be an integer >= 1, got None"),
        ({"num_layers": 4}, r"has shape \[3, 160\], but .* says \[3, 128\] with 2 heads"),
        ({"num_attention_heads": 3}, r"says \[3, 160\] with 3 heads"),
    ],
)
def test_what_is_not_such_a_prefix_is_refused(exported, changes, message) -> None:
    file = exported / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError, match=message):
        load_peft_prefix(exported)


@pytest.mark.parametrize(
    ("tensors", "header", "message"),
    [
        ({}, {}, r"a prefix is the tensor prompt_embeddings; the file has \['other'\]"),
        (
            {"prompt_embeddings": (3, 160)},
            {"ptjax_decoder_layers": "9"},
            "is 9, but the file has 5",
        ),
        (
            {"prompt_embeddings": (3, 160)},
            {"ptjax_decoder_layers": "[]"},
            "must be an integer >= 1",
        ),
    ],
)
def test_damaged_weights_are_refused(exported, tensors, header, message) -> None:
    arrays = {name: np.ones(shape, np.float32) for name, shape in tensors.items()}
    arrays = arrays or {"other": np.ones((1,), np.float32)}
    safetensors.numpy.save_file(arrays, exported / WEIGHTS, header)
    with pytest.raises(InputError, match=message):
        load_peft_prefix(exported)
