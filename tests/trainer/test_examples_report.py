"""The examples that a run shows before its first step: text, tokens, target and cut marks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from conftest import make_settings
from tiny import save_tiny, tiny_config

import ptjax
from ptjax.backbones.load import load_backbone
from ptjax.data.byte_tokenizer import ByteTokenizer
from ptjax.trainer.examples_report import report_examples_read
from ptjax.trainer.task_data import load_task_data

VERBALIZER = {"good": "good", "bad": "bad"}


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A backbone whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("bytes")
    return load_backbone(save_tiny(folder, tiny_config(384), tokenizer=ByteTokenizer()))


def shown(backbone: Any, texts: list[str], inputs: int, caplog, cut: int = 5, **task: Any):
    """The logged lines for these texts, with inputs cut to this length."""
    records = [{"text": text, "label": "bad" if i % 2 else "good"} for i, text in enumerate(texts)]
    how: Any = task or {"label": "label", "verbalizer": VERBALIZER}
    made = ptjax.Task.from_records(records, records[:2], inputs="say: {text}", **how)
    settings = make_settings(feature_lengths={"inputs": inputs, "targets": cut})
    data = load_task_data(made, backbone, settings)
    caplog.clear()
    with caplog.at_level("INFO", logger="absl"):
        report_examples_read([data, data])
    return [line for line in caplog.messages if line.startswith(("  ", f"{made.name}: "))][-10:]


def test_the_template_the_tokens_and_the_cut_are_shown(of_bytes, caplog) -> None:
    lines = shown(of_bytes, ["a", "bc", "abcdefghij", "d"], 12, caplog)
    assert lines == [
        "label: 2 of 4 training examples as the model reads them; inputs cut to 12 tokens: 1, "
        "targets cut to 5: 0",
        "  1. say: a",
        "     tokens: s a y : <0x20> a </s>",
        "     target: good = g o o d </s>",
        "  3. say: abcdef [CUT: 4 more tokens]",
        "     tokens: s a y : <0x20> a b c d e f [CUT: 4 more tokens] </s>",
        "     target: good = g o o d </s>",
    ]


def test_a_row_that_just_fits_is_not_taken_for_a_cut_one(of_bytes, caplog) -> None:
    lines = shown(of_bytes, ["a", "b", "abcdef", "abcdefg", "c"], 12, caplog)
    assert [line for line in lines if "CUT" in line] == [
        "  4. say: abcdef [CUT: 1 more tokens]",
        "     tokens: s a y : <0x20> a b c d e f [CUT: 1 more tokens] </s>",
    ]


def test_without_a_cut_the_longest_is_shown_and_a_long_one_in_excerpts(of_bytes, caplog) -> None:
    lines = shown(of_bytes, ["a", "b", "c", "d" * 400], 512, caplog)
    assert not [line for line in lines if "CUT" in line]
    assert "  4. say: " + "d" * 175 + " ... " + "d" * 60 in lines
    tokens = "s a y : <0x20>" + " d" * 23 + " ... 370 tokens ..." + " d" * 7 + " </s>"
    assert f"     tokens: {tokens}" in lines


def test_an_excerpt_leaves_out_two_tokens_or_more(of_bytes, caplog) -> None:
    fits = "     tokens: s a y : <0x20>" + " d" * 31 + " </s>"
    assert fits in shown(of_bytes, ["a", "b", "d" * 31], 512, caplog)
    less = "     tokens: s a y : <0x20>" + " d" * 23 + " ... 2 tokens ..." + " d" * 7 + " </s>"
    assert less in shown(of_bytes, ["a", "b", "d" * 32], 512, caplog)


def test_a_cut_target_is_marked(of_bytes, caplog) -> None:
    lines = shown(of_bytes, ["a", "b", "abcdefghij"], 32, caplog, 8, targets="{text}")
    assert (
        "     target: abcdefg [CUT: 3 more tokens] = a b c d e f g [CUT: 3 more tokens] </s>"
        in (lines)
    )


def test_what_a_text_holds_cannot_change_the_terminal(of_bytes, caplog) -> None:
    lines = shown(of_bytes, ["a\x1b[31m\nb\t\x9b", "c"], 64, caplog)
    assert "  1. say: a\\x1b[31m\\nb\\t\\x9b" in lines


def test_a_vocabulary_shows_its_pieces_and_a_run_shows_them(
    backbone, task, tmp_path, caplog
) -> None:
    task = dataclasses.replace(task, inputs="a lovely text: {text}")
    with caplog.at_level("INFO", logger="absl"):
        ptjax.tune(backbone, task, tmp_path, dry_run=True)
    start = next(i for i, line in enumerate(caplog.messages) if line.startswith("words: 3 of 48"))
    assert caplog.messages[start + 1].startswith("  1. a lovely text: ")
    assert caplog.messages[start + 2].startswith("     tokens: ▁a ▁lovely ▁text : ▁")
    assert any(line.startswith("compiled the step") for line in caplog.messages[start:])
