"""Tokens that were added to a vocabulary: read as transformers 5 reads them, and cut out of texts.

transformers has written them to four places: `added_tokens.json`, `added_tokens_decoder` in
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

_KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
CONTROL_NAMES = tuple(f"{kind}_token" for kind in _KINDS)
"""The settings of tokenizer_config.json that name control tokens; texts cannot hold these."""
START = "<s>"
"""SentencePiece's start piece; a control token even if no setting names it, as for T5."""


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of a text before the rest is made into pieces.

    Attributes:
        lstrip, rstrip: it takes the spaces beside it along.
        single_word: only where no letter stands beside it.
        normalized: it is looked for in the normalised text.
        special: transformers leaves it out of decoded texts if asked to.
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
        """k of `<extra_id_k>`."""
        match = SENTINEL.fullmatch(self.content)
        return None if match is None else int(match[1])

    def flags(self) -> dict[str, Any]:
        """As transformers writes it, without the id."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "id"}


def read_json(file: epath.Path) -> dict[str, Any]:
    """A tokenizer's JSON file; {} where there is none.

    Raises:
        InputError: it holds no JSON object.
    """
    return files.read_object(file) if file.exists() else {}


def read_added_tokens(
    folder: epath.Path, config: Mapping[str, Any], vocabulary: Mapping[str, int] | None
) -> tuple[list[AddedToken], dict[str, str]]:
    """(the tokens of a folder that were added, setting -> the control token that it names).

    Args:
        config: of `tokenizer_config.json`.
        vocabulary: the pieces that there are without them. A token that is a piece keeps its id,
            others get the next free ones, as transformers 5 numbers them. None (ByT5) takes the
            ids of the files.

    Raises:
        InputError: a file is damaged, or gives a token another id than transformers does.
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
                f"tokenizer's files, and transformers 5 gives it {index}; save the tokenizer again "
                "with the transformers that wrote it, without gaps in its ids"
            )
        numbered.append(dataclasses.replace(token, id=index))
    return numbered, control


def _declared(
    folder: epath.Path, config: Mapping[str, Any]
) -> tuple[dict[int, AddedToken], dict[str, Any]]:
    """(tokens with the ids that files give them, settings), the newest way of saying it first."""
    settings = dict(config)
    if (decoder := settings.get("added_tokens_decoder")) is not None:
        file = folder / "tokenizer_config.json"
        if not isinstance(decoder, dict):
            raise _damaged(file, decoder)
        return {_id(file, i): _token(file, i, said) for i, said in decoder.items()}, settings
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
    for said in added if isinstance(added, list) else [added]:
        if not isinstance(said, dict) or "id" not in said:
            raise _damaged(file, said)
        declared[_id(file, said["id"])] = _token(file, said["id"], said)
    return declared, settings


def _named(settings: Mapping[str, Any]) -> Iterator[Any]:
    """What settings name as special, in the order in which transformers 5 adds it."""
    yield from (settings[name] for name in CONTROL_NAMES if settings.get(name))
    for name, value in settings.items():  # a model's own, such as `image_token`
        if name.endswith("_token") and name not in CONTROL_NAMES and isinstance(value, str):
            yield value
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    several = list(extra.values()) if isinstance(extra, dict) else extra
    yield from several if isinstance(several, list) else [None]


def _content(said: Any) -> str:
    content = said.get("content") if isinstance(said, dict) else said
    if not isinstance(content, str) or not content:
        raise InputError(f"a special token of the tokenizer is {said!r}; copy its files again")
    return content


def _special(said: Any) -> AddedToken:
    flags = {**said, "special": True} if isinstance(said, dict) else {"special": True}
    return AddedToken(_content(said), NO_ID, **_known_flags(flags))


def _token(file: epath.Path, index: Any, said: Any) -> AddedToken:
    content = said.get("content") if isinstance(said, dict) else None
    if not isinstance(content, str) or not content:
        raise _damaged(file, said)
    return AddedToken(said["content"], _id(file, index), **_known_flags(said))


def _known_flags(said: Mapping[str, Any]) -> dict[str, bool]:
    names = ("lstrip", "rstrip", "single_word", "normalized", "special")
    return {name: said[name] is True for name in names if name in said}


def _id(file: epath.Path, index: Any) -> int:
    if isinstance(index, bool) or not (str(index).isdecimal() and len(str(index)) < 10):
        raise _damaged(file, index)
    return int(index)


def _damaged(file: epath.Path, said: Any) -> InputError:
    return InputError(f"{file}: {said!r:.80} is no added token; copy the tokenizer again")


class Splitter:
    """Cuts added tokens out of texts as transformers does: with the library that it uses.

    Those that are looked for in the text as it stands come first, then the rest is normalised and
    those of the normalised text are. Sentinels are looked for as `marked(k)`.

    Raises:
        InputError: the normalisation leaves nothing of a token; every text would stop the library.
    """

    def __init__(self, tokens: Sequence[AddedToken], charsmap: bytes, name: str) -> None:
        precompiled: Any = tokenizers.normalizers.Precompiled
        self._normalize = precompiled(charsmap).normalize_str if charsmap else str
        self._raw = _Cutter([token for token in tokens if not token.normalized], str)
        normalized = [token for token in tokens if token.normalized]
        for token in normalized:
            if not self._normalize(token.content):
                raise InputError(
                    f"{name}: its normalisation leaves nothing of the added token "
                    f"{token.content!r}; remove the token"
                )
        self._normalized = _Cutter(normalized, self._normalize) if normalized else None

    def split(self, texts: Sequence[str]) -> list[list[str | int]]:
        """Each text as what is left of it between added tokens, and the ids of those."""
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
    """Cuts tokens out of texts that are searched as they stand."""

    def __init__(self, tokens: Sequence[AddedToken], normalize: Callable[[str], str]) -> None:
        # Its only word is one that no text holds, so that what is left between is one token, 0.
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
            # Of two that read the same, the first is found.
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
