"""Whatever tokenizer folder a user brings gives transformers' ids, or is refused by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.normalizers
import tokenizers.pre_tokenizers
import tokenizers.trainers
import transformers
from tiny import tiny_config
from tokenizer_folders import FIXTURES, SPIECE, unpack, write_source
from tokenizer_texts import ADDED, control_texts, texts

from ptjax.backbones import load as backbones
from ptjax.backbones.load import load_backbone
from ptjax.backbones.save import save_backbone
from ptjax.data.preprocess import tokenize_texts
from ptjax.data.sentinels import Rendered
from ptjax.data.tokenizer import (
    ByteTokenizer,
    SentencePieceTokenizer,
    TransformersTokenizer,
    check_vocabulary,
    load_tokenizer,
)
from ptjax.errors import InputError
from ptjax.models.config import T5Config
from ptjax.models.t5 import parameter_shapes

RECORDED = {
    release: json.loads((FIXTURES / f"tokenizers_{release}.json").read_text()) for release in "45"
}
FOLDERS = RECORDED["4"]["folders"] | RECORDED["5"]["folders"]
SMALL = tiny_config(800)
TOKENS = (*ADDED, "film", "<l>", "<r>", "plot", "<sep>")
"""Those that `record_tokenizers.py` added."""


def zeros(config: T5Config) -> Any:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), parameter_shapes(config))


def recorded_ids(name: str) -> list[list[int]]:
    """What transformers 5.24 gives of `texts(TOKENS)`."""
    [first] = RECORDED["5"]["ids"].values()
    changed = RECORDED["5"]["changed"].get(name, {})
    return [changed.get(str(i), row) for i, row in enumerate(first)]


def reference(folder: Path) -> Any:
    with warnings.catch_warnings():  # transformers 5.3 uses what tokenizers 0.22 deprecates
        warnings.simplefilter("ignore", DeprecationWarning)
        return transformers.AutoTokenizer.from_pretrained(folder)


def reference_ids(folder: Path, lines: list[str]) -> list[list[int]]:
    load = reference(folder)
    return [load(line, add_special_tokens=False).input_ids for line in lines]


def assert_equal_ids(tokenizer: Any, wanted: list[list[int]], lines: list[str]) -> None:
    """Ties of equal score would be told apart here; there are none among these texts."""
    got = tokenizer.encode_batch(lines)
    other = [line for line, a, b in zip(lines, got, wanted, strict=True) if a != b]
    print(f"{len(lines)} texts, {len(other)} with other ids")
    assert not other
    assert got[::17] == [tokenizer.encode(line) for line in lines[::17]]


def assert_saved(tokenizer: Any, folder: Path, wanted: list[list[int]], lines: list[str]) -> None:
    """Saved, it is equal, to ptjax and to transformers."""
    tokenizer.save(folder)
    again = load_tokenizer(folder)
    assert type(again) is type(tokenizer)
    assert (again.fingerprint, again.vocab_size) == (tokenizer.fingerprint, tokenizer.vocab_size)
    assert again.encode_batch(lines) == wanted
    assert reference_ids(folder, lines) == wanted


# Row 1.1: added tokens


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_case_1_1_added_tokens_of_every_writer(name, tmp_path):
    """As 5.24 reads it: which transformers wrote it is told by its files' shape alone."""
    assert RECORDED["4"]["versions"]["transformers"] == "4.57.6"
    assert RECORDED["5"]["versions"]["transformers"] == "5.24.0"
    tokenizer = load_tokenizer(unpack(FOLDERS[name], tmp_path / "folder"))
    assert_equal_ids(tokenizer, recorded_ids(name), texts(TOKENS))
    kind = SentencePieceTokenizer if "spiece.model" in FOLDERS[name] else TransformersTokenizer
    assert isinstance(tokenizer, kind)
    hl = tokenizer.encode("<hl>")
    assert hl == [8098] and tokenizer.id_to_piece(8098) == "<hl>"
    assert tokenizer.decode([*tokenizer.encode("a"), *hl, *tokenizer.encode("b")]) == "a<hl> b"
    assert_saved(tokenizer, tmp_path / "saved", recorded_ids(name), texts(TOKENS))


