"""Suggested settings: lengths, prompt, batch and steps from data, and what a run does with them."""

from __future__ import annotations

import dataclasses
import json
import types
from typing import Any

import pytest

import ptjax
from ptjax.data.byte_tokenizer import ByteTokenizer
from ptjax.data.preprocess import check_labels
from ptjax.errors import InputError
from ptjax.methods.initializers import ClassLabels, SampledVocabulary
from ptjax.settings import TrainSchedule
from ptjax.trainer import suggest
from ptjax.trainer.identity import describe

SOURCE: Any = types.SimpleNamespace(tokenizer=ByteTokenizer())
"""All that a suggestion needs of a backbone. A text of n letters has n + 1 tokens."""


def suggested(texts: list[str], labels: list[str], method: Any = None, **how: Any) -> Any:
    """The settings for records of these texts, with the labels in turns."""
    records = [{"text": text, "label": labels[i % len(labels)]} for i, text in enumerate(texts)] * 2
    column: Any = {} if how else {"label": "label"}
    # The validation split holds one record of each label, so its share is negligible.
    held_out = [{"text": "x", "label": label} for label in labels]
    task = ptjax.Task.from_records(records, held_out, inputs="{text}", **column, **how)
    return ptjax.suggest_settings(SOURCE, task, method)


@pytest.mark.parametrize(
    ("lengths", "length"),
    [
        ([10] * 200, 64),  # with room for longer ones
        ([10] * 199 + [400], 64),  # 99.5% fit
        ([10] * 190 + [400] * 10, 416),
        ([79] * 200, 80),
        ([80] * 200, 96),  # EOS counts
        ([300] * 150 + [900] * 50, 512),  # T5's own length
        ([300] * 50 + [900] * 150, 912),
        ([3000] * 200, 1024),
    ],
)
def test_inputs_have_the_length_that_99_percent_need(lengths, length) -> None:
    settings = suggested(["x" * n for n in lengths], ["a", "b"])
    assert settings.batching.lengths == {"inputs": length, "targets": 2}


def test_no_label_is_cut_and_each_one_has_a_row() -> None:
    """The longest is so rare that no percentile of the targets would notice it."""
    longest = "a label of 25 characters "[:24]
    labels = [f"{i:02d}" for i in range(50)] + [longest]
    settings = suggested(["x"] * 50 + ["y"], labels)
    length = settings.batching.lengths["targets"]
    check_labels(labels, SOURCE.tokenizer, length)
    with pytest.raises(InputError, match="comes back as"):
        check_labels(labels, SOURCE.tokenizer, length - 1)
    assert settings.method.length == 51
    assert settings.method.initializer == ClassLabels()
    assert suggested(["x", "y"], ["a", "b"]).method.length == 20


def test_open_targets_have_a_length_like_inputs_and_a_prompt_of_sampled_vocabulary() -> None:
    settings = suggested(["x" * 40] * 200, ["a", "b"], targets="{text} and {text}")
    assert settings.batching.lengths == {"inputs": 64, "targets": 96}
    assert settings.method.initializer == SampledVocabulary()
    short = suggested(["x"] * 10, ["a", "b"], targets="{text}")
    assert short.batching.lengths == {"inputs": 64, "targets": 16}


def test_the_rate_is_in_units_of_the_embedding() -> None:
    optimizer = suggested(["x", "y"], ["a", "b"]).optimizer
    # 10 is the RMS of T5 1.1's embedding, 0.3 the paper's learning rate.
    assert optimizer.rate_number(0, 10.0) == pytest.approx(0.3)
    assert optimizer.rate_number(0, 0.5) == pytest.approx(0.015)


def test_a_method_is_used_as_it_is_with_a_rate_that_suits_it(caplog) -> None:
    caplog.set_level("INFO", logger="absl")
    method = ptjax.LoRA(rank=4)
    settings = suggested(["x", "y"], ["a", "b"], method)
    assert settings.method is method
    assert settings.optimizer == ptjax.Adafactor(0.001, weight_decay=0.0)
    prompt = suggested(["x", "y"], ["a", "b"])
    assert settings == dataclasses.replace(
        prompt, method=method, optimizer=method.suggested_optimizer()
    )
    suggested(["x", "y"], ["a", "b"], ptjax.BitFit())
    said = [line.removeprefix("suggested: ") for line in caplog.messages]
    assert "learning rate 0.001" in said
    assert "learning rate 0.03 of each array's own RMS" in said
    assert any(line.startswith("method LoRA(rank=4, ") for line in said)
    for wrong in (ptjax.LoRA, "lora"):
        with pytest.raises(InputError, match=r"suggest_settings needs a ptjax\.Method, got"):
            suggested(["x", "y"], ["a", "b"], wrong)


