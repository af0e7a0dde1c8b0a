"""Added tokens of a vocabulary: reads them like transformers 5, and splits texts at them.

transformers has stored them in four places: `added_tokens.json`, `added_tokens_decoder` in
`tokenizer_config.json`, `additional_special_tokens` (`extra_special_tokens`), `tokenizer.json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from etils import epath

from ptjax import files
from ptjax.data.sentinels import MARK, SENTINEL, marked
from ptjax.data.vocabulary import NO_ID
from ptjax.errors import InputError
from ptjax.files import JsonObject, Metadata

_KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
CONTROL_NAMES = tuple(f"{kind}_token" for kind in _KINDS)
"""The settings of tokenizer_config.json that name control tokens; texts cannot contain these."""
START = "<s>"
"""SentencePiece's start piece; a control token even if no setting names it, as for T5."""


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token at which a text is split before the rest is tokenised.

    Attributes:
        content: its text.
        id: `NO_ID` if the tokenizer's files do not state one.
        lstrip, rstrip: whether the spaces to its left or right belong to it.
        single_word: whether it matches only if no letter is next to it.
        normalized: whether it is searched in the normalised text.
        special: whether transformers omits it from decoded texts on request.
    """

    content: str
    id: int
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    special: bool = False

    @property
    def sentinel(self) -> int | None:
        """k if the token is the sentinel `<extra_id_k>`, else None."""
        match = SENTINEL.fullmatch(self.content)
        return None if match is None else int(match[1])

    def flags(self) -> JsonObject:
        """Returns the token as the JSON object that transformers writes, without the id."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "id"}


def read_json(file: epath.Path) -> JsonObject:
    """Reads a JSON file of a tokenizer; returns {} if it does not exist.

    Raises:
        InputError: the file does not hold a JSON object.
    """
    return files.read_object(file) if file.exists() else {}


def read_added_tokens(
    folder: epath.Path, config: Metadata, vocabulary: Mapping[str, int] | None
) -> tuple[list[AddedToken], dict[str, str]]:
    """Reads the added tokens and the control tokens of a tokenizer's folder.

    Args:
        config: the content of `tokenizer_config.json`.
        vocabulary: the model's own pieces and their ids. As in transformers 5, an added token that
            is a piece keeps its id, others get the next free ids. None (for ByT5, which has no
            pieces) takes the ids from the files and drops tokens for which they state none.

    Returns:
        The added tokens, and the control token that each setting names, such as
        `{"eos_token": "</s>"}`.

    Raises:
        InputError: a file is damaged, or states another id than transformers assigns.
    """
    declared, settings = _declared(folder, config)
    control = {name: _content(settings[name]) for name in CONTROL_NAMES if settings.get(name)}
    tokens = [token for _, token in sorted(declared.items())]
    names = {token.content for token in tokens}
    for token in map(_special, _named(settings)):
        if token.content not in names:
            names.add(token.content)
            tokens.append(token)
    if vocabulary is None:
        return [token for token in tokens if token.id != NO_ID], control
    taken, numbered = dict(vocabulary), []
    for token in tokens:
        index = taken.setdefault(token.content, len(taken))
        if token.id not in (NO_ID, index):
            raise InputError(
                f"{folder}: the added token {token.content!r} has the id {token.id} in the "
                f"tokenizer's files, but transformers 5 assigns {index}; save the tokenizer again "
                "with the transformers that wrote it, without gaps in its ids"
            )
        numbered.append(dataclasses.replace(token, id=index))
    return numbered, control


def _declared(folder: epath.Path, config: Metadata) -> tuple[dict[int, AddedToken], JsonObject]:
    """(id in the files -> token, settings); the newest format takes precedence."""
    settings = dict(config)
    if (decoder := settings.get("added_tokens_decoder")) is not None:
        file = folder / "tokenizer_config.json"
        if not isinstance(decoder, dict):
            raise _damaged(file, decoder)
        return {_id(file, i): _token(file, i, entry) for i, entry in decoder.items()}, settings
    settings |= read_json(folder / "special_tokens_map.json")
    special = {token.content for token in map(_special, _named(settings))}
    declared: dict[int, AddedToken] = {}
    file = folder / "added_tokens.json"
    for content, i in read_json(file).items():
        is_special = content in special
        flags = {"content": content, "normalized": not is_special, "special": is_special}
        declared[_id(file, i)] = _token(file, i, flags)
    file = folder / "tokenizer.json"
    added = read_json(file).get("added_tokens", [])
    for entry in added if isinstance(added, list) else [added]:
        if not isinstance(entry, dict) or "id" not in entry:
            raise _damaged(file, entry)
        declared[_id(file, entry["id"])] = _token(file, entry["id"], entry)
    return declared, settings