def test_case_1_1_the_same_tokens_have_one_fingerprint_whoever_wrote_them(tmp_path):
    names = ["4 slow", "4 fast", "4 fast, tokenizer.json", "5"]
    prints = {load_tokenizer(unpack(FOLDERS[name], tmp_path / name)).fingerprint for name in names}
    assert len(prints) == 1
    plain = load_tokenizer(write_source(tmp_path / "source"))
    assert plain.fingerprint not in prints


def test_case_1_1_tokens_added_by_this_transformers(tmp_path):
    """Whatever release is installed; with its tokenizer.json alone, and beside spiece.model."""
    source = write_source(tmp_path / "source")
    writer = reference(source)
    writer.add_tokens([*ADDED, transformers.AddedToken("<r>", rstrip=True, normalized=True)])
    writer.save_pretrained(tmp_path / "saved")
    lines = texts((*ADDED, "<r>"))
    wanted = reference_ids(tmp_path / "saved", lines)
    assert_equal_ids(load_tokenizer(tmp_path / "saved"), wanted, lines)
    shutil.copy(SPIECE, tmp_path / "saved")
    tokenizer = load_tokenizer(tmp_path / "saved")
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert_equal_ids(tokenizer, wanted, lines)


def test_case_1_1_a_spiece_model_alone_and_a_tokenizer_json_made_of_it(tmp_path):
    source = write_source(tmp_path / "source")
    lines = texts()
    wanted = reference_ids(source, lines)
    reference(source).save_pretrained(tmp_path / "fast")
    assert not (tmp_path / "fast" / "spiece.model").exists()
    for folder in (source, tmp_path / "fast"):
        assert_equal_ids(load_tokenizer(folder), wanted, lines)


def test_a_tokenizer_json_beside_a_models_config(tmp_path):
    """With nothing else; the model's kind tells transformers which tokens are control tokens."""
    files = {"tokenizer.json": FOLDERS["4 fast"]["tokenizer.json"]}
    folder = unpack(files | {"config.json": {"model_type": "t5"}}, tmp_path / "folder")
    tokenizer = load_tokenizer(folder)
    wanted = reference_ids(folder, texts(TOKENS))
    assert_equal_ids(tokenizer, wanted, texts(TOKENS))
    with pytest.raises(InputError, match="it has no end of sequence"):
        load_tokenizer(unpack(files, tmp_path / "alone"))


@pytest.mark.parametrize("kind", ["PegasusTokenizer", "BigBirdTokenizer"])
def test_case_1_1_other_classes_read_a_spiece_model_otherwise(tmp_path, kind):
    folder = write_source(tmp_path / "folder")
    (folder / "config.json").unlink()
    config = {"tokenizer_class": kind, **{f"{name}_token": f"<{name}>" for name in ("pad", "unk")}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "</s>"}))
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, TransformersTokenizer)
    assert_equal_ids(tokenizer, reference_ids(folder, texts(())), texts(()))


def test_case_1_1_save_backbone_keeps_added_tokens(tmp_path):
    folder = unpack(FOLDERS["4 slow"], tmp_path / "tokenizer")
    tokenizer = load_tokenizer(folder)
    config = dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size)
    target = tmp_path / "backbone"
    target.mkdir()
    (target / "added_tokens.json").write_text('{"<stale>": 8200}')
    save_backbone(target, config, zeros(config), tokenizer=tokenizer, dtype="float32")
    found = load_backbone(target).tokenizer
    assert found is not None and found.fingerprint == tokenizer.fingerprint
    assert found.encode_batch(texts(TOKENS)) == recorded_ids("4 slow")
    assert reference_ids(target, texts(TOKENS)) == recorded_ids("4 slow")


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer_config.json"])
def test_case_1_1_ids_with_a_gap_are_refused(tmp_path, name):
    """transformers 4's slow tokenizer takes such ids, 5 does not: two readings of one folder."""
    folder = write_source(tmp_path / "folder")
    content: dict[str, Any] = {"<hl>": 8120}
    if name == "tokenizer_config.json":
        content = json.loads((folder / name).read_text())
        content["added_tokens_decoder"] = {"8120": {"content": "<hl>"}}
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"'<hl>' has the id 8120 .* transformers 5 assigns 8097"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"<hl>": "x"}),
        ("added_tokens.json", {"<hl>": True}),
        ("added_tokens.json", ["<hl>"]),
        ("tokenizer_config.json", {"added_tokens_decoder": ["<hl>"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"8097": "<hl>"}}),
        ("tokenizer_config.json", {"additional_special_tokens": [7]}),
        ("special_tokens_map.json", {"eos_token": {"text": "</s>"}}),
        ("added_tokens.json", {"": 8097}),
        ("added_tokens.json", {"<hl>": 10**12}),
        ("tokenizer_config.json", {"additional_special_tokens": "<hl>"}),
        ("tokenizer.json", {"added_tokens": [{"content": "<hl>"}]}),
        ("tokenizer.json", {"added_tokens": 5}),
    ],
)
def test_case_1_1_damaged_added_tokens(tmp_path, name, content):
    folder = write_source(tmp_path / "folder")
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"copy (it|its files|the tokenizer) again"):
        load_tokenizer(folder)


