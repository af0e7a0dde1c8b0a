"""Models of the Hugging Face hub, imitated on this machine: which files are taken, and messages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import COMMIT, Hub, serve

WEIGHTS = {"model.fp16.safetensors": b"16", "pytorch_model.bin": b"32"}
MODELS = {
    "org/bpe": {"config.json": b"{}", "vocab.json": b"{}", "merges.txt": b"", **WEIGHTS},
    "org/wordpiece": {
        "config.json": b"{}",
        "vocab.txt": b"[PAD]",
        "model.safetensors": b"x",
        "pytorch_model.bin": b"32",
        "tf_model.h5": b"no",
    },
    "org/spiece": {"config.json": b"{}", "sentencepiece.model": b"x", "spiece.model": b"x"},
    "org/shards": {
        "model.safetensors.index.json": b"{}",
        "model-00001-of-00001.safetensors": b"x",
        "pytorch_model.bin": b"32",
    },
}
CALLS = """
import json, sys
from ptjax.errors import InputError
from ptjax.interop import huggingface
from ptjax.backbones.load import load_backbone
from ptjax.data.tokenizer import load_tokenizer
for name in sys.argv[1:]:
    kind, _, repo = name.partition(":")
    try:
        if kind == "model":
            folder, commit = huggingface.download(*repo.split("@"))
            print(json.dumps([commit, sorted(file.name for file in folder.iterdir())]))
        else:
            {"backbone": load_backbone, "tokenizer": load_tokenizer}[kind](repo)
    except InputError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve(MODELS) as hub:
        yield hub


@pytest.fixture(scope="module")
def downloads(hub, tmp_path_factory) -> tuple[Path, dict[str, set[str]]]:
    cache = tmp_path_factory.mktemp("cache")
    answers = hub.run(CALLS, cache, *(f"model:{name}" for name in MODELS))
    assert [commit for commit, _ in answers] == [COMMIT] * len(MODELS)
    return cache, {name: set(files) for name, (_, files) in zip(MODELS, answers, strict=True)}


def test_case_1_3_every_file_of_a_tokenizer_is_downloaded(downloads):
    _, files = downloads
    assert {"vocab.json", "merges.txt"} <= files["org/bpe"]
    assert "vocab.txt" in files["org/wordpiece"]
    assert {"spiece.model", "sentencepiece.model"} <= files["org/spiece"]


def test_case_1_3_torch_weights_are_taken_where_the_others_are_variants(downloads):
    _, files = downloads
    weights = {
        name: {file for file in held if file.startswith(("model", "pytorch"))}
        for name, held in files.items()
    }
    assert weights == {
        "org/bpe": {"pytorch_model.bin"},
        "org/wordpiece": {"model.safetensors"},
        "org/spiece": set(),
        "org/shards": {"model.safetensors.index.json", "model-00001-of-00001.safetensors"},
    }


def test_case_1_3_missing_private_and_no_network_are_three_messages(downloads, hub):
    cache, _ = downloads
    names = ("none", "private", "gated", "broken", "bpe@v9")
    asked = [f"model:org/{name}" for name in names] + [
        "tokenizer:org/none",
        "backbone:ptjx-nano",
        "tokenizer:bty5",
    ]
    none, private, gated, broken, revision, tokenizer, *ours = hub.run(CALLS, cache, *asked)
    assert none.startswith("org/none: not a local path, and the Hugging Face hub has no such model")
    assert tokenizer == none and "did you mean" not in none
    assert ours[0].endswith("; did you mean ptjax-nano?") and ours[1].endswith("mean byt5?")
    assert "private, or misspelt; log in with `hf auth login`" in private
    assert "on request only; log in with `hf auth login`" in gated
    assert "the Hugging Face hub failed (HTTP 500)" in broken
    assert "has no revision 'v9' of this model" in revision
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    cached, away = hub.run(CALLS, cache, "model:org/bpe", "model:org/none", **closed)
    assert cached[0] == COMMIT and "pytorch_model.bin" in cached[1]
    assert "the Hugging Face hub cannot be reached" in away and "check the network" in away