@pytest.mark.parametrize(
    ("train", "batch"), [(2, 8), (16, 8), (31, 8), (32, 16), (63, 16), (64, 32), (5000, 32)]
)
def test_an_epoch_has_two_batches_unless_there_are_very_few_examples(train, batch) -> None:
    assert suggest.batch_size(train) == batch


@pytest.mark.parametrize(
    ("train", "validation", "steps", "schedule"),
    [
        # 30 passes over 800 examples
        (800, 200, None, TrainSchedule(750, 50, 25, patience=8)),
        (20, 10, None, TrainSchedule(500, 50, 25, patience=5)),
        # the paper's 30,000; an evaluation costs about 150 steps
        (400_000, 10_000, None, TrainSchedule(30_000, 2000, 100, patience=8)),
        (800, 10_000, None, TrainSchedule(750, 500, 100, patience=5)),
        # at most every 20 steps
        (800, 200, 60, TrainSchedule(60, 20, 10, patience=5)),
        (800, 200, 1, TrainSchedule(1, 1, 1, patience=5)),
    ],
)
def test_the_schedule_follows_the_number_of_examples(train, validation, steps, schedule) -> None:
    assert suggest.make_schedule(train, validation, suggest.batch_size(train), steps) == schedule


def test_a_sweep_of_tasks_gets_lengths_that_suit_them_all(backbone, task) -> None:
    other = dataclasses.replace(
        task, name="other", inputs="some more text: {text}", verbalizer={
            "positive": "a rather longer label", "negative": "no"
        }
    )  # fmt: skip
    alone = [suggest.suggest(backbone, [each]).settings for each in (task, other)]
    both: Any = suggest.suggest(backbone, [task, other]).settings
    lengths = [settings.batching.lengths for settings in alone]
    assert lengths[0]["targets"] < lengths[1]["targets"]
    assert both.batching.lengths == {
        key: max(length[key] for length in lengths) for key in ("inputs", "targets")
    }
    assert both.method.initializer is None  # as each task needs


def test_a_backbone_without_a_tokenizer_is_refused(backbone, task) -> None:
    bare = dataclasses.replace(backbone, tokenizer=None)
    with pytest.raises(InputError, match="tokenizer"):
        ptjax.suggest_settings(bare, task)


def test_a_suggestion_says_why_and_takes_the_number_of_steps(backbone, task, caplog) -> None:
    caplog.set_level("INFO", logger="absl")
    settings = ptjax.suggest_settings(backbone, task, steps=60)
    assert settings.schedule == suggest.make_schedule(48, 16, 16, 60)
    usual = ptjax.suggest_settings(backbone, task)
    assert settings.schedule.eval_period < usual.schedule.eval_period
    lines = [line for line in caplog.messages if line.startswith("suggested: ")]
    assert len(lines) == 10 and "60 steps of 16 examples: as asked" in lines[3]
    with pytest.raises(InputError, match=r"suggest_settings\.steps must be >= 1, got 0"):
        ptjax.suggest_settings(backbone, task, steps=0)


def test_tune_without_settings_suggests_them_and_resumes(backbone, task, tmp_path, caplog) -> None:
    settings = ptjax.suggest_settings(backbone, task)
    caplog.set_level("INFO", logger="absl")
    caplog.clear()
    first = ptjax.tune(backbone, task, tmp_path, steps=2)
    lines = [line for line in caplog.messages if line.startswith("suggested: ")]
    assert len(lines) == 5 and all(len(line) < 150 for line in lines)
    assert "2 steps of 16 examples: as asked" in lines[3]
    saved = json.loads((tmp_path / "results.json").read_text())["settings"]
    schedule = suggest.make_schedule(48, 16, 16, 2)
    expected = dataclasses.replace(settings, schedule=schedule)
    assert saved == json.loads(json.dumps(describe(expected, whole=True)))
    caplog.clear()
    again = ptjax.tune(backbone, task, tmp_path, steps=3)
    assert "resuming from step 2" in caplog.text
    assert [run.results["trained_steps"] for run in (first, again)] == [2, 3]
    assert ptjax.tune(backbone, task, tmp_path, steps=3).results == again.results


def test_a_label_that_is_a_text_is_refused_before_it_fills_the_memory() -> None:
    assert suggested(["x", "y"], ["a" * 255, "b"]).batching.lengths["targets"] == 256
    with pytest.raises(InputError) as raised:
        suggested(["x", "y"], ["a" * 256, "b"])
    assert str(raised.value) == (
        f"task label: the label '{'a' * 80}...' has 257 tokens; give a verbalizer with short texts "
        "or, for open text, targets instead of a label"
    )
