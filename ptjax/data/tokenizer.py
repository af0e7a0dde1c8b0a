"""Loads the tokenizer of a path: SentencePiece (the reference), ByT5's or transformers'.

The interface is in `vocabulary`, each kind of tokenizer in its own file.
"""

from __future__ import annotations

import os
import tempfile

from etils import epath

from ptjax import hub
from ptjax.data.added_tokens import read_added_tokens, read_json
from ptjax.data.byte_tokenizer import ByteTokenizer
from ptjax.data.sentencepiece_tokenizer import (
    T5_SENTINELS,
    SentencePieceTokenizer,
    train_sentencepiece,
)
from ptjax.data.sources import resolve_path
from ptjax.data.transformers_tokenizer import TransformersTokenizer
from ptjax.data.vocabulary import Tokenizer, check_vocabulary
from ptjax.errors import InputError, check_path, missing

__all__ = [
    "ByteTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "TransformersTokenizer",
    "check_vocabulary",
    "find_tokenizer",
    "load_tokenizer",
    "train_sentencepiece",
]

_MODEL_FILES = ("spiece.model", "sentencepiece.model")
_CONFIG_FILE = "tokenizer_config.json"
_T5_CLASSES = {
    None,
    *(f"{kind}Tokenizer{speed}" for kind in ("T5", "MT5") for speed in ("", "Fast")),
}


def load_tokenizer(source: str | os.PathLike[str]) -> Tokenizer:
    """Loads a tokenizer; the first use of a hub id downloads its files.

    Args:
        source: a SentencePiece file '*.model', 'byt5', a folder as transformers saves it, or the
            id of a model on the Hugging Face hub. Paths may be remote (gs://...) or
            'package:NAME', data shipped with ptjax.

    Raises:
        InputError: `source` does not hold a tokenizer.
    """
    check_path("the path of the tokenizer", source)
    text = os.fspath(source)
    if text == "byt5":
        return ByteTokenizer()
    if text.endswith(".model"):
        return SentencePieceTokenizer(text)
    folder = resolve_path(text)
    if folder.is_dir():
        tokenizer = find_tokenizer(folder)
        if tokenizer is None:
            raise InputError(
                f"{folder}: no tokenizer in it; it needs {_MODEL_FILES[0]}, tokenizer.json or "
                f"{_CONFIG_FILE}"
            )
        return tokenizer
    if folder.exists():
        raise InputError(f"{folder}: a tokenizer file must be a SentencePiece *.model")
    if text.startswith((".", "/", "~", "package:")) or "://" in text:
        raise missing("tokenizer", folder)
    # With config.json: it states the model's kind if the tokenizer's files do not.
    tokenizer = find_tokenizer(
        hub.download(text, [*hub.TOKENIZER_FILES, "config.json"], ours=["byt5"])
    )
    if tokenizer is None:
        raise InputError(f"{text}: no tokenizer in this hub repository; name another")
    tokenizer.name = text
    return tokenizer


def find_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer | None:
    """Loads the tokenizer in a folder, with its added tokens; None if it has no tokenizer files.

    T5's SentencePiece file is preferred: fast tokenizers made from it differ on rare texts.

    Raises:
        InputError: a file is damaged or missing, or transformers is needed and cannot read it.
    """
    folder = resolve_path(directory)
    config = read_json(folder / _CONFIG_FILE)
    kind = config.get("tokenizer_class")
    if kind == "ByT5Tokenizer":
        added, _ = read_added_tokens(folder, config, None)
        return ByteTokenizer(added, name=os.fspath(folder) if added else "byt5")
    if kind in _T5_CLASSES:
        for file in _MODEL_FILES:
            if (folder / file).exists():
                extra_ids = config.get("extra_ids")
                return SentencePieceTokenizer(
                    folder / file,
                    T5_SENTINELS if extra_ids is None else extra_ids,
                    folder=folder,
                    config=config,
                )
    if not (folder / "tokenizer.json").exists():
        if not config and not any((folder / file).exists() for file in _MODEL_FILES):
            return None
        if kind in _T5_CLASSES and kind is not None:
            raise InputError(
                f"{folder}: {_CONFIG_FILE} names a {kind}, but its vocabulary is missing: neither "
                f"{_MODEL_FILES[0]} nor tokenizer.json; copy the tokenizer again"
            )
    return _load_by_transformers(folder)


def _load_by_transformers(folder: epath.Path) -> Tokenizer:
    if "://" not in os.fspath(folder):
        return TransformersTokenizer(folder)
    with tempfile.TemporaryDirectory() as local:  # transformers reads local files only
        for file in (*hub.TOKENIZER_FILES, "config.json"):
            if (folder / file).exists():
                (epath.Path(local) / file).write_bytes((folder / file).read_bytes())
        return TransformersTokenizer(local, name=os.fspath(folder))
