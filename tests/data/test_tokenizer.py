"""Tokenizers: ids, sentinels, round trips, fingerprints, saved and loaded again, broken files."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import sentencepiece
from markers import SHARED
from tiny import tiny_config

from ptjax.backbones.load import Backbone
from ptjax.data import tokenizer as tokenizers
from ptjax.data.added_tokens import AddedToken
from ptjax.data.sentinels import MARK
from ptjax.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, TransformersTokenizer
from ptjax.errors import InputError
from ptjax.inference.prompts import check_prompt
from ptjax.interop.prompt_file import PromptFile

NANO = "package:nano/spiece.model"
TEXTS = ["a fine film .", "the plot is <extra_id_0> thin", "", "  spaces   inside ", "naïve 電影"]


@pytest.fixture(scope="module")
def nano():
    return SentencePieceTokenizer(NANO)


@pytest.fixture(scope="module")
def fast(nano, tmp_path_factory):
    """A tokenizer.json made by transformers from the SentencePiece model, and nothing else."""
    import transformers

    model = tmp_path_factory.mktemp("sentencepiece")
    nano.save(model)
    folder = tmp_path_factory.mktemp("fast")
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    assert not (folder / "spiece.model").exists()
    return folder


def test_ids_are_sentencepieces_own(nano):
    reference = sentencepiece.SentencePieceProcessor(
        model_proto=tokenizers.resolve_path(NANO).read_bytes()
    )
    for text in ("a fine film .", "  spaces   inside ", "naïve 電影", "x_<extra_id>"):
        assert nano.encode(text) == reference.encode(text)
    assert (nano.pad_id, nano.eos_id, nano.unk_id) == (0, 1, 2)
    assert nano.vocab_size == reference.get_piece_size() + 100 == 8192


def test_sentinels_count_down_from_the_top(nano):
    assert nano.sentinel_id(0) == 8191
    assert nano.sentinel_id(99) == 8092
    assert nano.id_to_piece(8191) == "▁<extra_id_0>"
    the, top = nano.encode("the")[0], 8191
    assert nano.encode("the <extra_id_0> the <extra_id_99>") == [the, top, the, 8092]
    # Also where no space stands before it, which SentencePiece alone would spell out.
    assert nano.encode("the<extra_id_0><extra_id_1> the") == [the, top, top - 1, the]
    assert nano.decode([the, top, the]) == "the <extra_id_0> the"
    with pytest.raises(InputError, match="no sentinel <extra_id_100>"):
        nano.sentinel_id(100)


def test_a_model_with_its_own_sentinels_keeps_them(nano):
    """As mT5's, whose file holds them."""
    own = SentencePieceTokenizer(nano._processor.serialized_model_proto())
    assert own.extra_ids == 0
    assert own.vocab_size == nano.vocab_size
    assert own.sentinel_id(7) == nano.sentinel_id(7)
    assert own.encode("the <extra_id_7> film") == nano.encode("the <extra_id_7> film")


@pytest.mark.parametrize("make", [lambda: SentencePieceTokenizer(NANO), ByteTokenizer])
def test_decode_stops_at_the_end_and_drops_padding(make):
    tokenizer = make()
    ids = tokenizer.encode("a fine film")
    padded = np.array([0, *ids, 0, 1, *ids], np.int32)
    assert tokenizer.decode(padded) == "a fine film"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([1]) == ""


def test_ids_without_a_piece_decode_as_unknown(nano):
    film = nano.encode("film")
    assert nano.decode([*film, 9000]) == nano.decode([*film, nano.unk_id])
    assert nano.id_to_piece(9000) == "<9000>"


# No text holds the mark, a noncharacter.
@hypothesis.given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters=[MARK])))
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids == [byte + 3 for byte in text.encode()]
    assert tokenizer.decode(ids) == text


def test_byt5_special_ids():
    """Pinned to google/byt5: 3 special ids, sentinels from 258 down, 384 embedding rows."""
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("hé") == [107, 198, 172]
    assert tokenizer.vocab_size == 384
    assert [tokenizer.sentinel_id(k) for k in (0, 99)] == [258, 159]
    # Cut in the middle of a character, and with ids that are no bytes.
    assert tokenizer.decode([107, 198, 300, 2]) == "h"
    pieces = [tokenizer.id_to_piece(i) for i in (0, 1, 2, 107, 198, 35, 300)]
    assert pieces == ["<pad>", "</s>", "<unk>", "h", "<0xC3>", "<0x20>", "<300>"]