def test_case_1_1_a_token_that_the_normalisation_removes_is_refused(tmp_path):
    """tokenizers panics on every text, in transformers too."""
    folder = write_source(tmp_path / "folder")
    (folder / "added_tokens.json").write_text(json.dumps({"\x01": 8097}))
    with pytest.raises(InputError, match=r"the added token '\\x01' is empty after normalisation"):
        load_tokenizer(folder)
    files = FOLDERS["4 fast, tokenizer.json"]
    files["tokenizer.json"]["added_tokens"][-1] |= {"content": "\n", "normalized": True}
    files["tokenizer_config.json"] |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    with pytest.raises(InputError, match=r"the added token '\\n' is empty after normalisation"):
        load_tokenizer(unpack(files, tmp_path / "fast"))


def test_case_1_1_byt5_with_added_tokens(tmp_path):
    """Sentinels excepted: to transformers, <extra_id_0> is 259, which ByT5 was never taught."""
    writer = transformers.ByT5Tokenizer()
    writer.add_tokens([*ADDED, "\n"])
    writer.add_tokens(
        [
            transformers.AddedToken("<l>", lstrip=True),
            transformers.AddedToken("<r>", rstrip=True),
            transformers.AddedToken("plot", single_word=True),
        ]
    )
    writer.save_pretrained(tmp_path / "byt5")
    lines = [line for line in texts((*ADDED, "<l>", "<r>", "plot")) if "<extra_id_" not in line]
    assert len(lines) > 180
    wanted = reference_ids(tmp_path / "byt5", lines)
    tokenizer = load_tokenizer(tmp_path / "byt5")
    assert isinstance(tokenizer, ByteTokenizer) and tokenizer.vocab_size == 389
    assert_equal_ids(tokenizer, wanted, lines)
    assert tokenizer.encode("a <extra_id_1>b") == [100, 35, 257, 101]
    assert tokenizer.decode(tokenizer.encode("the <hl>film")) == "the <hl>film"
    assert tokenizer.id_to_piece(385) == "<hl>"
    assert tokenizer.fingerprint != ByteTokenizer().fingerprint
    assert_saved(tokenizer, tmp_path / "saved", wanted, lines)


