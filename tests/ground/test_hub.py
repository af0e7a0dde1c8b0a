"""Models of the Hugging Face hub, imitated on this machine: which files are taken, and messages."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0a" * 20
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


class Hub(http.server.BaseHTTPRequestHandler):
    """The three paths that `snapshot_download` asks: a model's commit, its files, a file."""

    def log_message(self, *_: Any) -> None: ...

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/api/models/").strip("/")
        repo, rest = "/".join(path.split("/")[:2]), path.split("/")[2:]
        if repo == "org/gated":
            return self.answer(403, b"", X_Error_Code="GatedRepo")
        if repo == "org/private":
            return self.answer(401, b"")
        if repo == "org/broken":
            return self.answer(500, b"")
        if repo not in MODELS:
            return self.answer(404, b"", X_Error_Code="RepoNotFound")
        if "revision" in rest and rest[-1] not in ("main", COMMIT):
            return self.answer(404, b"", X_Error_Code="RevisionNotFound")
        files = MODELS[repo]
        tag = {name: hashlib.sha1(name.encode()).hexdigest() for name in files}
        if rest[:1] == ["resolve"]:
            name = rest[2]
            return self.answer(200, files[name], ETag=f'"{tag[name]}"', X_Repo_Commit=COMMIT)
        if rest[:1] == ["tree"]:
            listed: Any = [
                {"type": "file", "path": name, "size": len(content), "oid": tag[name]}
                for name, content in files.items()
            ]
        else:
            siblings = [{"rfilename": name} for name in files]
            listed = {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False}
        self.answer(200, json.dumps(listed).encode(), Content_Type="application/json")

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def ask(endpoint: str, cache: Path, *names: str) -> list[Any]:
    """What a process of its own gets: the hub's address is read once."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", CALLS, *names],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def downloads(endpoint, tmp_path_factory) -> tuple[Path, dict[str, set[str]]]:
    cache = tmp_path_factory.mktemp("cache")
    answers = ask(endpoint, cache, *(f"model:{name}" for name in MODELS))
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


def test_case_1_3_missing_private_and_no_network_are_three_messages(downloads, endpoint):
    cache, _ = downloads
    names = ("none", "private", "gated", "broken", "bpe@v9")
    asked = [f"model:org/{name}" for name in names] + [
        "tokenizer:org/none",
        "backbone:ptjx-nano",
        "tokenizer:bty5",
    ]
    none, private, gated, broken, revision, tokenizer, *ours = ask(endpoint, cache, *asked)
    assert none.startswith("org/none: not a local path, and the Hugging Face hub has no such model")
    assert tokenizer == none and "did you mean" not in none
    assert ours[0].endswith("; did you mean ptjax-nano?") and ours[1].endswith("mean byt5?")
    assert "private, or misspelt; log in with `hf auth login`" in private
    assert "on request only; log in with `hf auth login`" in gated
    assert "the Hugging Face hub failed (HTTP 500)" in broken
    assert "has no revision 'v9' of this model" in revision
    closed = "http://127.0.0.1:9"
    cached, away = ask(closed, cache, "model:org/bpe", "model:org/none")
    assert cached[0] == COMMIT and "pytorch_model.bin" in cached[1]
    assert "the Hugging Face hub cannot be reached" in away and "check the network" in away
