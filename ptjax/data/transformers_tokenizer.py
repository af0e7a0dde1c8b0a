"""Tokenizers other than SentencePiece and ByT5, loaded by `transformers`."""

from __future__ import annotations

import base64
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from ptjax import files
from ptjax.data.added_tokens import CONTROL_NAMES, START, read_json
from ptjax.data.sentinels import SENTINEL, encode_parts, mark_sentinels, marked
from ptjax.data.vocabulary import (
    NO_ID,
    check_special_ids,
    clear_folder,
    sha256,
    text_ids,
    unigram_fingerprint,
)
from ptjax.errors import InputError
from ptjax.files import Metadata

_VOCABULARIES = ("tokenizer.json", "spiece.model", "vocab.json", "vocab.txt")
"""The vocabulary files of most tokenizers."""


class TransformersTokenizer:
    """A fast tokenizer that `transformers.AutoTokenizer` loads; runs no code from the folder.

    Texts are encoded with a copy in which control tokens and sentinels have names that no text
    contains; `mark_sentinels` inserts these names for sentinels.

    Args:
        directory: a local folder.
        name: for messages; by default the folder.

    Raises:
        InputError: transformers cannot load it, a file of its vocabulary is missing, it has no
            fast version, or no end of sequence.
    """

    def __init__(self, directory: str | os.PathLike[str], *, name: str | None = None) -> None:
        self.name = name or os.fspath(directory)
        self._tokenizer = _load(directory, self.name)
        vocabulary = self._tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.pad_id = _id_or(self._tokenizer.pad_token_id)
        self.eos_id = _id_or(self._tokenizer.eos_token_id)
        self.unk_id = _id_or(self._tokenizer.unk_token_id)
        check_special_ids(self)
        named = self._tokenizer.special_tokens_map
        control = {str(named[key]) for key in CONTROL_NAMES if named.get(key)}
        self._sentinels = {
            int(match[1]): index
            for piece, index in vocabulary.items()
            if (match := SENTINEL.fullmatch(piece.removeprefix("▁")))
        }
        self._spaced_sentinels = any(SENTINEL.fullmatch(p[1:]) for p in vocabulary if p[:1] == "▁")
        content = json.loads(self._tokenizer.backend_tokenizer.to_str())
        content |= {"truncation": None, "padding": None}
        _check_added_tokens(self._tokenizer.backend_tokenizer, content, self.name)
        model = dict(content["model"])
        if model.get("type") == "Unigram" and self.unk_id != NO_ID:
            # transformers 5 always writes 2, whatever the model says; in MADLAD-400 that is EOS.
            model["unk_id"] = self.unk_id
        self._control = control | _own_start(content)
        self._texts = _without_control_tokens(content | {"model": model}, self._control, self.name)
        self.prefix = self._own_prefix()
        former = sha256(json.dumps(content, sort_keys=True).encode())
        special_ids = self.pad_id, self.eos_id, self.unk_id
        same = _spiece_fingerprint(content, special_ids, self._control) if not self.prefix else None
        self.fingerprint = same or former
        # With a prefix, prompts of earlier versions were trained on other ids.
        self.former_fingerprints = () if self.prefix else (former,)
        if same and self._control != control:
            # Earlier versions treated an unnamed `<s>` as an added token; few texts contain it.
            older = _spiece_fingerprint(content, special_ids, control)
            self.former_fingerprints += (str(older),)
        if self.prefix:
            self.fingerprint = sha256(f"{former}{self.prefix}".encode())

    def _own_prefix(self) -> tuple[int, ...]:
        """The ids that the tokenizer's post-processor prepends to a text."""
        backend = self._tokenizer.backend_tokenizer
        whole = backend.encode("a", add_special_tokens=True).ids
        body = backend.encode("a", add_special_tokens=False).ids
        starts = range(len(whole) - len(body) + 1)
        start = next((i for i in starts if whole[i : i + len(body)] == body), 0)
        return tuple(whole[:start])

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        marks = [mark_sentinels(text, self._sentinels) for text in texts]
        encode = self._encode_marked
        return encode_parts(marks, encode) if self._spaced_sentinels else encode(marks)

    def _encode_marked(self, marks: list[str]) -> list[list[int]]:
        return [e.ids for e in self._texts.encode_batch(marks, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        valid = [i for i in text_ids(self, ids) if i < self.vocab_size]
        return self._tokenizer.decode(valid, clean_up_tokenization_spaces=False)

    def id_to_piece(self, index: int) -> str:
        piece = self._tokenizer.convert_ids_to_tokens(int(index))
        return f"<{index}>" if piece is None else piece

    def sentinel_id(self, k: int) -> int:
        if k not in self._sentinels:
            raise InputError(f"{self.name}: it has no sentinel <extra_id_{k}>")
        return self._sentinels[k]

    def save(self, directory: str | os.PathLike[str]) -> None:
        folder = clear_folder(directory)
        with tempfile.TemporaryDirectory() as local:
            for file in self._tokenizer.save_pretrained(local):
                source = epath.Path(file)
                if source.exists():
                    files.write_bytes(folder / source.name, source.read_bytes())


def _load(directory: str | os.PathLike[str], name: str) -> Any:
    import transformers  # slow to import, and the reference tokenizers do not need it

    folder = epath.Path(directory)
    lost = not (folder / "tokenizer.json").exists()
    pair = [file for file in ("vocab.json", "merges.txt") if not (folder / file).exists()]
    if lost and len(pair) == 1:
        raise _lacks(name, pair)
    try:
        with warnings.catch_warnings():
            # transformers 5.3 passes file names to tokenizers 0.22, which deprecates that; if
            # warnings are errors, a valid folder would be refused.
            warnings.simplefilter("ignore", DeprecationWarning)
            # trust_remote_code: without it, transformers asks on the terminal whether to run code.
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                os.fspath(directory), local_files_only=True, trust_remote_code=False
            )
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # broken files raise nearly anything, including panics
        if "auto_map" in read_json(folder / "tokenizer_config.json"):
            raise InputError(
                f"{name}: this tokenizer comes with its own code (auto_map), which ptjax does not "
                "run; save it as a tokenizer.json with a class of transformers"
            ) from error
        if not any((folder / file).exists() for file in _VOCABULARIES):
            raise InputError(
                f"{name}: the tokenizer's vocabulary is missing: none of "
                f"{', '.join(_VOCABULARIES)}; copy the tokenizer again"
            ) from error
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{name}: transformers cannot load this tokenizer ({reason}); check its files"
        ) from error
    # If its files are missing, transformers silently creates an empty vocabulary.
    names: Mapping[str, str] = getattr(tokenizer, "vocab_files_names", {})
    needed = [names[kind] for kind in ("vocab_file", "merges_file") if kind in names]
    missing = [file for file in needed if not (folder / file).exists()]
    if lost and missing:
        raise _lacks(name, missing)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise InputError(
            f"{name}: {type(tokenizer).__name__} has no fast version (tokenizer.json), which ptjax "
            "needs; convert it, or use another tokenizer"
        )
    return tokenizer


