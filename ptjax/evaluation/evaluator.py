"""Predicting and scoring the splits of a task with given variables."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Array

from ptjax.backbones.damage import check_scores
from ptjax.backbones.load import Backbone
from ptjax.data.examples import Example, Examples
from ptjax.data.pipeline import ExampleSource, make_buckets
from ptjax.data.preprocess import TokenizedExamples, check_labels, tokenize_examples
from ptjax.data.tasks import Task
from ptjax.data.tokenizer import Tokenizer
from ptjax.errors import InputError
from ptjax.evaluation.ensembles import Answers, Repeated, mean_shares, vote_on_labels, vote_on_texts
from ptjax.inference.answering import make_label_tokens, predict_labels, predict_texts
from ptjax.models.prompt import Bank, stack_prompts
from ptjax.models.prompted import with_prompt
from ptjax.settings import Evaluation
from ptjax.sharding.arrays import replicated, rows_divisor
from ptjax.trees import Tree


class Evaluator:
    """Predicts and scores splits of one task with one backbone, reusing what it compiled.

    Attributes:
        metric: what prompts are selected by; of several metrics it is their mean, as in the paper.
        reported_split: the test split, or else the one that selects.
        apply_fn: by default the backbone's for the kind of prompt that is evaluated; without a
            prompt both kinds are one.
        attends_to_input: that kind.
    """

    def __init__(
        self,
        task: Task,
        backbone: Backbone,
        tokenizer: Tokenizer,
        lengths: Mapping[str, int],
        settings: Evaluation,
        attends_to_input: bool = True,
        apply_fn: Callable[..., Any] | None = None,
    ) -> None:
        self.apply_fn, self.attends_to_input = (
            apply_fn or backbone.make_apply_fn(attends_to_input),
            attends_to_input,
        )
        self.task, self.backbone, self.tokenizer = task, backbone, tokenizer
        self.lengths, self.settings = lengths, settings
        self.metric = task.metrics[0] if len(task.metrics) == 1 else "mean"
        self.reported_split = "test" if "test" in task.splits else settings.split
        closed = task.labels is not None
        self.ranks = settings.predict == "rank" or (settings.predict == "auto" and closed)
        if self.ranks and not closed:
            raise InputError(f"task {task.name}: predict = 'rank' needs a verbalizer; use 'decode'")
        if task.positive is not None:
            logging.info("%s: f1 is F1 of %r (Task.positive_label)", task.name, task.positive)
        if task.labels is not None:
            check_labels(task.labels, tokenizer, lengths["targets"])
        self.examples = functools.cache(self._load)
        self._source = functools.cache(lambda split: self._tokenize(self.examples(split)))

    def __call__(
        self, variables: Tree, split: str, rewording: Callable[[str], str] | None = None
    ) -> dict[str, float]:
        """Metrics of `split`, every example exactly once; `rewording` changes the inputs' text."""
        return self.score(self.predict(variables, split, rewording), split)

    def score(self, predictions: Sequence[str], split: str) -> dict[str, float]:
        """The task's metrics of a text for every example of `split`, and the mean of several."""
        values = self.task.evaluate(predictions, self.examples(split))
        return values if len(values) == 1 else values | {"mean": statistics.fmean(values.values())}

    def predict(
        self, variables: Tree, split: str, rewording: Callable[[str], str] | None = None
    ) -> list[str]:
        """A text for every example of `split`, in its order.

        Raises:
            InputError: a logit is not finite; where a weight of the backbone is to blame, it is
                named, else it is a `NotFiniteError`.
        """
        if rewording is None:
            source = self._source(split)
        else:
            source = self._tokenize(self.examples(split), rewording)
        return self._predict(variables, source, self.settings.batch_size)[0]

    def ensemble(
        self,
        prompts: Sequence[np.ndarray | Array] | np.ndarray | Array | Bank,
        split: str,
        names: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """The scores of N prompts and of their ensembles, as `score_ensemble` has them.

        Args:
            prompts: matrices [P_i, D] or an array [N, P, D], of the kind that is evaluated, or a
                bank.
            names: of the prompts; default: their numbers.
        """
        bank = (
            prompts if isinstance(prompts, Bank) else stack_prompts(prompts, self.attends_to_input)
        )
        return self.score_ensemble(self.ask(bank, split), split, names)

    def ask(self, bank: Bank, split: str) -> Answers:
        """What every prompt of a bank says to every example of `split`, and what all say together.

        The prompts of an example share a batch: N rows of one forward pass.
        """
        count, examples = len(bank.lengths), len(self.examples(split))
        source = Repeated(self._source(split), count)
        # A batch holds all rows of an example, and divides over the mesh.
        step = math.lcm(count, rows_divisor(self.backbone.mesh))
        placed = jax.device_put(bank, replicated(self.backbone.mesh))
        texts, scores = self._predict(
            with_prompt(self.backbone.variables, placed),
            source,
            step * max(1, self.settings.batch_size // step),
            np.tile(np.arange(count, dtype=np.int32), examples),
        )
        members = [texts[member::count] for member in range(count)]
        scores = scores.reshape(examples, count, *scores.shape[1:])
        if not self.ranks:
            said = zip(zip(*members, strict=True), scores, strict=True)
            return Answers(members, [vote_on_texts(*one) for one in said], None)
        labels = list(self.task.labels or ())
        majority, mean = vote_on_labels(scores), mean_shares(scores).argmax(axis=1)
        return Answers(members, [labels[i] for i in majority], [labels[i] for i in mean])

    def score_ensemble(
        self, answers: Answers, split: str, names: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Scores as in the paper's Table 3, all on `split`.

        Returns:
            "members": metrics by name; "average": the mean of each metric over them; "best": name
            and value of the member with the best metric on this very split, which flatters it;
            "ensemble": metrics of "majority_vote" and, where labels were ranked, of
            "mean_likelihood".
        """
        names = names or [str(number) for number in range(len(answers.members))]
        scores = [self.score(member, split) for member in answers.members]
        best = max(range(len(scores)), key=lambda member: scores[member][self.metric])
        ensemble = {"majority_vote": self.score(answers.majority_vote, split)}
        if answers.mean_likelihood is not None:
            ensemble["mean_likelihood"] = self.score(answers.mean_likelihood, split)
        return {
            "members": dict(zip(names, scores, strict=True)),
            "average": {name: statistics.fmean(one[name] for one in scores) for name in scores[0]},
            "best": {"name": names[best], "value": scores[best][self.metric]},
            "ensemble": ensemble,
        }

    def _predict(
        self,
        variables: Tree,
        source: ExampleSource,
        batch_size: int,
        prompt_ids: np.ndarray | None = None,
    ) -> tuple[list[str], np.ndarray]:
        """A text for every example, in order, and its score [N]; of all labels [N, C] if ranked."""
        buckets, length = make_buckets(source), self.lengths["targets"]
        where, ids = (self.apply_fn, variables, source), self.backbone.config.special_ids
        if not self.ranks:
            texts, scores = predict_texts(
                *where,
                self.tokenizer,
                buckets,
                batch_size,
                ids=ids,
                max_length=length,
                prompt_ids=prompt_ids,
            )
            check_scores(scores, self.backbone, f"task {self.task.name}: the score of a text")
            return texts, scores
        labels = list(self.task.labels or ())
        tokens = make_label_tokens(labels, self.tokenizer, length, ids)
        chosen, likelihoods = predict_labels(
            *where, tokens, buckets, batch_size, ids=ids, prompt_ids=prompt_ids
        )
        check_scores(likelihoods, self.backbone, f"task {self.task.name}: the score of a label")
        return [labels[i] for i in chosen], likelihoods

    def majority(self, train: Sequence[Example], split: str) -> float:
        """The metric of always saying what stands most often in the training targets."""
        most, _ = collections.Counter(example.targets for example in train).most_common(1)[0]
        return self.score([most] * len(self.examples(split)), split)[self.metric]

    def _load(self, split: str) -> Examples:
        examples = self.task.load(split, limit=self.settings.examples)
        capped = len(examples) == self.settings.examples
        note = " (EVAL_EXAMPLES caps them)" if capped else ""
        report_examples(self.task, split, examples, note)
        return examples

    def _tokenize(
        self, examples: Sequence[Example], rewording: Callable[[str], str] | None = None
    ) -> TokenizedExamples:
        if rewording is not None:
            examples = [dataclasses.replace(e, inputs=rewording(e.inputs)) for e in examples]
        source = tokenize_examples(
            examples, self.tokenizer, self.lengths["inputs"], self.lengths["targets"]
        )
        report_cut(source, self.lengths)
        report_lost(self.task, examples, source, self.tokenizer)
        return source


def report_examples(task: Task, split: str, examples: Examples, note: str = "") -> None:
    """How many there are, and what was left out of them."""
    logging.info("%s, split %s: %d examples%s", task.name, split, len(examples), note)
    if bad := examples.bad.count:
        lines = examples.bad.lines
        logging.warning(
            "left out %d of %d records%s; the first: %s",
            bad,
            bad + len(examples),
            f" ({lines} lines)" if lines != bad else "",
            examples.bad.first,
        )


MOST_CUT = 0.99
"""The share of a task's inputs or targets that may be cut; beyond it the length is a mistake. Long
reviews may well be meant to be cut: 98% of IMDb's are longer than 64 tokens."""


def check_cut(source: TokenizedExamples, lengths: Mapping[str, int], what: str) -> None:
    """Refuses to train with lengths that cut nearly everything; of other splits that is a warning.

    Raises:
        InputError: more than `MOST_CUT` of the inputs or targets do not fit; it names the setting.
    """
    for side, rows in (("inputs", source.inputs), ("targets", source.targets)):
        if rows.truncated > MOST_CUT * len(rows):
            raise InputError(
                f"{what}: {rows.truncated} of {len(rows)} {side} are longer than {lengths[side]} "
                f"tokens and would be cut; raise TASK_FEATURE_LENGTHS['{side}'], or shorten the "
                "texts themselves"
            )


def report_cut(source: TokenizedExamples, lengths: Mapping[str, int]) -> None:
    """How many texts did not fit; a hard prompt with many shots may leave nothing of the input."""
    for side, rows in (("inputs", source.inputs), ("targets", source.targets)):
        if rows.truncated:
            logging.warning(
                "%d of %d %s are longer than %d tokens and were cut (TASK_FEATURE_LENGTHS)",
                rows.truncated,
                len(rows),
                side,
                lengths[side],
            )


def report_lost(
    task: Task, examples: Sequence[Example], source: TokenizedExamples, tokenizer: Tokenizer
) -> None:
    """Counts the texts that the vocabulary cannot write, each kind with an example.

    An open target that does not come back from its tokens is one that even a perfect model gets
    wrong; of labels, `check_labels` refuses those. Texts that were cut are left to `report_cut`.
    """
    longest = source.target_lengths.max(initial=0) if source.targets.truncated else np.inf
    texts = [example.targets for example in examples] if task.labels is None else []
    written: dict[str, str] = {}
    for i, text in enumerate(texts):
        if text not in written and source.target_lengths[i] < longest:
            written[text] = tokenizer.decode(source.targets[i]).strip()
    lost = [text for text in texts if written.get(text, text.strip()) != text.strip()]
    if lost:
        logging.warning(
            "%s: %d of %d targets cannot be written with the vocabulary of %s; %r comes back as %r",
            task.name,
            len(lost),
            len(texts),
            tokenizer.name,
            lost[0][:60],
            written[lost[0]][:60],
        )
    places = np.flatnonzero(source.inputs.ids == tokenizer.unk_id)
    rows = np.unique(np.searchsorted(source.inputs.offsets, places, side="right") - 1)
    if len(rows):
        text = examples[int(rows[0])].inputs
        characters = [c for c in dict.fromkeys(text) if tokenizer.unk_id in tokenizer.encode(c)]
        logging.warning(
            "%s: %d of %d inputs hold characters that the vocabulary of %s lacks; the first: %r%s",
            task.name,
            len(rows),
            len(examples),
            tokenizer.name,
            text[:60],
            f" ({' '.join(characters[:5])})" if characters else "",
        )
