"""Prompt files: ours, and the others that hold a prompt."""

from __future__ import annotations

import pathlib
import pickle

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tensorstore as ts
from flax import serialization
from markers import SHARED

from ptjax.backbones.load import load_backbone
from ptjax.errors import InputError
from ptjax.inference.prompts import check_prompt
from ptjax.interop.peft import export_peft
from ptjax.interop.prompt_file import T5X_PROMPT, load_prompt, load_prompts, save_prompt

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
NUMPY_NAME = "encoder.prompt.prompt.prompt"
METADATA = {
    "ptjax_version": "0.1.0",
    "task": "sst2",
    "template": 'Kritik: "{text}" → {label}\n',
    "verbalizers": {"0": "negative", "1": "positive"},
    "step": 1200,
    "metric": 0.93,
    "fingerprint": None,
}


@pytest.fixture
def prompt():
    return np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)


def test_a_prompt_and_its_metadata_come_back(tmp_path, prompt):
    save_prompt(tmp_path / "prompt.safetensors", prompt, METADATA)
    loaded = load_prompt(tmp_path / "prompt.safetensors")
    assert loaded.prompt.dtype == np.float32
    np.testing.assert_array_equal(loaded.prompt, prompt)
    assert loaded.metadata == METADATA
    tensors = safetensors.numpy.load_file(tmp_path / "prompt.safetensors")
    assert list(tensors) == ["prompt"]
    assert [path.name for path in tmp_path.iterdir()] == ["prompt.safetensors"]


def test_a_reader_of_the_old_file_is_not_disturbed(tmp_path, prompt):
    """The new file takes the old one's name in one step."""
    file = tmp_path / "prompt.safetensors"
    save_prompt(file, prompt, {})
    before = file.read_bytes()
    with file.open("rb") as old:
        save_prompt(file, prompt + 1, {})
        assert old.read() == before
    np.testing.assert_array_equal(load_prompt(file).prompt, prompt + 1)


def test_a_failed_save_leaves_the_old_file(tmp_path, prompt):
    file = tmp_path / "prompt.safetensors"
    save_prompt(file, prompt, {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_prompt(file, prompt + 1, {"bad": object()})
    with pytest.raises(InputError, match=r"not finite \(row 2\)"):
        prompt_with_nan = prompt.copy()
        prompt_with_nan[2, 3] = np.nan
        save_prompt(file, prompt_with_nan, {})
    np.testing.assert_array_equal(load_prompt(file).prompt, prompt)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["prompt.npy", NUMPY_NAME])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, ">f4"])
def test_a_numpy_file_of_prompt_tuning(tmp_path, prompt, name, dtype):
    with (tmp_path / name).open("wb") as stream:
        np.save(stream, prompt.astype(dtype))
    loaded = load_prompt(tmp_path / name)
    assert loaded.prompt.dtype == np.float32
    np.testing.assert_array_equal(loaded.prompt, prompt.astype(dtype).astype(np.float32))
    assert loaded.metadata == {}


def test_a_peft_directory_or_its_weights(tmp_path, prompt):
    export_peft(tmp_path, prompt, num_heads=2, num_layers=3, metadata=METADATA)
    files = ("adapter_model.safetensors", "adapter_config.json")
    for path in (tmp_path, *(tmp_path / file for file in files)):
        np.testing.assert_array_equal(load_prompt(path).prompt, prompt)
        assert load_prompt(path).metadata == METADATA
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"adapter_config\.json: the file is missing"):
        load_prompt(tmp_path / "adapter_model.safetensors")


def test_a_directory_above_prompts(tmp_path, prompt):
    """An adapter with a name is in a folder of its own, and a numpy prompt below its step."""
    adapter, numpy_file = tmp_path / "named", tmp_path / "checkpoint_9" / NUMPY_NAME
    export_peft(adapter, prompt, num_heads=2, num_layers=3)
    with pytest.raises(InputError, match=rf"did you mean {adapter}\?"):
        load_prompt(tmp_path)
    numpy_file.parent.mkdir()
    with numpy_file.open("wb") as stream:
        np.save(stream, prompt)
    for folder in (tmp_path, numpy_file.parent):
        with pytest.raises(InputError, match=rf"did you mean {numpy_file}\?"):
            load_prompt(folder)


