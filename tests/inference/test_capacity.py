"""What fits a capacity runs the program compiled for it; a prompt is checked and placed once."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from letters import LETTERS, make_backbone, random_texts

from ptjax.data.tasks import Task
from ptjax.errors import InputError
from ptjax.evaluation.evaluator import Evaluator
from ptjax.inference.bank import make_bank, place_bank
from ptjax.inference.capacity import bank_capacity, label_capacity
from ptjax.inference.generate import generate, generate_with_scores
from ptjax.inference.predict import rank
from ptjax.inference.prompts import open_prompt
from ptjax.interop.prompt_file import PromptFile
from ptjax.settings import Evaluation

RNG = np.random.default_rng(11)
MATRICES = [RNG.normal(size=(4 + i % 3, 16)).astype(np.float32) for i in range(6)]
TEXTS = random_texts(16, 25)
LABELS = ["ab", "c", "dd", "e"]


@pytest.fixture(scope="module")
def backbone(tiny):
    return make_backbone(tiny)


def bank_of(count: int):
    return make_bank({f"p{i}": matrix for i, matrix in enumerate(MATRICES[:count])})


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The programs that were compiled inside."""
    compiled: list[str] = []

    def listen(name: str, duration: float, **_: Any) -> None:
        if "backend_compile" in name:
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_generating_compiles_once_within_its_capacities(backbone):
    """A further prompt, other texts, lengths, batch sizes and numbers of new tokens."""

    def run(prompts: int, texts: int, batch_size: int, new: int, length: int = 33, **more: Any):
        bank, ids = bank_of(prompts), [i % prompts for i in range(texts)]
        chosen = [text.ljust(length, "x") for text in TEXTS[:texts]]
        return generate(
            backbone,
            chosen,
            bank,
            prompt_ids=ids,
            batch_size=batch_size,
            max_new_tokens=new,
            **more,
        )

    with compilations() as compiled:
        whole = run(5, 16, 8, 6)
        assert compiled  # else the counter counts nothing
        compiled.clear()
        run(6, 16, 8, 6)
        run(5, 9, 7, 6)
        short = run(5, 16, 8, 5)
        run(5, 16, 8, 6, length=44)
        assert compiled == []
        run(5, 16, 8, 9)
        assert compiled  # beyond a capacity
    # A greedy text is a longer one's beginning, and others were in the batch.
    assert all(x.startswith(y) for x, y in zip(whole, short, strict=True))


def test_ranking_compiles_once_within_its_capacities(backbone):
    """Another number of labels, other labels, another number of label sets, another prompt."""
    bank = bank_of(5)
    ids = [i % 5 for i in range(8)]

    def run(labels: Any, prompts: Any = bank, texts: int = 8):
        return rank(backbone, TEXTS[:texts], labels, prompts, prompt_ids=ids[:texts], batch_size=8)

    with compilations() as compiled:
        four = run(LABELS)
        assert compiled
        compiled.clear()
        run(["z", "xy", "w"])
        run(LABELS, bank_of(6), texts=7)
        assert compiled == []
        two = run(LABELS[:2])
        assert compiled  # most tasks have two labels, and pay for no more
        sets = run([LABELS[:3], LABELS] * 4)
        compiled.clear()
        run([LABELS[:2], LABELS[1:]] * 4)
        assert compiled == []
    # Padding is invisible: the same likelihoods whatever stands beside a label.
    for one, other, mixed in zip(two, four, sets, strict=True):
        best = LABELS[:2][int(np.argmax([other.probabilities[x] for x in LABELS[:2]]))]
        assert one.text == best
        share = other.probabilities[best] / sum(other.probabilities[x] for x in LABELS[:2])
        assert one.probabilities[best] == pytest.approx(share, rel=1e-5)  # float32
        if len(mixed.probabilities) == 4:
            assert mixed.probabilities == pytest.approx(other.probabilities, rel=1e-5)


def test_an_ensemble_compiles_nothing_for_a_further_prompt(backbone, tmp_path):
    rows = "".join(f"{text},{i % 2}\n" for i, text in enumerate(TEXTS))
    (tmp_path / "test.csv").write_text("text,label\n" + rows)
    task = Task(
        name="t",
        inputs="{text}",
        label="label",
        verbalizer={"0": "a", "1": "b"},
        metrics="accuracy",
        splits={"test": str(tmp_path / "test.csv")},
    )
    lengths = {"inputs": 30, "targets": 4}
    evaluator = Evaluator(task, backbone, LETTERS, lengths, Evaluation(batch_size=12))
    with compilations() as compiled:
        five = evaluator.predict_bank(bank_of(5), "test")
        assert compiled
        compiled.clear()
        six = evaluator.predict_bank(bank_of(6), "test")
        assert compiled == []
    assert six.members[:5] == five.members and len(six.members) == 6


def test_capacities_hold_what_they_round_up():
    assert bank_capacity(500, 100) == bank_capacity(501, 97) == (512, 104)
    assert label_capacity(2, 2) == (2, 2) and label_capacity(17, 5) == (32, 8)
    bank = bank_of(5).arrays
    placed = place_bank(bank, jax.sharding.Mesh(np.array(jax.devices()[:1]), "data"))
    assert placed.prompt.shape == (6, 6, 16) and placed.lengths.tolist() == [4, 5, 6, 4, 5, 0]
    np.testing.assert_array_equal(placed.prompt[:5], bank.prompt)


# A prompt is checked once


class CountedMetadata(dict):
    """Counts how often it is read."""

    reads = 0

    def get(self, *arguments: Any) -> Any:
        self.reads += 1
        return super().get(*arguments)


@pytest.mark.parametrize("many", [False, True])
def test_a_prompt_is_checked_when_it_is_added(backbone, many):
    metadata = CountedMetadata(backbone_name="tiny", input_length=9)
    file = PromptFile(MATRICES[0], metadata)
    prompt = make_bank({"a": file}) if many else file
    settings: dict[str, Any] = {"max_new_tokens": 2, "prompt_ids": ["a"] if many else None}
    texts = generate_with_scores(backbone, ["abc"], prompt, **settings)
    reads = metadata.reads
    assert reads > 0
    again = generate_with_scores(backbone, ["abc"], prompt, **settings)
    assert again == texts and metadata.reads == reads
    # The result of the door passes it unchanged, and so is not checked or placed again.
    opened = open_prompt(backbone, prompt)
    assert open_prompt(backbone, opened) is opened is open_prompt(backbone, prompt)


def test_an_allowed_mismatch_is_allowed_to_its_result_alone(backbone):
    file = PromptFile(MATRICES[0], {"backbone_fingerprint": "sha256:1"})
    used = open_prompt(backbone, file, allow_mismatch=True)
    assert open_prompt(backbone, used) is used
    with pytest.raises(InputError, match="was tuned on a backbone with the backbone sha256:1"):
        open_prompt(backbone, file)


def test_opened_prompts_are_not_kept_alive(backbone):
    bank, file, array = bank_of(2), PromptFile(MATRICES[0], {"backbone_name": "tiny"}), MATRICES[1]
    opened = [open_prompt(backbone, prompt) for prompt in (bank, file, array)]
    alive = [weakref.ref(x) for x in (bank, file, *opened)]
    del bank, file, opened
    gc.collect()
    assert [x() for x in alive] == [None] * 5
