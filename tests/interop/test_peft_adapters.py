"""LoRA, IA3 and LN_TUNING in PEFT's files: names, transposes, and what is refused in one line.

`test_peft_adapters_parity` runs PEFT itself on such files.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ptjax.errors import InputError
from ptjax.interop.peft_adapters import (
    export_peft_ia3,
    export_peft_lora,
    export_peft_norms,
    is_peft_adapter,
    load_peft_adapter,
)

# As PEFT 0.21.2 names them.
BLOCK = "base_model.model.encoder.block.11.layer.0.SelfAttention.q"
CROSS = "base_model.model.decoder.block.0.layer.1.EncDecAttention.v"
WO = "base_model.model.decoder.block.3.layer.2.DenseReluDense.wo"
LORA = {"peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM", "r": 2, "lora_alpha": 6}
NORM = "base_model.model.encoder.block.0.layer.0.layer_norm.ln_tuning_layers"
IA3 = {"peft_type": "IA3", "task_type": "SEQ_2_SEQ_LM", "feedforward_modules": ["wo"]}
NORMS = {"peft_type": "LN_TUNING", "task_type": "SEQ_2_SEQ_LM", "target_modules": ["layer_norm"]}
# The norms of a T5 with two layers in the encoder and one in the decoder, in both names.
SCALES = {
    "encoder.block.0.layer.0.layer_norm": "encoder/layers_0/pre_attention_layer_norm",
    "encoder.block.0.layer.1.layer_norm": "encoder/layers_0/pre_mlp_layer_norm",
    "encoder.block.1.layer.0.layer_norm": "encoder/layers_1/pre_attention_layer_norm",
    "encoder.block.1.layer.1.layer_norm": "encoder/layers_1/pre_mlp_layer_norm",
    "encoder.final_layer_norm": "encoder/encoder_norm",
    "decoder.block.0.layer.0.layer_norm": "decoder/layers_0/pre_self_attention_layer_norm",
    "decoder.block.0.layer.1.layer_norm": "decoder/layers_0/pre_cross_attention_layer_norm",
    "decoder.block.0.layer.2.layer_norm": "decoder/layers_0/pre_mlp_layer_norm",
    "decoder.final_layer_norm": "decoder/decoder_norm",
}


def counted(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def lora_tensors() -> dict[str, np.ndarray]:
    return {f"{BLOCK}.lora_A.weight": counted(2, 4), f"{BLOCK}.lora_B.weight": counted(5, 2)}


def ia3_tensors() -> dict[str, np.ndarray]:
    return {f"{CROSS}.ia3_l": counted(5, 1), f"{WO}.ia3_l": counted(1, 6)}


def norm_tensors(*without: str) -> dict[str, np.ndarray]:
    """A scale for every norm, except those whose names contain one of `without`."""
    return {
        f"base_model.model.{name}.ln_tuning_layers.weight": counted(4) + number
        for number, name in enumerate(SCALES)
        if not any(part in name for part in without)
    }


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_lora_is_transposed_and_named_after_t5x(tmp_path) -> None:
    read = load_peft_adapter(write(tmp_path, {**LORA, "lora_dropout": 0.1}, lora_tensors()))
    path = "encoder/layers_11/attention/query"
    assert (read.method, list(read.arrays)) == ("lora", [f"lora/{path}/a", f"lora/{path}/b"])
    np.testing.assert_array_equal(read.arrays[f"lora/{path}/a"], counted(2, 4).T)
    np.testing.assert_array_equal(read.arrays[f"lora/{path}/b"], counted(5, 2).T)
    targets = ["encoder/layers/attention/query"]
    assert read.fields == {"rank": 2, "alpha": 6.0, "dropout": 0.1, "targets": targets}


def test_rank_stabilised_lora_is_lora_of_another_alpha(tmp_path) -> None:
    """6 / sqrt(2) in PEFT is alpha / 2 here."""
    read = load_peft_adapter(write(tmp_path, {**LORA, "use_rslora": True}, lora_tensors()))
    assert read.fields["alpha"] / 2 == pytest.approx(6 / 2**0.5)


def test_ia3_scales_inputs_or_outputs_by_the_shape(tmp_path) -> None:
    read = load_peft_adapter(write(tmp_path, IA3, ia3_tensors()))
    cross, wo = "decoder/layers_0/encoder_decoder_attention/value", "decoder/layers_3/mlp/wo"
    np.testing.assert_array_equal(read.arrays[f"ia3/{cross}/outputs"], counted(5))
    np.testing.assert_array_equal(read.arrays[f"ia3/{wo}/inputs"], counted(6))
    assert read.method == "ia3" and len(read.arrays) == 2
    assert read.fields == {
        "outputs": ["decoder/layers/encoder_decoder_attention/value"],
        "inputs": ["decoder/layers/mlp/wo"],
    }


def test_scales_of_norms_are_those_of_bitfit_and_back_again(tmp_path) -> None:
    read = load_peft_adapter(write(tmp_path / "peft", NORMS, norm_tensors()))
    assert (read.method, read.fields) == ("bitfit", {})
    assert list(read.arrays) == sorted(f"bitfit/{path}/scale" for path in SCALES.values())
    for number, path in enumerate(SCALES.values()):
        np.testing.assert_array_equal(read.arrays[f"bitfit/{path}/scale"], counted(4) + number)
    export_peft_norms(tmp_path / "again", read.arrays, base_model="me/t5", metadata={"step": 7})
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LN_TUNING" and config["task_type"] == "SEQ_2_SEQ_LM"
    assert set(config["target_modules"]) == {"layer_norm", "final_layer_norm"}
    tensors = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert set(tensors) == set(norm_tensors())
    for name, scale in norm_tensors().items():
        np.testing.assert_array_equal(tensors[name], scale)
    metadata = load_peft_adapter(tmp_path / "again").metadata
    assert metadata == {"step": 7, "backbone_name": "me/t5"}


@pytest.mark.parametrize(
    ("without", "missing"),
    [
        (("encoder",), "encoder.final_layer_norm"),
        (("final",), "encoder.final_layer_norm"),
        (("block",), "encoder.block.0.layer.0.layer_norm"),
        (("block.0.layer.1",), "encoder.block.0.layer.1.layer_norm"),
        (("encoder.block.1.layer.0",), "encoder.block.1.layer.0.layer_norm"),
        (("layer.2",), "decoder.block.0.layer.2.layer_norm"),
    ],
)
def test_scales_of_some_norms_are_refused(tmp_path, without, missing) -> None:
    """BitFit trains those of all norms; these are most of PEFT's possible targets."""
    with pytest.raises(InputError, match=f": {missing} is missing, so only some of the lay") as e:
        load_peft_adapter(write(tmp_path, NORMS, norm_tensors(*without)))
    assert "adapter_model.safetensors" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({}, {f"{BLOCK}.ln_tuning_layers.weight": counted(4, 4)}, "belongs to no layer norm of a"),
        ({}, {"base_model.model.lm_head.ln_tuning_layers.weight": counted(9, 4)}, "no layer norm"),
        ({}, {f"{NORM}.bias": counted(4)}, "bias belongs to no layer norm of a T5"),
        ({}, {f"{NORM}.weight": counted(1, 4)}, r"has shape \[1, 4\]; a scale has \[n\]"),
        ({}, {f"{NORM}.weight": np.full(4, np.inf, "f4")}, "layer_norm/scale is not finite"),
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save is .*; ptjax reads plain LN_TUN"),
        ({"of_a_later_version": 3}, {}, "of_a_later_version is 3: ptjax does not know it"),
        ({"task_type": "CAUSAL_LM"}, {}, "task_type is CAUSAL_LM; ptjax reads adapters of a T5"),
    ],
)
def test_modules_that_are_not_norms_are_refused(tmp_path, changes, tensors, message) -> None:
    with pytest.raises(InputError, match=message) as raised:
        load_peft_adapter(write(tmp_path, NORMS | changes, norm_tensors() | tensors))
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_half_precision_file_is_read_in_float32(tmp_path) -> None:
    tensors = {name: x.astype(np.float16) for name, x in lora_tensors().items()}
    read = load_peft_adapter(write(tmp_path, LORA, tensors))
    assert {x.dtype.name for x in read.arrays.values()} == {"float32"}


