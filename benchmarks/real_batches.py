"""Real examples as batches, in every way that the benchmarks beside this file compare."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from prompt_step import t5_1_1

from ptjax.data.batch import Batch, make_batch
from ptjax.data.catalogue import reviews
from ptjax.data.packing import PackedBatches
from ptjax.data.pipeline import TrainBatches, make_buckets
from ptjax.data.preprocess import TokenizedExamples, tokenize_examples
from ptjax.data.tasks import Task
from ptjax.data.tokenizer import load_tokenizer

TARGET_LENGTH = 4
T5_IDS = t5_1_1("small").special_ids

TASKS: dict[str, dict[str, Any]] = {  # laid out as in gin_configs/tasks/, without a name in front
    "sst2": {
        "inputs": "{sentence}",
        "splits": {split: f"sst2/{split}.tsv" for split in ("train", "validation", "test")},
        "verbalizer": {"0": "negative", "1": "positive"},
    },
    "imdb": {
        "inputs": "{text}",
        "splits": {"train": "imdb/train.jsonl.xz", "test": "imdb/test.jsonl.xz"},
        "verbalizer": {"neg": "negative", "pos": "positive"},
        "preprocess": reviews.without_line_breaks,
    },
    "ag_news": {
        "inputs": "{text}",
        "splits": {split: f"ag_news/{split}.csv" for split in ("train", "test")},
        # Words of few pieces: "Sci/Tech" has six of ptjax-nano's.
        "verbalizer": {
            "World": "world",
            "Sports": "sports",
            "Business": "business",
            "Sci/Tech": "science",
        },
    },
}


def make_task(name: str, data_dir: str | os.PathLike[str]) -> Task:
    return Task(name=name, label="label", data_dir=os.fspath(data_dir), **TASKS[name])


def load_examples(
    task: Task, tokenizer: str, length: int, split: str = "train"
) -> TokenizedExamples:
    """A split as ids, inputs cut to `length`; `tokenizer` is what `load_tokenizer` takes."""
    return tokenize_examples(task.load(split), load_tokenizer(tokenizer), length, TARGET_LENGTH)


class PaddedBatches:
    """Shuffled batches, padded to one length, or each to its longest example.

    Args:
        length: T of every batch; None is the longest example's.
        multiple: such a T is rounded up to a multiple of it.
    """

    def __init__(
        self,
        source: TokenizedExamples,
        *,
        batch_size: int,
        seed: int,
        length: int | None = None,
        multiple: int = 1,
    ) -> None:
        self.source, self.length, self.multiple = source, length, multiple
        order = np.random.default_rng(seed).permutation(len(source))
        order = np.append(order, order[: -len(order) % batch_size])
        self._examples = order.reshape(-1, batch_size)
        self.batches_per_epoch = len(self._examples)

    def batch(self, number: int) -> Batch:
        examples = [self.source.tokens(int(i), 0) for i in self._examples[number]]
        longest = max(len(inputs) for inputs, _ in examples)
        return make_batch(
            [inputs for inputs, _ in examples],
            [targets for _, targets in examples],
            input_length=self.length or -(-longest // self.multiple) * self.multiple,
            target_length=int(self.source.target_lengths.max()),
            ids=T5_IDS,
        )


class Plan(Protocol):
    """An epoch of batches by number."""

    batches_per_epoch: int

    def batch(self, number: int) -> Batch: ...


def pad_to(length: int) -> Callable[..., Plan]:
    """Every row padded to `length`, as google-research/prompt-tuning does."""
    return lambda source, batch_size, prompt_slots: PaddedBatches(
        source, batch_size=batch_size, seed=0, length=length
    )


def pad_to_longest(multiple: int = 1) -> Callable[..., Plan]:
    """Every batch padded to its longest example, as PEFT's users do."""
    return lambda source, batch_size, prompt_slots: PaddedBatches(
        source, batch_size=batch_size, seed=0, multiple=multiple
    )


def bucket(source: TokenizedExamples, batch_size: int, prompt_slots: int) -> Plan:
    """ptjax's default: examples of like length share a batch."""
    buckets = make_buckets(source)
    return TrainBatches(source, buckets=buckets, batch_size=batch_size, seed=0, ids=T5_IDS)


def pack(source: TokenizedExamples, batch_size: int, prompt_slots: int) -> Plan:
    """ptjax's PACK: short examples share a row."""
    return PackedBatches(
        source, batch_size=batch_size, seed=0, ids=T5_IDS, prompt_slots=prompt_slots
    )


def epoch(plan: Plan) -> Iterator[Batch]:
    return (plan.batch(number) for number in range(plan.batches_per_epoch))


def positions(batch: Batch) -> int:
    """Encoder positions of a batch, without those of a prompt that stands before its rows."""
    return batch["encoder_input_tokens"].size


def pick(plan: Plan, count: int) -> list[Batch]:
    """`count` batches that stand for the epoch: sorted by size, the middle one of every part."""
    batches = sorted(epoch(plan), key=positions)
    return [batches[(2 * i + 1) * len(batches) // (2 * count)] for i in range(count)]
