"""Prompt files that were damaged on the way, and those of before the checksum."""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open
from test_torch_file import tensor
from test_torch_file import write as write_torch

from ptjax.errors import InputError
from ptjax.interop.peft import export_peft
from ptjax.interop.prompt_file import load_prompt, save_prompt
from ptjax.interop.torch_file import open_torch
from ptjax.models.t5 import PromptStates

OLD = pathlib.Path(__file__).parents[1] / "fixtures" / "prompts_324cea1"
DAMAGED = r"x\.safetensors: the prompt file was damaged or changed after ptjax wrote it"


def ramp(*shape):
    return (np.arange(np.prod(shape)) - 5).reshape(shape).astype(np.float32) / 4


def header_of(file):
    with safe_open(file, framework="numpy") as opened:
        return dict(opened.metadata())


def rewrite(source, target, change):
    """The file `source` with another header, by the safetensors package: no checksum anew."""
    header = header_of(source)
    change(header)
    safetensors.numpy.save_file(safetensors.numpy.load_file(source), target, metadata=header)
    return target


def test_prompts_of_before_the_checksum_stay_readable():
    trained, compiled = (
        load_prompt(OLD / "trained.safetensors"),
        load_prompt(OLD / "compiled.safetensors"),
    )
    assert trained.prompt.shape == (3, 128) and trained.prompt.dtype == np.float32
    digest = hashlib.sha256(trained.prompt.tobytes()).hexdigest()
    assert digest == "9cfc404397ca053adb3f04aeb16aa7d493937f32963a3ca75f60d32ccc4adcf8"
    texts = header_of(OLD / "trained.safetensors")
    assert trained.metadata == {key: json.loads(text) for key, text in texts.items()}
    assert not trained.attends_to_input and trained.metadata["task"]["label"] == "label"
    np.testing.assert_array_equal(compiled.prompt, ramp(2, 4))
    assert compiled.states is not None
    for pair in compiled.states.present().values():
        for array in pair:
            np.testing.assert_array_equal(array, ramp(1, 2, 2, 2))


METADATA = {
    "ptjax_version": "0.1.0",
    "task": {"name": "é", "inputs": "{a}", "label": "b", "verbalizer": {"0": "no"}},
    "sees_input": False,
    "input_length": 8,
}


def test_case_5_6_a_checksum_covers_all_of_a_prompt_file(tmp_path):
    """One bit of every byte: refused, or it meant nothing (a letter's case in an escape)."""
    file = tmp_path / "x.safetensors"
    save_prompt(file, ramp(2, 2), METADATA)
    assert load_prompt(file).metadata == METADATA
    data, harmless = file.read_bytes(), []
    for index in range(len(data)):
        damaged = bytearray(data)
        damaged[index] ^= 1 << index % 8
        file.write_bytes(damaged)
        try:
            read = load_prompt(file)
        except InputError:
            continue
        assert read.metadata == METADATA, index
        np.testing.assert_array_equal(read.prompt, ramp(2, 2))
        harmless.append(data[index - 3 : index + 3])
    assert all(b"\\u00" in around for around in harmless), harmless


def test_case_5_6_the_states_of_a_compiled_prompt_too(tmp_path):
    file, pair = tmp_path / "x.safetensors", (ramp(1, 2, 2, 2), ramp(1, 2, 2, 2))
    save_prompt(file, ramp(2, 4), METADATA, PromptStates(pair, pair))
    assert load_prompt(file).states is not None
    file.write_bytes(file.read_bytes()[:-4] + np.float32(7).tobytes())
    with pytest.raises(InputError, match=rf"{DAMAGED} \(the checksum does not match\)"):
        load_prompt(file)


def test_case_5_6_a_header_without_its_checksum_is_no_older_file(tmp_path):
    save_prompt(tmp_path / "whole.safetensors", ramp(2, 2), METADATA)
    for key in ("ptjax_format", "ptjax_sha256"):
        file = rewrite(
            tmp_path / "whole.safetensors",
            tmp_path / "x.safetensors",
            lambda header, key=key: header.pop(key),
        )
        with pytest.raises(InputError, match=rf"{DAMAGED} \(the checksum does not match\)"):
            load_prompt(file)


