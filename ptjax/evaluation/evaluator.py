"""Predicts and scores the splits of a task."""

from __future__ import annotations

import collections
import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import logging
from jaxtyping import Array

from ptjax.backbones.damage import check_scores
from ptjax.backbones.load import Backbone
from ptjax.data.examples import Example, Examples
from ptjax.data.metrics import check_installed
from ptjax.data.pipeline import ExampleSource
from ptjax.data.preprocess import TokenizedExamples, check_labels, tokenize_examples
from ptjax.data.tasks import Task
from ptjax.data.tokenizer import Tokenizer
from ptjax.errors import InputError
from ptjax.evaluation.ensembles import (
    EnsemblePredictions,
    RepeatedSource,
    mean_shares,
    vote_on_labels,
    vote_on_texts,
)
from ptjax.files import JsonObject
from ptjax.inference.bank import PromptBank, place_bank
from ptjax.inference.generate import decode_tokens, generate_tokens
from ptjax.inference.labels import make_label_tokens, predict_labels
from ptjax.inference.model import Model
from ptjax.models.family import ApplyFn
from ptjax.models.prompt import stack_prompts
from ptjax.models.prompted import with_prompt
from ptjax.settings import Evaluation
from ptjax.trees import Variables


class Evaluator:
    """Predicts and scores splits of one task with one backbone; caches examples and tokens.

    Attributes:
        metric: the metric by which prompts are selected: the task's only one, or "mean" of several.
        reported_split: "test" if the task has it, else the split on which prompts are selected.
        attends_to_input: whether a prompt's positions attend to the input.
        model: the backbone's network, without a prompt.
        ranks: True: the likeliest of the task's labels is predicted; False: texts are generated.
    """

    def __init__(
        self,
        task: Task,
        backbone: Backbone,
        tokenizer: Tokenizer,
        lengths: Mapping[str, int],
        settings: Evaluation,
        attends_to_input: bool = True,
        apply_fn: ApplyFn | None = None,
    ) -> None:
        """`lengths`: of "inputs" and "targets"; `apply_fn`: by default the backbone's."""
        self.attends_to_input = attends_to_input
        self.model = Model(
            apply_fn or backbone.make_apply_fn(attends_to_input),
            backbone.variables,
            backbone.mesh,
            backbone.config.special_ids,
            tokenizer,
        )
        self.task, self.backbone, self.tokenizer, self.lengths = task, backbone, tokenizer, lengths
        check_installed(task.metrics)  # now, not after the first steps of a run
        self.settings, self.metric = settings, "mean" if task.metrics[1:] else task.metrics[0]
        self.reported_split = reported_split(task, settings.split)
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

    @property
    def apply_fn(self) -> ApplyFn:
        """The network as a function `apply_fn(variables, ..., method=)`; see `Family.build`."""
        return self.model.apply_fn

    def __call__(
        self, variables: Variables, split: str, rewording: Callable[[str], str] | None = None
    ) -> dict[str, float]:
        """Predicts and scores every example of `split`; arguments as for `predict`."""
        return self.score(self.predict(variables, split, rewording), split)

    def score(self, predictions: Sequence[str], split: str) -> dict[str, float]:
        """Computes the task's metrics for one text per example; if several, also their "mean"."""
        values = self.task.evaluate(predictions, self.examples(split))
        return values if len(values) == 1 else values | {"mean": statistics.fmean(values.values())}

    def predict(
        self, variables: Variables, split: str, rewording: Callable[[str], str] | None = None
    ) -> list[str]:
        """Returns the texts of `predict_with_scores`."""
        return self.predict_with_scores(variables, split, rewording)[0]

    def predict_with_scores(
        self, variables: Variables, split: str, rewording: Callable[[str], str] | None = None
    ) -> tuple[list[str], np.ndarray]:
        """Predicts a text for every example of `split`, in order; also returns log-likelihoods.

        They are [N, C] of the task's labels if these are ranked, else [N] of the texts. `variables`
        include any prompt (see `with_prompt`); `rewording` replaces each input.

        Raises:
            InputError, NotFiniteError: a score is not finite; see `check_scores`.
        """
        reworded = rewording and self._tokenize(self.examples(split), rewording)
        source = self._source(split) if reworded is None else reworded
        return self._predict(self.model.with_variables(variables), source)

    def ensemble(
        self,
        prompts: Sequence[np.ndarray | Array] | np.ndarray | Array,
        split: str,
        names: Sequence[str] | None = None,
    ) -> JsonObject:
        """Scores N prompts and their ensembles on `split`; returns the dict of `score_ensemble`.

        Args:
            prompts: matrices [P_i, D] or an array [N, P, D]; this evaluator's `attends_to_input`
                applies to them.
            names: the names of the prompts; default: their numbers.
        """
        names = names or [str(number) for number in range(len(prompts))]
        arrays = stack_prompts(prompts, self.attends_to_input)
        bank = PromptBank(tuple(names), arrays, (None,) * len(names))
        return self.score_ensemble(self.predict_bank(bank, split), split, names)

    def predict_bank(self, bank: PromptBank, split: str) -> EnsemblePredictions:
        """Predicts the examples of `split` with every prompt of a bank, and with their ensembles.

        One forward pass covers all N prompts: each example has N rows in the batch.
        """
        count, examples = len(bank.names), len(self.examples(split))
        placed = place_bank(bank.arrays, self.backbone.mesh)
        texts, scores = self._predict(
            self.model.with_variables(with_prompt(self.backbone.variables, placed)),
            RepeatedSource(self._source(split), count),
            np.tile(np.arange(count, dtype=np.int32), examples),
            group=count,
        )
        members = [texts[member::count] for member in range(count)]
        scores = scores.reshape(examples, count, *scores.shape[1:])
        if not self.ranks:
            votes = zip(zip(*members, strict=True), scores, strict=True)
            voted = [vote_on_texts(texts, of_texts) for texts, of_texts in votes]
            return EnsemblePredictions(members, voted, None)
        labels = list(self.task.labels or ())
        majority, mean = vote_on_labels(scores), mean_shares(scores).argmax(axis=1)
        return EnsemblePredictions(
            members, [labels[i] for i in majority], [labels[i] for i in mean]
        )

    def score_ensemble(
        self, predictions: EnsemblePredictions, split: str, names: Sequence[str] | None = None
    ) -> JsonObject:
        """Scores the predictions of N prompts and their ensembles on `split` (paper, Table 3).

        Returns "members", each prompt's metrics by its name; "average", their means; "best", the
        "name" and "value" of the prompt with the highest `metric` on `split` (so optimistic); and
        "ensemble", metrics of "majority_vote" and, if labels were ranked, "mean_likelihood".
        """
        names = names or [str(number) for number in range(len(predictions.members))]
        scores = [self.score(member, split) for member in predictions.members]
        best = max(range(len(scores)), key=lambda member: scores[member][self.metric])
        ensemble = {"majority_vote": self.score(predictions.majority_vote, split)}
        if predictions.mean_likelihood is not None:
            ensemble["mean_likelihood"] = self.score(predictions.mean_likelihood, split)
        return {
            "members": dict(zip(names, scores, strict=True)),
            "average": {
                name: statistics.fmean(metrics[name] for metrics in scores) for name in scores[0]
            },
            "best": {"name": names[best], "value": scores[best][self.metric]},
            "ensemble": ensemble,
        }

    def _predict(
        self,
        model: Model,
        source: ExampleSource,
        prompt_ids: np.ndarray | None = None,
        group: int = 1,
    ) -> tuple[list[str], np.ndarray]:
        """A text for every example, in order, and its score [N]; of all labels [N, C] if ranked."""
        length, batch_size = self.lengths["targets"], self.settings.batch_size
        if not self.ranks:
            tokens, scores = generate_tokens(
                model,
                source,
                batch_size,
                max_new_tokens=length,
                prompt_ids=prompt_ids,
                group=group,
            )
            check_scores(scores, self.backbone, f"task {self.task.name}: the score of a text")
            return decode_tokens(model, tokens), scores
        labels = list(self.task.labels or ())
        tokens = make_label_tokens(labels, self.tokenizer, length, model.ids)
        chosen, likelihoods = predict_labels(
            model, source, [tokens], batch_size, prompt_ids=prompt_ids, group=group
        )
        check_scores(likelihoods, self.backbone, f"task {self.task.name}: the score of a label")
        return [labels[i] for i in chosen], likelihoods

    def majority(self, train: Sequence[Example], split: str) -> float:
        """Returns the `metric` of predicting `train`'s most frequent target for all of `split`."""
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