def write_t5x_prompt(checkpoint, prompt):
    path = f"target.{T5X_PROMPT.replace('/', '.')}"
    metadata = {"chunks": [3, 6], "dtype": "<f4", "shape": list(prompt.shape)}
    kvstore = {"driver": "file", "path": f"{checkpoint / path}/"}
    spec = {"driver": "zarr", "kvstore": kvstore, "metadata": metadata}
    ts.open(spec, create=True).result().write(prompt).result()
    leaf = {**spec, "kvstore": {"driver": "gfile", "path": path}}
    target = {"encoder": {"prompt": {"prompt": {"prompt": leaf}}}}
    (checkpoint / "checkpoint").write_bytes(
        serialization.msgpack_serialize({"version": 3, "optimizer": {"target": target}})
    )


def test_a_t5x_checkpoint_with_a_prompt(tmp_path, prompt):
    for step, value in ((9, prompt), (10, prompt + 1)):
        write_t5x_prompt(tmp_path / f"checkpoint_{step}", value)
    np.testing.assert_array_equal(load_prompt(tmp_path).prompt, prompt + 1)
    for path in (tmp_path / "checkpoint_9", tmp_path / "checkpoint_9" / "checkpoint"):
        np.testing.assert_array_equal(load_prompt(path).prompt, prompt)


def test_a_t5x_checkpoint_without_a_prompt():
    with pytest.raises(InputError, match=rf"checkpoint_3: .* holds no prompt \(.*{T5X_PROMPT}"):
        load_prompt(FIXTURES / "t5_1_1_tiny_legacy")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros(6, np.float32), r"shape \[6\], not \[P, D\]"),
        (np.zeros((2, 3, 4), np.float32), r"shape \[2, 3, 4\]"),
        (np.zeros((0, 4), np.float32), r"shape \[0, 4\]"),
        (np.array([[0, np.nan]], np.float32), r"not finite \(row 0\)"),
        (np.array([[0.0], [np.inf]], np.float32), r"not finite \(row 1\)"),
        (np.array([[1e300]]), "not finite"),
    ],
)
@pytest.mark.parametrize("name", ["x.npy", "x.safetensors"])
def test_a_prompt_that_is_none(tmp_path, value, message, name):
    if name.endswith(".npy"):
        np.save(tmp_path / name, value)
    else:
        safetensors.numpy.save_file({"prompt": value}, tmp_path / name)
    with pytest.raises(InputError, match=rf"{name}: the prompt .*{message}"):
        load_prompt(tmp_path / name)


def test_integers_are_no_prompt(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 2), np.int32))
    with pytest.raises(InputError, match="dtype int32, not floating point"):
        load_prompt(tmp_path / "x.npy")


@pytest.mark.parametrize("keep", [0, 5, 50, 130, -1])
def test_a_truncated_numpy_file(tmp_path, prompt, keep):
    np.save(tmp_path / "x.npy", prompt)
    data = (tmp_path / "x.npy").read_bytes()[:keep]
    (tmp_path / "x.npy").write_bytes(data)
    with pytest.raises(
        InputError, match=r"x\.npy: (the numpy file is truncated|not a prompt file)"
    ):
        load_prompt(tmp_path / "x.npy")


def test_a_truncated_safetensors_file(tmp_path, prompt):
    file = tmp_path / "x.safetensors"
    save_prompt(file, prompt, METADATA)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"x\.safetensors: the file is truncated"):
        load_prompt(file)


def test_pickled_arrays_are_refused_unopened(tmp_path, prompt):
    np.save(tmp_path / "x.npy", np.array([[{"a": 1}]], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="Object arrays cannot be loaded"):
        load_prompt(tmp_path / "x.npy")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(prompt))
    with pytest.raises(InputError, match="a pickle, which could run any code"):
        load_prompt(tmp_path / "x.pkl")
    np.savez(tmp_path / "x.npz", prompt=prompt)
    with pytest.raises(InputError, match="a zip"):
        load_prompt(tmp_path / "x.npz")


def test_somebody_else_s_safetensors(tmp_path, prompt):
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"prompt": prompt}, file, metadata={"format": "pt"})
    assert load_prompt(file).metadata == {"format": "pt"}
    safetensors.numpy.save_file({"weight": prompt}, file)
    with pytest.raises(InputError, match=r"holds \['weight'\], not the tensor 'prompt'"):
        load_prompt(file)