def test_an_added_token_takes_spaces_or_stands_alone_only_if_it_says_so():
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    assert AddedToken("<hl>", 384).flags() == {"content": "<hl>", **dict.fromkeys(flags, False)}
    a, b, space, hl = 100, 101, 35, 384
    spelt = [byte + 3 for byte in b"<hl>"]
    for setting, text, ids in [
        ({}, "a <hl> b", [a, space, hl, space, b]),
        ({}, "a<hl>b", [a, hl, b]),
        ({"lstrip": True}, "a  <hl> b", [a, hl, space, b]),
        ({"lstrip": True}, "<hl> b", [hl, space, b]),
        ({"rstrip": True}, "a <hl>  b", [a, space, hl, b]),
        ({"rstrip": True}, "a <hl>", [a, space, hl]),
        ({"single_word": True}, "a <hl> b", [a, space, hl, space, b]),
        ({"single_word": True}, "a<hl> b", [a, *spelt, space, b]),
        ({"single_word": True}, "a <hl>b", [a, space, *spelt, b]),
    ]:
        tokenizer = ByteTokenizer([AddedToken("<hl>", 384, **setting)])
        assert tokenizer.encode(text) == ids, (setting, text)


def test_batches_equal_single_texts(nano, fast):
    for tokenizer in (nano, ByteTokenizer(), TransformersTokenizer(fast)):
        assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
        assert tokenizer.encode_batch([]) == []


def test_transformers_tokenizers(nano, fast):
    tokenizer = tokenizers.load_tokenizer(fast)
    assert isinstance(tokenizer, TransformersTokenizer)
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id) == (8192, 0, 1)
    ids = tokenizer.encode("a fine film .")
    assert ids == nano.encode("a fine film .")
    assert tokenizer.decode([0, *ids, 1, *ids]) == "a fine film ."
    assert tokenizer.decode([*ids, 9000]) == "a fine film ."
    assert tokenizer.sentinel_id(3) == nano.sentinel_id(3)
    assert [tokenizer.id_to_piece(i) for i in ids] == [nano.id_to_piece(i) for i in ids]
    assert tokenizer.id_to_piece(9000) == "<9000>"
    with pytest.raises(InputError, match="no sentinel"):
        tokenizer.sentinel_id(100)


def test_saved_tokenizers_load_as_equal_ones(nano, fast, tmp_path):
    few = SentencePieceTokenizer(NANO, extra_ids=5)
    for i, tokenizer in enumerate((nano, few, ByteTokenizer(), TransformersTokenizer(fast))):
        tokenizer.save(tmp_path / str(i))
        again = tokenizers.load_tokenizer(tmp_path / str(i))
        assert type(again) is type(tokenizer)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.vocab_size == tokenizer.vocab_size
        assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_fingerprints_tell_apart_what_has_other_ids(nano, fast, tmp_path):
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in fast.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    content = json.loads((fast / "tokenizer.json").read_text())
    content["model"]["vocab"][5][1] -= 1.0
    (changed / "tokenizer.json").write_text(json.dumps(content))
    all_of_them = [
        nano,
        SentencePieceTokenizer(NANO, extra_ids=99),
        ByteTokenizer(),
        TransformersTokenizer(changed),
    ]
    fingerprints = {tokenizer.fingerprint for tokenizer in all_of_them}
    assert len(fingerprints) == len(all_of_them)
    assert all(len(f) == 71 and f.startswith("sha256:") for f in fingerprints)
    # Truncation is a caller's setting and changes no id.
    content = json.loads((fast / "tokenizer.json").read_text())
    content["truncation"] = {
        "direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    (changed / "tokenizer.json").write_text(json.dumps(content))
    assert TransformersTokenizer(changed).fingerprint == TransformersTokenizer(fast).fingerprint


def test_sentencepiece_goes_before_a_fast_tokenizer(nano, fast, tmp_path):
    for file in fast.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "spiece.model").write_bytes(tokenizers.resolve_path(NANO).read_bytes())
    found = tokenizers.find_tokenizer(tmp_path)
    assert isinstance(found, SentencePieceTokenizer)
    assert found.encode("the <extra_id_0>") == nano.encode("the <extra_id_0>")