def reported_split(task: Task, selected: str = "validation") -> str:
    """Returns the split whose scores are reported: "test", or without it the one `selected` on."""
    return "test" if "test" in task.splits else selected


def report_examples(task: Task, split: str, examples: Examples, note: str = "") -> None:
    """Logs the number of examples of a split, and a warning if records were left out.

    Args:
        note: text to append to the number of examples in the message.
    """
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
"""The share of a task's inputs or targets that may be truncated; if more are, the length must be a
mistake. Long reviews may be cut on purpose: 98% of IMDb's are longer than 64 tokens."""


def check_cut(source: TokenizedExamples, lengths: Mapping[str, int], what: str) -> None:
    """Raises InputError if nearly all inputs, or nearly all targets, of a split were truncated.

    `MOST_CUT` is the share that may be truncated. The message names the setting to change.

    Args:
        source: the tokenised examples, which record how many texts were truncated.
        lengths: the maximum lengths of "inputs" and "targets", in tokens.
        what: the start of the message, which names task and split.
    """
    for side, rows in (("inputs", source.inputs), ("targets", source.targets)):
        if rows.truncated > MOST_CUT * len(rows):
            raise InputError(
                f"{what}: {rows.truncated} of {len(rows)} {side} are longer than {lengths[side]} "
                f"tokens and would be cut; raise TASK_FEATURE_LENGTHS['{side}'], or shorten the "
                "texts themselves"
            )


def report_cut(source: TokenizedExamples, lengths: Mapping[str, int]) -> None:
    """Logs a warning if inputs or targets were truncated.

    It is also called for hard prompts: one with many shots may leave no room for the input itself.

    Args:
        lengths: the maximum lengths of "inputs" and "targets", in tokens.
    """
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
    """Logs a warning, with an example, for texts that the vocabulary cannot represent.

    An input is lost if the tokenizer encodes part of it as unknown. A target is lost if tokenising
    and decoding change it, because then even a perfect model cannot predict it. Not checked are
    truncated targets (see `report_cut`) and the labels of a closed set (see `check_labels`).

    Args:
        source: the tokens of `examples`, in the same order.
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