def test_case_5_6_a_prompt_that_is_saved_again_is_sealed_anew(tmp_path):
    save_prompt(tmp_path / "x.safetensors", ramp(2, 2), METADATA)
    read = load_prompt(tmp_path / "x.safetensors")
    save_prompt(tmp_path / "y.safetensors", read.prompt, read.metadata | {"step": 3})
    assert load_prompt(tmp_path / "y.safetensors").metadata["step"] == 3
    first, second = (header_of(tmp_path / f"{x}.safetensors")["ptjax_sha256"] for x in "xy")
    assert first != second and "ptjax_sha256" not in read.metadata
    with pytest.raises(InputError, match=r"cannot be saved with this metadata, 'step' is 1\.5"):
        save_prompt(tmp_path / "y.safetensors", read.prompt, {"step": 1.5})


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("input_length", '"512"', "'input_length' is \"512\""),
        ("input_length", "true", "'input_length' is true"),
        ("input_length", "64.0", r"'input_length' is 64\.0"),
        ("input_length", str(10**9), "'input_length' is 1000000000"),
        ("target_length", "-4", "'target_length' is -4"),
        ("sees_input", "0", "'sees_input' is 0"),
        ("sees_input", "falsf", "'sees_input' is not valid JSON"),
        ("backbone_fingerprint", "[1]", r"'backbone_fingerprint' is \[1\]"),
        ("seed", None, "'seed' is missing"),
        ("task", None, "'task' is missing"),
        ("sees_input", None, "'sees_input' is missing"),
        ("verbalizer", None, "'task' lost its labels"),
        ("label", None, "'task' lost its labels"),
        ("verbalizer", {"a": 1}, "'task' has a value of the wrong type"),
        ("verbalizer", ["no", "yes"], "'task' has a value of the wrong type"),
        ("inputs", 3, "'task' has a value of the wrong type"),
    ],
)
def test_case_5_6_wrong_types_in_a_file_of_ours_are_damage(tmp_path, key, text, message):
    """Of before the checksum as well, where nothing else would tell."""

    def change(header):
        if key in header:
            header.pop(key) if text is None else header.update({key: text})
        else:
            task = json.loads(header["task"])
            header["task"] = json.dumps(task | {key: text})

    file = rewrite(OLD / "trained.safetensors", tmp_path / "x.safetensors", change)
    with pytest.raises(InputError, match=rf"{DAMAGED} \({message}\)"):
        load_prompt(file)


IDS = {"pad_id": 0, "eos_ids": [1, 2], "decoder_start_id": 0, "forced_bos_id": None}
WRONG = {
    "sees_input": (0, "false", None),
    "ptjax_version": (1, ["0.1.0"]),
    "backbone_name": (3,),
    "tokenizer_fingerprint": ([],),
    "input_length": (-1, 1.5, "8", True, None, 1 << 20),
    "seed": (-1, False, 1 << 64),
    "special_ids": ([0], 3, {"pad_id": "0"}, {"eos_ids": [1, True]}, {"pad_id": -1}, {"a": [[1]]}),
}
RIGHT = {
    "sees_input": (True, False),
    "backbone_name": ("a", None),
    "input_length": (0, (1 << 20) - 1),
    "seed": (0, (1 << 64) - 1),
    "special_ids": ({}, IDS, {"eos_ids": []}),
    "anything": ([{}], None, 1.5),
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in WRONG.items() for v in values])
def test_a_value_of_the_wrong_type_is_not_written(tmp_path, key, value):
    said = rf"x\.safetensors: a prompt cannot be saved with this metadata, '{key}' is "
    with pytest.raises(InputError, match=said + re.escape(json.dumps(value)[:40]) + "$"):
        save_prompt(tmp_path / "x.safetensors", ramp(2, 4), {"task": None, key: value})
    assert list(tmp_path.iterdir()) == []


