"""Pre-training data: plain text and supervised tasks, mixed at fixed rates."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from absl import logging
from etils import epath

from ptjax import untrusted
from ptjax.data.batch import SpecialIds
from ptjax.data.catalogue import Preprocess
from ptjax.data.denoising import PrefixLMSource, SpanCorruptionSource
from ptjax.data.pipeline import Bucket, MixtureBatches, TrainBatches, make_buckets
from ptjax.data.preprocess import tokenize_examples
from ptjax.data.sources import read_records
from ptjax.data.tasks import Task
from ptjax.data.tokenizer import Tokenizer
from ptjax.errors import InputError


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """Documents of plain, unlabelled text.

    Attributes:
        files: path or glob -> the field that holds the text ({"imdb.jsonl.xz": "text"}). In plain
            text files, every line is a record with the field "text".
        data_dir: base of relative paths.
        preprocess: maps a record's fields to the fields of each document made from it.
        take_every: path or glob (a key of `files`) -> n. Uses only every n-th of its records.
    """

    files: Mapping[str, str]
    data_dir: str = ""
    preprocess: Preprocess | None = None
    take_every: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def documents(self) -> Iterator[str]:
        """Yields the text of every document, in the order of the files.

        Raises:
            InputError: a file cannot be read, or a record lacks the field.
        """
        for file, field in self.files.items():
            path = os.path.join(self.data_dir, file) if self.data_dir else file
            for record in read_records(path)[:: self.take_every.get(file, 1)]:
                if field not in record.fields:
                    raise InputError(f"{record.where}: no field {field!r}")
                made = (
                    [record.fields] if self.preprocess is None else self.preprocess(record.fields)
                )
                yield from (fields[field] for fields in made)

    def tokenize(self, tokenizer: Tokenizer, seed: int) -> np.ndarray:
        """Tokenises all documents, in random order, into one stream of ids [N].

        EOS follows each document. The dtype is uint16 if the vocabulary fits, else int32.

        Raises:
            InputError: the files contain no document, or one of them cannot be used.
        """
        documents = list(self.documents())
        if not documents:
            raise InputError(f"no document in the running text of {', '.join(self.files) or '{}'}")
        order = np.random.default_rng(seed).permutation(len(documents))
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
        rows = []
        for start in range(0, len(order), 4096):
            texts = [documents[i] for i in order[start : start + 4096]]
            rows += [
                np.array([*ids, tokenizer.eos_id], dtype) for ids in tokenizer.encode_batch(texts)
            ]
        stream = np.concatenate(rows)
        logging.info("%d documents, %d tokens of running text", len(documents), len(stream))
        return stream


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """Plain text that is already tokenised: the result of `TextFiles.tokenize` in a file.

    Attributes:
        path: a `.npy` file with one array of ids [N], local or gs://.
    """

    path: str

    def tokenize(self, tokenizer: Tokenizer, seed: int) -> np.ndarray:
        """Reads the ids [N] from the file. Ignores `seed`: the documents keep the file's order.

        Raises:
            InputError: the file does not exist or does not hold a vector of integers, or an id is
                not in the vocabulary.
        """
        try:
            stream = untrusted.read_numpy(epath.Path(self.path).read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path}: cannot be read as an .npy array: {error}") from error
        if stream.ndim != 1 or stream.dtype.kind not in "iu":
            raise InputError(
                f"{self.path}: {stream.dtype} {list(stream.shape)}, but token ids are one vector "
                "of integers"
            )
        if len(stream) and not 0 <= stream.min() <= stream.max() < tokenizer.vocab_size:
            raise InputError(
                f"{self.path}: ids {stream.min()} to {stream.max()}, but the vocabulary has "
                f"{tokenizer.vocab_size}; tokenise the text with this tokenizer"
            )
        logging.info("%d tokens of running text", len(stream))
        return stream


class MixtureComponent(Protocol):
    """The interface of a component of a training mixture: a source of training batches.

    Attributes:
        rate: its weight in the mixture, relative to the rates of the other components.
        batch_size: examples per batch.
    """

    rate: float
    batch_size: int

    def make(
        self, tokenizer: Tokenizer, stream: np.ndarray | None, seed: int, ids: SpecialIds
    ) -> list[TrainBatches]:
        """Builds the component's pipelines: endless sequences of batches that share its rate.

        Args:
            stream: the token ids [N] of the plain text; None if the run has none.
            seed: determines the random order and contents of the batches.
            ids: the special ids of the backbone's vocabulary.

        Raises:
            InputError: the component needs text and `stream` is None, or its data cannot be used.
        """
        ...


def _needs_text(stream: np.ndarray | None) -> np.ndarray:
    if stream is None:
        raise InputError("span corruption and prefix LM need running text: set pretrain.text")
    return stream


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
    """T5's span corruption of the plain text.

    In the input, sentinels replace random spans. The target has these spans, each after its
    sentinel.

    Attributes:
        rate: its weight in the mixture, relative to the rates of the other components.
        batch_size: examples per batch.
        input_length: the maximum number of input tokens of an example.
        noise_density: the fraction of tokens that are replaced.
        mean_span: the mean number of tokens per span.
    """

    rate: float
    batch_size: int = 64
    input_length: int = 128
    noise_density: float = 0.15
    mean_span: float = 3.0

    def make(
        self, tokenizer: Tokenizer, stream: np.ndarray | None, seed: int, ids: SpecialIds
    ) -> list[TrainBatches]:
        source = SpanCorruptionSource(
            _needs_text(stream),
            tokenizer,
            input_length=self.input_length,
            noise_density=self.noise_density,
            mean_span=self.mean_span,
            seed=seed,
        )
        bucket = (int(source.input_lengths[0]), int(source.target_lengths[0]))
        return [
            TrainBatches(source, buckets=[bucket], batch_size=self.batch_size, seed=seed, ids=ids)
        ]


@dataclasses.dataclass(frozen=True)
class PrefixLM:
    """Prefix language modelling on the plain text, the paper's LM adaptation.

    The input is a piece of text of random length, the target are the tokens that follow it.

    Attributes:
        rate: its weight in the mixture, relative to the rates of the other components.
        batch_size: examples per batch.
        input_length: the maximum number of input tokens of an example.
        target_length: the number of target tokens of an example.
    """

    rate: float
    batch_size: int = 64
    input_length: int = 64
    target_length: int = 32

    def make(
        self, tokenizer: Tokenizer, stream: np.ndarray | None, seed: int, ids: SpecialIds
    ) -> list[TrainBatches]:
        source = PrefixLMSource(
            _needs_text(stream),
            tokenizer,
            input_length=self.input_length,
            target_length=self.target_length,
            seed=seed,
        )
        bucket = (self.input_length, self.target_length)
        return [
            TrainBatches(source, buckets=[bucket], batch_size=self.batch_size, seed=seed, ids=ids)
        ]


@dataclasses.dataclass(frozen=True)
class TaskComponent:
    """A supervised task in several phrasings, which share its rate equally.

    Attributes:
        rate: its weight in the mixture, relative to the rates of the other components.
        phrasings: pairs (input template, verbalizer), one per phrasing, which replace the
            task's `inputs` and `verbalizer`. A verbalizer of None keeps the task's.
        input_length, target_length: in tokens; longer texts are truncated.
        buckets: batch shapes (T, L); None chooses them by the lengths of the examples.
    """

    rate: float
    task: Task
    phrasings: Sequence[tuple[str, Mapping[str, str] | None]]
    batch_size: int = 64
    input_length: int = 256
    target_length: int = 16
    buckets: Sequence[Bucket] | None = None

    def make(
        self, tokenizer: Tokenizer, stream: np.ndarray | None, seed: int, ids: SpecialIds
    ) -> list[TrainBatches]:
        made, count = [], 0
        for number, (inputs, verbalizer) in enumerate(self.phrasings):
            verbalizer = self.task.verbalizer if verbalizer is None else verbalizer
            task = dataclasses.replace(self.task, inputs=inputs, verbalizer=verbalizer)
            examples = task.load("train")
            count = len(examples)
            source = tokenize_examples(examples, tokenizer, self.input_length, self.target_length)
            buckets = self.buckets or make_buckets(source)
            made.append(
                TrainBatches(
                    source,
                    buckets=buckets,
                    batch_size=self.batch_size,
                    seed=seed + number,
                    ids=ids,
                )
            )
        logging.info("%s: %d examples in %d phrasings", self.task.name, count, len(made))
        return made


def make_batches(
    components: Sequence[MixtureComponent],
    stream: np.ndarray | None,
    tokenizer: Tokenizer,
    seed: int,
    ids: SpecialIds,
) -> list[list[TrainBatches]]:
    """Builds the pipelines (endless sequences of batches) of every component, for `mix`.

    Args:
        stream: the token ids [N] of the plain text; None if the run has none.

    Returns:
        For each component, the list that its `make` returns.
    """
    return [
        component.make(tokenizer, stream, seed + 100 * number, ids)
        for number, component in enumerate(components)
    ]


def mix(
    components: Sequence[MixtureComponent], batches: Sequence[Sequence[TrainBatches]], seed: int
) -> MixtureBatches:
    """Returns one sequence of batches that draws from all components at their rates.

    Args:
        batches: the result of `make_batches` for these components. The pipelines of a component
            share its rate equally.
        seed: determines the random order in which components are drawn.
    """
    rates = [
        component.rate / len(made)
        for component, made in zip(components, batches, strict=True)
        for _ in made
    ]
    return MixtureBatches([pipeline for made in batches for pipeline in made], rates, seed)
