"""ByT5: text as UTF-8 bytes, without a vocabulary file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from ptjax.data.added_tokens import AddedToken
from ptjax.data.sentinels import mark_sentinels, marked
from ptjax.data.vocabulary import sha256, text_ids
from ptjax.errors import InputError

_SENTINELS = range(256)
"""All 256 values, as ByT5 was pre-trained: more than 100 are never needed."""


class ByteTokenizer:
    """ByT5: the byte b of the UTF-8 text is the id b + 3; 0 to 2 are padding, EOS, unknown.

    Above the bytes lie 125 unused ids (384 rows in every ByT5), then added tokens. Its sentinels
    are the last byte values, which UTF-8 never uses, counted down: <extra_id_k> is 258 - k. (To
    transformers `<extra_id_k>` is 259 + k, an id that ByT5 was never trained with.)

    Args:
        added: tokens of ids from 384 up; the others of transformers are its sentinels.
    """

    prefix: tuple[int, ...] = ()
    pad_id, eos_id, unk_id = 0, 1, 2

    def __init__(self, added: Sequence[AddedToken] = (), *, name: str = "byt5") -> None:
        self.name = name
        self._added = {token.content: token for token in added if token.id >= 3 + 256 + 125}
        self._contents = {token.id: token.content for token in self._added.values()}
        self.vocab_size = max([3 + 256 + 124, *self._contents]) + 1
        # The longest first, as transformers' own search has it.
        contents = sorted(map(re.escape, self._added), key=len, reverse=True)
        self._cut = re.compile("|".join([*contents, f"{marked('[0-9]+')}"]))
        known = [token.flags() | {"id": token.id} for token in self._added.values()]
        tail = json.dumps(known, sort_keys=True) if known else ""
        self.fingerprint = sha256(f"byt5{tail}".encode())
        self.former_fingerprints = ()

    def encode(self, text: str) -> list[int]:
        parts: list[str | int] = []
        start = 0
        plain = mark_sentinels(text, _SENTINELS)
        for match in self._cut.finditer(plain):
            parts += [plain[start : match.start()], self._id_of(match[0])]
            start = match.end()
        parts.append(plain[start:])
        if self._added:
            self._apply_flags(parts)
        return [
            i for p in parts for i in ((p,) if isinstance(p, int) else (b + 3 for b in p.encode()))
        ]

    def _id_of(self, content: str) -> int:
        if content in self._added:
            return self._added[content].id
        return self.sentinel_id(int(content[1:-1]))

    def _apply_flags(self, parts: list[str | int]) -> None:
        """Lets tokens take their spaces along, or be part of a word; texts stand at 0, 2, 4."""
        for i in range(1, len(parts), 2):
            token = self._added.get(self._contents.get(parts[i], ""))  # type: ignore[arg-type]
            left, right = parts[i - 1], parts[i + 1]
            assert isinstance(left, str) and isinstance(right, str)
            if token is None:
                continue
            if token.rstrip:
                parts[i + 1] = right = right.lstrip()
            if token.lstrip:
                parts[i - 1] = left = left.rstrip()
            alone = left[-1:] in ("", " ") and right[:1] in ("", " ")
            if token.single_word and not alone:
                parts[i] = ""
                parts[i - 1] = left + token.content

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
        known = {0: "<pad>", 1: "</s>", 2: "<unk>", **self._contents}
        return known.get(index, f"<{index}>")

    def sentinel_id(self, k: int) -> int:
        if k not in _SENTINELS:
            raise InputError(f"byt5: it has no sentinel <extra_id_{k}>")
        return 258 - k

    def save(self, directory: str | os.PathLike[str]) -> None:
        folder = epath.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}
        if self._added:
            # The sentinels of transformers too, which would else take these ids themselves.
            unused = [AddedToken(f"<extra_id_{k}>", 259 + k, special=True) for k in range(125)]
            tokens = [*unused, *self._added.values()]
            config["extra_ids"] = 0
            config["added_tokens_decoder"] = {str(token.id): token.flags() for token in tokens}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
