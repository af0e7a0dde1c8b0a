"""What else in a Hugging Face folder would make another model: adapters, quantized weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from absl import logging
from oracles import record_models as recorded
from test_transformers_readings import make_folder

from ptjax.errors import InputError
from ptjax.interop import huggingface
from ptjax.interop.peft import export_peft

KEYS = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "model", head="own", **KEYS)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    return lines


def write_adapter(folder: Path, method: str, **keys: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": method, **keys}))
    weights = {"base_model.model.encoder.block.0.lora_A.weight": np.ones((2, 16), np.float32)}
    safetensors.numpy.save_file(weights, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("method", ["LORA", "IA3", "PREFIX_TUNING", "SOMETHING_NEW"])
def test_case_1_10_an_adapter_beside_the_weights_is_refused(folder, method):
    """transformers 5.24 puts it into the model that it loads from there; see the live test."""
    assert huggingface.load_huggingface(folder)
    write_adapter(folder, method)
    with pytest.raises(
        InputError,
        match=rf"adapter_config\.json: .*\({method}\).*merge_and_unload.*move adapter_\*",
    ):
        huggingface.load_huggingface(folder)


def test_case_1_10_a_damaged_adapter_is_named(folder):
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"adapter_config\.json: the file is truncated"):
        huggingface.load_huggingface(folder)


def test_case_1_10_a_prompt_beside_the_weights_is_said(folder, said):
    """It does not change them, and `load_prompt` reads it from the same folder."""
    export_peft(folder, np.zeros((3, 16), np.float32), num_heads=4, num_layers=2)
    assert huggingface.load_huggingface(folder)
    assert len(said) == 1 and "also holds a prompt (PROMPT_TUNING), which is ignored" in said[0]


def set_quantization(folder: Path, value: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": value}))


@pytest.mark.parametrize(
    "value", [{"quant_method": "bitsandbytes", "load_in_8bit": True}, {"bits": 4}, "int8"]
)
def test_case_1_10_plain_weights_with_a_quantization_config_are_said(folder, said, value):
    expected = huggingface.load_huggingface(folder)
    assert not said
    set_quantization(folder, value)
    arrays = huggingface.load_huggingface(folder)
    assert (
        len(said) == 1 and "has a quantization_config" in said[0] and "quantize='int8'" in said[0]
    )
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name].read_all(), array.read_all())


@pytest.mark.parametrize(
    ("method", "extra"),
    [
        ("bitsandbytes", {"weight": np.int8, "SCB": np.float32}),  # LLM.int8()
        ("bitsandbytes", {"weight": np.uint8, "weight.absmax": np.float32}),  # 4 bits
        ("gptq", {"qweight": np.int32, "scales": np.float16}),
    ],
)
def test_case_1_10_weights_that_are_quantized_are_refused(folder, method, extra):
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    layer = "encoder.block.0.layer.0.SelfAttention.q"
    shape = tensors.pop(f"{layer}.weight").shape
    tensors |= {f"{layer}.{name}": np.ones(shape, kind) for name, kind in extra.items()}
    safetensors.numpy.save_file(tensors, file)
    set_quantization(folder, {"quant_method": method})
    with pytest.raises(InputError, match=rf"quantization_config \({method}\).*not floating point"):
        huggingface.load_huggingface(folder)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT reads it
def test_case_1_10_transformers_applies_an_adapter_that_it_finds_there(folder, said):
    """Why it is refused: the folder's model is not the one of its weights."""
    import peft
    import torch
    import transformers

    model = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    plain = recorded.run(model.eval())[0]
    torch.manual_seed(0)
    lora = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(folder)
    again = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    assert np.abs(recorded.run(again.eval())[0] - plain).max() > 1
    with pytest.raises(InputError, match=r"\(LORA\)"):
        huggingface.load_huggingface(folder)
    assert not said
