"""The interface of tokenizers, and functions that all of them share.

A text ends with `eos_id`; `encode` adds neither it nor padding.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Sequence
from typing import Protocol

from etils import epath

from ptjax.errors import InputError, check_path
from ptjax.hub import TOKENIZER_FILES

NO_ID = -1
"""The id of a special token that a vocabulary lacks; SentencePiece's convention."""


class Tokenizer(Protocol):
    """The interface of tokenizers.

    All follow one rule: the name of a control token (`</s>`, `<pad>`, `<unk>`, `<s>`, ...) in a
    text is encoded as ordinary text, `<extra_id_N>` is the sentinel unless `data.sentinels` says
    otherwise, and an added token has its own id.
    """

    name: str
    vocab_size: int
    """The highest id + 1, sentinels included."""
    pad_id: int
    eos_id: int
    unk_id: int
    prefix: tuple[int, ...]
    """Ids prepended to every input and target (`<s>` of CodeT5); usually empty."""
    fingerprint: str
    """'sha256:<hex>' of everything that determines the ids, independent of the file format."""
    former_fingerprints: tuple[str, ...]
    """Fingerprints that earlier versions recorded for the same tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without `prefix` and without an end of sequence."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes each text like `encode`, but faster."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids before the first EOS, without padding and `prefix`."""
        ...

    def id_to_piece(self, index: int) -> str:
        """Returns the piece of text that an id represents, readable; `<id>` if it has none."""
        ...

    def sentinel_id(self, k: int) -> int:
        """Returns the id of T5's sentinel <extra_id_k>.

        Raises:
            InputError: the vocabulary does not have this sentinel.
        """
        ...

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes files from which `load_tokenizer(directory)` loads an equal tokenizer.

        Creates the folder if necessary, and first deletes other tokenizers' files in it.
        """
        ...


def check_vocabulary(tokenizer: Tokenizer, embedding_rows: int) -> None:
    """Raises InputError for a tokenizer that the model cannot have been trained with.

    A vocabulary may be smaller than the embedding, whose rows are padded to a round number (T5:
    32,100 ids, 32,128 rows). One that leaves more than half of them unused is another model's, or
    incomplete because files are missing.

    Raises:
        InputError: there are more ids than `embedding_rows`, or fewer than half as many.
    """
    ids = tokenizer.vocab_size
    if embedding_rows / 2 <= ids <= embedding_rows:
        return
    problem = "do not fit" if ids > embedding_rows else "are far too few for"
    raise InputError(
        f"{tokenizer.name}: its {ids} ids {problem} the model's {embedding_rows} embedding rows; "
        "use the tokenizer that the model was trained with"
    )


def check_special_ids(tokenizer: Tokenizer) -> None:
    """Raises InputError for a tokenizer that has no end of sequence."""
    if tokenizer.eos_id == NO_ID:
        raise InputError(
            f"{tokenizer.name}: it has no end of sequence, which T5 appends to every text; choose "
            "a tokenizer with an EOS token"
        )


def text_ids(tokenizer: Tokenizer, ids: Iterable[int]) -> list[int]:
    """Returns the ids before the first EOS, without padding and prefix, as Python integers."""
    kept: list[int] = []
    for index in ids:
        index = int(index)
        if index == tokenizer.eos_id:
            break
        if index != tokenizer.pad_id and index not in tokenizer.prefix:
            kept.append(index)
    return kept


def clear_folder(directory: str | os.PathLike[str]) -> epath.Path:
    """Creates the folder if necessary, and deletes the tokenizer files that it contains."""
    check_path("the folder of the tokenizer", directory)
    folder = epath.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    for file in TOKENIZER_FILES:
        (folder / file).unlink(missing_ok=True)
    return folder


def sha256(content: bytes) -> str:
    """Returns the SHA-256 hash of `content` as 'sha256:<hex>'."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def unigram_fingerprint(
    pieces: Sequence[tuple[str, float]],
    charsmap: bytes,
    special_ids: Sequence[int],
    added: Sequence[object],
) -> str:
    """Computes the fingerprint of a SentencePiece unigram model with T5's treatment of spaces.

    It is the same for spiece.model and for a tokenizer.json made from it.

    Args:
        pieces: every piece with its score, including T5's sentinels as `<extra_id_k>`.
        charsmap: SentencePiece's normalisation, `precompiled_charsmap`.
        special_ids: padding, end of sequence, unknown.
        added: tokens that are not pieces, in the order of their ids, as JSON values.
    """
    # Both files store scores with float32's precision.
    scored = [[piece, struct.pack("<f", score).hex()] for piece, score in pieces]
    normalisation = base64.b64encode(charsmap).decode()
    return sha256(json.dumps([scored, normalisation, list(special_ids), added]).encode())