def _named(settings: Metadata) -> Iterator[object]:
    """The special tokens that settings name, in the order in which transformers 5 adds them."""
    yield from (settings[name] for name in CONTROL_NAMES if settings.get(name))
    for name, value in settings.items():  # a model's own, such as `image_token`
        if name.endswith("_token") and name not in CONTROL_NAMES and isinstance(value, str):
            yield value
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    several = list(extra.values()) if isinstance(extra, dict) else extra
    yield from several if isinstance(several, list) else [None]


def _content(entry: object) -> str:
    content = entry.get("content") if isinstance(entry, dict) else entry
    if not isinstance(content, str) or not content:
        raise InputError(f"a special token of the tokenizer is {entry!r}; copy its files again")
    return content


def _special(entry: object) -> AddedToken:
    flags = {**entry, "special": True} if isinstance(entry, dict) else {"special": True}
    return AddedToken(_content(entry), NO_ID, **_known_flags(flags))


def _token(file: epath.Path, index: object, entry: object) -> AddedToken:
    content = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(content, str) or not content:
        raise _damaged(file, entry)
    return AddedToken(content, _id(file, index), **_known_flags(entry))


def _known_flags(entry: Metadata) -> dict[str, bool]:
    names = ("lstrip", "rstrip", "single_word", "normalized", "special")
    return {name: entry[name] is True for name in names if name in entry}


def _id(file: epath.Path, index: object) -> int:
    if isinstance(index, bool) or not (str(index).isdecimal() and len(str(index)) < 10):
        raise _damaged(file, index)
    return int(str(index))


def _damaged(file: epath.Path, entry: object) -> InputError:
    return InputError(f"{file}: {entry!r:.80} is not an added token; copy the tokenizer again")


class Splitter:
    """Splits texts at added tokens with the library that transformers uses.

    It first splits the original text at the tokens that are not `normalized`, then normalises the
    rest and splits it at the others. It finds the sentinel <extra_id_k> in a text only in the form
    `sentinels.marked(k)`.

    Args:
        charsmap: SentencePiece's normalisation (`precompiled_charsmap`); empty for none.
        name: of the tokenizer, for messages.

    Raises:
        InputError: a token is empty after normalisation, which would make the library panic.
    """

    def __init__(self, tokens: Sequence[AddedToken], charsmap: bytes, name: str) -> None:
        precompiled: Any = tokenizers.normalizers.Precompiled
        self._normalize = precompiled(charsmap).normalize_str if charsmap else str
        self._raw = _Cutter([token for token in tokens if not token.normalized], str)
        normalized = [token for token in tokens if token.normalized]
        for token in normalized:
            if not self._normalize(token.content):
                raise InputError(
                    f"{name}: the added token {token.content!r} is empty after normalisation; "
                    "remove the token"
                )
        self._normalized = _Cutter(normalized, self._normalize) if normalized else None

    def split(self, texts: Sequence[str]) -> list[list[str | int]]:
        """Splits each text into the parts between added tokens (str) and their ids (int)."""
        rows = self._raw.cut(texts)
        if self._normalized is None:
            return rows
        between = [self._normalize(part) for row in rows for part in row if isinstance(part, str)]
        cut = iter(self._normalized.cut(between))
        return [
            [p for part in row for p in (next(cut) if isinstance(part, str) else (part,))]
            for row in rows
        ]


class _Cutter:
    """Splits texts at tokens, without normalising the texts."""

    def __init__(self, tokens: Sequence[AddedToken], normalize: Callable[[str], str]) -> None:
        # The only word is one that no text contains, so every part between tokens is one token, 0.
        model: Any = tokenizers.models.WordLevel({MARK: 0}, unk_token=MARK)
        self._backend = tokenizers.Tokenizer(model)
        self._ids = [-1]
        for token in tokens:
            k = token.sentinel
            native = tokenizers.AddedToken(
                normalize(token.content) if k is None else marked(k),
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                single_word=token.single_word,
                normalized=False,
            )
            # Of two tokens with the same text, the first matches.
            self._ids += [token.id] * self._backend.add_tokens([native])

    def cut(self, texts: Sequence[str]) -> list[list[str | int]]:
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [
            [
                self._ids[index] if index else text[start:end]
                for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            ]
            for text, encoding in zip(texts, encodings, strict=True)
        ]
