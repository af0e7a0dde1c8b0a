"""Ensembles: votes and means against numpy by hand, and against runs of every prompt alone."""

from __future__ import annotations

import collections
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from letters import LETTERS, make_backbone
from t5_ids import T5_IDS

from ptjax.data.tasks import Task
from ptjax.evaluation import ensembles, evaluator
from ptjax.inference import labels as ranking
from ptjax.inference.bank import PromptBank
from ptjax.models.prompt import stack_prompts
from ptjax.models.prompted import with_prompt

RNG = np.random.default_rng(3)
LABELS = "jklmnopqrs"
PROMPTS = 2 * RNG.normal(size=(3, 4, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Twenty-one examples of unequal lengths and ten labels; enough for several batches."""
    file = tmp_path_factory.mktemp("task") / "test.csv"
    texts = ["".join(chr(97 + c) for c in RNG.integers(0, 26, 1 + 2 * i)) for i in range(21)]
    rows = [f"{text},{i % 10}\n" for i, text in enumerate(texts)]
    file.write_text("".join(["text,label\n", *rows]))
    return dict(inputs="{text}", label="label", splits={"test": str(file)})


def make_evaluator(tiny, task, *, labels: str = LABELS, **settings: Any):
    targets = {"targets": "{text}"} if not labels else {
        "verbalizer": {str(i): text for i, text in enumerate(labels)}
    }  # fmt: skip
    kept = {k: v for k, v in task.items() if labels or k != "label"}
    made = Task(name="t", metrics="accuracy", **(kept | targets))
    chosen = evaluator.Evaluation(batch_size=8)
    lengths = {"inputs": 50, "targets": 4}
    return evaluator.Evaluator(made, make_backbone(tiny), LETTERS, lengths, chosen, **settings)


def make_bank(sees_input: bool = True) -> PromptBank:
    return PromptBank(("x", "y", "z"), stack_prompts(PROMPTS, sees_input), (None,) * 3)


def test_the_mean_is_one_of_probabilities():
    odds = np.log([[[9.0, 1.0], [2.0, 3.0]], [[1.0, 1.0], [1.0, 3.0]]])
    np.testing.assert_allclose(
        ensembles.mean_shares(odds), [[(0.9 + 0.4) / 2, (0.1 + 0.6) / 2], [0.375, 0.625]]
    )
    # Log-likelihoods would be added up instead, and one prompt could veto.
    veto = np.log([[[0.6, 0.4], [0.6, 0.4], [1e-9, 1.0 - 1e-9]]])
    np.testing.assert_allclose(ensembles.mean_shares(veto), [[0.4, 0.6]], atol=1e-8)
    # All labels of one prompt may be unlikely texts: only their shares count.
    unlikely = veto + np.array([[0.0], [-900.0], [0.0]])
    np.testing.assert_allclose(ensembles.mean_shares(unlikely), [[0.4, 0.6]], atol=1e-8)


def test_most_votes_win_and_the_mean_breaks_ties():
    likelihoods = np.log(
        [
            [[0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.01, 0.98, 0.01]],  # two votes against the mean
            [[0.5, 0.4, 0.1], [0.1, 0.4, 0.5], [0.33, 0.34, 0.33]],  # a vote each
        ]
    )
    assert ensembles.mean_shares(likelihoods).argmax(axis=1).tolist() == [1, 1]
    assert ensembles.vote_on_labels(likelihoods).tolist() == [0, 1]
    # Of two that tie, even if the mean would take a third one.
    tie = np.log([[[0.5, 0.1, 0.4]] * 2 + [[0.1, 0.45, 0.45 - 1e-6]] * 2])
    assert ensembles.mean_shares(tie).argmax() == 2
    assert ensembles.vote_on_labels(tie).tolist() == [0]


def test_texts_are_voted_on_and_their_authors_break_ties():
    assert ensembles.vote_on_texts(["x", "y", "x"], np.array([-9.0, -1.0, -9.0])) == "x"
    assert ensembles.vote_on_texts(["x", "y"], np.array([-9.0, -1.0])) == "y"
    four = np.array([-3.0, -2.0, -3.0, -5.0])
    assert ensembles.vote_on_texts(["x", "y", "x", "y"], four) == "x"


@pytest.mark.parametrize("attends_to_input", [True, False])
def test_members_and_ensembles_are_those_of_separate_runs(tiny, task, attends_to_input):
    evaluator = make_evaluator(tiny, task, attends_to_input=attends_to_input)
    source, labels = evaluator._source("test"), list(LABELS)
    tokens = ranking.make_label_tokens(labels, LETTERS, 4, T5_IDS)
    found = []
    for prompt in PROMPTS:
        variables = with_prompt({"params": tiny.params}, prompt)
        model = evaluator.model.with_variables(variables)
        found.append(ranking.predict_labels(model, source, [tokens], 8)[1])
    own = [[labels[i] for i in one.argmax(axis=1)] for one in found]
    right = [example.targets for example in evaluator.examples("test")]

    def accuracy(texts):
        return {"accuracy": np.mean([x == y for x, y in zip(texts, right, strict=True)])}

    shares = np.exp(found) / np.exp(found).sum(axis=2, keepdims=True)
    mean = [labels[i] for i in shares.mean(axis=0).argmax(axis=1)]
    majority = []
    for i, said in enumerate(zip(*own, strict=True)):
        votes = collections.Counter(said)
        tied = [x for x in labels if votes[x] == max(votes.values())]
        majority.append(max(tied, key=lambda x: shares[:, i, labels.index(x)].sum()))
    answers = evaluator.predict_bank(make_bank(attends_to_input), "test")
    assert answers.members == own
    assert (answers.majority_vote, answers.mean_likelihood) == (majority, mean)
    # Otherwise the numbers would agree for nothing: all three tell something different.
    assert len({*map(tuple, own), tuple(majority), tuple(mean)}) > 3

    result = evaluator.ensemble(PROMPTS, "test", names=["x", "y", "z"])
    values = [accuracy(one)["accuracy"] for one in own]
    assert result == {
        "members": dict(zip("xyz", map(accuracy, own), strict=True)),
        "average": {"accuracy": pytest.approx(np.mean(values))},
        "best": {"name": "xyz"[int(np.argmax(values))], "value": max(values)},
        "ensemble": {"majority_vote": accuracy(majority), "mean_likelihood": accuracy(mean)},
    }
    assert list(evaluator.ensemble(PROMPTS[:2], "test")["members"]) == ["0", "1"]


def test_generated_texts_are_voted_on(tiny, task):
    evaluator = make_evaluator(tiny, task, labels="")
    alone, scores = [], []
    for prompt in PROMPTS:
        variables = with_prompt({"params": tiny.params}, prompt)
        model = evaluator.model.with_variables(variables)
        texts, found = evaluator._predict(model, evaluator._source("test"))
        alone.append(texts)
        scores.append(found)
    answers = evaluator.predict_bank(make_bank(), "test")
    assert answers.members == alone and answers.mean_likelihood is None
    assert len({*map(tuple, alone)}) == 3
    assert answers.majority_vote == [
        ensembles.vote_on_texts(texts, own)
        for texts, own in zip(zip(*alone, strict=True), np.transpose(scores), strict=True)
    ]
    assert list(evaluator.ensemble(PROMPTS, "test")["ensemble"]) == ["majority_vote"]


def test_the_prompts_of_an_example_share_a_batch(tiny, task, monkeypatch):
    """N rows of one forward pass: 8 rows at once hold two examples of three prompts."""
    evaluator = make_evaluator(tiny, task)
    batches = []

    def rank(apply_fn, variables, tokens, lengths, labels, sets, prompt_ids, *, ids):
        batches.append((np.asarray(tokens), np.asarray(prompt_ids)))
        return jnp.zeros((len(tokens), labels.tokens.shape[1]))

    monkeypatch.setattr(ranking, "rank", rank)
    evaluator.predict_bank(make_bank(), "test")
    assert len(batches) > 10
    for tokens, prompt_ids in batches:
        real = tokens.any(axis=1)
        assert prompt_ids[real].tolist() == [0, 1, 2] * (real.sum() // 3) and len(tokens) == 8
        examples = tokens[real].reshape(-1, 3, tokens.shape[1])
        assert (examples == examples[:, :1]).all()