def test_a_path_below_home(tmp_path, prompt, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_prompt("~/p.safetensors", prompt, {})
    np.testing.assert_array_equal(load_prompt("~/p.safetensors").prompt, prompt)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["sst2", "mrpc", "rte"])
def test_a_prompt_that_google_released(tmp_path, name):
    """What the commands make of it, `test_commands` sees."""
    file = SHARED / "fixtures" / "released_prompts" / f"{name}.npy"
    released = load_prompt(file).prompt
    assert (released.shape, released.dtype) == ((100, 768), np.float32)
    np.testing.assert_array_equal(released, np.load(file, allow_pickle=False))
    save_prompt(tmp_path / "p.safetensors", released, {})
    assert load_prompt(tmp_path / "p.safetensors").prompt.tobytes() == released.tobytes()
    with pytest.raises(
        InputError, match=r"\[100, 768\] does not fit ptjax-nano, whose width is 128"
    ):
        check_prompt(load_backbone("ptjax-nano"), load_prompt(tmp_path / "p.safetensors"))


def test_paths_that_hold_nothing(tmp_path):
    with pytest.raises(InputError, match="the path does not exist"):
        load_prompt(tmp_path / "gone.npy")
    with pytest.raises(InputError, match="no prompt in this directory"):
        load_prompt(tmp_path)
    (tmp_path / "x.txt").write_text("hello, this is text")
    with pytest.raises(InputError, match="not a prompt file: unknown format"):
        load_prompt(tmp_path / "x.txt")


# Many of them


def test_every_prompt_of_a_directory_by_name(tmp_path, prompt, caplog):
    """Files, PEFT's directories, members of a bank, runs; nothing hidden, nothing else."""
    wanted = {name: prompt + i for i, name in enumerate(("dash-ed", "file", "peft", "run", "seed"))}
    save_prompt(tmp_path / "file.safetensors", wanted["file"], METADATA)
    np.save(tmp_path / "dash-ed.npy", wanted["dash-ed"])
    export_peft(tmp_path / "peft", wanted["peft"], num_heads=2, num_layers=1)
    save_prompt(tmp_path / "seed" / "best.safetensors", wanted["seed"], {})
    save_prompt(tmp_path / "seed" / "step_3.safetensors", prompt - 1, {})
    save_prompt(tmp_path / "run" / "prompts" / "best.safetensors", wanted["run"], {})
    save_prompt(tmp_path / ".hidden.safetensors", prompt - 1, {})
    save_prompt(tmp_path / ".tmp" / "best.safetensors", prompt - 1, {})
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "unfinished" / "prompts").mkdir(parents=True)
    found = load_prompts(tmp_path)
    assert list(found) == sorted(wanted)
    for name, want in wanted.items():
        np.testing.assert_array_equal(found[name].prompt, want)
    assert found["file"].metadata == METADATA
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path / 'unfinished'}: no prompt in this folder, skipped"
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "no prompt in this directory$"),
        (("notes.txt",), "no prompt in this directory$"),
        (
            ("prompts/a/best.safetensors",),
            "no prompt in this directory; did you mean .*/prompts\\?",
        ),
        (("a.safetensors", "a.npy"), "a.npy and .*a.safetensors have the same name"),
        (("a.safetensors", "a/best.safetensors"), "have the same name"),
        (("a/best.safetensors", "a/prompts/best.safetensors"), "have the same name"),
        (("none.npy",), "none.npy: the name 'none' is reserved"),
        (("a.npy", "broken.safetensors"), "broken.safetensors: "),
        (("adapter_model.safetensors",), "a PEFT directory holds one prompt"),
    ],
)
def test_a_directory_that_cannot_be_taken_as_it_is(tmp_path, prompt, names, message):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".npy"):
            np.save(tmp_path / name, prompt)
        elif name.startswith(("broken", "notes")):
            (tmp_path / name).write_text("no prompt")
        else:
            save_prompt(tmp_path / name, prompt, {})
    with pytest.raises(InputError, match=message):
        load_prompts(tmp_path)


def test_a_path_that_is_no_directory(tmp_path, prompt):
    save_prompt(tmp_path / "a.safetensors", prompt, {})
    with pytest.raises(InputError, match="is a file; name the directory that the prompts are in"):
        load_prompts(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"no prompts at .*gone: the path does not exist"):
        load_prompts(tmp_path / "gone")