# Other vocabularies


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Path:
    """Byte-level BPE with `<s>` in front, as CodeT5's: vocab.json and merges.txt."""
    folder = tmp_path_factory.mktemp("bpe")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts(), trainer)
    trained.model.save(str(folder))
    config = {
        "tokenizer_class": "RobertaTokenizer",
        "additional_special_tokens": [f"<extra_id_{k}>" for k in reversed(range(100))],
        **{f"{kind}_token": f"<{kind}>" for kind in ("pad", "unk", "mask")},
        **{f"{kind}_token": "<s>" for kind in ("bos", "cls")},
        **{f"{kind}_token": "</s>" for kind in ("eos", "sep")},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """WordPiece, with [CLS] and [SEP] around a text: vocab.txt."""
    folder = tmp_path_factory.mktemp("bert")
    trained = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = tokenizers.normalizers.BertNormalizer()
    trained.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=special, show_progress=False
    )
    trained.train_from_iterator(texts(), trainer)
    trained.model.save(str(folder))
    config = {"tokenizer_class": "BertTokenizer", "eos_token": "[SEP]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["bpe", "bert"])
def test_other_vocabularies_with_added_tokens(kind, tmp_path, request):
    folder = request.getfixturevalue(kind)
    lines = texts()
    assert_equal_ids(load_tokenizer(folder), reference_ids(folder, lines), lines)
    writer = reference(folder)
    writer.add_tokens(list(ADDED))
    writer.save_pretrained(tmp_path / "added")
    wanted = reference_ids(tmp_path / "added", lines)
    tokenizer = load_tokenizer(tmp_path / "added")
    assert_equal_ids(tokenizer, wanted, lines)
    assert_saved(tokenizer, tmp_path / "saved", wanted, lines)


@pytest.mark.parametrize("kind", ["bpe", "bert"])
def test_case_1_4_what_the_tokenizer_puts_in_front(kind, request):
    folder = request.getfixturevalue(kind)
    tokenizer, theirs = load_tokenizer(folder), reference(folder)
    assert tokenizer.prefix == ((1,) if kind == "bpe" else (2,))
    lines = ["the film", "a <hl> b", ""]
    rows = tokenize_texts(lines, tokenizer, 32)
    assert [rows[i].tolist() for i in range(3)] == [theirs(line).input_ids for line in lines]
    cut = tokenize_texts(["the film is a fine old story"], tokenizer, 5)
    wanted = theirs("the film is a fine old story", max_length=5, truncation=True).input_ids
    assert cut[0].tolist() == wanted and cut.truncated == 1
    assert tokenizer.decode([0, *rows[0].tolist(), 7]) == "the film"
    with pytest.raises(InputError, match="a length of 2 tokens has no room"):
        tokenize_texts(lines, tokenizer, 2)


def test_case_1_4_most_tokenizers_put_nothing_in_front(tmp_path):
    source = write_source(tmp_path / "source")
    reference(source).save_pretrained(tmp_path / "fast")
    for tokenizer in (load_tokenizer(source), load_tokenizer(tmp_path / "fast"), ByteTokenizer()):
        assert tokenizer.prefix == ()


# Row 1.2: a vocabulary that is not there


@pytest.mark.parametrize("kind", ["T5Tokenizer", "T5TokenizerFast", "MT5Tokenizer"])
def test_case_1_2_a_config_without_its_vocabulary(tmp_path, kind):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(InputError, match=r"missing: neither spiece.model nor tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["PegasusTokenizer", "LlamaTokenizer", "XLMRobertaTokenizer"])
def test_case_1_2_a_config_of_another_class_without_any_vocabulary(tmp_path, kind):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    message = r": the tokenizer's vocabulary is missing: n(one|either) .*tokenizer.json"
    with pytest.raises(InputError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("kind", "lost", "message"),
    [
        ("bpe", "vocab.json", "neither vocab.json nor tokenizer.json"),
        ("bpe", "merges.txt", "neither merges.txt nor tokenizer.json"),
        ("bpe", "vocab.json merges.txt", "neither vocab.json and merges.txt nor tokenizer.json"),
        ("bert", "vocab.txt", "neither vocab.txt nor tokenizer.json"),
    ],
)
def test_case_1_2_other_vocabularies_without_a_file(kind, lost, message, tmp_path, request):
    shutil.copytree(request.getfixturevalue(kind), tmp_path / "folder")
    for file in lost.split():
        (tmp_path / "folder" / file).unlink()
    with pytest.raises(InputError, match=f"is missing: {message}; copy the tokenizer again"):
        load_tokenizer(tmp_path / "folder")


@pytest.mark.parametrize(
    ("ids", "rows"), [(32_100, 32_128), (250_100, 250_112), (384, 384), (8192, 8192)]
)
def test_vocabularies_of_released_models_fit(ids, rows):
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = ids
    check_vocabulary(tokenizer, rows)


@pytest.mark.parametrize(("ids", "rows"), [(104, 32_128), (384, 32_128), (16_000, 32_128)])
def test_case_1_2_a_vocabulary_far_smaller_than_the_embedding(ids, rows, monkeypatch):
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = ids
    with pytest.raises(InputError, match=f"byt5: its {ids} ids are far too few for .* {rows} emb"):
        check_vocabulary(tokenizer, rows)


def test_case_1_2_the_backbones_own_tokenizer_too(tmp_path, monkeypatch):
    save_backbone(tmp_path, SMALL, zeros(SMALL), tokenizer=ByteTokenizer())
    monkeypatch.setattr(backbones, "place", None)  # before the weights are read
    with pytest.raises(InputError, match="384 ids are far too few for the model's 800 embedding"):
        load_backbone(tmp_path)


# Row 5.2: code in a tokenizer's folder


@pytest.mark.parametrize("auto_map", [["own.Own", None], {"AutoTokenizer": ["own.Own", "own.Own"]}])
def test_case_5_2_a_tokenizer_that_brings_code(tmp_path, monkeypatch, auto_map):
    """Neither run nor asked about."""
    flag = tmp_path / "was_run"
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "own.py").write_text(f"open({str(flag)!r}, 'w').close()\nclass Own: pass\n")
    config = {"auto_map": auto_map, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    questions = []
    # Somebody who says yes to everything.
    monkeypatch.setattr("builtins.input", lambda *said: questions.append(said) or "y")
    with pytest.raises(InputError, match=r"comes with its own code .* which ptjax does not run"):
        load_tokenizer(folder)
    assert not flag.exists() and not questions
    shutil.copy(SPIECE, folder)
    config["tokenizer_class"] = "T5Tokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert isinstance(load_tokenizer(folder), SentencePieceTokenizer)
    assert not flag.exists() and not questions


# One rule for control tokens and sentinels


@pytest.fixture(
    params=["spiece", "spiece + added", "tokenizer.json", "bpe", "bert", "byt5", "mt5", "own"]
)
def any_tokenizer(request, tmp_path) -> Any:
    if request.param in ("bpe", "bert"):
        return load_tokenizer(request.getfixturevalue(request.param))
    if request.param == "byt5":
        return ByteTokenizer()
    if request.param == "mt5":
        return SentencePieceTokenizer(with_own_sentinels())
    if request.param == "own":
        return SentencePieceTokenizer(with_own_sentinels(space="", kind=1))
    if request.param == "spiece":
        return load_tokenizer(write_source(tmp_path / "source"))
    name = {"spiece + added": "4 slow", "tokenizer.json": "5"}[request.param]
    return load_tokenizer(unpack(FOLDERS[name], tmp_path / "folder"))


def with_own_sentinels(space: str = "▁", kind: int = 4) -> bytes:
    """A model whose file holds its sentinels, as mT5's does."""
    from sentencepiece import sentencepiece_model_pb2 as pb2

    proto = pb2.ModelProto.FromString(SPIECE.read_bytes())  # type: ignore[attr-defined]
    for k in reversed(range(100)):
        proto.pieces.add(piece=f"{space}<extra_id_{k}>", score=0.0, type=kind)
    return proto.SerializeToString()


def test_case_1_1_control_tokens_in_a_text_are_spelt_out(any_tokenizer):
    control = {any_tokenizer.pad_id, any_tokenizer.eos_id, *any_tokenizer.prefix}
    names = {any_tokenizer.id_to_piece(i) for i in control}
    lines = control_texts()
    for line, ids in zip(lines, any_tokenizer.encode_batch(lines), strict=True):
        assert ids and not control & set(ids), line
        assert not names & {any_tokenizer.id_to_piece(i) for i in ids}, line
        if any_tokenizer.unk_id not in ids and not isinstance(any_tokenizer, TransformersTokenizer):
            assert any_tokenizer.decode(ids) == line
    plain = any_tokenizer.encode("a b")
    assert any_tokenizer.encode("a </s> b") != plain


def test_case_1_1_sentinels_of_a_field_are_spelt_out(any_tokenizer):
    try:
        sentinel = any_tokenizer.sentinel_id(1)
    except InputError:
        sentinel = -1  # BERT's has none
    line = "the <extra_id_1> film <extra_id_1>"
    both, none = any_tokenizer.encode(line), any_tokenizer.encode(Rendered(line))
    first, second = any_tokenizer.encode_batch([Rendered(line, [4]), Rendered(line, [22])])
    assert both.count(sentinel) == (2 if sentinel >= 0 else 0)
    assert sentinel not in none
    if sentinel >= 0:
        assert first.count(sentinel) == second.count(sentinel) == 1
        assert first.index(sentinel) < second.index(sentinel)
    # One that the tokenizer has not is text, as is what only looks like one.
    odd = "<extra_id_999> <extra_id_01> <extra_id_x> \uffff1\uffff"
    assert sentinel not in any_tokenizer.encode(odd)