def test_load_tokenizer_knows_what_it_is_given(nano, tmp_path, monkeypatch):
    assert isinstance(tokenizers.load_tokenizer("byt5"), ByteTokenizer)
    assert tokenizers.load_tokenizer("package:nano").fingerprint == nano.fingerprint
    assert tokenizers.load_tokenizer(NANO).fingerprint == nano.fingerprint
    assert tokenizers.find_tokenizer(tmp_path) is None

    asked = []

    def download(repository, *, revision, allow_patterns):
        asked.append(repository)
        nano.save(tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub = tokenizers.load_tokenizer("google/t5-v1_1-small")
    assert asked == [hub.name] == ["google/t5-v1_1-small"]
    assert hub.fingerprint == nano.fingerprint


def test_what_is_no_tokenizer(tmp_path, monkeypatch):
    def offline(repository, *, revision, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.json").write_text("{}")
    for source, message in [
        (tmp_path / "no.model", "no tokenizer at .*: the path does not exist"),
        (tmp_path / "nowhere", "no tokenizer at .*: the path does not exist"),
        (tmp_path / "empty", "no tokenizer in it; it needs spiece.model"),
        (tmp_path / "file.json", r"must be a SentencePiece \*.model"),
        ("some/model", "some/model: not a local path, and the Hugging Face hub cannot be reached"),
    ]:
        with pytest.raises(InputError, match=message):
            tokenizers.load_tokenizer(source)


@pytest.mark.parametrize("content", [b"", b"\x00" * 20, b"not a model" * 99])
def test_broken_sentencepiece_files(tmp_path, content):
    path = tmp_path / "spiece.model"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"spiece\.model: not a SentencePiece model"):
        tokenizers.load_tokenizer(tmp_path)


def test_case_5_8_a_piece_that_is_no_text(tmp_path):
    source = Path(tokenizers.__file__).parents[1] / "assets" / "nano" / "spiece.model"
    path = tmp_path / "spiece.model"
    path.write_bytes(source.read_bytes().replace(b"the", b"t\xffe", 1))
    with pytest.raises(InputError, match=r"spiece\.model: damaged, piece \d+ is not UTF-8 text"):
        tokenizers.load_tokenizer(tmp_path)


def test_broken_json_files(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {')
    with pytest.raises(InputError, match="transformers cannot load this tokenizer"):
        tokenizers.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"_config\.json: the file is truncated or not a JSON"):
        tokenizers.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(
        InputError, match=r"_config\.json: .* not a JSON object \(it holds a list\)"
    ):
        tokenizers.load_tokenizer(tmp_path)


@pytest.mark.parametrize("count", [-1, "100", 1.5, True, 10**12])
def test_a_number_of_sentinels_that_is_none(tmp_path, nano, count):
    nano.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": count}))
    with pytest.raises(
        InputError,
        match=f"spiece.model: extra_ids must be an integer from 0 to 10000, got {count!r}",
    ):
        tokenizers.load_tokenizer(tmp_path)


@pytest.mark.parametrize("eos_id", [2, -1])
def test_case_1_6_a_model_needs_an_end_of_sequence_and_no_padding(tmp_path, eos_id):
    prefix = tmp_path / "llama"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three four"] * 9),
        model_prefix=str(prefix),
        vocab_size=13,
        eos_id=eos_id,
        minloglevel=2,
    )
    if eos_id == 2:
        tokenizer = SentencePieceTokenizer(f"{prefix}.model")
        assert (tokenizer.unk_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 2, -1)
        return
    with pytest.raises(InputError, match="it has no end of sequence"):
        SentencePieceTokenizer(f"{prefix}.model")


def test_check_vocabulary(nano):
    tokenizers.check_vocabulary(nano, 8192)
    with pytest.raises(InputError, match="its 8192 ids do not fit the model's 8191 embedding"):
        tokenizers.check_vocabulary(nano, 8191)


def test_train_sentencepiece(tmp_path):
    texts = [f"the {a} {b} is fine" for a in ("red", "blue", "old") for b in ("car", "film", "hat")]
    path = tmp_path / "own.model"
    tokenizers.train_sentencepiece(texts * 5, 22, path)
    tokenizer = SentencePieceTokenizer(path)
    assert tokenizer.vocab_size == 122
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    assert tokenizer.decode(tokenizer.encode("the red hat is fine")) == "the red hat is fine"
    again = tmp_path / "again.model"
    tokenizers.train_sentencepiece(texts * 5, 22, again)
    assert again.read_bytes() == path.read_bytes()
    with pytest.raises(InputError, match="vocab_size=4000: SentencePiece refuses"):
        tokenizers.train_sentencepiece(texts, 4000, path)


@pytest.mark.shared
def test_the_real_t5_vocabulary():
    tokenizer = SentencePieceTokenizer(SHARED / "tokenizers" / "t5_32k.model")
    ids = tokenizer.encode("translate English to German: The house is wonderful.")
    assert ids == [13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5]
    assert tokenizer.vocab_size == 32_100
    assert [tokenizer.sentinel_id(k) for k in (0, 99)] == [32_099, 32_000]
    assert tokenizer.encode("The <extra_id_0> walks in <extra_id_1> park") == [
        37, 32_099, 10_681, 16, 32_098, 2_447
    ]  # fmt: skip
    tokenizers.check_vocabulary(tokenizer, 32_128)


def test_case_1_1_one_vocabulary_has_one_fingerprint(nano, fast, tmp_path):
    """spiece.model and the tokenizer.json that transformers makes of it."""
    again = TransformersTokenizer(fast)
    assert again.fingerprint == nano.fingerprint
    again.save(tmp_path)
    assert tokenizers.load_tokenizer(tmp_path).fingerprint == nano.fingerprint
    assert nano.fingerprint != SentencePieceTokenizer(NANO, extra_ids=99).fingerprint


def test_case_1_1_fingerprints_that_prompts_recorded_stay_valid(nano, fast):
    """As ptjax 0.1.0 wrote them for ptjax-nano, and for a tokenizer.json."""
    assert nano.former_fingerprints == (
        "sha256:2e3fe211a08792e04620c63b204a5110da303f34bc741a9d2c4d67c87c56bae6",
    )
    again = TransformersTokenizer(fast)
    content = json.loads(again._tokenizer.backend_tokenizer.to_str())
    former = json.dumps({**content, "truncation": None, "padding": None}, sort_keys=True)
    assert again.former_fingerprints == (f"sha256:{hashlib.sha256(former.encode()).hexdigest()}",)
    for tokenizer in (nano, again):
        for recorded in (tokenizer.fingerprint, *tokenizer.former_fingerprints):
            prompt = PromptFile(np.zeros((2, 64), np.float32), {"tokenizer_fingerprint": recorded})
            checked = check_prompt(backbone_with(tokenizer), prompt)
            assert checked.metadata["tokenizer_fingerprint"] == tokenizer.fingerprint
        other = PromptFile(np.zeros((2, 64), np.float32), {"tokenizer_fingerprint": "sha256:0"})
        with pytest.raises(InputError, match="with the tokenizer sha256:0, not with that of"):
            check_prompt(backbone_with(tokenizer), other)


def backbone_with(tokenizer) -> Backbone:
    config = tiny_config(8192, emb_dim=64)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    return Backbone(config, {}, print, tokenizer, "sha256:b", "tiny", mesh)


def rewrite_fast(fast: Path, target: Path, **changes) -> Path:
    """A copy of the folder with other top-level entries in its tokenizer.json.

    Its class is the general one: T5's makes its own pre-tokenizer, whatever the file says.
    """
    shutil.copytree(fast, target)
    config = json.loads((fast / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    content = json.loads((fast / "tokenizer.json").read_text())
    (target / "tokenizer.json").write_text(json.dumps({**content, **changes}))
    return target


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
@pytest.mark.parametrize("split", [False, True])
def test_only_sentencepieces_way_with_spaces_has_its_fingerprint(
    nano, fast, tmp_path, scheme, split
):
    spaces = {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True
    }  # fmt: skip
    if split:
        spaces = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, spaces]}
    tokenizer = TransformersTokenizer(rewrite_fast(fast, tmp_path / "own", pre_tokenizer=spaces))
    assert (tokenizer.fingerprint == nano.fingerprint) == (scheme == "always")


def test_a_file_of_another_vocabulary_beside_tokenizer_json_is_no_loss(nano, fast, tmp_path):
    folder = tmp_path / "both"
    shutil.copytree(fast, folder)
    (folder / "vocab.json").write_text("{}")
    assert TransformersTokenizer(folder).encode_batch(TEXTS) == nano.encode_batch(TEXTS)


def test_the_reason_why_transformers_cannot_load_is_cut(fast, tmp_path):
    folder = rewrite_fast(fast, tmp_path / "own", version="9" * 400)
    with pytest.raises(InputError) as refused:
        TransformersTokenizer(folder)
    reason = re.search(r"cannot load this tokenizer \((.*)\); check its files", str(refused.value))
    assert reason is not None and len(reason[1]) == 300