MODULES = [
    *(f"encoder/layers_0/attention/{x}" for x in ("query", "out")),
    *(f"decoder/layers_0/self_attention/{x}" for x in ("query", "out")),
    *(f"decoder/layers_0/encoder_decoder_attention/{x}" for x in ("query", "out")),
    *(f"{stack}/layers_0/mlp/wo" for stack in ("encoder", "decoder")),
]  # fmt: skip


def test_a_name_of_which_all_linear_maps_are_chosen_is_short(tmp_path) -> None:
    arrays = {f"lora/{m}/{x}": counted(3, 3) for m in MODULES[:-1] for x in "ab"}
    arrays["lora/decoder/logits_dense/a"] = arrays["lora/decoder/logits_dense/b"] = counted(3, 3)
    export_peft_lora(tmp_path, arrays, rank=3, alpha=1.5, base_model="me/t5", metadata={"step": 7})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 1.5, "LORA")
    assert set(config["target_modules"]) == {
        "q", "o", "lm_head", "encoder.block.0.layer.1.DenseReluDense.wo",
    }  # fmt: skip
    read = load_peft_adapter(tmp_path)
    assert sorted(read.fields["targets"]) == [
        "encoder/layers/mlp/wo", "logits_dense", "out", "query",
    ]  # fmt: skip
    assert read.metadata == {"step": 7, "backbone_name": "me/t5"}
    for path, array in arrays.items():
        np.testing.assert_array_equal(read.arrays[path], array)