def test_every_value_of_the_right_type_comes_back(tmp_path):
    for key, values in RIGHT.items():
        for value in values:
            save_prompt(tmp_path / "x.safetensors", ramp(2, 4), {key: value})
            assert load_prompt(tmp_path / "x.safetensors").metadata == {key: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_values": None}, "the compiled prompt has no tensor 'encoder_values'"),
        ({"decoder_keys": None}, "the compiled prompt has no tensor 'decoder_keys'"),
        (
            {"encoder_keys": ramp(1, 2, 2, 3)},
            r"encoder_keys has shape \[1, 2, 2, 3\], not \[layers",
        ),
        (
            {"decoder_keys": ramp(2, 2, 4)},
            r"decoder_keys has shape \[2, 2, 4\], not \[layers, P, H",
        ),
        (
            {"encoder_keys": ramp(2, 2, 2), "encoder_values": ramp(2, 2, 2)},
            r"encoder_keys has shape \[2, 2, 2\], not \[layers, P, H, K\]",
        ),
        (
            {"encoder_keys": ramp(0, 2, 2, 2), "encoder_values": ramp(0, 2, 2, 2)},
            r"encoder_keys has shape \[0, 2, 2, 2\], not \[layers",
        ),
        ({"decoder_values": ramp(1, 2, 2, 2) + np.inf}, "decoder_keys or decoder_values is not fi"),
        ({"prompt": ramp(3, 4)}, "the states have 2 positions, the prompt 3; compile it again"),
        ({"sees_input": "true"}, "a prompt that attends to its input cannot be compiled"),
    ],
)
def test_states_that_are_none_are_refused(tmp_path, change, message):
    """In files without a checksum: of other programs, or of before it."""
    kinds = [f"{stack}_{kind}" for stack in ("encoder", "decoder") for kind in ("keys", "values")]
    tensors = {"prompt": ramp(2, 4)} | {kind: ramp(1, 2, 2, 2) for kind in kinds}
    file, header = tmp_path / "x.safetensors", {"sees_input": "false"}
    header |= {"task": "null", "input_length": "8", "target_length": "8", "seed": "0"}
    safetensors.numpy.save_file(tensors, file, metadata=header)
    assert load_prompt(file).states is not None
    header |= {key: value for key, value in change.items() if isinstance(value, str)}
    tensors |= {key: value for key, value in change.items() if key not in header}
    tensors = {key: value for key, value in tensors.items() if value is not None}
    safetensors.numpy.save_file(tensors, file, metadata=header)
    with pytest.raises(InputError, match=rf"x\.safetensors: {message}"):
        load_prompt(file)


def test_somebody_else_s_values_may_be_anything(tmp_path):
    file = tmp_path / "x.safetensors"
    header = {"input_length": '"512"', "format": "pt", "note": "a text"}
    safetensors.numpy.save_file({"prompt": ramp(2, 4)}, file, metadata=header)
    assert load_prompt(file).metadata == {"input_length": "512", "format": "pt", "note": "a text"}


def test_case_5_6_wrong_types_in_a_peft_directory_of_ours(tmp_path):
    metadata = {"sees_input": 1}
    export_peft(tmp_path, ramp(2, 4), num_heads=1, num_layers=1, metadata=metadata)
    with pytest.raises(InputError, match=r"was damaged or changed .*'sees_input' is 1"):
        load_prompt(tmp_path)


# .bin


def test_case_5_6_the_checksums_of_a_torch_file(tmp_path):
    file = write_torch(tmp_path / "x.bin", {"a": tensor(0, (6,), (1,))})
    data = file.read_bytes()
    numbers = np.arange(6, dtype="<f4").tobytes()
    at = data.index(numbers)
    file.write_bytes(data[: at + 5] + bytes([data[at + 5] ^ 1]) + data[at + 6 :])
    array = open_torch(file)["a"]
    with pytest.raises(InputError, match=r"^\S*x\.bin: archive/data/0 is damaged: its checksum"):
        array.read_all()
    name = data.index(b"X\x01\x00\x00\x00a") + 5  # of the tensor, in the pickle
    file.write_bytes(data[:name] + b"b" + data[name + 1 :])
    with pytest.raises(InputError, match=r"archive/data\.pkl is damaged: its checksum"):
        open_torch(file)


def test_case_5_6_a_torch_file_without_checksums(tmp_path):
    """`torch.serialization.set_crc32_options(False)` writes 0; such files are read."""
    file = write_torch(tmp_path / "x.bin", {"a": tensor(0, (6,), (1,))})
    data = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            data = data.replace(info.CRC.to_bytes(4, "little"), bytes(4))
    file.write_bytes(data)
    np.testing.assert_array_equal(open_torch(file)["a"].read_all(), np.arange(6))
