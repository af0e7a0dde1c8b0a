"""What a run needs before its first step: data, prompts, members. What is wrong shows here."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from ptjax import __version__
from ptjax.backbone import Backbone, load_backbone, save_backbone
from ptjax.bank import Variant, check_names
from ptjax.data.packing import PackedBatches
from ptjax.data.pipeline import Bucket, TrainBatches, make_buckets
from ptjax.data.preprocess import TokenizedExamples, tokenize_examples
from ptjax.data.tasks import Task
from ptjax.data.vocabularies import missing_tokenizer
from ptjax.errors import InputError, check_at_least, check_choice, gin_flag
from ptjax.evaluation import (
    Evaluation,
    Evaluator,
    check_cut,
    report_cut,
    report_examples,
    report_lost,
)
from ptjax.exports import BEST, Exports, read_model
from ptjax.identity import digest_texts
from ptjax.interop import prompt_header
from ptjax.interop.prompt_file import load_prompt, save_prompt
from ptjax.members import Member
from ptjax.models.prompt import ClassLabels, Initializer, Prompt, SampledVocabulary, Surroundings
from ptjax.models.prompted import with_prompt
from ptjax.scale import processes, sharding
from ptjax.training import freeze as freezing
from ptjax.training.optimizer import Adafactor, embedding_rms

Tree = Any


def check_settings(
    method: str,
    *,
    prompt_length: int,
    batch_size: int,
    microbatches: int,
    feature_lengths: Mapping[str, int] | None,
    quantize: str | None,
    bank: Mapping[str, Variant] | None,
) -> dict[str, int]:
    """The arguments of `tuning.tune` that need neither weights nor data to be judged.

    Returns:
        {"inputs": T, "targets": L}.

    Raises:
        InputError: one is out of bounds, or they do not fit together.
    """
    check_choice(freezing.METHODS, "tune", method=method)
    check_at_least(1, PROMPT_LENGTH=prompt_length, BATCH_SIZE=batch_size, MICROBATCHES=microbatches)
    if batch_size % microbatches:
        raise InputError(f"BATCH_SIZE = {batch_size} is no multiple of {microbatches} MICROBATCHES")
    lengths = {"inputs": 512, "targets": 16}
    if unknown := sorted(set(feature_lengths or {}) - set(lengths)):
        raise InputError(f"TASK_FEATURE_LENGTHS has {unknown[0]!r}, not 'inputs' or 'targets'")
    if method == "model_tuning" and quantize:
        needed = gin_flag("QUANTIZE", None)
        raise InputError(f"int8 kernels do not train: set {needed} for model tuning")
    if bank and method != "prompt_tuning":
        raise InputError(f"every member of a bank has a prompt; method = {method!r} has none")
    check_names(bank or {})
    return lengths | dict(feature_lengths or {})


class Subject:
    """A task with its training examples; the members of a bank that learn it share it."""

    def __init__(self, task: Task, evaluator: Evaluator) -> None:
        self.task, self.evaluator = task, evaluator
        for split in (evaluator.settings.split, evaluator.reported_split):
            evaluator.examples(split)  # what is wrong with them shows before the training
        self.train = task.load("train")

    def describe_data(self) -> dict[str, dict[str, Any]]:
        """What it was read from and what that gave, for the run's identity."""
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
        """The training examples as tokens."""
        lengths = self.evaluator.lengths
        source = tokenize_examples(
            self.train, self.evaluator.tokenizer, lengths["inputs"], lengths["targets"]
        )
        report_examples(self.task, "train", self.train)
        check_cut(source, lengths, f"{self.task.name}, split train")
        report_cut(source, lengths)
        report_lost(self.task, self.train, source, self.evaluator.tokenizer)
        return source


