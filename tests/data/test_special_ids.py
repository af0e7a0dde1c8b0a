"""Padding, start and end of texts come from the files, and lengths say what is padding."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from conftest import tune
from t5_ids import T5_IDS, decode
from tiny import save_tiny, tiny_config

from ptjax import inspect
from ptjax.backbones import describe
from ptjax.backbones.load import load_backbone
from ptjax.data.batch import SpecialIds, make_batch, make_packed_batch, trailing_lengths
from ptjax.data.packing import PackedBatches
from ptjax.data.pipeline import SweepBatches, TrainBatches, make_buckets
from ptjax.data.preprocess import TokenizedExamples, TokenRows
from ptjax.data.tokenizer import SentencePieceTokenizer
from ptjax.errors import InputError
from ptjax.inference import forward, generate, labels
from ptjax.inference.predict import rank
from ptjax.interop.huggingface_format import make_config_json
from ptjax.models.config import T5Config

MADLAD = {"pad_id": 1, "eos_ids": (2,), "decoder_start_id": 0}
WORDS = ["red", "green", "blue", "cold", "warm", "dark", "light", "old"]


def make_tokenizer(**ids: int) -> SentencePieceTokenizer:
    """A vocabulary of 24 pieces and 60 sentinels, with its special ids where `ids` say."""
    model = io.BytesIO()
    rng = np.random.default_rng(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(rng.choice(WORDS, 6)) for _ in range(200)]),
        model_writer=model,
        vocab_size=24,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
        **ids,
    )
    # Sentinels fill it up to more than half of the embedding, as `check_vocabulary` wants it.
    return SentencePieceTokenizer(model.getvalue(), extra_ids=60)


@pytest.fixture(scope="module")
def madlad(tmp_path_factory) -> Any:
    """A random model with MADLAD-400's ids: unknown 0, padding 1, end 2."""
    folder = tmp_path_factory.mktemp("madlad")
    tokenizer = make_tokenizer(unk_id=0, pad_id=1, eos_id=2)
    return load_backbone(save_tiny(folder, tiny_config(128, **MADLAD), tokenizer=tokenizer))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model with T5's ids and no tokenizer."""
    return save_tiny(tmp_path, tiny_config(128))


def rewrite(path: Path, **keys: Any) -> None:
    raw = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(raw | keys))


def source_of(*rows: list[int]) -> TokenizedExamples:
    """Examples whose inputs and targets are `rows`."""
    offsets = np.cumsum([0, *map(len, rows)])
    tokens = TokenRows(np.concatenate(rows).astype(np.int32), offsets, truncated=0)
    return TokenizedExamples(tokens, tokens)


# What the files say


def test_case_1_5_start_and_forced_first_token_come_from_the_files(folder):
    start = {"decoder_start_token_id": 101}
    rewrite(folder / "config.json", **start, forced_bos_token_id=102, eos_token_id=[1, 7])
    config = load_backbone(folder).config
    assert config.special_ids == SpecialIds(0, (1, 7), 101, 102)
    # transformers generates by generation_config.json alone where there is one.
    rewrite(folder / "generation_config.json", **start, eos_token_id=9)
    assert load_backbone(folder).config.special_ids == SpecialIds(0, (9,), 101, None)
    rewrite(folder / "generation_config.json", forced_bos_token_id=103, eos_token_id=None)
    config = load_backbone(folder).config
    assert config.special_ids == SpecialIds(0, (1, 7), 101, 103)
    described = inspect.show(describe.describe(folder))
    for line in ("pad id: 0", "eos ids: 1, 7", "decoder start id: 101", "forced bos id: 103"):
        assert f"\n  {line}\n" in described


