"""Which ids the files of a Hugging Face folder state, and what else they would generate with."""

from __future__ import annotations

import json
from typing import Any

import pytest
from absl import logging
from etils import epath
from letters import LETTERS
from tiny import tiny_config

from ptjax.errors import InputError
from ptjax.interop.special_ids import check_end_of_sequence, read_special_ids, write_special_ids

# The defaults of transformers' `GenerationConfig`, with which it decodes greedily.
DEFAULTS = {
    "num_beams": 1,
    "do_sample": False,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
}
CHANGED = {
    "num_beams": 4,
    "do_sample": True,
    "min_length": 3,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 2,
    "repetition_penalty": 1.2,
    "encoder_repetition_penalty": 2.0,
    "min_new_tokens": 2,
    "bad_words_ids": [[5]],
    "suppress_tokens": [5],
    "begin_suppress_tokens": [5],
    "sequence_bias": [[[5], -1.0]],
    "forced_eos_token_id": 1,
    "exponential_decay_length_penalty": [3, 1.1],
}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    return lines


def read(folder: Any, generation: Any = None, chosen: Any = (), **config: Any) -> dict[str, Any]:
    """The ids of a folder whose config.json holds `config`."""
    file = folder / "generation_config.json"
    if generation is not None:
        file.write_text(json.dumps(generation))
    return read_special_ids(epath.Path(folder), {"vocab_size": 50, **config}, chosen)


@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
def test_what_generates_as_ever_is_not_spoken_of(tmp_path, said, place):
    plain = DEFAULTS | dict.fromkeys(CHANGED.keys() - DEFAULTS.keys()) | {"bad_words_ids": []}
    read(tmp_path, **({"generation": plain} if place[0] == "g" else plain))
    assert said == []


@pytest.mark.parametrize("key", CHANGED)
def test_every_setting_that_changes_a_text_is_said(tmp_path, said, key):
    read(tmp_path, DEFAULTS | {key: CHANGED[key]})
    assert len(said) == 1
    assert said[0].startswith(
        f"{tmp_path / 'generation_config.json'}: transformers generates with {key} = "
        f"{CHANGED[key]!r}; ptjax ignores this and decodes greedily"
    )
    read(tmp_path, chosen=("pad_id", "eos_ids", "decoder_start_id", "forced_bos_id"))
    assert len(said) == 1  # the files are not used


def test_which_file_decides(tmp_path):
    config = {"pad_token_id": 3, "eos_token_id": 4, "decoder_start_token_id": 5}
    ids = {"pad_id": 3, "eos_ids": (4,), "decoder_start_id": 5, "forced_bos_id": None}
    assert read(tmp_path, **config) == ids
    assert read(tmp_path, forced_bos_token_id=6, **config) == ids | {"forced_bos_id": 6}
    assert read(tmp_path) == {"forced_bos_id": None}
    # bos_token_id starts a generated text where nothing else does.
    assert read(tmp_path, bos_token_id=7) == {"decoder_start_id": 7, "forced_bos_id": None}
    there = {"pad_token_id": 8, "eos_token_id": [9, 10], "bos_token_id": 5}
    both = ids | {"eos_ids": (9, 10)}
    assert read(tmp_path, there, forced_bos_token_id=6, **config) == both
    assert read(tmp_path, there)["pad_id"] == 8
    assert read(tmp_path, {"forced_bos_token_id": 6}, **config) == ids | {"forced_bos_id": 6}
    chosen = ("pad_id", "eos_ids", "decoder_start_id", "forced_bos_id")
    assert read(tmp_path, {"decoder_start_token_id": 1}, chosen, **config) == {}


def test_two_starts_are_refused(tmp_path):
    said = (
        r"targets start with 5 \(decoder_start_token_id of config\.json\), generated texts with 6 "
        r"\(generation_config\.json\); choose one with decoder_start_id = 5 or 6"
    )
    for there in ({"decoder_start_token_id": 6}, {"bos_token_id": 6}):
        with pytest.raises(InputError, match=said):
            read(tmp_path, there, decoder_start_token_id=5)
        assert read(tmp_path, there)["decoder_start_id"] == 6
    # In one file the second is what transformers falls back to, not a contradiction.
    (tmp_path / "generation_config.json").unlink()
    assert read(tmp_path, decoder_start_token_id=5, bos_token_id=6)["decoder_start_id"] == 5


@pytest.mark.parametrize("value", [-1, 50, 1.0, True, "3", [3]])
@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
def test_what_is_no_id_is_refused_with_its_file(tmp_path, place, value):
    wrong = {"pad_token_id": value}
    with pytest.raises(InputError, match=rf"{place}: pad_token_id is .*a vocabulary of 50; corr"):
        read(tmp_path, **({"generation": wrong} if place[0] == "g" else wrong))
    assert read(tmp_path, {}, pad_token_id=49)["pad_id"] == 49


def test_ends_may_be_several_but_all_must_be_ids(tmp_path):
    assert read(tmp_path, eos_token_id=[1, 49])["eos_ids"] == (1, 49)
    assert "eos_ids" not in read(tmp_path, eos_token_id=[])
    with pytest.raises(InputError, match=r"eos_token_id is \[1, 50\], not an id"):
        read(tmp_path, eos_token_id=[1, 50])


@pytest.mark.parametrize("ends", [(1,), (1, 2)])
@pytest.mark.parametrize("forced", [None, 6])
def test_what_is_written_is_read(tmp_path, ends, forced):
    ids = {"pad_id": 3, "eos_ids": ends, "decoder_start_id": 5, "forced_bos_id": forced}
    written = write_special_ids(tiny_config(50, **ids))
    assert read(tmp_path, **json.loads(json.dumps(written))) == ids
    assert ("forced_bos_token_id" in written) == (forced is not None)
    assert written["eos_token_id"] == (1 if len(ends) == 1 else [1, 2])


def test_a_tokenizer_ends_texts_as_the_model_does():
    check_end_of_sequence(LETTERS, tiny_config(50, eos_ids=(2, 1)))
    said = r"letters: .* with id 1, the model with 2 or 3; .* load_backbone\(eos_ids=\(1,\)\)"
    with pytest.raises(InputError, match=said):
        check_end_of_sequence(LETTERS, tiny_config(50, eos_ids=(2, 3)))
