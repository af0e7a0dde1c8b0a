"""Tokenizer folders as releases of transformers save them, kept as what differs from spiece.model.

Plain Python and sentencepiece, so that the scripts of `tests/oracles` can import it.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

SPIECE = Path(__file__).parent.parent / "ptjax" / "assets" / "nano" / "spiece.model"
FIXTURES = Path(__file__).parent / "fixtures" / "transformers"
CONFIG = {"tokenizer_class": "T5Tokenizer", "extra_ids": 5, "pad_token": "<pad>"}


def write_source(folder: Path) -> Path:
    """The shipped vocabulary with five sentinels, as ptjax saves it."""
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(SPIECE.read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    (folder / "config.json").write_text('{"model_type": "t5"}')
    return folder


def pack(folder: Path) -> dict[str, Any]:
    """file -> content; what a file has from spiece.model is left out."""
    files: dict[str, Any] = {}
    for file in sorted(folder.iterdir()):
        files[file.name] = None if file.suffix == ".model" else json.loads(file.read_text())
    if "tokenizer.json" in files:
        content = files["tokenizer.json"]
        assert content["model"]["vocab"] == _vocabulary()
        content["model"]["vocab"] = None
        for step in _steps(content):
            if "precompiled_charsmap" in step:
                assert step["precompiled_charsmap"] == _charsmap()
                step["precompiled_charsmap"] = None
    return files


def unpack(files: dict[str, Any], folder: Path) -> Path:
    """The folder that `pack` took."""
    folder.mkdir(parents=True)
    for name, content in json.loads(json.dumps(files)).items():
        if name == "tokenizer.json":
            content["model"]["vocab"] = _vocabulary()
            for step in _steps(content):
                if "precompiled_charsmap" in step:
                    step["precompiled_charsmap"] = _charsmap()
        if content is None:
            (folder / name).write_bytes(SPIECE.read_bytes())
        else:
            (folder / name).write_text(json.dumps(content))
    return folder


def _proto() -> Any:
    return sentencepiece_model_pb2.ModelProto.FromString(SPIECE.read_bytes())  # type: ignore[attr-defined]


def _vocabulary() -> list[list[Any]]:
    sentinels = [[f"<extra_id_{k}>", 0.0] for k in reversed(range(CONFIG["extra_ids"]))]
    return [[piece.piece, piece.score] for piece in _proto().pieces] + sentinels


def _charsmap() -> str:
    return base64.b64encode(_proto().normalizer_spec.precompiled_charsmap).decode()


def _steps(content: dict[str, Any]) -> list[dict[str, Any]]:
    return content["normalizer"].get("normalizers", [content["normalizer"]])
