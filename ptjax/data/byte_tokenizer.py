"""ByT5: text as UTF-8 bytes, without a vocabulary file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

from ptjax import files
from ptjax.data.added_tokens import AddedToken
from ptjax.data.sentinels import MARK, mark_sentinels, marked
from ptjax.data.vocabulary import clear_folder, sha256, text_ids
from ptjax.errors import InputError

_ROWS = 3 + 256 + 125
_SENTINELS = range(256)
"""All 256 values, as ByT5 was pre-trained: more than 100 are never needed."""


class ByteTokenizer:
    """ByT5: the byte b of the UTF-8 text is the id b + 3; 0 to 2 are padding, EOS, unknown.

    After the bytes there are 125 unused ids (384 rows in every ByT5), then added tokens. The
    sentinels are the last byte values, which UTF-8 never uses, in descending order: <extra_id_k>
    is 258 - k. (In transformers it is 259 + k, an id that ByT5 was never trained with.)

    Args:
        added: tokens with ids >= 384, or with the id of a byte; others are ignored.
        name: for messages.
    """

    prefix: tuple[int, ...] = ()
    pad_id, eos_id, unk_id = 0, 1, 2

    def __init__(self, added: Sequence[AddedToken] = (), *, name: str = "byt5") -> None:
        self.name = name
        # transformers' sentinels, with ids in between, are ignored.
        kept = [token for token in added if 3 <= token.id < 259 or token.id >= _ROWS]
        self._added = {token.content: token for token in kept}
        self._contents = {token.id: token.content for token in kept}
        self.vocab_size = max(_ROWS, *(token.id + 1 for token in kept)) if kept else _ROWS
        # Longest first, like transformers.
        contents = sorted(map(re.escape, self._added), key=len, reverse=True)
        self._cut = re.compile("(" + "|".join([*contents, marked("[0-9]+")]) + ")")
        described = [token.flags() | {"id": token.id} for token in kept]
        tail = json.dumps(described, sort_keys=True) if described else ""
        self.fingerprint = sha256(f"byt5{tail}".encode())
        self.former_fingerprints = ()

    def encode(self, text: str) -> list[int]:
        parts = [part for part in self._cut.split(mark_sentinels(text, _SENTINELS)) if part]
        for i, part in enumerate(parts):
            if part in self._added:
                self._apply_flags(parts, i)
        return [index for part in parts for index in self._ids(part)]

    def _apply_flags(self, parts: list[str], i: int) -> None:
        """Applies an added token's `lstrip`, `rstrip` and `single_word` like transformers."""
        token = self._added[parts[i]]
        left, right = parts[i - 1] if i else "", "".join(parts[i + 1 : i + 2])
        if token.rstrip and right:
            parts[i + 1] = right.lstrip()
        if token.lstrip and left:
            parts[i - 1] = left.rstrip()
        if token.single_word and left and left[-1] != " ":
            parts[i - 1], parts[i] = parts[i - 1] + token.content, ""
        elif token.single_word and right and right[0] != " ":
            parts[i], parts[i + 1] = "", token.content + parts[i + 1]

    def _ids(self, part: str) -> list[int]:
        if part in self._added:
            return [self._added[part].id]
        if part.startswith(MARK):
            return [self.sentinel_id(int(part[1:-1]))]
        return [byte + 3 for byte in part.encode()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        kept = b"".join(
            bytes([i - 3]) if i < 259 else self._contents.get(i, "").encode()
            for i in text_ids(self, ids)
            if i >= 3
        )
        return kept.decode(errors="ignore")

    def id_to_piece(self, index: int) -> str:
        if 3 <= index < 259:
            byte = index - 3
            return chr(byte) if 32 < byte < 127 else f"<0x{byte:02X}>"
        names = {**self._contents, 0: "<pad>", 1: "</s>", 2: "<unk>"}
        return names.get(index, f"<{index}>")

    def sentinel_id(self, k: int) -> int:
        if k not in _SENTINELS:
            raise InputError(f"byt5: it has no sentinel <extra_id_{k}>")
        return 258 - k

    def save(self, directory: str | os.PathLike[str]) -> None:
        folder = clear_folder(directory)
        config: dict[str, Any] = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}
        if self._added:
            # With transformers' sentinels, or it would assign these ids to its own.
            unused = [AddedToken(f"<extra_id_{k}>", 259 + k, special=True) for k in range(125)]
            tokens = [*unused, *self._added.values()]
            config["extra_ids"] = 0
            config["added_tokens_decoder"] = {str(token.id): token.flags() for token in tokens}
        text = f"{json.dumps(config, indent=1)}\n"
        files.write_bytes(folder / "tokenizer_config.json", text.encode())
