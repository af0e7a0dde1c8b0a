"""The SentencePiece tokenizer, the reference for all others, and its training."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import sentencepiece
import tokenizers
from absl import logging
from etils import epath
from sentencepiece import sentencepiece_model_pb2

from ptjax import files
from ptjax.data.added_tokens import CONTROL_NAMES, START, AddedToken, Splitter, read_added_tokens
from ptjax.data.sentinels import MARK, SENTINEL, encode_parts, mark_sentinels, marked
from ptjax.data.sources import resolve_path
from ptjax.data.vocabulary import (
    NO_ID,
    check_special_ids,
    clear_folder,
    sha256,
    text_ids,
    unigram_fingerprint,
)
from ptjax.errors import InputError, missing

T5_SENTINELS = 100
_MOST_SENTINELS = 10_000
_Proto = Any
"""A `ModelProto`; protobuf makes its classes at run time."""
_PB2: Any = sentencepiece_model_pb2  # its classes are made at run time
_PIECE: Any = _PB2.ModelProto.SentencePiece
_SYMBOLS = (_PIECE.USER_DEFINED, _PIECE.CONTROL)
_OWN_SENTINEL = re.compile(f"▁?{SENTINEL.pattern}")


class SentencePieceTokenizer:
    """A SentencePiece model whose own pieces are followed by T5's sentinels and added tokens.

    <extra_id_k> has the id size + extra_ids - 1 - k, as in seqio. Texts are split at sentinels and
    added tokens, and SentencePiece encodes each part like a separate text, as in transformers 5
    (seqio adds no leading space after a sentinel).

    Args:
        model: a serialised model, or the path of one.
        extra_ids: number of sentinels to add. A model with its own sentinels (mT5's) gets none.
        name: for messages; by default the path.
        folder: the folder with the files of added tokens; None means no added tokens.
        config: the content of the folder's `tokenizer_config.json`.

    Raises:
        InputError: the file does not exist, is not a SentencePiece model or has no end of
            sequence; or transformers assigns other ids to added tokens than the files state.
    """

    prefix: tuple[int, ...] = ()

    def __init__(
        self,
        model: bytes | str | os.PathLike[str],
        extra_ids: int = T5_SENTINELS,
        *,
        name: str | None = None,
        folder: epath.Path | None = None,
        config: files.JsonObject | None = None,
    ) -> None:
        if isinstance(model, bytes):
            self.name, self._model = name or "a SentencePiece model", model
        else:
            path = resolve_path(model)
            if not path.exists():
                raise missing("tokenizer", path)
            self.name, self._model = name or os.fspath(path), path.read_bytes()
        if type(extra_ids) is not int or not 0 <= extra_ids <= _MOST_SENTINELS:
            raise InputError(
                f"{self.name}: extra_ids must be an integer from 0 to {_MOST_SENTINELS}, got "
                f"{extra_ids!r}"
            )
        proto = self._parse()
        self._own_sentinels = any(_OWN_SENTINEL.fullmatch(p.piece) for p in proto.pieces)
        self.extra_ids = 0 if self._own_sentinels else extra_ids
        self._pieces = _pieces(proto, self.extra_ids)
        self._config = dict(config or {})
        self._added, named = [], {}
        if folder is not None:
            vocabulary = {piece: i for i, (piece, _) in enumerate(self._pieces)}
            self._added, named = read_added_tokens(folder, self._config, vocabulary)
        control = set(named.values()) | _spelt_out(proto)
        cut = self._cut_tokens(proto, control)
        self._names, self._sentinels = _compile(proto, self._pieces, self._added, cut, control)
        self._splitter = Splitter(cut, proto.normalizer_spec.precompiled_charsmap, self.name)
        # If there are only sentinels, most texts need no splitting.
        self._always_splits = any(token.sentinel is None for token in cut)
        self._processor = sentencepiece.SentencePieceProcessor(
            model_proto=proto.SerializeToString()
        )
        self.vocab_size = self._processor.get_piece_size()
        # MADLAD-400's model has no padding id; its config uses `<s>`.
        ids = {token.content: token.id for token in self._added}
        self.pad_id = ids.get(named.get("pad_token", ""), self._processor.pad_id())
        self.eos_id = ids.get(named.get("eos_token", ""), self._processor.eos_id())
        self.unk_id = self._processor.unk_id()
        check_special_ids(self)
        self._unlike_t5 = _unlike_t5(proto)
        if self._unlike_t5 and folder is not None:
            logging.warning(
                "%s: transformers 5 ignores settings of this model (%s); ptjax uses the "
                "ids of SentencePiece, like seqio and the slow tokenizer of transformers 4",
                self.name,
                ", ".join(self._unlike_t5),
            )
        self._set_fingerprints(proto, cut)

    def _parse(self) -> _Proto:
        try:
            proto = _PB2.ModelProto.FromString(self._model)
            # SentencePiece checks what protobuf does not (an empty file parses).
            sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(self._model)
        except Exception as error:  # protobuf and SentencePiece raise classes of their own
            raise InputError(
                f"{self.name}: not a SentencePiece model; name a .model file or a tokenizer folder"
            ) from error
        for number, piece in enumerate(proto.pieces):
            if not isinstance(piece.piece, str):  # protobuf returns invalid UTF-8 as bytes
                raise InputError(
                    f"{self.name}: damaged, piece {number} is not UTF-8 text; copy the file again"
                )
        return proto

    def _cut_tokens(self, proto: _Proto, control: set[str]) -> list[AddedToken]:
        """The tokens at which texts are split: sentinels, added tokens, the model's own symbols."""
        cut = {token.content: token for token in self._added if token.content not in control}
        for i, (content, _) in enumerate(self._pieces[len(proto.pieces) :], len(proto.pieces)):
            cut.setdefault(content, AddedToken(content, i, special=True))
        for i, piece in enumerate(proto.pieces):
            # Control symbols too: transformers 5 recognises them in texts, SentencePiece does not.
            is_symbol = piece.type in _SYMBOLS or SENTINEL.fullmatch(piece.piece)
            if is_symbol and piece.piece not in control and not piece.piece.startswith("▁"):
                special = piece.type == _PIECE.CONTROL
                cut.setdefault(piece.piece, AddedToken(piece.piece, i, special=special))
        return list(cut.values())

    def _set_fingerprints(self, proto: _Proto, cut: Sequence[AddedToken]) -> None:
        added = {token.content for token in self._added}
        tokens = [t for t in sorted(cut, key=lambda token: token.id) if t.sentinel is None]
        older = [token for token in tokens if not token.special or token.content in added]
        self.fingerprint = self._fingerprint_with(tokens, proto)
        # Earlier versions encoded the model's own control symbols as text; few texts contain them.
        former = [] if older == tokens else [self._fingerprint_with(older, proto)]
        # The first versions also encoded added tokens as text and used the model's own end of
        # sequence: their prompts are only valid if neither makes a difference.
        if not older and self.eos_id == self._processor.eos_id():
            former.append(self._first_fingerprint())
        self.former_fingerprints = tuple(former)

    def _first_fingerprint(self) -> str:
        """The fingerprint of a model without added tokens, from its file alone."""
        return sha256(self._model + b"\nextra_ids=%d" % self.extra_ids)

    def _fingerprint_with(self, tokens: Sequence[AddedToken], proto: _Proto) -> str:
        """The fingerprint if texts are split at `tokens`, which are in the order of their ids."""
        added = [[t.id, t.content, t.lstrip, t.rstrip, t.single_word, t.normalized] for t in tokens]
        if self._unlike_t5:
            first = self._first_fingerprint()
            return sha256(f"{first}{json.dumps(added)}".encode()) if added else first
        charsmap = proto.normalizer_spec.precompiled_charsmap
        ids = self.pad_id, self.eos_id, self.unk_id
        return unigram_fingerprint(self._pieces, charsmap, ids, added)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        marks = [mark_sentinels(text, self._sentinels) for text in texts]
        encode = self._encode_marked
        return encode_parts(marks, encode) if self._own_sentinels else encode(marks)

    def _encode_marked(self, marks: list[str]) -> list[list[int]]:
        parts: list[list[str | int]] = [[text] for text in marks]
        split = [i for i, text in enumerate(marks) if self._always_splits or MARK in text]
        if split:
            for i, part in zip(split, self._splitter.split([marks[i] for i in split]), strict=True):
                parts[i] = part
        rows = iter(
            self._processor.encode([p for part in parts for p in part if isinstance(p, str)])
        )
        return [
            [i for p in part for i in (next(rows) if isinstance(p, str) else (p,))]
            for part in parts
        ]

    def decode(self, ids: Iterable[int]) -> str:
        size = self.vocab_size
        # A model may have more embedding rows than pieces (T5: 32,128) and may emit their ids.
        valid = [i if i < size else self.unk_id for i in text_ids(self, ids)]
        text = self._processor.decode(valid)
        return re.sub(f"{MARK}([0-9]+){MARK}", r"<extra_id_\1>", text) if MARK in text else text

    def id_to_piece(self, index: int) -> str:
        if not 0 <= index < self.vocab_size:
            return f"<{index}>"
        return self._names[index]

    def sentinel_id(self, k: int) -> int:
        if k not in self._sentinels:
            raise InputError(f"{self.name}: it has no sentinel <extra_id_{k}>")
        return self._sentinels[k]

    def save(self, directory: str | os.PathLike[str]) -> None:
        folder = clear_folder(directory)
        files.write_bytes(folder / "spiece.model", self._model)
        config: dict[str, Any] = {
            "tokenizer_class": "T5Tokenizer",
            "extra_ids": self.extra_ids,
        }
        special = {"pad": self.pad_id, "eos": self.eos_id, "unk": self.unk_id}
        config |= {
            f"{name}_token": self._processor.id_to_piece(index)
            for name, index in special.items()
            if index != NO_ID
        }
        if self._added:
            names = {name: self._config[name] for name in CONTROL_NAMES if self._config.get(name)}
            decoder = {str(token.id): token.flags() for token in self._added}
            config |= names | {"added_tokens_decoder": decoder}
        text = f"{json.dumps(config, indent=1)}\n"
        files.write_bytes(folder / "tokenizer_config.json", text.encode())


def _spelt_out(proto: _Proto) -> set[str]:
    """Pieces that are ordinary text in a text: padding, EOS, unknown, and `<s>` if present."""
    spec = proto.trainer_spec
    controls = {piece.piece for piece in proto.pieces if piece.type == _PIECE.CONTROL}
    return {spec.pad_piece, spec.eos_piece, spec.unk_piece} | ({START} & controls)


def _unlike_t5(proto: _Proto) -> list[str]:
    """Settings that differ from T5's, which a tokenizer.json made from the model would ignore."""
    spec, trainer = proto.normalizer_spec, proto.trainer_spec
    charsmap: bytes = spec.precompiled_charsmap
    precompiled: Any = tokenizers.normalizers.Precompiled
    normalised = precompiled(charsmap).normalize_str("a\tb\nc") if charsmap else ""
    reasons = {
        "not a unigram model": trainer.model_type != trainer.UNIGRAM,
        "byte_fallback": trainer.byte_fallback,
        "treat_whitespace_as_suffix": trainer.treat_whitespace_as_suffix,
        "add_dummy_prefix is off": not spec.add_dummy_prefix,
        "remove_extra_whitespaces is off": not spec.remove_extra_whitespaces,
        "tabs and line breaks are not spaces": normalised != "a b c",
    }
    return [reason for reason, holds in reasons.items() if holds]


def _pieces(proto: _Proto, extra_ids: int) -> list[tuple[str, float]]:
    """(piece, score) of the model's pieces and the sentinels after them, in transformers' order."""
    sentinels = [(f"<extra_id_{k}>", 0.0) for k in reversed(range(extra_ids))]
    return [(piece.piece, piece.score) for piece in proto.pieces] + sentinels


def _compile(
    proto: _Proto,
    pieces: Sequence[tuple[str, float]],
    added: Sequence[AddedToken],
    cut: Sequence[AddedToken],
    control: set[str],
) -> tuple[list[str], dict[int, int]]:
    """Changes `proto` so that it encodes the parts between the tokens of `cut`, and decodes all.

    Returns:
        The name of every id, and k -> id of the sentinels.
    """
    names = [piece.piece for piece in proto.pieces]
    sentinels: dict[int, int] = {}
    texts = {token.content for token in cut}
    for i, piece in enumerate(proto.pieces):
        if sentinel := _OWN_SENTINEL.fullmatch(piece.piece):
            sentinels[int(sentinel[1])] = i
            if piece.piece.startswith("▁"):  # mT5's, which SentencePiece itself recognises
                piece.piece = f"▁{marked(sentinel[1])}"
                piece.type = _PIECE.USER_DEFINED
                continue
        symbol = (sentinel or piece.type in _SYMBOLS) and piece.piece in texts
        if symbol or piece.piece in control:
            # Decodes but never encodes them; control pieces already behave like this.
            encodable = symbol or piece.type in (_PIECE.NORMAL, _PIECE.USER_DEFINED)
            piece.type = _PIECE.UNUSED if encodable else piece.type
    for content, _ in pieces[len(names) :]:
        # With the space, as in seqio: the space before a sentinel belongs to it.
        sentinels[int(SENTINEL.fullmatch(content)[1])] = len(names)  # type: ignore[index]
        names.append(f"▁{content}")
        proto.pieces.add(piece=f"▁{content}", score=0.0, type=_PIECE.UNUSED)
    for token in sorted(added, key=lambda token: token.id):
        if token.id >= len(names):
            if token.sentinel is not None:
                sentinels[token.sentinel] = token.id
            names.append(token.content)
            proto.pieces.add(piece=token.content, score=0.0, type=_PIECE.UNUSED)
    return names, sentinels


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    path: str | os.PathLike[str],
    *,
    character_coverage: float = 0.9999,
) -> None:
    """Trains a unigram model of `vocab_size` pieces with T5's special ids; writes it to `path`.

    Raises:
        InputError: the texts contain too few pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            character_coverage=character_coverage,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=NO_ID,
            num_threads=1,  # more threads change the result
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-200:]
        raise InputError(f"vocab_size={vocab_size}: SentencePiece refuses: {reason}") from error
    epath.Path(path).write_bytes(model.getvalue())
