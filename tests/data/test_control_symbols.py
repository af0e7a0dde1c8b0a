"""A SentencePiece model's own control symbols: one rule, whichever file the vocabulary is in."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import tokenizers.models
import transformers

from ptjax.data.sentinels import Rendered
from ptjax.data.tokenizer import load_tokenizer
from ptjax.data.vocabulary import sha256, unigram_fingerprint

NAMES = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
CONFIG = {"tokenizer_class": "T5Tokenizer", "extra_ids": 3, **NAMES}
KINDS = {
    "control_symbols": {"bos_id": -1, "control_symbols": ["<ctrl>", "[TWO]"]},
    "with user's": {"bos_id": -1, "control_symbols": ["<c>"], "user_defined_symbols": ["<ud>"]},
    "a start": {"bos_id": 3},
}
TEXTS = [
    "word1 <ctrl> thing", "word1<ctrl>thing", "<ctrl>", " [TWO]  word2", "<c> a <ud> b",
    "<s> word3", "a</s> <pad><unk>", "<extra_id_0> <ctrl><extra_id_1>", "a [TWO", "\n<ctrl>\n", "",
]  # fmt: skip
ADDED = {"<ctrl>", "[TWO]", "<c>", "<ud>"}


def save_both(folder: Path, settings: dict[str, Any], **files: dict[str, Any]) -> tuple[Path, Path]:
    """A spiece.model with its config, and what transformers 5 saves of it: no spiece.model."""
    model = io.BytesIO()
    texts = [f"word{i % 17} other{i % 13} thing {i} text number{i % 7} [TWO" for i in range(300)]
    sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
        sentence_iterator=iter(texts), model_writer=model, vocab_size=110, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, minloglevel=2, **settings,
    )  # fmt: skip
    own, saved = folder / "own", folder / "saved"
    own.mkdir()
    (own / "spiece.model").write_bytes(model.getvalue())
    for name, content in {"tokenizer_config": CONFIG, **files}.items():
        (own / f"{name}.json").write_text(json.dumps(content))
    transformers.AutoTokenizer.from_pretrained(own).save_pretrained(saved)
    assert not (saved / "spiece.model").exists()
    return own, saved


@pytest.fixture(params=KINDS)
def folders(request, tmp_path) -> tuple[Path, Path]:
    return save_both(tmp_path, KINDS[request.param])


def test_control_symbols_are_those_of_transformers_in_either_file(folders):
    own, saved = map(load_tokenizer, folders)
    theirs = transformers.AutoTokenizer.from_pretrained(folders[0])
    assert own.encode_batch(TEXTS) == saved.encode_batch(TEXTS)
    assert own.fingerprint == saved.fingerprint
    for text in TEXTS:
        if not any(name in text for name in ("</s>", "<s>")):  # which ptjax spells out
            assert own.encode(text) == theirs.encode(text, add_special_tokens=False), text
    spelt = own.encode("<s>")
    assert len(spelt) > 1 and min(spelt) > 1


def test_control_symbols_come_back_from_their_ids(folders):
    """SentencePiece itself decodes them to nothing."""
    own, saved = map(load_tokenizer, folders)
    for symbol in ADDED & set(
        own.encode("") or [own.id_to_piece(i) for i in range(own.vocab_size)]
    ):
        [index] = own.encode(symbol)
        assert own.id_to_piece(index) == saved.id_to_piece(index) == symbol
        assert own.decode([index]) == saved.decode([index]) == symbol


def test_fingerprints_of_before_control_symbols_counted_stay_valid(folders):
    """They were spelt out by spiece.model, and `<s>` was an added token of tokenizer.json."""
    own, saved = map(load_tokenizer, folders)
    model = (folders[0] / "spiece.model").read_bytes()
    proto = sentencepiece.sentencepiece_model_pb2.ModelProto.FromString(model)
    sentinels = [(f"<extra_id_{k}>", 0.0) for k in (2, 1, 0)]
    pieces = [(piece.piece, piece.score) for piece in proto.pieces] + sentinels
    charsmap = proto.normalizer_spec.precompiled_charsmap

    def recorded(*contents: str) -> str:
        names = [piece for piece, _ in pieces]
        added = [[names.index(x), x, False, False, False, False] for x in contents]
        return unigram_fingerprint(pieces, charsmap, (0, 1, 2), added)

    users = ["<ud>"] if own.encode("<ud>")[1:] == [] else []
    former = {own.fingerprint, *own.former_fingerprints}
    assert recorded(*users) in former
    assert (sha256(model + b"\nextra_ids=3") in former) == (not users)
    if any(piece == "<s>" for piece, _ in pieces):
        assert recorded("<s>") in saved.former_fingerprints


def test_a_model_file_alone_reads_as_its_folder_does(folders):
    alone, own = load_tokenizer(folders[0] / "spiece.model"), load_tokenizer(folders[0])
    symbols = [text for text in TEXTS if "extra_id" not in text]  # of which it gets a hundred
    assert alone.encode_batch(symbols) == own.encode_batch(symbols)


@pytest.mark.parametrize("writer", [0, 1])
def test_the_space_of_a_sentinel_of_mt5_is_no_added_token(tmp_path, writer):
    """The added token "\\n" is every space of a text, as for transformers, but not a sentinel's."""
    mt5 = {"bos_id": -1, "user_defined_symbols": [f"▁<extra_id_{k}>" for k in range(3)]}
    for name in ("plain", "added"):
        (tmp_path / name).mkdir()
    config = CONFIG | {"extra_ids": 0}
    plain = load_tokenizer(save_both(tmp_path / "plain", mt5, tokenizer_config=config)[writer])
    line = {"\n": plain.vocab_size}
    folders = save_both(tmp_path / "added", mt5, tokenizer_config=config, added_tokens=line)
    added = load_tokenizer(folders[writer])
    theirs = transformers.AutoTokenizer.from_pretrained(folders[0])
    newline = plain.vocab_size
    assert added.encode("word1 word2").count(newline) == 1
    for text in (
        "word1<extra_id_0>thing",
        "<extra_id_1><extra_id_2>",
        "a<extra_id_0><extra_id_1>b",
    ):
        assert added.encode(text) == plain.encode(text)
        assert newline not in added.encode(text)
        assert added.sentinel_id(0) in added.encode(text + "<extra_id_0>")
    for text in ("word1 <extra_id_0> thing", "a\n<extra_id_1>", "<extra_id_0> b"):
        assert added.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert plain.encode("b<extra_id_0>a") == plain.encode("b <extra_id_0>a")


def test_merges_that_would_make_a_control_token_are_not_made(tmp_path):
    special, names = ["</s>", "<unk>"], ["<s>", "<extra_id_0>"]
    # Letter by letter: "<", "s" -> "<s"; "<s", ">" -> "<s>".
    merges = [(name[:n], name[n]) for name in names for n in range(1, len(name))]
    pieces = [*special, *names, *"".join(names), "a", *(a + b for a, b in merges)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    model = tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    config |= {"unk_token": "<unk>", "bos_token": "<s>", "extra_special_tokens": names[1:]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)

    def pieces_of(text):
        return [tokenizer.id_to_piece(i) for i in tokenizer.encode(text)]

    assert pieces_of("a<s>") == ["a", "<s", ">"]
    assert pieces_of("<extra_id_0>") == ["<extra_id_0>"]
    assert pieces_of(Rendered("<extra_id_0>")) == ["<extra_id_0", ">"]
