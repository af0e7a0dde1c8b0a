"""`ptjax.export`, and the command over it: which files are written, and what is refused."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import FIXTURES

import ptjax
from ptjax.errors import InputError
from ptjax.inference.export_prompt import FORMATS
from ptjax.interop import t5x
from ptjax.interop.prompt_file import PromptFile, load_prompt, save_prompt

pytestmark = pytest.mark.usefixtures("own_process")
T5X = FIXTURES / "t5_1_1_tiny_legacy" / "checkpoint_3"
HF = FIXTURES / "torch_parity" / "t5_1_1"
PROMPT = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)


def test_the_command_knows_the_formats_of_the_function():
    assert importlib.import_module("ptjax.export").FORMATS == FORMATS


def test_every_form_of_a_prompt_and_every_format():
    np.save("prompt.npy", PROMPT)
    for i, prompt in enumerate((PROMPT, PromptFile(PROMPT, {}), "prompt.npy")):
        path = ptjax.export(prompt, f"out/{i}.safetensors", to="safetensors")
        assert path == Path(f"out/{i}.safetensors")
        assert load_prompt(path).prompt.tobytes() == PROMPT.tobytes()
    for to in ("npy", "peft", "t5x"):
        path = ptjax.export("prompt.npy", f"out/{to}", to=to, backbone=T5X)
        assert load_prompt(path).prompt.tobytes() == PROMPT.tobytes()


def test_a_loaded_backbone_and_its_path_are_the_same(t5_1_1):
    ptjax.export(PROMPT, "a/new", to="peft", backbone=T5X)
    ptjax.export(PROMPT, "b/new", to="peft", backbone=t5_1_1)
    first, second = (
        {file.name: file.read_bytes() for file in Path(folder, "new").iterdir()} for folder in "ab"
    )
    del first["adapter_config.json"], second["adapter_config.json"]  # how the path is written
    assert first == second and set(first) == {"adapter_model.safetensors", "README.md"}


def test_peft_s_folder_has_the_card_of_the_run(call, t5_1_1):
    metadata = {"step": 1, "backbone_name": str(T5X), **t5_1_1.fingerprints.as_metadata()}
    save_prompt("run/prompts/best.safetensors", PROMPT, metadata)
    results = {"step": 1, "metric": "f1", "metrics": {"f1": 0.5}, "split": "test"}
    Path("run/results.json").write_text(json.dumps(results))
    load_prompt("run").save("saved/tickets")
    card = Path("saved/tickets/README.md").read_text()
    assert "| **this prompt**, f1 | 0.5 |" in card
    ptjax.export("run", "function/tickets", to="peft")
    code, _, err = call("export", "--model_dir=run", "--to=peft", "--output=command/tickets")
    assert code == 0, err
    for folder in ("function", "command"):
        assert Path(folder, "tickets/README.md").read_text() == card
    # What is exported again has it too.
    load_prompt("command/tickets").save("again/tickets")
    assert Path("again/tickets/README.md").read_text() == card


def test_export_to_a_t5x_checkpoint(call):
    np.save("prompt.npy", PROMPT)
    flags = ("prompt.npy", "--to=t5x", f"--backbone={T5X}")
    code, out, err = call("export", *flags, "--output=checkpoint_3")
    assert code == 0 and out == "checkpoint_3: t5x, [3, 32] from prompt.npy\n", err
    prompt = t5x.load_t5x("checkpoint_3")["encoder/prompt/prompt/prompt"].read_all()
    assert prompt.tobytes() == PROMPT.tobytes()
    again = ptjax.load_backbone("checkpoint_3", dtype="float32")
    assert again.fingerprint == ptjax.load_backbone(T5X, dtype="float32").fingerprint
    code, _, err = call("export", *flags, "--output=checkpoint_3", "--force")
    assert code == 2 and "checkpoint_3 already exists; name a new folder for the checkpoint" in err


def test_what_cannot_be_exported_is_refused(t5_1_1):
    blind = PromptFile(PROMPT, {"sees_input": False})
    for to in ("npy", "peft", "t5x"):
        with pytest.raises(InputError, match=f"does not see its input, which --to={to} cannot"):
            ptjax.export(blind, "new", to=to, backbone=t5_1_1)
    with pytest.raises(InputError, match="not a format of export; did you mean t5x"):
        ptjax.export(PROMPT, "new", to="t5")  # pyright: ignore[reportArgumentType]
    for to, needed in (("peft", "sizes"), ("t5x", "T5X checkpoint")):
        with pytest.raises(InputError, match=f"--to={to} needs the backbone's {needed}; name it"):
            ptjax.export(PROMPT, "new", to=to)
    with pytest.raises(InputError, match=r"t5_1_1 is not a T5X checkpoint, which --to=t5x adds to"):
        ptjax.export(PROMPT[:, :16], "new", to="t5x", backbone=HF)
    for to in ("peft", "t5x"):
        with pytest.raises(InputError, match=r"the prompt \[3, 8\] does not fit .* width is 32"):
            ptjax.export(PROMPT[:, :8], "new", to=to, backbone=t5_1_1)
    assert not Path("new").exists()


def test_nothing_is_overwritten_unasked():
    ptjax.export(PROMPT, "p.npy", to="npy")
    with pytest.raises(InputError, match=r"p\.npy already exists; .* --force \(force=True\)"):
        ptjax.export(2 * PROMPT, "p.npy", to="npy")
    assert load_prompt("p.npy").prompt.tobytes() == PROMPT.tobytes()
    ptjax.export(2 * PROMPT, "p.npy", to="npy", force=True)
    assert load_prompt("p.npy").prompt.tobytes() == (2 * PROMPT).tobytes()
    Path("folder").mkdir()
    Path("folder/README.md").write_text("# Mine")
    with pytest.raises(InputError, match="folder is a directory; name a file"):
        ptjax.export(PROMPT, "folder", to="npy", force=True)
    with pytest.raises(InputError, match=r"p\.npy is a file; name a folder"):
        ptjax.export(PROMPT, "p.npy", to="peft", backbone=T5X, force=True)
    with pytest.raises(InputError, match="is not a model card of ptjax; name another folder"):
        ptjax.export(PROMPT, "folder", to="peft", backbone=T5X, force=True)
    assert Path("folder/README.md").read_text() == "# Mine"