def test_case_1_5_two_starts_are_refused_unless_the_user_says_which(folder):
    rewrite(folder / "config.json", decoder_start_token_id=101)
    rewrite(folder / "generation_config.json", decoder_start_token_id=55)
    message = "targets start with 101 .* generated texts with 55 .* decoder_start_id = 101 or 55"
    with pytest.raises(InputError, match=message):
        load_backbone(folder)
    assert load_backbone(folder, decoder_start_id=55).config.decoder_start_id == 55
    # Where no start is named, generation starts with `bos_token_id`.
    (folder / "generation_config.json").write_text('{"bos_token_id": 44}')
    with pytest.raises(InputError, match="generated texts with 44"):
        load_backbone(folder)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_how_transformers_would_generate_is_said(folder, caplog, file):
    """By config.json alone too, as 5.24 does where there is no other file."""
    plain = {"num_beams": 1, "do_sample": False, "bad_words_ids": None, "length_penalty": 2.0}
    rewrite(folder / file, **plain)
    load_backbone(folder)
    assert "generates with" not in caplog.text
    rewrite(folder / file, num_beams=4, no_repeat_ngram_size=3, forced_eos_token_id=1)
    load_backbone(folder)
    [line] = [line for line in caplog.messages if "generates with" in line]
    listed = "num_beams = 4, no_repeat_ngram_size = 3, forced_eos_token_id = 1"
    assert line.startswith(f"{folder / file}: transformers generates with {listed}; ptjax ignores")


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "pad_token_id", 128),
        ("config.json", "decoder_start_token_id", "0"),
        ("config.json", "decoder_start_token_id", [0]),
        ("config.json", "eos_token_id", [1, -1]),
        ("generation_config.json", "forced_bos_token_id", True),
    ],
)
def test_case_1_5_what_is_no_id_is_refused_by_name(folder, file, key, value):
    rewrite(folder / file, **{key: value})
    with pytest.raises(InputError, match=f"{file}: {key} is .* of a vocabulary of 128"):
        load_backbone(folder)


def test_case_1_5_ids_are_written_back(tmp_path):
    config = tiny_config(128, pad_id=3, eos_ids=(2, 5), decoder_start_id=4, forced_bos_id=6)
    # An older file would say otherwise.
    rewrite(tmp_path / "generation_config.json", decoder_start_token_id=0, eos_token_id=1)
    save_tiny(tmp_path, config)
    assert load_backbone(tmp_path).config == config
    plain = make_config_json(tiny_config(128), "float32")
    assert "forced_bos_token_id" not in plain and plain["eos_token_id"] == 1


def test_case_1_5_untold_ids_are_t5s_and_said(folder, t5_1_1):
    told = {"pad_id", "eos_ids", "decoder_start_id", "forced_bos_id"}
    assert told <= set(t5_1_1.assumed)  # a T5X checkpoint, which tells none
    assert not told & set(load_backbone(folder).assumed)
    rewrite(folder / "config.json", decoder_start_token_id=None, eos_token_id=None)
    backbone = load_backbone(folder)
    assert backbone.config.special_ids == T5_IDS
    assert told & set(backbone.assumed) == {"decoder_start_id", "eos_ids"}


def test_case_1_5_a_tokenizer_ends_texts_as_the_model_does(folder):
    make_tokenizer(unk_id=0, pad_id=1, eos_id=2).save(folder)
    with pytest.raises(InputError, match=r"ends texts with id 2, the model with 1; .*\(2,"):
        load_backbone(folder)
    for chosen in ((2, 7), [2, 7]):
        assert load_backbone(folder, eos_ids=chosen).config.eos_ids == (2, 7)
    rewrite(folder / "config.json", eos_token_id=[1, 2])
    assert load_backbone(folder).config.eos_ids == (1, 2)


# Start, force and stop


def test_case_1_5_a_start_is_what_is_fed_by_hand():
    """Token 101 in the place of the 0: nothing else of a batch, packed or not, differs."""
    ids = SpecialIds(0, (1,), 101, 102)
    rows = [[5, 6, 1], [7, 1]]
    sizes = {"input_length": 8, "target_length": 8}
    for make, more in (
        (make_batch, ()),
        (functools.partial(make_packed_batch, row_count=1), (np.zeros(2, int),)),
    ):
        arrays = [np.array(row) for row in rows]
        plain = make(arrays, arrays, *more, **sizes, ids=T5_IDS)
        started = make(arrays, arrays, *more, **sizes, ids=ids)
        changed = plain.pop("decoder_input_tokens") != started["decoder_input_tokens"]
        assert np.unique(started.pop("decoder_input_tokens")[changed]).tolist() == [101]
        segments = plain.get("decoder_segment_ids", np.ones((2, 1), int))
        first = np.diff(segments, axis=1, prepend=0) > 0
        np.testing.assert_array_equal((changed & first[:, : changed.shape[1]]).sum(), len(rows))
        for name, array in plain.items():  # a forced token changes no target
            np.testing.assert_array_equal(array, started[name])


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Any:
    """A model whose decoder starts with 101, as its config.json says."""
    folder = tmp_path_factory.mktemp("started")
    return load_backbone(save_tiny(folder, tiny_config(128, decoder_start_id=101)))


