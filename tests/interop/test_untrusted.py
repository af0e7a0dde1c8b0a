"""What a file claims and does not hold, and what is nested without an end. All inputs are small."""

from __future__ import annotations

import ast
import bz2
import functools
import gzip
import json
import lzma
import pathlib
import pickle
import shutil
import struct
import zipfile

import msgpack
import numpy as np
import pytest
from etils import epath
from flax import serialization
from test_torch_file import tensor
from test_torch_file import write as write_torch

import ptjax
from ptjax import files, untrusted
from ptjax.backbones.describe import describe
from ptjax.backbones.open import open_backbone
from ptjax.data import added_tokens
from ptjax.data.sources import read_records
from ptjax.errors import InputError
from ptjax.interop.huggingface import load_huggingface
from ptjax.interop.huggingface_format import read_config
from ptjax.interop.peft import export_peft, load_peft, method_of
from ptjax.interop.prompt_file import load_prompt
from ptjax.interop.safetensors_file import open_safetensors
from ptjax.interop.special_ids import read_special_ids
from ptjax.interop.t5x import load_t5x
from ptjax.interop.torch_file import open_torch

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
LEGACY = FIXTURES / "t5_1_1_tiny_legacy" / "checkpoint_3"
QUERY = "target.encoder.layers_0.attention.query.kernel"
DEEP = "[" * 150 + "]" * 150
LZMA = functools.partial(lzma.compress, preset=0)
TOO_DEEP = "nested deeper than 100 levels"


def nested(levels):
    return functools.reduce(lambda inner, _: {"a": inner}, range(levels), "")


# One guard for msgpack, zip and the rest; that for JSON is tested in test_files


def test_case_5_8_depth_of_msgpack():
    array = np.arange(3, dtype=np.float32)
    tree = {"a": {"b": array}, "c": "text"}
    read = untrusted.unpack_msgpack(serialization.msgpack_serialize(tree))
    np.testing.assert_array_equal(read["a"]["b"], array)
    assert untrusted.unpack_msgpack(msgpack.packb(nested(100))) == nested(100)
    with pytest.raises(ValueError, match=TOO_DEEP):
        untrusted.unpack_msgpack(msgpack.packb(nested(102)))