@dataclasses.dataclass(frozen=True)
class Start:
    """A member as it starts.

    `variables` has its initial prompt, `trainable` and `frozen` are its halves, by `freeze`.
    """

    member: Member
    subject: Subject
    seed: int
    variables: Tree
    freeze: freezing.Freeze
    trainable: Tree
    frozen: Tree


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What the members of a run share; the fields are arguments of `tuning.tune`."""

    model_dir: epath.Path
    backbone: Backbone
    method: str
    prompt: Prompt
    prompt_length: int
    init_prompt: Initializer | None
    optimizer: Adafactor
    batch_size: int
    microbatches: int
    lengths: Mapping[str, int]
    buckets: Sequence[Bucket] | None
    pack: bool
    row_length: int | None
    evaluation: Evaluation

    @functools.cached_property
    def embedding_rms(self) -> float:
        return embedding_rms(self.backbone.embedding)

    def load(self, task: Task) -> Subject:
        """Reads everything of `task` that the run will use."""
        backbone, tokenizer = self.backbone, self.backbone.tokenizer
        if tokenizer is None:
            raise missing_tokenizer(backbone.name, backbone.config.vocab_size)
        settings = self.evaluation, self.prompt.sees_input
        return Subject(task, Evaluator(task, backbone, tokenizer, self.lengths, *settings))

    def start(self, subject: Subject, variant: Variant, seed: int, name: str = "") -> Start:
        """The member `name` ("" is an ordinary run's only one) with its prompt and its data."""
        seed = seed if variant.seed is None else variant.seed
        variables = self.backbone.variables
        if self.method == "prompt_tuning":
            initializer = variant.init_prompt or self.init_prompt
            variables = with_prompt(
                variables, self._initial_prompt(initializer, subject, seed, name)
            )
        freeze = freezing.make_freeze(variables, freezing.METHODS[self.method])
        trainable, frozen = freezing.split(variables, freeze)
        optimizer = self.optimizer
        if variant.learning_rate is not None:
            optimizer = dataclasses.replace(optimizer, learning_rate=variant.learning_rate)
        rms = self.embedding_rms
        _report_rate(self.method, optimizer, rms)
        member = Member(
            self._batches(subject, seed),
            self._exports(subject.task, seed, name),
            rate_at=lambda step: float(optimizer.rate_at(step, rms)),
            evaluate=lambda own: subject.evaluator(
                freezing.combine(own, frozen), self.evaluation.split
            ),
            metric=subject.evaluator.metric,
            name=name,
        )
        return Start(member, subject, seed, variables, freeze, trainable, frozen)

    def load_best(self, member: Member) -> Tree:
        """Variables with a member's best export, read back from its file."""
        path, backbone = member.exports.path(BEST), self.backbone
        if self.method == "model_tuning":
            config = backbone.config
            return load_backbone(
                path,
                dtype=config.dtype,
                mesh=backbone.mesh,
                fsdp=backbone.fsdp,
                scan_layers=config.scan_layers,
                family=backbone.family,
            ).variables
        return with_prompt(backbone.variables, load_prompt(path).prompt)

    def _initial_prompt(
        self, initializer: Initializer | None, subject: Subject, seed: int, name: str
    ) -> jax.Array:
        """P [P, D], float32, replicated on the backbone's mesh."""
        backbone, labels = self.backbone, subject.task.labels
        if initializer is None:
            initializer = ClassLabels() if labels else SampledVocabulary()
        surroundings = Surroundings(
            embedding=backbone.embedding,
            tokenizer=backbone.tokenizer,
            labels=labels,
            texts=lambda: (example.inputs for example in subject.train),
        )
        # Its own stream: the same seed drives dropout through the train state's key.
        key = jax.random.fold_in(jax.random.key(seed), 1)
        made = initializer(key, self.prompt_length, surroundings)
        prompt = processes.on_host(made).astype(np.float32)
        if prompt.shape != (self.prompt_length, backbone.config.emb_dim):
            raise InputError(
                f"the initial prompt{f' of {name}' if name else ''} has shape {prompt.shape}, the "
                f"run wants ({self.prompt_length}, {backbone.config.emb_dim}); change "
                "PROMPT_LENGTH or the initialiser"
            )
        return jax.device_put(prompt, sharding.replicated(backbone.mesh))

    def _batches(self, subject: Subject, seed: int) -> TrainBatches | PackedBatches:
        source, mesh = subject.source, self.backbone.mesh
        ids = self.backbone.config.special_ids
        own = self.pack and self.method == "prompt_tuning" and self.prompt.sees_input
        slots = self.prompt_length if own else 0
        if self.pack:
            batches = PackedBatches(
                source,
                batch_size=self.batch_size,
                seed=seed,
                ids=ids,
                prompt_slots=slots,
                row_length=self.row_length,
                row_multiple=self.microbatches * sharding.rows_divisor(mesh),
            )
        else:
            buckets = self.buckets or make_buckets(source)
            batches = TrainBatches(
                source, buckets=buckets, batch_size=self.batch_size, seed=seed, ids=ids
            )
        length = self.lengths["inputs"]
        logging.info(
            "%d batches an epoch; padding %.0f%% -> %.0f%% (to %d tokens -> %s)",
            batches.batches_per_epoch,
            100 * (1 - (float(source.input_lengths.mean()) + slots) / (length + slots)),
            100 * batches.padding(),
            length,
            ("packed" if self.pack else "in buckets") + (", all with their prompts" if own else ""),
        )
        return batches

    def _metadata(self, task: Task, seed: int) -> dict[str, Any]:
        """What an exported prompt says of itself."""
        backbone, tokenizer = self.backbone, self.backbone.tokenizer
        return {
            "ptjax_version": __version__,
            "backbone_name": backbone.name,
            **backbone.fingerprints.as_metadata(),
            "tokenizer_fingerprint": tokenizer.fingerprint if tokenizer else None,
            **prompt_header.special_ids(backbone.config.special_ids),
            "task": task.describe(),
            "input_length": self.lengths["inputs"],
            "target_length": self.lengths["targets"],
            "seed": seed,
            "sees_input": self.prompt.sees_input,
        }

    def _exports(self, task: Task, seed: int, name: str) -> Exports:
        backbone, metadata = self.backbone, self._metadata(task, seed)

        def write_prompt(path: epath.Path, trainable: Tree, more: dict[str, Any]) -> None:
            if processes.first():
                save_prompt(path, np.asarray(trainable["prompt"]["prompt"]), metadata | more)

        def write_model(path: epath.Path, trainable: Tree, more: dict[str, Any]) -> None:
            # float32: the tuned weights as they are, whatever the backbone's activations.
            params, tokenizer = trainable["params"], backbone.tokenizer
            kept = {"tokenizer": tokenizer, "dtype": "float32", "family": backbone.family}
            save_backbone(path, backbone.config, params, **kept)

        if self.method == "model_tuning":
            return Exports(self.model_dir / "models", "", write_model, read_model)
        return Exports(
            self.model_dir / "prompts" / name,
            ".safetensors",
            write_prompt,
            lambda path: load_prompt(path).metadata,
        )


def report_sizes(
    method: str, backbone: Backbone, trainable: Tree, opt_state: Tree, frozen: Tree
) -> None:
    """What trains, what is frozen, and how large the two are."""
    (trained, trained_bytes), (kept, kept_bytes) = (
        freezing.sizes(trainable),
        freezing.sizes(frozen),
    )
    _, optimizer_bytes = freezing.sizes(opt_state)
    logging.info("backbone %s, %s", backbone.name, backbone.fingerprint[:19])
    logging.info(
        "%s: %s parameters train (%.4f%%), %s are frozen (%s)",
        method,
        f"{trained:,}",
        100 * trained / (trained + kept),
        f"{kept:,}",
        _megabytes(kept_bytes),
    )
    logging.info(
        "optimizer state %s, a checkpoint about %s",
        _megabytes(optimizer_bytes),
        _megabytes(trained_bytes + optimizer_bytes),
    )


def report_steps(train_steps: int, backbone: Backbone) -> None:
    """A warning where TRAIN_STEPS seems to count the backbone's own steps, as T5X does."""
    checkpoint = re.search(r"checkpoint_(\d+)/*$", backbone.name)
    before = int(checkpoint[1]) if checkpoint else 0
    # A checkpoint of a few steps beside a long run is no sign of it.
    if train_steps / 10 < before < train_steps:
        logging.warning(
            "TRAIN_STEPS = %s are steps of this run. T5X counts on from the checkpoint's %s and "
            "would train %s: set %s if that is what you mean",
            f"{train_steps:,}",
            f"{before:,}",
            f"{train_steps - before:,}",
            gin_flag("TRAIN_STEPS", train_steps - before),
        )


def _report_rate(method: str, optimizer: Adafactor, rms: float) -> None:
    """The learning rate against the embedding's scale."""
    rate = float(optimizer.rate_at(0, rms))
    logging.info(
        "learning rate %.4g: %.2g%% of the embedding's RMS (%.3g) a step",
        rate,
        100 * rate / rms,
        rms,
    )
    if method == "prompt_tuning" and rate > 0.1 * rms:
        logging.warning(
            "one step may move a prompt entry by %.0f%% of the embedding's RMS; 1-3%% learns "
            "best: set %s %s (Adafactor.learning_rate_scale and learning_rate)",
            100 * rate / rms,
            gin_flag("LEARNING_RATE_SCALE", "embedding_rms"),
            gin_flag("LEARNING_RATE", 0.03),
        )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"
