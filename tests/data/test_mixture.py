"""Running text, the components of a mixture and their shares."""

from __future__ import annotations

import collections
import json
import pickle

import numpy as np
import pytest
from t5_ids import T5_IDS

from ptjax.data.mixture import (
    PrefixLM,
    SpanCorruption,
    TaskComponent,
    TextFiles,
    TokenFile,
    make_batches,
    mix,
)
from ptjax.data.pipeline import Shape
from ptjax.data.tasks import Task
from ptjax.data.tokenizer import ByteTokenizer
from ptjax.errors import InputError

BYTES = ByteTokenizer()
STREAM = np.arange(3, 259).repeat(3).astype(np.uint16)


class Characters:
    """Every character is the id of its code point; the end is id 1."""

    eos_id = 1

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode_batch(self, texts):
        return [[ord(character) for character in text] for text in texts]


def write_lines(path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


# Running text


def test_documents_are_those_of_all_files_in_order(tmp_path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"body": f"a{i}"} for i in range(7)])
    (tmp_path / "b.txt").write_text("b0\nb1\n")
    files = {"a.jsonl": "body", "b.txt": "text"}
    text = TextFiles(files, data_dir=str(tmp_path), take_every={"a.jsonl": 3})
    assert list(text.documents()) == ["a0", "a3", "a6", "b0", "b1"]
    # Without `data_dir` the paths are whole.
    whole = TextFiles({str(tmp_path / "b.txt"): "text"})
    assert list(whole.documents()) == ["b0", "b1"]

    def halves(fields):
        return [{"body": fields["body"][:1]}, {"body": fields["body"][1:]}]

    cut = TextFiles({"a.jsonl": "body"}, str(tmp_path), halves, {"a.jsonl": 6})
    assert list(cut.documents()) == ["a", "0", "a", "6"]
    wrong = TextFiles({"a.jsonl": "text"}, data_dir=str(tmp_path))
    with pytest.raises(InputError, match=r"a\.jsonl:1: no field 'text'"):
        list(wrong.documents())


def test_every_document_ends_and_their_order_follows_from_the_seed(tmp_path) -> None:
    documents = [f"{i:04}" for i in range(4100)]  # more than are tokenised at once
    (tmp_path / "a.txt").write_text("\n".join(documents))
    text = TextFiles({"a.txt": "text"}, data_dir=str(tmp_path))
    streams = [text.tokenize(BYTES, seed) for seed in (0, 0, 1)]
    orders = []
    for stream in streams:
        rows = stream.reshape(len(documents), 5)
        assert (rows[:, -1] == BYTES.eos_id).all()
        orders.append([BYTES.decode(row) for row in rows])
        assert sorted(orders[-1]) == documents
    assert orders[0] == orders[1] != orders[2] != documents


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.int32), (131_072, np.int32)]
)
def test_the_stream_holds_every_id_of_the_vocabulary(tmp_path, vocab_size, dtype) -> None:
    top = chr(vocab_size - 1 if vocab_size != 65_536 else 0xFFFD)
    (tmp_path / "a.txt").write_text(f"a{top}\n", "utf-8")
    text = TextFiles({"a.txt": "text"}, data_dir=str(tmp_path))
    stream = text.tokenize(Characters(vocab_size), 0)
    assert stream.tolist() == [ord("a"), ord(top), 1]
    assert stream.dtype == dtype


def test_no_document_is_refused(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("x\n")
    none = TextFiles({"a.txt": "text"}, str(tmp_path), lambda fields: [])
    for text, named in ((none, "a.txt"), (TextFiles({}), "{}")):
        with pytest.raises(InputError, match=f"no document in the running text of {named}"):
            text.tokenize(BYTES, 0)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_a_token_file_is_read_as_it_is(tmp_path, dtype) -> None:
    ids = np.array([5, 0, 383, 1], dtype)
    np.save(tmp_path / "ids.npy", ids)
    read = TokenFile(str(tmp_path / "ids.npy")).tokenize(BYTES, 0)
    np.testing.assert_array_equal(read, ids)
    assert read.dtype == dtype


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((2, 3), np.int32), r"int32 \[2, 3\], but token ids are one vector of integers"),
        (np.array(5), r"int64 \[\], but token ids are one vector of integers"),
        (np.ones(3, np.float32), r"float32 \[3\], but token ids are one vector of integers"),
        (np.array([3, 384]), "ids 3 to 384, but the vocabulary has 384; tokenise the text with"),
        (np.array([-1, 3]), "ids -1 to 3, but the vocabulary has 384"),
    ],
)
def test_a_token_file_of_something_else_is_refused(tmp_path, array, message) -> None:
    np.save(tmp_path / "ids.npy", array)
    with pytest.raises(InputError, match=rf"ids\.npy: {message}"):
        TokenFile(str(tmp_path / "ids.npy")).tokenize(BYTES, 0)


def test_a_token_file_that_is_none_is_refused(tmp_path) -> None:
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps([1, 2]))
    for name in ("pickle.npy", "missing.npy"):
        with pytest.raises(InputError, match=rf"{name}: cannot be read as an \.npy array"):
            TokenFile(str(tmp_path / name)).tokenize(BYTES, 0)