def readers(folder):
    """(what, reader) of each file of a stranger that a JSON text stands in."""
    (folder / "tasks.jsonl").write_text(f'{{"text": {DEEP}}}\n')
    yield "tasks.jsonl", read_records
    export_peft(folder / "peft", np.ones((2, 4), np.float32), num_heads=1, num_layers=1)
    (folder / "peft" / "adapter_config.json").write_text(f'{{"a": {DEEP}}}')
    yield "peft", load_peft
    text = f'{{"a": {DEEP}}}'.encode()
    (folder / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    yield "x.safetensors", open_safetensors
    for name in ("config.json", "model.safetensors.index.json"):
        shutil.copytree(FIXTURES / "torch_bin" / "t5_safetensors", folder / name[:5])
        (folder / name[:5] / name).write_text(f'{{"weight_map": {DEEP}}}')
    (folder / "model" / "model.safetensors").unlink()
    yield "confi", open_backbone
    yield "model", load_huggingface
    (folder / "run").mkdir()
    (folder / "run" / "results.json").write_text(DEEP)
    yield "run", describe
    shutil.copytree(FIXTURES / "orbax" / "v0_4_folders", folder / "orbax")
    (folder / "orbax" / "_METADATA").write_text(f'{{"tree_metadata": {DEEP}}}')
    yield "orbax", load_t5x
    (folder / "checkpoint").write_bytes(msgpack.packb({"version": 3, "optimizer": nested(150)}))
    yield "checkpoint", load_t5x


def test_case_5_8_every_reader_refuses_deep_nesting(tmp_path):
    for name, read in readers(tmp_path):
        with pytest.raises(InputError, match=TOO_DEEP):
            read(tmp_path / name)


def test_case_5_8_no_reader_goes_past_the_guard():
    """What parses a stranger's bytes is called in two files alone; the rest reads its own."""
    own = {
        "planning/compiler.py": "its own cache and children",
        "launch.py": "what its children write",
        "trainer/checksums.py": "what Orbax writes of this run",
        "data/transformers_tokenizer.py": "of the tokenizers library",
    }
    guarded = {"json.loads", "json.load", "msgpack_restore", "np.load", "archive.read"}
    guarded |= {"gzip.decompress", "bz2.decompress", "lzma.decompress", "pickle.loads"}
    calls = {}
    package = pathlib.Path(ptjax.__file__).parent
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(tuple(guarded)):
                calls.setdefault(file.relative_to(package).as_posix(), []).append(
                    f"{node.lineno}: {ast.unparse(node.func)}"
                )
    assert calls.pop("files.py") and calls.pop("untrusted.py")
    assert set(calls) == set(own), calls


# Sizes


# What is wrong with a file, and what the message calls it.
NO_OBJECT = {
    '{"a": ': r"\(Expecting value: line 1 column 7 \(char 6\)\)",
    "[]": r"\(it holds a list\)",
    "null": r"\(it holds a NoneType\)",
    '{"a": ' + DEEP + "}": rf"\({TOO_DEEP}\)",
}


@pytest.mark.parametrize("text", NO_OBJECT)
def test_a_config_that_is_no_object_is_told_alike_by_every_reader(tmp_path, text):
    folder = epath.Path(tmp_path)
    readers = {
        "special_tokens_map.json": lambda: added_tokens.read_json(folder / file),
        "generation_config.json": lambda: read_special_ids(folder, {"vocab_size": 3}),
        "adapter_config.json": lambda: method_of(tmp_path),
        "config.json": lambda: read_config(folder),
    }
    for file, read in readers.items():
        (tmp_path / file).write_text(text)
        said = (
            rf"{file}: the file is truncated or not a JSON object {NO_OBJECT[text]}; copy it again$"
        )
        with pytest.raises(InputError, match=said):
            read()


def test_case_5_8_a_json_file_has_a_largest_size(tmp_path):
    """As long as it says, but without blocks on the disk."""
    file = tmp_path / "adapter_config.json"
    with file.open("wb") as stream:
        stream.truncate(files.MAX_JSON_BYTES + 1)
    with pytest.raises(InputError, match="268,435,457 bytes of JSON, more than 268,435,456"):
        load_peft(tmp_path)


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_case_5_8_a_numpy_file_that_claims_more_than_it_holds(tmp_path, version):
    file = tmp_path / "x.npy"
    with file.open("wb") as stream:
        np.lib.format.write_array(stream, np.ones((3, 4), np.float32), version)
    assert load_prompt(file).prompt.shape == (3, 4)
    data = file.read_bytes()
    file.write_bytes(data.replace(b"(3, 4), }   ", b"(3, 400), } "))
    with pytest.raises(InputError, match="the header claims 4,800 bytes, the file holds 48"):
        load_prompt(file)


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".xz", LZMA), (".bz2", bz2.compress)],
)
def test_case_5_8_what_inflates_without_an_end(tmp_path, suffix, compress):
    """65 MiB of zeros are 65 KB in gzip, and fewer in the others."""
    packed = compress(bytes(1 << 20)) * 65  # parts one behind the other are one file
    file = tmp_path / f"x.txt{suffix}"
    file.write_bytes(packed)
    with pytest.raises(InputError, match=rf"{len(packed):,} bytes inflate to more than 67,108,864"):
        read_records(file)
    text = ("x" * 99 + "\n").encode() * 2_000
    assert untrusted.inflate(compress(text), suffix) == text
    assert len(compress(text)) * untrusted.MAX_RATIO < len(text)  # small files may


def edit_zarray(checkpoint, **fields):
    file = checkpoint / QUERY / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    contents = serialization.msgpack_restore((checkpoint / "checkpoint").read_bytes())
    query = contents["optimizer"]["target"]["encoder"]["layers_0"]["attention"]["query"]
    query["kernel"]["metadata"]["shape"] = fields["shape"]
    (checkpoint / "checkpoint").write_bytes(serialization.msgpack_serialize(contents))


