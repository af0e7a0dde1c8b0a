"""Prompts put into T5X checkpoints: what is added, and that nothing else changes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from orbax import checkpoint as ocp

from ptjax import untrusted
from ptjax.errors import InputError
from ptjax.interop import t5x
from ptjax.interop.prompt_file import load_prompt
from ptjax.interop.t5x_write import write_t5x
from ptjax.trees import flatten_paths

FIXTURES = Path(__file__).parents[1] / "fixtures"
PROMPT = "encoder/prompt/prompt/prompt"
LEGACY = ("t5_1_1_tiny_legacy/checkpoint_3", "t5_1_0_tiny_legacy/checkpoint_3")
ORBAX = (
    "t5_1_1_tiny_orbax/checkpoint_3",
    "orbax/v0_4_ocdbt",
    "orbax/v0_4_folders",
    "orbax/v0_4_msgpack",
    "orbax/v0_7_zarr3",
    "orbax/v0_11_items/3",
)


def make_prompt(width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(5, width)).astype(np.float32)


def width_of(checkpoint: Path) -> int:
    return t5x.load_t5x(checkpoint)["token_embedder/embedding"].shape[1]


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize("name", [*LEGACY, *ORBAX])
def test_a_prompt_is_added_and_nothing_else_changes(name, tmp_path):
    """Bitwise, twice: the second prompt replaces the first."""
    source = Path(shutil.copytree(FIXTURES / name, tmp_path / "source"))
    before, original = digests(source), t5x.load_t5x(source)
    for seed, output in enumerate((tmp_path / "first", tmp_path / "second")):
        prompt = make_prompt(width_of(source), seed)
        write_t5x(source if seed == 0 else tmp_path / "first", prompt, output)
        arrays = t5x.load_t5x(output)
        assert set(arrays) == {*original, PROMPT}
        for path, array in original.items():
            assert arrays[path].read_all().tobytes() == array.read_all().tobytes(), path
        assert load_prompt(output).prompt.tobytes() == prompt.tobytes()
        assert arrays[PROMPT].dtype == "float32"
    assert digests(source) == before
    # The first checkpoint keeps its own prompt, although it shares files with the second.
    first = make_prompt(width_of(source), 0)
    assert load_prompt(tmp_path / "first").prompt.tobytes() == first.tobytes()


@pytest.mark.parametrize("name", [*LEGACY, ORBAX[0]])
def test_arrays_are_linked_not_copied(name, tmp_path):
    source = Path(shutil.copytree(FIXTURES / name, tmp_path / "source"))
    write_t5x(source, make_prompt(32), tmp_path / "new")
    files = [file for file in source.rglob("*") if file.is_file()]
    new = [tmp_path / "new" / file.relative_to(source) for file in files]
    linked = {a.name for a, b in zip(files, new, strict=True) if a.samefile(b)}
    changed = {file.name for file in files} - linked
    lists = {"_METADATA", "_sharding", "process_0", "manifest.ocdbt"}
    assert changed <= lists if name in ORBAX else changed == {"checkpoint"}


def test_without_links_files_are_copied(tmp_path, monkeypatch):
    def no_links(*_: object) -> None:
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", no_links)
    write_t5x(FIXTURES / LEGACY[0], make_prompt(32), tmp_path / "new")
    assert len(t5x.load_t5x(tmp_path / "new")) == 53


@pytest.mark.parametrize("name", LEGACY)
def test_the_prompt_is_stored_as_t5x_stored_the_embedding(name, tmp_path):
    source, new = FIXTURES / name, tmp_path / "checkpoint_3"
    write_t5x(source, make_prompt(32), new)
    old, tree = (untrusted.unpack_msgpack((x / "checkpoint").read_bytes()) for x in (source, new))
    spec = tree["optimizer"]["target"]["encoder"].pop("prompt")["prompt"]["prompt"]
    flat, kept = flatten_paths(tree), flatten_paths(old)
    assert flat.keys() == kept.keys()
    for path, leaf in flat.items():
        np.testing.assert_array_equal(leaf, kept[path], path)
    beside = old["optimizer"]["target"]["token_embedder"]["embedding"]
    folder = "target.encoder.prompt.prompt.prompt"
    slash = "/" * beside["kvstore"]["path"].endswith("/")
    sizes = {"shape": [5, 32], "chunks": [5, 32]}
    assert spec == {
        **beside,
        "kvstore": {**beside["kvstore"], "path": folder + slash},
        "metadata": {**beside["metadata"], **sizes},
    }
    zarr, like = (
        json.loads((new / x / ".zarray").read_text())
        for x in (folder, "target.token_embedder.embedding")
    )
    assert {**zarr, **sizes} == zarr
    assert {**like, **sizes, "dimension_separator": "."} == zarr | {"dimension_separator": "."}
    assert {file.name for file in (new / folder).iterdir()} == {".zarray", "0.0"}


@pytest.mark.filterwarnings("ignore:Sharding info not provided when restoring")
@pytest.mark.parametrize("name", [ORBAX[0], ORBAX[1], ORBAX[4]])
def test_orbax_itself_restores_it(name, tmp_path):
    source, new = FIXTURES / name, tmp_path / "new"
    prompt = make_prompt(width_of(source))
    write_t5x(source, prompt, new)
    items = [folder for folder in (new / "params", new / "state", new) if folder.is_dir()]
    restored = flatten_paths(ocp.PyTreeCheckpointer().restore(items[0]))
    before = flatten_paths(ocp.PyTreeCheckpointer().restore(source / items[0].relative_to(new)))
    [path] = set(restored) - set(before)
    assert path.endswith(PROMPT)
    np.testing.assert_array_equal(restored.pop(path), prompt)
    for path, value in restored.items():
        np.testing.assert_array_equal(value, before[path], path)


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    source = Path(shutil.copytree(FIXTURES / LEGACY[0], tmp_path / "source"))
    with pytest.raises(InputError, match=r"source already exists; name a new folder"):
        write_t5x(source, make_prompt(32), source)
    with pytest.raises(InputError, match=r"is inside of the checkpoint .*; name another folder"):
        write_t5x(source, make_prompt(32), source / "new")
    with pytest.raises(InputError, match=r"source: width 32, but the prompt is \[5, 8\]"):
        write_t5x(source, make_prompt(8), tmp_path / "new")
    with pytest.raises(InputError, match="is written to a local folder; name one"):
        write_t5x(source, make_prompt(32), "gs://bucket/new")
    next(source.glob("*query.kernel/0.0")).unlink()
    with pytest.raises(InputError, match=r"a chunk of parameter .* is missing"):
        write_t5x(source, make_prompt(32), tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
