"""Text to token ids and back: SentencePiece (the reference), ByT5's bytes, anything else.

T5's conventions hold for all of them: id 0 is padding, the end of a text is `eos_id` (1 for every
T5), and `encode` adds neither.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import sentencepiece
from etils import epath
from sentencepiece import sentencepiece_model_pb2

from ptjax import atomic
from ptjax.data.sources import resolve_path
from ptjax.errors import InputError

T5_SENTINELS = 100
_PB2: Any = sentencepiece_model_pb2  # its classes are made at run time
_SENTINEL = re.compile(r"\s*<extra_id_(\d+)>")
_MODEL_FILES = ("spiece.model", "sentencepiece.model")
_CONFIG_FILE = "tokenizer_config.json"
_HUB_FILES = (*_MODEL_FILES, _CONFIG_FILE, "tokenizer.json", "special_tokens_map.json",
              "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt")  # fmt: skip


class Tokenizer(Protocol):
    """What the rest of ptjax asks of a tokenizer."""

    name: str
    vocab_size: int
    """The highest id + 1, sentinels included."""
    pad_id: int
    eos_id: int
    unk_id: int
    fingerprint: str
    """'sha256:<hex>' of what determines the ids."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end of sequence."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, faster."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the first end of sequence; padding is dropped."""
        ...

    def id_to_piece(self, index: int) -> str:
        """How one id is shown to people."""
        ...

    def sentinel_id(self, k: int) -> int:
        """The id of T5's sentinel <extra_id_k>."""
        ...

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes files from which `load_tokenizer(directory)` makes an equal one."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model with T5's sentinels behind its own pieces.

    <extra_id_k> has the id size + extra_ids - 1 - k, as in seqio. The sentinels become pieces of
    the model itself, so SentencePiece encodes and decodes them natively.

    Args:
        model: a serialised model, or the path of one.
        extra_ids: sentinels to add. A model that has its own (mT5's) keeps those and gets none.
        name: for messages; by default the path.

    Raises:
        InputError: no such file, not a SentencePiece model, or one without padding at 0 and EOS.
    """

    def __init__(
        self,
        model: bytes | str | os.PathLike[str],
        extra_ids: int = T5_SENTINELS,
        *,
        name: str | None = None,
    ) -> None:
        if isinstance(model, bytes):
            self.name, self._model = name or "a SentencePiece model", model
        else:
            path = resolve_path(model)
            if not path.exists():
                raise InputError(f"{path}: no such tokenizer file; correct the path")
            self.name, self._model = name or os.fspath(path), path.read_bytes()
        if type(extra_ids) is not int or extra_ids < 0:
            raise InputError(
                f"{self.name}: extra_ids is {extra_ids!r}; it has to be a number from 0 up"
            )
        proto = self._parse()
        own = [p for p in proto.pieces if re.fullmatch(r"▁?<extra_id_\d+>", p.piece)]
        self.extra_ids = 0 if own else extra_ids
        for k in reversed(range(self.extra_ids)):
            proto.pieces.add(
                # With the space, as seqio has it: the space before a sentinel belongs to it.
                piece=f"▁<extra_id_{k}>",
                score=0.0,
                type=_PB2.ModelProto.SentencePiece.USER_DEFINED,
            )
        self._processor = sentencepiece.SentencePieceProcessor(
            model_proto=proto.SerializeToString()
        )
        self.vocab_size = self._processor.get_piece_size()
        self.pad_id = self._processor.pad_id()
        self.eos_id = self._processor.eos_id()
        self.unk_id = self._processor.unk_id()
        _check_special_ids(self)
        settings = b"\nextra_ids=%d" % self.extra_ids
        self.fingerprint = _sha256(self._model + settings)

    def _parse(self) -> Any:
        try:
            proto = _PB2.ModelProto.FromString(self._model)
            # SentencePiece itself checks what protobuf does not (an empty file parses).
            sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(self._model)
        except Exception as error:  # protobuf and SentencePiece raise classes of their own
            raise InputError(
                f"{self.name}: not a SentencePiece model; name a .model file or a tokenizer folder"
            ) from error
        return proto

    def _spaced(self, text: str) -> str:
        """Every sentinel with one space before it, without which it would be spelt out."""
        if "<extra_id_" not in text:
            return text
        return _SENTINEL.sub(r" <extra_id_\1>", text)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(self._spaced(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode([self._spaced(text) for text in texts])

    def decode(self, ids: Iterable[int]) -> str:
        size = self.vocab_size
        # A model may have more embedding rows than pieces (T5: 32,128) and may emit those ids.
        known = [i if i < size else self.unk_id for i in _text_ids(self, ids)]
        return self._processor.decode(known)

    def id_to_piece(self, index: int) -> str:
        if not 0 <= index < self.vocab_size:
            return f"<{index}>"
        return self._processor.id_to_piece(int(index))

    def sentinel_id(self, k: int) -> int:
        for piece in (f"▁<extra_id_{k}>", f"<extra_id_{k}>"):
            index = self._processor.piece_to_id(piece)
            if index != self.unk_id:
                return index
        raise InputError(f"{self.name}: it has no sentinel <extra_id_{k}>")

    def save(self, directory: str | os.PathLike[str]) -> None:
        folder = epath.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(folder / "spiece.model", self._model)
        config = {
            "tokenizer_class": "T5Tokenizer",
            "extra_ids": self.extra_ids,
            "pad_token": self._processor.id_to_piece(self.pad_id),
            "eos_token": self._processor.id_to_piece(self.eos_id),
            "unk_token": self._processor.id_to_piece(self.unk_id),
        }
        atomic.write_bytes(folder / _CONFIG_FILE, f"{json.dumps(config, indent=1)}\n".encode())


class ByteTokenizer:
    """ByT5: the byte b of the UTF-8 text is the id b + 3; 0 to 2 are padding, EOS, unknown.

    Above the bytes lie 125 unused ids (384 rows in every ByT5). Its sentinels are the last byte
    values, which UTF-8 never uses, counted down: <extra_id_k> is 258 - k.
    """

    name = "byt5"
    vocab_size = 3 + 256 + 125
    pad_id, eos_id, unk_id = 0, 1, 2

    def __init__(self) -> None:
        self.fingerprint = _sha256(b"byt5")

    def encode(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        kept = bytes(i - 3 for i in _text_ids(self, ids) if 3 <= i < 259)
        return kept.decode(errors="ignore")

    def id_to_piece(self, index: int) -> str:
        if 3 <= index < 259:
            byte = index - 3
            return chr(byte) if 32 < byte < 127 else f"<0x{byte:02X}>"
        return {0: "<pad>", 1: "</s>", 2: "<unk>"}.get(index, f"<{index}>")

    def sentinel_id(self, k: int) -> int:
        # All 256 values, as ByT5 was pre-trained: more than 100 are never needed.
        if not 0 <= k < 256:
            raise InputError(f"byt5: it has no sentinel <extra_id_{k}>")
        return 258 - k

    def save(self, directory: str | os.PathLike[str]) -> None:
        folder = epath.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}
        atomic.write_bytes(folder / _CONFIG_FILE, f"{json.dumps(config, indent=1)}\n".encode())


class TransformersTokenizer:
    """Whatever `transformers.AutoTokenizer` loads from a folder.

    The fingerprint is taken over the fast tokenizer's JSON (keys sorted, without the truncation
    and padding that a caller may have set), for slow ones over class and vocabulary.

    Raises:
        InputError: transformers cannot load it, or it has no EOS or its padding is not id 0.
    """

    def __init__(self, directory: str | os.PathLike[str], *, name: str | None = None) -> None:
        import transformers  # takes seconds, and the reference tokenizers do without it

        self.name = name or os.fspath(directory)
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                os.fspath(directory), local_files_only=True
            )
        except Exception as error:  # transformers raises nearly anything for broken files
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"{self.name}: transformers cannot load this tokenizer ({reason}); check its files"
            ) from error
        vocabulary = self._tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.pad_id = _id_or(self._tokenizer.pad_token_id)
        self.eos_id = _id_or(self._tokenizer.eos_token_id)
        self.unk_id = _id_or(self._tokenizer.unk_token_id)
        _check_special_ids(self)
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            content: Any = [type(self._tokenizer).__name__, sorted(vocabulary.items())]
        else:
            content = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
        self.fingerprint = _sha256(json.dumps(content, sort_keys=True).encode())

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: lengths are the caller's business, not the tokenizer's to warn about.
        return self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, ids: Iterable[int]) -> str:
        known = [i for i in _text_ids(self, ids) if i < self.vocab_size]
        return self._tokenizer.decode(known, clean_up_tokenization_spaces=False)

    def id_to_piece(self, index: int) -> str:
        piece = self._tokenizer.convert_ids_to_tokens(int(index))
        return f"<{index}>" if piece is None else piece

    def sentinel_id(self, k: int) -> int:
        index = self._tokenizer.get_vocab().get(f"<extra_id_{k}>")
        if index is None:
            raise InputError(f"{self.name}: it has no sentinel <extra_id_{k}>")
        return index

    def save(self, directory: str | os.PathLike[str]) -> None:
        folder = epath.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as local:
            for file in self._tokenizer.save_pretrained(local):
                source = epath.Path(file)
                if source.exists():
                    atomic.write_bytes(folder / source.name, source.read_bytes())


def load_tokenizer(source: str | os.PathLike[str]) -> Tokenizer:
    """Finds out what `source` is and loads it.

    Args:
        source: a SentencePiece file '*.model', 'byt5', a folder (see `find_tokenizer`), or the
            id of a model on the Hugging Face hub. Paths may be remote or 'package:NAME'.

    Raises:
        InputError: there is no tokenizer there.
    """
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
        raise InputError(f"{folder}: a tokenizer file has to be a SentencePiece *.model")
    if text.startswith((".", "/", "~", "package:")) or "://" in text:
        raise InputError(f"{folder}: no such file or folder; correct the tokenizer's path")
    return _load_from_hub(text)


def find_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer whose files lie in a folder; None without any.

    SentencePiece's file goes first: the fast tokenizers made from it differ on rare texts.
    """
    folder = resolve_path(directory)
    config: dict[str, Any] = {}
    if (folder / _CONFIG_FILE).exists():
        try:
            config = json.loads((folder / _CONFIG_FILE).read_text())
        except ValueError as error:
            raise InputError(f"{folder / _CONFIG_FILE}: not valid JSON ({error})") from error
        if not isinstance(config, dict):
            raise InputError(f"{folder / _CONFIG_FILE}: no JSON object; copy the tokenizer again")
    for file in _MODEL_FILES:
        if (folder / file).exists():
            extra_ids = config.get("extra_ids")
            return SentencePieceTokenizer(
                folder / file, T5_SENTINELS if extra_ids is None else extra_ids
            )
    if config.get("tokenizer_class") == "ByT5Tokenizer":
        return ByteTokenizer()
    if not config and not (folder / "tokenizer.json").exists():
        return None
    if "://" not in os.fspath(folder):
        return TransformersTokenizer(folder)
    with tempfile.TemporaryDirectory() as local:  # transformers reads local files only
        for file in _HUB_FILES:
            if (folder / file).exists():
                (epath.Path(local) / file).write_bytes((folder / file).read_bytes())
        return TransformersTokenizer(local, name=os.fspath(folder))


