"""Loads a task's data: examples for evaluation, and batches for training."""

from __future__ import annotations

import functools

from absl import logging

from ptjax.backbones.load import Backbone
from ptjax.data.class_weights import example_weights
from ptjax.data.packing import PackedBatches
from ptjax.data.pipeline import TrainBatches, make_buckets
from ptjax.data.preprocess import TokenizedExamples, tokenize_examples
from ptjax.data.tasks import Task
from ptjax.data.vocabularies import missing_tokenizer
from ptjax.evaluation.evaluator import (
    Evaluator,
    check_cut,
    report_cut,
    report_examples,
    report_lost,
)
from ptjax.files import JsonObject
from ptjax.methods.base import run_with
from ptjax.settings import RunSettings
from ptjax.sharding.arrays import rows_divisor
from ptjax.trainer.identity import digest_texts


class TaskData:
    """A task with its examples, loaded on construction; shared by members with equal tasks.

    Attributes:
        train: the examples of the split "train".
    """

    def __init__(self, task: Task, evaluator: Evaluator) -> None:
        self.task, self.evaluator = task, evaluator
        for split in (evaluator.settings.split, evaluator.reported_split):
            evaluator.examples(split)  # loaded now: bad records are reported before training
        self.train = task.load("train")

    def describe(self) -> dict[str, JsonObject]:
        """Identifies the content of each split that the run uses, so that changed data is noticed.

        Returns:
            the split and task in words -> digests and the number of examples, by name. Pass it to
            `make_identity` as (a part of) `data`.
        """
        evaluator = self.evaluator
        splits = {
            split: evaluator.examples(split)
            for split in (evaluator.settings.split, evaluator.reported_split)
        }
        return {
            f"split {split!r} of task {self.task.name}": {
                "the hash": examples.digest,
                "the number of examples": len(examples),
                "the hash of the text": digest_texts(
                    text for example in examples for text in (example.inputs, example.targets)
                ),
            }
            for split, examples in {**splits, "train": self.train}.items()
        }

    @functools.cached_property
    def source(self) -> TokenizedExamples:
        """The tokenised training examples. Logs their number and warns of truncated or lost text.

        Raises:
            InputError: nearly all inputs or nearly all targets would be truncated.
        """
        lengths = self.evaluator.lengths
        source = tokenize_examples(
            self.train, self.evaluator.tokenizer, lengths["inputs"], lengths["targets"]
        )
        report_examples(self.task, "train", self.train)
        check_cut(source, lengths, f"{self.task.name}, split train")
        report_cut(source, lengths)
        report_lost(self.task, self.train, source, self.evaluator.tokenizer)
        return source


def load_task_data(task: Task, backbone: Backbone, settings: RunSettings) -> TaskData:
    """Loads every split of `task` that the run uses.

    Raises:
        InputError: the backbone has no tokenizer, or the data cannot be used.
    """
    if backbone.tokenizer is None:
        raise missing_tokenizer(backbone.name, backbone.config.vocab_size)
    evaluator = Evaluator(
        task,
        backbone,
        backbone.tokenizer,
        settings.batching.lengths,
        settings.evaluation,
        settings.method.attends_to_input,
        run_with(settings.method, backbone),
    )
    return TaskData(task, evaluator)


def make_train_batches(
    data: TaskData, settings: RunSettings, seed: int
) -> TrainBatches | PackedBatches:
    """Makes the training batches, packed or in buckets as `settings.batching` selects.

    Logs the number of batches per epoch, and two percentages of padding: if every input were padded
    to the full length, and in the batches made here.

    Args:
        seed: determines the order of the examples.
    """
    source, backbone, batching = data.source, data.evaluator.backbone, settings.batching
    class_weights = settings.loss.class_weights
    weights = None
    if class_weights is not None:
        weights = example_weights(class_weights, data.task, data.train)
    ids = backbone.config.special_ids
    slots = settings.method.extra_positions() if batching.pack else 0
    if batching.pack:
        batches = PackedBatches(
            source,
            batch_size=batching.batch_size,
            seed=seed,
            ids=ids,
            prompt_slots=slots,
            row_length=batching.row_length,
            row_multiple=batching.microbatches * rows_divisor(backbone.mesh),
            weights=weights,
        )
    else:
        batches = TrainBatches(
            source,
            buckets=batching.buckets or make_buckets(source),
            batch_size=batching.batch_size,
            seed=seed,
            ids=ids,
            weights=weights,
        )
    length = batching.lengths["inputs"]
    logging.info(
        "%d batches an epoch; padding %.0f%% -> %.0f%% (to %d tokens -> %s)",
        batches.batches_per_epoch,
        100 * (1 - (float(source.input_lengths.mean()) + slots) / (length + slots)),
        100 * batches.padding(),
        length,
        ("packed" if batching.pack else "in buckets") + (", all with their prompts" * bool(slots)),
    )
    return batches