def log_probs_of(backbone: Any, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Teacher-forced log p [B, L] of targets behind the backbone's start."""
    start = np.full((len(targets), 1), backbone.config.decoder_start_id)
    fed = np.concatenate([start, targets[:, :-1]], axis=1)
    batch = {"encoder_input_tokens": inputs, "decoder_input_tokens": fed}
    log_probs = jax.nn.log_softmax(forward.forward(backbone, batch))
    return np.take_along_axis(np.asarray(log_probs), targets[..., None], -1)[..., 0]


INPUTS = np.array([[5, 6, 1, 0], [9, 1, 0, 0], [40, 50, 60, 1]], np.int32)


@pytest.mark.parametrize("forced", [None, 102])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_case_1_5_decoding_starts_and_is_forced(started, num_beams, forced):
    ids = SpecialIds(0, (126,), 101, forced)
    settings = {"ids": ids, "max_length": 5, "num_beams": num_beams, "alpha": 0.0}
    tokens, scores = decode(started.apply_fn, started.variables, INPUTS, **settings)
    tokens = np.asarray(tokens)
    assert not (tokens == 126).any()
    gained = log_probs_of(started, INPUTS, tokens)
    if forced is not None:
        assert (tokens[:, 0] == forced).all()
        gained[:, 0] = 0  # certain, as transformers' beam search counts it
    np.testing.assert_allclose(scores, gained.sum(axis=1), rtol=1e-5)
    other = decode(
        started.apply_fn,
        started.variables,
        INPUTS,
        **settings | {"ids": dataclasses.replace(ids, decoder_start_id=0)},
    )
    assert not np.allclose(other[1], scores, atol=1e-2)  # the start is felt


def test_case_1_5_any_end_ends_a_text_and_padding_follows(started):
    free = SpecialIds(9, (126,), 101, None)
    settings = {"max_length": 6}
    model = started.apply_fn, started.variables, INPUTS
    tokens = np.asarray(decode(*model, ids=free, **settings)[0])
    ends = tuple({int(tokens[0, 2]), int(tokens[1, 4])})
    found = decode(*model, ids=dataclasses.replace(free, eos_ids=ends), **settings)[0]
    for row, cut in zip(tokens.tolist(), np.asarray(found).tolist(), strict=True):
        stop = next((i for i, token in enumerate(row) if token in ends), len(row) - 1) + 1
        assert cut == row[:stop] + [9] * (6 - stop)
        assert generate.before_end(cut, dataclasses.replace(free, eos_ids=ends)) == [
            token for token in row[:stop] if token not in ends
        ]


def test_case_1_5_labels_are_ranked_behind_the_start_as_they_are(started):
    sets = labels.Labels(np.array([[5, 1, 0], [0, 7, 1]]), np.array([2, 3]))
    for forced in (None, 102):
        ids = dataclasses.replace(started.config.special_ids, forced_bos_id=forced)
        lengths = trailing_lengths(INPUTS, 0)
        model = started.apply_fn, started.variables
        ranked = labels.rank(*model, INPUTS, lengths, sets, ids=ids)
        for c, (row, length) in enumerate(zip(*sets, strict=True)):
            targets = np.tile(row[:length], (len(INPUTS), 1))
            expected = log_probs_of(started, INPUTS, targets).sum(axis=1)
            np.testing.assert_allclose(ranked[:, c], expected, rtol=1e-5)


# Lengths, not ids


def test_case_1_6_padding_of_another_id_is_invisible(madlad):
    rows, targets = [[5, 0, 1, 9, 2], [0, 2], [7]], [[3, 2], [0, 2], [2]]
    ids = madlad.config.special_ids
    batch = make_batch(rows, targets, input_length=9, target_length=4, ids=ids)
    assert batch["encoder_input_tokens"][1].tolist() == [0, 2] + [1] * 7
    padded = forward.forward(madlad, batch)
    for i, (row, target) in enumerate(zip(rows, targets, strict=True)):
        sizes = {"input_length": len(row), "target_length": len(target)}
        alone = make_batch([row], [target], **sizes, ids=ids)
        want = forward.forward(madlad, alone)[0]
        # Sums over more, masked positions run in another order.
        np.testing.assert_allclose(padded[i, : len(target)], want, rtol=0, atol=1e-5)
    # Without lengths they are read off the trailing padding, here with the same result.
    del batch["encoder_lengths"]
    np.testing.assert_array_equal(forward.forward(madlad, batch), padded)
    prompt = np.ones((2, 16), np.float32)
    weights = batch.pop("decoder_loss_weights")
    unsaid = forward.loss_and_prompt_gradient(madlad, batch, prompt)
    said = forward.loss_and_prompt_gradient(
        madlad, batch | {"decoder_loss_weights": weights}, prompt
    )
    np.testing.assert_array_equal(unsaid[0], said[0])


def test_case_1_6_rows_that_begin_with_padding_need_lengths(madlad):
    batch = {
        "encoder_input_tokens": np.array([[5, 2, 1, 1], [1, 1, 5, 2]]),
        "decoder_input_tokens": np.zeros((2, 1), int),
    }
    with pytest.raises(InputError, match=r"row 1 .* begins with the padding id 1 .* on the right"):
        forward.forward(madlad, batch)
    forward.forward(madlad, batch | {"encoder_lengths": [2, 4]})
    for lengths in ([2], [2, 5], [-1, 2]):
        with pytest.raises(InputError, match="must be 2 numbers from 0 to 4"):
            forward.forward(madlad, batch | {"encoder_lengths": lengths})


def test_case_1_6_a_network_is_not_run_without_lengths(madlad):
    tokens = jnp.array([[5, 2]])
    for given in ({}, {"encoder_segment_ids": tokens, "encoder_lengths": jnp.array([2])}):
        with pytest.raises(InputError, match=r"need encoder_lengths, packed rows need"):
            madlad.apply_fn(madlad.variables, tokens, tokens, **given)


def test_case_1_6_trailing_lengths():
    rows = np.array([[5, 0, 3, 3], [3, 3, 3, 3], [3, 3, 5, 3], [5, 5, 5, 5]])
    assert trailing_lengths(rows, 3).tolist() == [2, 0, 3, 4]
    assert trailing_lengths(rows[:, :0], 3).tolist() == [0] * 4


def test_case_1_6_id_0_is_a_word_in_every_batch(madlad):
    source, ids = source_of([0, 0, 2], [5, 2], [0, 2], [0, 0, 0, 2]), madlad.config.special_ids
    settings = {"batch_size": 2, "seed": 0, "ids": ids}
    plain = TrainBatches(source, buckets=make_buckets(source, smallest=4), **settings)
    packed = PackedBatches(source, prompt_slots=1, **settings)
    weights = 0.0
    for number in range(2):
        batch = plain.batch(number)
        for row, length in enumerate(batch["encoder_lengths"]):
            assert set(batch["encoder_input_tokens"][row, length:].tolist()) <= {1}
            assert batch["encoder_input_tokens"][row, length - 1] == 2
        weights += batch["decoder_loss_weights"].sum()
        batch = packed.batch(number)
        for side in ("encoder_input", "decoder_target"):
            own = batch[f"{side.split('_')[0]}_segment_ids"] > 0
            assert (batch[f"{side}_tokens"][~own] == 1).all()
        weights += batch["decoder_loss_weights"].sum()
    assert weights == 2 * (3 + 2 + 2 + 4)


def test_case_1_6_a_banks_smaller_batch_is_padded_with_its_padding(madlad):
    ids = madlad.config.special_ids
    members = []
    for rows, length in (([[5, 2]], 2), ([[5, 6, 7, 2]], 4)):
        source = source_of(*rows)
        shape = {"buckets": [(length, length)], "batch_size": 1, "seed": 0}
        members.append(TrainBatches(source, **shape, ids=ids))
    batch = SweepBatches(members).batch(0)
    assert batch["encoder_input_tokens"].tolist() == [[[5, 2, 1, 1]], [[5, 6, 7, 2]]]
    assert batch["encoder_lengths"].tolist() == [[2], [4]]
    assert batch["decoder_loss_weights"].tolist() == [[[1, 1, 0, 0]], [[1] * 4]]


@pytest.mark.parametrize("pack", [False, True])
def test_case_1_6_tunes_generates_and_ranks(madlad, tmp_path, pack):
    from ptjax.data.tasks import Task
    from ptjax.settings import TrainSchedule

    rng = np.random.default_rng(0)
    lines = []
    for i in range(16):
        words, label = rng.choice(WORDS, 1 + i % 5), ("cold", "warm")[i % 2]
        lines.append(json.dumps({"text": " ".join(words), "label": label}))
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    task = Task(
        name="words",
        data_dir=str(tmp_path),
        splits={"train": "x.jsonl", "validation": "x.jsonl"},
        inputs="{text}",
        label="label",
        verbalizer={"cold": "cold", "warm": "warm"},
    )
    schedule = TrainSchedule(train_steps=2, eval_period=2, log_period=1)
    lengths = {"inputs": 16, "targets": 8}
    results = tune(
        tmp_path / "run", task, madlad, schedule=schedule, pack=pack, feature_lengths=lengths
    )
    assert np.isfinite(results["best"]["value"]) if "best" in results else results
    if not pack:
        texts = ["red green", "dark"]
        together = generate.generate(madlad, texts, max_new_tokens=4)
        assert together == [generate.generate(madlad, [x], max_new_tokens=4)[0] for x in texts]
        ranked = rank(madlad, texts, ["cold", "warm"])
        alone = [rank(madlad, [x], ["cold", "warm"])[0] for x in texts]
        for one, other in zip(ranked, alone, strict=True):
            assert one.text == other.text
            assert one.score == pytest.approx(other.score, abs=1e-4)


# Against transformers


@pytest.fixture
def torch_model(tmp_path) -> Any:
    """`torch_model(config)`: the folder of a model and what transformers loads from it."""
    import transformers

    def make(config: T5Config) -> Any:
        save_tiny(tmp_path, config)
        return tmp_path, transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()

    return make


@pytest.mark.oracle
def test_case_1_5_loss_and_texts_are_transformers(torch_model):
    import torch

    path, theirs = torch_model(tiny_config(128, decoder_start_id=101, forced_bos_id=102))
    ours = load_backbone(path)
    labels = np.array([[9, 8, 7, 1], [30, 31, 32, 33], [102, 50, 51, 1]])
    inputs = torch.tensor(INPUTS, dtype=torch.long)
    mask = (inputs != 0).long()
    with torch.no_grad():
        want = theirs(input_ids=inputs, attention_mask=mask, labels=torch.tensor(labels)).loss
        texts = theirs.generate(input_ids=inputs, attention_mask=mask, max_new_tokens=6)
    mean = -log_probs_of(ours, INPUTS, labels).mean()
    np.testing.assert_allclose(mean, float(want), rtol=1e-5)  # float32, summed in another order
    ids = ours.config.special_ids
    tokens, _ = decode(ours.apply_fn, ours.variables, INPUTS, ids=ids, max_length=6)
    np.testing.assert_array_equal(tokens, texts[:, 1:])


@pytest.mark.oracle
def test_case_1_6_logits_are_transformers(torch_model):
    import torch

    path, theirs = torch_model(tiny_config(128, **MADLAD))
    ours = load_backbone(path)
    inputs = np.array([[5, 0, 7, 2, 1, 1], [0, 2, 1, 1, 1, 1], [9, 8, 7, 6, 5, 2]])
    decoder = np.array([[0, 5, 6], [0, 7, 0], [0, 1, 2]])
    batch = {"encoder_input_tokens": inputs, "decoder_input_tokens": decoder}
    with torch.no_grad():
        want = theirs(
            input_ids=torch.tensor(inputs),
            attention_mask=torch.tensor((inputs != 1).astype(int)),
            decoder_input_ids=torch.tensor(decoder),
        ).logits.numpy()
    # float32 on both sides, summed in another order; 1e-4 as in test_torch_parity.
    np.testing.assert_allclose(forward.forward(ours, batch), want, rtol=0, atol=1e-4)