def test_case_5_8_an_array_that_claims_more_than_its_chunks_hold(tmp_path):
    checkpoint = pathlib.Path(shutil.copytree(LEGACY, tmp_path / "checkpoint_3"))
    edit_zarray(checkpoint, shape=[8192, 4096], chunks=[8192, 4096])
    array = load_t5x(checkpoint)["encoder/layers_0/attention/query/kernel"]
    with pytest.raises(InputError, match=r"claims 134,217,728 bytes, but its files hold [1-9]"):
        array.read((slice(0, 1), slice(0, 1)))
    edit_zarray(checkpoint, shape=[10**9, 10**9], chunks=[1, 1])
    with pytest.raises(InputError, match=r"a chunk of parameter .*query/kernel is missing"):
        load_t5x(checkpoint)


@pytest.mark.parametrize("layers", [40, 10**9])
def test_case_5_8_a_config_that_claims_more_layers_than_there_are(tmp_path, layers):
    """Before the network is traced: a config.json beside a T5X checkpoint is believed."""
    shutil.copytree(LEGACY, tmp_path / "checkpoint_3")
    config = pathlib.Path(ptjax.__file__).parent / "assets" / "nano" / "config.json"
    claimed = json.loads(config.read_text()) | {"num_layers": layers}
    (tmp_path / "config.json").write_text(json.dumps(claimed))
    with pytest.raises(InputError, match=rf"the config has {layers:,} encoder layers, the weights"):
        open_backbone(tmp_path)


# Pickles


def torch_file_of(path, pickled):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", bytes(24))
    return path


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        # The table of the unpickler in C grows to the largest index that is named.
        (b"\x80\x02}r" + struct.pack("<I", 1 << 20) + b"(X\x01\x00\x00\x00aNu.", "a state dict"),
        (pickle.dumps({((1,),): 1}, 2), "a key is neither a string nor a number"),
        (pickle.dumps({"a": {1.0}}, 4), "opcode .* is not allowed in a file of weights"),
        (pickle.dumps({"a": b"bytes"}, 4), "opcode .* is not allowed in a file of weights"),
        (b"\x80\x02}X\x01\x00\x00\x00a(lp0\nI1\na.", "opcode b'l' is not allowed"),
    ],
    ids=["a large index", "a tuple for a key", "a set", "bytes", "protocol 0"],
)
def test_case_5_8_a_pickle_of_what_no_state_dict_has(tmp_path, pickled, message):
    with pytest.raises(InputError, match=message):
        open_torch(torch_file_of(tmp_path / "x.bin", pickled))


def test_case_5_8_a_storage_that_is_named_by_tuples(tmp_path):
    """Neither hashed nor written into a message: both go down into every tuple there is."""
    deep = functools.reduce(lambda inner, _: (inner, inner), range(12), ())
    for bad in (
        tensor(0, (2,), (1,), key=deep),
        tensor(0, (2,), (1,), count=deep),
        tensor(0, (deep,), (1,)),
    ):
        with pytest.raises(InputError) as error:
            open_torch(write_torch(tmp_path / "x.bin", {"a": bad}))
        assert "not described by strings" in str(error.value) or "not numbers" in str(error.value)
        assert len(str(error.value)) < 300


def test_case_5_8_a_compressed_pickle_is_not_inflated(tmp_path):
    file = tmp_path / "x.bin"
    with zipfile.ZipFile(file, "w") as archive:
        packed = pickle.dumps({"a": "b" * 10_000}, 2)
        archive.writestr("archive/data.pkl", packed, zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match=r"data\.pkl is compressed, which torch never does"):
        open_torch(file)


def test_case_5_8_names_and_shapes_of_a_msgpack_that_are_none(tmp_path):
    checkpoint = pathlib.Path(shutil.copytree(LEGACY, tmp_path / "checkpoint_3"))
    contents = serialization.msgpack_restore((checkpoint / "checkpoint").read_bytes())
    target = contents["optimizer"]["target"]
    target["encoder"]["layers_0"]["attention"]["query"]["kernel"]["metadata"]["shape"] = 3
    (checkpoint / "checkpoint").write_bytes(serialization.msgpack_serialize(contents))
    with pytest.raises(InputError, match=r"has shape \[32, 32\], .* says 3"):
        load_t5x(checkpoint)
    (checkpoint / "checkpoint").write_bytes(
        msgpack.packb({"version": 3, "optimizer": {"target": {b"a": 1}}})
    )
    with pytest.raises(InputError, match=r"parameter b'a' is a int"):
        load_t5x(checkpoint)