def test_peft_takes_o_for_the_end_of_wo_among_feed_forward_modules(tmp_path) -> None:
    """Without a dot before it; so the names of `out` are written whole."""
    outs = [module for module in MODULES if module.endswith("/out")]
    arrays = {f"ia3/{module}/inputs": counted(4) for module in outs}
    arrays |= {f"ia3/{module}/outputs": counted(5) for module in MODULES[-2:]}
    export_peft_ia3(tmp_path, arrays)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert all(name.endswith(".o") for name in config["feedforward_modules"])
    assert set(config["target_modules"]) == {"wo", *config["feedforward_modules"]}
    shapes = {
        name: x.shape for name, x in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    prefix = "base_model.model.decoder.block.0.layer"
    assert shapes[f"{prefix}.1.EncDecAttention.o.ia3_l"] == (1, 4)
    assert shapes[f"{prefix}.2.DenseReluDense.wo.ia3_l"] == (5, 1)
    read = load_peft_adapter(tmp_path)
    assert read.fields == {"outputs": ["wo"], "inputs": ["out"]}


def test_peft_cannot_scale_both_sides_of_a_linear_map(tmp_path) -> None:
    arrays = {f"ia3/{MODULES[0]}/{side}": counted(3) for side in ("inputs", "outputs")}
    with pytest.raises(InputError, match=f"either the outputs or the inputs .* {MODULES[0]}"):
        export_peft_ia3(tmp_path / "both", arrays)
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is True: DoRA scales the whole kernel"),
        ({"bias": "all"}, "bias is 'all': it trained biases too"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is .*parts of the backbone"),
        ({"layers_to_transform": [0]}, "some of the layers only"),
        ({"rank_pattern": {"q": 4}}, "ranks differ"),
        ({"alpha_pattern": {"q": 4}}, "alphas differ"),
        ({"use_qalora": True}, "use_qalora is True: ptjax does not know it"),
        ({"of_a_later_version": 3}, "of_a_later_version is 3: ptjax does not know it"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the backb"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; ptjax reads LORA, IA3, LN_TUN"),
        ({"task_type": "CAUSAL_LM"}, "task_type is CAUSAL_LM; ptjax reads adapters of a T5"),
        ({"r": 3}, r"has shape \[2, 4\], but adapter_config.json says r 3"),
        ({"r": "two"}, "r must be an integer >= 1, got 'two'"),
        ({"lora_alpha": "x"}, "lora_alpha must be a number, got 'x'"),
    ],
)
def test_variants_of_lora_are_refused_by_name(tmp_path, changes, message) -> None:
    assert load_peft_adapter(write(tmp_path, LORA, lora_tensors())).method == "lora"
    with pytest.raises(InputError, match=message) as raised:
        load_peft_adapter(write(tmp_path, LORA | changes, lora_tensors()))
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