def _lacks(name: str, files: Sequence[str]) -> InputError:
    return InputError(
        f"{name}: the tokenizer's vocabulary is missing: neither {' and '.join(files)} nor "
        "tokenizer.json; copy the tokenizer again"
    )


def _check_added_tokens(backend: Any, content: Metadata, name: str) -> None:
    """Refuses tokens that would make the library panic at the first text."""
    for token in content["added_tokens"]:
        normalizer = backend.normalizer
        if token["normalized"] and normalizer and not normalizer.normalize_str(token["content"]):
            raise InputError(
                f"{name}: the added token {token['content']!r} is empty after normalisation; "
                "remove the token"
            )


def _without_control_tokens(content: Metadata, control: set[str], name: str) -> Any:
    """The tokenizer changed so that texts cannot contain control tokens or unmarked sentinels."""
    import tokenizers

    def rename(piece: Any) -> Any:
        if piece in control:
            return marked(piece)
        bare = piece.removeprefix("▁") if isinstance(piece, str) else ""
        if match := SENTINEL.fullmatch(bare):
            return piece.replace(bare, marked(match[1]))
        return piece

    model = dict(content["model"])
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {rename(piece): index for piece, index in vocabulary.items()}
    else:
        model["vocab"] = [[rename(piece), score] for piece, score in vocabulary]
    if model.get("unk_token") is not None:
        model["unk_token"] = rename(model["unk_token"])
    if "merges" in model:
        # Merges that produce such a name would recognise it in a text.
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [
            [a, b] for a, b in pairs if all(rename(piece) == piece for piece in (a, b, a + b))
        ]
    added = [token | {"content": rename(token["content"])} for token in content["added_tokens"]]
    changed = {**content, "model": model, "added_tokens": added, "post_processor": None}
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(changed))
    except Exception as error:  # the library has no class of its own
        raise InputError(f"{name}: its tokenizer.json cannot be used ({error})") from error


def _own_start(content: Metadata) -> set[str]:
    """{`<s>`} if it is a control symbol of the SentencePiece model that tokenizer.json is from."""
    pieces = content["model"]["vocab"] if content["model"]["type"] == "Unigram" else ()
    special = {token["content"] for token in content["added_tokens"] if token["special"]}
    return {START} & special if any(piece == START for piece, _ in pieces) else set()


def _spiece_fingerprint(
    content: Metadata, special_ids: Sequence[int], control: set[str]
) -> str | None:
    """The fingerprint of the spiece.model that tokenizer.json was made from, if any."""
    model = content["model"]
    charsmap = _charsmap(content["normalizer"])
    if model["type"] != "Unigram" or model.get("byte_fallback") or charsmap is None:
        return None
    spaces = content["pre_tokenizer"] or {}
    parts = spaces.get("pretokenizers", [spaces])
    kinds = [part.get("type") for part in parts]
    if kinds not in (["Metaspace"], ["WhitespaceSplit", "Metaspace"]):
        return None
    if parts[-1].get("prepend_scheme") != "always":
        return None
    flags = ("id", "content", "lstrip", "rstrip", "single_word", "normalized")
    added = [
        [token[flag] for flag in flags]
        for token in sorted(content["added_tokens"], key=lambda token: token["id"])
        if token["content"] not in control
        and not SENTINEL.fullmatch(token["content"].removeprefix("▁"))
    ]
    pieces = [(piece, score) for piece, score in model["vocab"]]
    return unigram_fingerprint(pieces, charsmap, special_ids, added)


def _charsmap(normalizer: Metadata | None) -> bytes | None:
    """SentencePiece's normalisation; None for any other."""
    if normalizer is None:
        return b""
    steps = normalizer.get("normalizers", [normalizer])
    kinds = [step.get("type") for step in steps]
    # transformers 4 writes further steps, which collapse spaces.
    if kinds not in (["Precompiled"], ["Precompiled", "Strip", "Replace"]):
        return None
    return base64.b64decode(steps[0]["precompiled_charsmap"])


def _id_or(index: int | None) -> int:
    return NO_ID if index is None else index