def _load_from_hub(repository: str) -> Tokenizer:
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(repository, allow_patterns=list(_HUB_FILES))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise InputError(
            f"{repository}: neither a file or folder here nor to be had from the Hugging Face "
            f"hub ({type(error).__name__}); correct the tokenizer's name"
        ) from error
    tokenizer = find_tokenizer(folder)
    if tokenizer is None:
        raise InputError(f"{repository}: no tokenizer in this hub repository; name another")
    tokenizer.name = repository
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, embedding_rows: int) -> None:
    """Refuses a tokenizer that has more ids than the model has embeddings.

    Raises:
        InputError: `tokenizer.vocab_size` exceeds `embedding_rows`.
    """
    if tokenizer.vocab_size > embedding_rows:
        raise InputError(
            f"{tokenizer.name}: its {tokenizer.vocab_size} ids do not fit the model's "
            f"{embedding_rows} embedding rows; use the tokenizer that the model was trained with"
        )


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    path: str | os.PathLike[str],
    *,
    character_coverage: float = 0.9999,
) -> None:
    """Learns a unigram model of `vocab_size` pieces with T5's special ids and writes it.

    Raises:
        InputError: the texts do not hold that many pieces.
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
            bos_id=-1,
            num_threads=1,  # more threads change the result
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-200:]
        raise InputError(f"vocab_size={vocab_size}: SentencePiece refuses: {reason}") from error
    epath.Path(path).write_bytes(model.getvalue())


def _sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _id_or(index: int | None) -> int:
    return -1 if index is None else index


def _check_special_ids(tokenizer: Tokenizer) -> None:
    if tokenizer.pad_id != 0 or tokenizer.eos_id < 0:
        raise InputError(
            f"{tokenizer.name}: its padding id is {tokenizer.pad_id} and its end-of-sequence id "
            f"{tokenizer.eos_id} (-1: none); a T5 needs padding at 0 and an end of sequence"
        )


def _text_ids(tokenizer: Tokenizer, ids: Iterable[int]) -> list[int]:
    """The ids before the first end of sequence, without padding, as Python integers."""
    kept: list[int] = []
    for index in ids:
        index = int(index)
        if index == tokenizer.eos_id:
            break
        if index != tokenizer.pad_id:
            kept.append(index)
    return kept