OTHER = BLOCK.replace("encoder", "model")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{BLOCK}.lora_A.weight": counted(2, 4)}, "query/a, but not .*query/b; .* incomplete"),
        ({f"{OTHER}.lora_A.weight": counted(2, 4)}, "belongs to no linear map of a T5"),
        ({"base_model.model.shared.weight": counted(9, 4)}, "save_embedding_layers=False"),
        ({f"{BLOCK}.lora_A.bias": counted(4)}, "belongs to no linear map of a T5"),
        ({f"{BLOCK[17:]}.lora_A.weight": counted(2, 4)}, "belongs to no linear map of a T5"),
        ({f"{BLOCK.replace('11', '011')}.lora_A.weight": counted(2, 4)}, "no linear map"),
        ({f"{BLOCK.replace('11', '../1')}.lora_A.weight": counted(2, 4)}, "no linear map"),
        ({f"{BLOCK}.lora_A.weight": counted(8)}, r"has shape \[8\], but .* says r 2"),
        ({}, "the file is empty"),
    ],
)
def test_other_tensors_are_refused(tmp_path, tensors, message) -> None:
    with pytest.raises(InputError, match=message) as raised:
        load_peft_adapter(write(tmp_path, LORA, tensors))
    assert "adapter_model.safetensors" in str(raised.value)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value) -> None:
    tensors = lora_tensors()
    tensors[f"{BLOCK}.lora_B.weight"][1, 1] = value
    with pytest.raises(InputError, match=r"the array of encoder/.*/query/b is not finite"):
        load_peft_adapter(write(tmp_path, LORA, tensors))


def test_a_header_of_the_wrong_types_is_damaged(tmp_path) -> None:
    """Only ptjax writes such a header; a value that cannot be used is an error of the file."""
    write(tmp_path, LORA, lora_tensors())
    header = {"ptjax_version": '"1"', "input_length": '"many"'}
    save_file(lora_tensors(), tmp_path / "adapter_model.safetensors", header)
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: .*input_length"):
        load_peft_adapter(tmp_path)


@pytest.mark.parametrize("shape", [(4,), (2, 3), (1, 1), (0, 1)])
def test_a_vector_of_ia3_is_a_row_or_a_column(tmp_path, shape) -> None:
    with pytest.raises(InputError, match=r"ia3_l has shape .*\[n, 1\] or \[1, n\]"):
        load_peft_adapter(write(tmp_path, IA3, {f"{WO}.ia3_l": counted(*shape)}))


def test_missing_files_are_named_and_pickles_are_not_read(tmp_path) -> None:
    write(tmp_path, LORA, lora_tensors())
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is missing; load the adap"):
        load_peft_adapter(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"adapter_config\.json: the file is missing"):
        load_peft_adapter(tmp_path)


def test_only_folders_of_peft_with_an_adapter_are_one(tmp_path) -> None:
    assert is_peft_adapter(write(tmp_path / "lora", LORA, lora_tensors()))
    assert is_peft_adapter(write(tmp_path / "ia3", IA3, ia3_tensors()))
    assert is_peft_adapter(write(tmp_path / "norms", NORMS, norm_tensors()))
    prompt = {"peft_type": "PROMPT_TUNING"}
    assert not is_peft_adapter(write(tmp_path / "prompt", prompt, lora_tensors()))
    assert not is_peft_adapter(tmp_path)
