"""SentencePiece models of other makes than T5's own, in folders and re-saved by transformers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from absl import logging
from tokenizer_texts import texts

from ptjax.data.tokenizer import load_tokenizer

NAMES = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
LINES = [text for text in texts(()) if text.strip() and "\0" not in text]


def make_folder(folder: Path, config: dict[str, Any], **trainer: Any) -> Path:
    """A folder with a spiece.model trained so, without sentinels of T5's behind its pieces."""
    model = io.BytesIO()
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "vocab_size": 500}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 4),
        model_writer=model,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=3,
        **ids | trainer,
    )
    folder.mkdir()
    (folder / "spiece.model").write_bytes(model.getvalue())
    said = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0} | NAMES | config
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    (folder / "config.json").write_text('{"model_type": "t5"}')
    return folder


def resaved(folder: Path, to: Path) -> Path:
    """The folder as transformers 5 saves it again: tokenizer.json, no spiece.model."""
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(to)
    assert not (to / "spiece.model").exists()
    return to


def test_case_1_6_a_model_without_padding_takes_what_its_folder_names(tmp_path):
    """MADLAD-400's: `<unk>` 0, `<s>` 1, `</s>` 2, and `<s>` is the padding."""
    ids = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    named = {"pad_token": "<s>", "bos_token": "<s>"}
    folder = make_folder(tmp_path / "madlad", named, **ids, user_defined_symbols=["<2fr>"])
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)
    assert (reference.pad_token_id, reference.eos_token_id) == (1, 2)
    other = load_tokenizer(resaved(folder, tmp_path / "5"))
    assert other.fingerprint == tokenizer.fingerprint
    # transformers 5 writes that id 2 stands for unknown characters: the end of the text here.
    assert other.encode("a \u16a0 b") == tokenizer.encode("a \u16a0 b")
    assert 0 in other.encode("a \u16a0 b") and 2 not in other.encode("a \u16a0 b")
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.pad_id, again.fingerprint) == (1, tokenizer.fingerprint)


@pytest.mark.parametrize("symbols", [["<END>"], []], ids=["a piece", "an added token"])
def test_case_1_5_the_end_of_sequence_is_the_one_that_the_folder_names(tmp_path, symbols):
    folder = make_folder(tmp_path / "x", {"eos_token": "<END>"}, user_defined_symbols=symbols)
    tokenizer = load_tokenizer(folder)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_id == reference.eos_token_id > 2
    assert tokenizer.former_fingerprints == ()  # earlier versions ended texts with </s>
    assert tokenizer.eos_id not in tokenizer.encode("the <END> film")


def test_case_1_1_sentinels_of_mt5_after_transformers_saved_them_again(tmp_path):
    """With the space that is part of them, also behind a letter; as from spiece.model."""
    symbols = [f"▁<extra_id_{k}>" for k in range(5)]
    folder = make_folder(tmp_path / "mt5", {}, user_defined_symbols=symbols)
    one, other = load_tokenizer(folder), load_tokenizer(resaved(folder, tmp_path / "5"))
    assert one.fingerprint == other.fingerprint
    for text in (
        "the<extra_id_1>film",
        "<extra_id_0> the <extra_id_2><extra_id_3>",
        "a<extra_id_4>",
    ):
        assert one.encode(text) == other.encode(text)
        assert one.unk_id not in one.encode(text)


@pytest.mark.parametrize("mark", ["", "▁"])
def test_case_1_1_a_sentinel_brings_no_line_break_along(tmp_path, mark):
    """The added token "\\n" is found wherever a space is, and none is typed here."""
    symbols = [f"{mark}<extra_id_{k}>" for k in range(5)]
    folder = make_folder(tmp_path / "x", {}, user_defined_symbols=symbols)
    writer = transformers.AutoTokenizer.from_pretrained(folder)
    writer.add_tokens(["\n"])
    writer.save_pretrained(tmp_path / "5")
    (tmp_path / "5" / "spiece.model").write_bytes((folder / "spiece.model").read_bytes())
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "5")
    tokenizer = load_tokenizer(tmp_path / "5")
    for text in ("<extra_id_0>", "the <extra_id_1> film", "<extra_id_2> x"):
        assert tokenizer.encode(text) == reference(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("trainer", "reason"),
    [
        ({"model_type": "bpe"}, "not a unigram model"),
        ({"byte_fallback": True, "vocab_size": 800}, "byte_fallback"),
        ({"normalization_rule_name": "identity"}, "tabs and line breaks are not spaces"),
        ({"normalization_rule_name": "nfkc"}, "tabs and line breaks are not spaces"),
        ({"add_dummy_prefix": False}, "add_dummy_prefix is off"),
        ({"remove_extra_whitespaces": False}, "remove_extra_whitespaces is off"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_case_1_1_a_model_that_transformers_reads_otherwise_is_said(
    tmp_path, monkeypatch, trainer, reason
):
    said: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
    folder = make_folder(tmp_path / "x", {}, **trainer)
    tokenizer = load_tokenizer(folder)
    processor = sentencepiece.SentencePieceProcessor(str(folder / "spiece.model"))
    lines = [line for line in LINES if "<" not in line]
    assert tokenizer.encode_batch(lines) == processor.encode(lines)
    assert [f"({reason})" in line for line in said] == [True]
    if trainer.get("normalization_rule_name") == "identity":
        return  # tokenizers 0.22 makes no tokenizer.json of a model without any normalisation
    # Other ids than those of a tokenizer.json made of it, so not its fingerprint.
    other = load_tokenizer(resaved(folder, tmp_path / "5"))
    assert other.encode_batch(lines) != tokenizer.encode_batch(lines)
    assert other.fingerprint != tokenizer.fingerprint
