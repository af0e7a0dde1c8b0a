"""`<extra_id_N>` in a template is the sentinel, in a record's field it is text unless wanted."""

from __future__ import annotations

import pickle

import pytest

from ptjax.data.hard_prompt import HardPrompt
from ptjax.data.preprocess import tokenize_examples
from ptjax.data.sentinels import Rendered, join_texts, mark_sentinels, spelt_out
from ptjax.data.tasks import Task
from ptjax.data.templates import parse_template
from ptjax.data.tokenizer import load_tokenizer

S0, S1 = "<extra_id_0>", "<extra_id_1>"


@pytest.fixture(scope="module")
def nano():
    return load_tokenizer("package:nano")


def numbers(text: str) -> list[int]:
    """The sentinels that a tokenizer sees in the text."""
    parts = mark_sentinels(text, range(100)).split("\uffff")
    return [int(part) for part in parts[1::2]]


def task(**settings) -> Task:
    return Task(name="fill", inputs=f"fill {S0}: {{text}}", targets="{word} " + S1, **settings)


def test_case_1_1_a_field_is_spelt_out_and_a_template_is_not(nano):
    fields = {"text": f"the {S0} film</s>", "word": f"{S1} old"}
    inputs = task().format_inputs(fields)
    assert inputs == f"fill {S0}: the {S0} film</s>" and numbers(inputs) == [0]
    ids = nano.encode(inputs)
    assert ids.count(nano.sentinel_id(0)) == 1 and nano.eos_id not in ids
    # Between its own parts it is tokenised as one text.
    head, tail = f"fill {S0}", f": the {S0} film</s>"
    assert ids == nano.encode(head) + nano.encode(spelt_out(tail))
    assert nano.decode(ids).replace(" :", ":") == inputs  # as transformers, a part starts a word
    target = parse_template(task().targets or "").render(fields)
    assert target == f"{S1} old {S1}" and nano.encode(target).count(nano.sentinel_id(1)) == 1
    assert numbers(task().format_line(f"a {S0}")) == [0]


def test_case_1_1_sentinels_true_makes_those_of_fields_sentinels(nano, tmp_path):
    fields = {"text": f"the {S0} film", "word": f"{S1} old"}
    assert numbers(task(sentinels=True).format_inputs(fields)) == [0, 0]
    (tmp_path / "a.tsv").write_text(f"text\tword\nthe {S1} film\t{S1} old\n")
    counts = {}
    for sentinels in (False, True):
        splits = {"train": str(tmp_path / "a.tsv")}
        [example] = examples = task(sentinels=sentinels, splits=splits).load("train")
        tokens = tokenize_examples(examples, nano, 32, 32)
        rows = tokens.inputs[0].tolist(), tokens.targets[0].tolist()
        counts[sentinels] = [row.count(nano.sentinel_id(1)) for row in rows]
        assert example.targets == f"{S1} old {S1}"
    assert counts == {False: [0, 1], True: [1, 2]}


def test_case_1_1_a_prompts_file_tells_whether_fields_hold_sentinels():
    for sentinels in (False, True):
        description = task(sentinels=sentinels).describe()
        assert Task.from_description(description).sentinels is sentinels
    del description["sentinels"]
    assert Task.from_description(description).sentinels is False


def test_case_1_1_the_callers_own_text_may_hold_sentinels():
    assert numbers(f"{S0}a{S1}") == [0, 1]


def test_case_1_1_joined_texts_keep_what_each_part_means():
    record = spelt_out(f"x {S0}")
    assert numbers(record) == [] and record == f"x {S0}"
    joined = join_texts([S1, record, S1, record])
    assert joined == f"{S1}x {S0}{S1}x {S0}" and numbers(joined) == [1, 1]
    assert numbers(join_texts(["<extra_id_", "0>"])) == []  # neither part holds it
    assert type(join_texts(["a", "b"])) is str and type(join_texts([S0, "b"])) is str
    assert numbers(pickle.loads(pickle.dumps(joined))) == [1, 1]
    assert numbers(Rendered(f"{S0}{S0}", [12])) == [0]


def test_case_1_1_a_hard_prompt_is_the_users_own_text(tmp_path):
    (tmp_path / "a.tsv").write_text(f"text\tword\na {S0}\tb {S0}\n")
    [shot] = task(splits={"train": str(tmp_path / "a.tsv")}).load("train")
    inputs = task().format_inputs({"text": f"c {S0}"})
    for text, own in (("", []), (f"say {S1}", [1]), (f"say {S1} {{inputs}} {S1}", [1, 1])):
        prompt = HardPrompt(text, shots=1)
        assert prompt.apply("x") == (f"{text} x".strip() if "{" not in text else f"say {S1} x {S1}")
        inside = [*own[:1], 0, *own[1:]]
        assert numbers(prompt.apply(inputs)) == inside
        reworded = prompt.rewording([shot], 0)(inputs)
        assert reworded == f"{prompt.apply(shot.inputs)} {shot.targets} {prompt.apply(inputs)}"
        assert numbers(reworded) == [*inside, 1, *inside]
