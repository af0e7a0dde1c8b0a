"""`pretrain`: model tuning on running text and supervised text-to-text tasks.

From scratch it makes a backbone; from a checkpoint it is the paper's LM adaptation.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from absl import logging
from etils import epath

from ptjax import lock
from ptjax.backbone import Backbone, save_backbone
from ptjax.damage import check_weights
from ptjax.data.batch import SpecialIds
from ptjax.data.catalogue import Preprocess
from ptjax.data.denoising import PrefixLM, SpanCorruption
from ptjax.data.pipeline import Bucket, MixtureBatches, TrainBatches, make_buckets
from ptjax.data.preprocess import TokenizedExamples, tokenize_examples
from ptjax.data.sources import read_records
from ptjax.data.tasks import Task
from ptjax.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from ptjax.data.vocabularies import missing_tokenizer
from ptjax.errors import InputError, check_path, gin_flag
from ptjax.exports import Exports, read_model
from ptjax.identity import digest_array, digest_texts, make_identity
from ptjax.interop.special_ids import check_end_of_sequence
from ptjax.loop import Pace, Run
from ptjax.members import Member
from ptjax.models.config import T5Config
from ptjax.models.prompted import make_apply_fn
from ptjax.models.t5 import init_params, parameter_shapes
from ptjax.preparation import report_steps
from ptjax.scale import sharding
from ptjax.scale.compiled import Recipe
from ptjax.training import freeze as freezing
from ptjax.training.loss import Loss
from ptjax.training.optimizer import Adafactor


@dataclasses.dataclass(frozen=True)
class Text:
    """Documents of running text.

    Attributes:
        files: paths or globs, each with the field of its records that holds the text
            ("imdb.jsonl.xz": "text"; plain text files give the field "text" line by line).
        data_dir: where relative paths start.
        preprocess: fields of a record -> fields of the documents made of it.
        take_every: keep every n-th document of a file, by file.
    """

    files: Mapping[str, str]
    data_dir: str = ""
    preprocess: Preprocess | None = None
    take_every: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def documents(self) -> Iterator[str]:
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
        """All documents in random order, EOS behind each, as one stream of ids [N]."""
        documents = list(self.documents())
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


class Part(Protocol):
    """A component of the mixture: its rate, and its pipelines with their share of the rate."""

    rate: float
    batch_size: int

    def make(
        self, tokenizer: Tokenizer, stream: np.ndarray | None, seed: int, ids: SpecialIds
    ) -> list[TrainBatches]: ...


def _needs_text(stream: np.ndarray | None) -> np.ndarray:
    if stream is None:
        raise InputError("span corruption and prefix LM need running text: set pretrain.text")
    return stream


@dataclasses.dataclass(frozen=True)
class SpanCorruptionPart:
    """T5's own objective on the running text; `rate` is its share of the batches."""

    rate: float
    batch_size: int = 64
    input_length: int = 128
    noise_density: float = 0.15
    mean_span: float = 3.0

    def make(
        self, tokenizer: Tokenizer, stream: np.ndarray | None, seed: int, ids: SpecialIds
    ) -> list[TrainBatches]:
        source = SpanCorruption(
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
class PrefixLMPart:
    """The paper's LM adaptation on the running text."""

    rate: float
    batch_size: int = 64
    input_length: int = 64
    target_length: int = 32

    def make(
        self, tokenizer: Tokenizer, stream: np.ndarray | None, seed: int, ids: SpecialIds
    ) -> list[TrainBatches]:
        source = PrefixLM(
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
class TaskPart:
    """A supervised task in several phrasings, all at equal rates.

    Attributes:
        phrasings: (template of the inputs, verbalizer or None for the task's own) each.
        input_length: longer inputs are cut.
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


def pretrain(
    model_dir: str | os.PathLike[str],
    parts: Sequence[Part],
    *,
    text: Text | None = None,
    model: T5Config | None = None,
    backbone: Backbone | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    optimizer: Adafactor = Adafactor(learning_rate=0.01, multiply_by_parameter_scale=True),
    loss: Loss = Loss(per_token=True),
    pace: Pace = Pace(),
    microbatches: int = 1,
    seed: int = 0,
    config: str = "",
    dry_run: bool = False,
) -> None:
    """Trains all weights; `MODEL_DIR/models/best` is the newest, in Hugging Face's layout.

    Args:
        model: sizes, to start from scratch; needs `tokenizer`.
        backbone: what to go on from instead.
        parts: the mixture; each batch comes from one part.

    Raises:
        InputError: neither or both of `model` and `backbone`, or parts without what they need.
    """
    given = dict(locals())
    check_path("MODEL_DIR", model_dir)
    if backbone is not None and model is None:
        report_steps(pace.train_steps, backbone)
        model, mesh, found = backbone.config, backbone.mesh, backbone.tokenizer
        params, apply_fn = backbone.variables["params"], backbone.apply_fn
        if any(leaf.dtype != np.float32 for leaf in jax.tree.leaves(params)):
            raise InputError(
                "pretrain updates float32 weights: set "
                + gin_flag("backbone.load_backbone.dtype", "float32")
            )
    elif model is not None and backbone is None:
        mesh, found = sharding.make_mesh(), None
        params, apply_fn = _init_on_mesh(model, seed, mesh), make_apply_fn(model)
    else:
        raise InputError("pretrain starts either from sizes (pretrain.model) or from a backbone")
    for part in parts:
        sharding.check_batch_size(part.batch_size, mesh, microbatches)
    if tokenizer is not None:
        found = load_tokenizer(tokenizer)
    if found is None:
        if backbone is None:
            raise InputError("pretrain needs a tokenizer: set pretrain.tokenizer")
        raise missing_tokenizer(backbone.name, model.vocab_size)
    check_vocabulary(found, model.vocab_size)
    check_end_of_sequence(found, model)
    batches, data = _mixture(parts, text, found, seed, model.special_ids)
    trainable = {"params": params}
    freeze = freezing.make_freeze(trainable, freezing.METHODS["model_tuning"])
    recipe = Recipe("model_tuning", optimizer, loss, microbatches)
    init, step = recipe.compose(apply_fn, freeze, mesh)
    state = jax.jit(init)(trainable, sharding.replicate_key(jax.random.key(seed), mesh))
    logging.info("pre-training %s parameters", f"{freezing.sizes(trainable)[0]:,}")

    def write(path: epath.Path, trainable: Any, metadata: dict[str, Any]) -> None:
        save_backbone(path, model, trainable["params"], tokenizer=found, dtype="float32")

    directory = epath.Path(model_dir).expanduser()
    member = Member(
        batches,
        Exports(directory / "models", "", write, read_model),
        rate_at=lambda step: float(optimizer.rate_at(step, 1.0)),
    )
    identity = make_identity(pretrain, given | {"tokenizer": found}, data)
    with lock.hold(directory, needed=not dry_run) as held:
        run = Run(
            directory,
            pace,
            [member],
            identity=identity,
            config=config,
            lock=held,
            check_weights=lambda: check_weights(params, backbone.name if backbone else "the start"),
        )
        run.fit(state, {}, step, mesh, dry_run=dry_run)


def _init_on_mesh(model: T5Config, seed: int, mesh: Any) -> Any:
    def init(key: jax.Array) -> Any:
        return init_params(model, key)

    where = sharding.shardings_of({"params": parameter_shapes(model)}, mesh)["params"]
    return jax.jit(init, out_shardings=where)(jax.random.key(seed))


def _mixture(
    parts: Sequence[Part], text: Text | None, tokenizer: Tokenizer, seed: int, ids: SpecialIds
) -> tuple[MixtureBatches, dict[str, Any]]:
    """(the mixture, what was read for it, for the run's identity)."""
    stream = None if text is None else text.tokenize(tokenizer, seed)
    data = {} if stream is None else {"the running text": {"the hash": digest_array(stream)}}
    components, rates = [], []
    for number, part in enumerate(parts):
        made = part.make(tokenizer, stream, seed + 100 * number, ids)
        components += made
        rates += [part.rate / len(made)] * len(made)
        for phrasing, batches in enumerate(made):
            if isinstance(batches.source, TokenizedExamples):
                data[f"part {number}, phrasing {phrasing}"] = _describe_examples(batches.source)
    return MixtureBatches(components, rates, seed), data


def _describe_examples(source: TokenizedExamples) -> dict[str, Any]:
    arrays = (x for rows in (source.inputs, source.targets) for x in (rows.ids, rows.offsets))
    digest = digest_texts(digest_array(array) for array in arrays)
    return {"the number of examples": len(source), "the hash": digest}