# Components


def test_span_corruption_has_batches_of_one_shape() -> None:
    component = SpanCorruption(1.0, batch_size=3, input_length=32, noise_density=0.3, mean_span=2.0)
    [batches] = component.make(BYTES, STREAM, 0, T5_IDS)
    # 43 tokens, of which 13 in 6 spans are replaced: 30 + 6 and EOS would not fit into 32.
    [shape] = batches.shapes
    assert (shape.rows, shape.inputs <= 32) == (3, True)
    batch = batches.batch(0)
    assert Shape.of(batch) == shape
    # All rows are full: no example is shorter than the shape.
    assert (batch["encoder_lengths"] == shape.inputs).all()
    assert (batch["decoder_loss_weights"] == 1).all()
    noise = (batch["decoder_target_tokens"] != 1).sum(axis=1)
    assert (noise > 0.3 * shape.inputs).all()


def test_text_for_a_single_example_is_enough() -> None:
    [probe] = SpanCorruption(1.0, input_length=32).make(BYTES, STREAM, 0, T5_IDS)
    enough = STREAM[: 2 * probe.source.piece]
    [batches] = SpanCorruption(1.0, batch_size=2, input_length=32).make(BYTES, enough, 0, T5_IDS)
    assert len(batches.source) == 1
    assert batches.shapes == [probe.shapes[0]._replace(rows=2)]
    [batches] = PrefixLM(1.0, 2, 16, 8).make(BYTES, STREAM[:48], 0, T5_IDS)
    assert len(batches.source) == 1
    assert batches.shapes == [Shape(2, 16, 8)]
    assert Shape.of(batches.batch(0)) == Shape(2, 16, 8)


@pytest.mark.parametrize("component", [SpanCorruption(1.0), PrefixLM(1.0)])
def test_components_of_text_need_text(component) -> None:
    with pytest.raises(InputError, match=r"need running text: set pretrain\.text"):
        component.make(BYTES, None, 0, T5_IDS)


@pytest.fixture
def task(tmp_path) -> Task:
    write_lines(tmp_path / "a.jsonl", [{"text": "ab"[i % 2] * 5, "y": i % 2} for i in range(12)])
    return Task(
        name="t",
        inputs="{text}",
        label="y",
        verbalizer={"0": "no", "1": "yes"},
        splits={"train": "a.jsonl"},
        data_dir=str(tmp_path),
    )


def texts_of(batches, count: int) -> set[tuple[str, str]]:
    """(input, target) of all examples of the first batches."""
    return {
        (BYTES.decode(inputs), BYTES.decode(targets))
        for number in range(count)
        for inputs, targets in zip(
            batches.batch(number)["encoder_input_tokens"],
            batches.batch(number)["decoder_target_tokens"],
            strict=True,
        )
    }


def test_a_task_has_one_pipeline_for_each_phrasing(task) -> None:
    phrasings = [("x {text}", None), ("{text} z", {"0": "b", "1": "g"})]
    component = TaskComponent(1.0, task, phrasings, 4, input_length=8, target_length=4)
    first, second = component.make(BYTES, None, 7, T5_IDS)
    assert texts_of(first, 3) == {("x aaaaa", "no"), ("x bbbbb", "yes")}
    assert texts_of(second, 3) == {("aaaaa z", "b"), ("bbbbb z", "g")}
    assert (first.seed, second.seed) == (7, 8)
    assert [shape.rows for shape in first.shapes] == [4]
    given = TaskComponent(1.0, task, phrasings[:1], 4, 8, 4, buckets=[(24, 6)])
    assert given.make(BYTES, None, 7, T5_IDS)[0].shapes == [Shape(4, 24, 6)]
    cut = TaskComponent(1.0, task, phrasings[:1], 4, input_length=4, target_length=3)
    assert texts_of(cut.make(BYTES, None, 7, T5_IDS)[0], 3) == {("x a", "no"), ("x b", "ye")}


def test_components_draw_apart_and_share_by_rate(task) -> None:
    phrasings = [("{text}", None), ("{text} z", None)]
    lengths = {"input_length": 8, "target_length": 4}
    components = [
        PrefixLM(3.0, batch_size=1, **lengths),
        PrefixLM(1.0, batch_size=2, **lengths),
        TaskComponent(4.0, task, phrasings, 3, buckets=[(16, 4)], **lengths),
    ]
    made = make_batches(components, STREAM, BYTES, 5, T5_IDS)
    assert [[pipeline.seed for pipeline in part] for part in made] == [[5], [105], [205, 206]]
    mixture = mix(components, made, seed=0)
    drawn = [mixture.batch(number)["encoder_input_tokens"] for number in range(1000)]
    assert collections.Counter(len(rows) for rows in drawn) == {1: 375, 2: 125, 3: 500}
    # Phrasings share equally: a row with the second one has two more bytes.
    longer = sum((rows[0] > 2).sum() > 6 for rows in drawn if len(rows) == 3)
    assert longer == 250
