"""`tune`: a task, a frozen backbone and a recipe become a prompt and `results.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from ptjax import __version__, atomic
from ptjax.backbone import Backbone, load_backbone, save_backbone
from ptjax.checkpoint import Checkpoints
from ptjax.data.packing import PackedBatches
from ptjax.data.pipeline import Bucket, TrainBatches, make_buckets
from ptjax.data.preprocess import TokenizedExamples, tokenize_examples
from ptjax.data.tasks import Example, Task
from ptjax.errors import InputError, check_at_least
from ptjax.evaluation import Evaluation, Evaluator, HardPrompt, report_cut, report_examples
from ptjax.interop.prompt_file import load_prompt, save_prompt
from ptjax.loop import BEST, Exports, Pace, Run, report_memory
from ptjax.models.prompt import ClassLabels, Initializer, Prompt, SampledVocabulary, Surroundings
from ptjax.models.prompted import with_prompt
from ptjax.scale import sharding
from ptjax.training import freeze as freezing
from ptjax.training.loss import Loss
from ptjax.training.optimizer import Adafactor, embedding_rms
from ptjax.training.step import TrainState, init_train_state, make_train_step

Tree = Any


def tune(
    model_dir: str | os.PathLike[str],
    task: Task,
    backbone: Backbone,
    *,
    method: Literal["prompt_tuning", "model_tuning", "hard_prompt"] = "prompt_tuning",
    prompt: Prompt = Prompt(),
    prompt_length: int = 100,
    init_prompt: Initializer | None = None,
    optimizer: Adafactor = Adafactor(),
    loss: Loss = Loss(),
    pace: Pace = Pace(),
    batch_size: int = 32,
    microbatches: int = 1,
    feature_lengths: Mapping[str, int] | None = None,
    buckets: Sequence[Bucket] | None = None,
    pack: bool = False,
    row_length: int | None = None,
    evaluation: Evaluation = Evaluation(),
    hard_prompt: HardPrompt | None = None,
    other_hard_prompts: Mapping[str, HardPrompt] | None = None,
    seed: int = 0,
    config: str = "",
    dry_run: bool = False,
) -> dict[str, Any]:
    """Trains, selects on `evaluation.split`, and scores the best on the test split.

    Args:
        model_dir: receives everything; a run that was stopped there goes on.
        method: what trains, see `training.freeze.METHODS`; "hard_prompt" only scores.
        prompt: how the prompt is read.
        prompt_length: P.
        init_prompt: None is class labels for a closed label set, else sampled vocabulary.
        feature_lengths: T5X's {"inputs": T, "targets": L}, EOS included; longer ones are cut,
            counted and reported.
        buckets: batch shapes (T, L); None takes input lengths that double from 32.
        pack: short examples share rows instead; a batch holds as many examples as before.
        row_length: T of such rows, with the prompt's places where it sees its input; None chooses.
        hard_prompt: scored beside the tuned prompt ("hard_prompt" in the results).
        other_hard_prompts: more of them, by name.
        config: the settings as text, kept as `config.gin`.
        dry_run: compile, report, stop before the first step.

    Returns:
        What `results.json` holds.

    Raises:
        InputError: settings that do not fit together, or a `model_dir` of another run.
    """
    model_dir = epath.Path(model_dir).expanduser()
    if backbone.tokenizer is None:
        raise InputError(f"{backbone.name} has no tokenizer; set load_backbone.tokenizer")
    if method not in freezing.METHODS:
        raise InputError(f"no method {method!r}; choose one of {', '.join(freezing.METHODS)}")
    check_at_least(1, PROMPT_LENGTH=prompt_length, BATCH_SIZE=batch_size, MICROBATCHES=microbatches)
    check_at_least(0, RANDOM_SEED=seed)
    if batch_size % microbatches:
        raise InputError(f"BATCH_SIZE = {batch_size} is no multiple of {microbatches} MICROBATCHES")
    lengths = {"inputs": 512, "targets": 16}
    if unknown := sorted(set(feature_lengths or {}) - set(lengths)):
        raise InputError(f"TASK_FEATURE_LENGTHS has {unknown[0]!r}, not 'inputs' or 'targets'")
    lengths |= feature_lengths or {}
    evaluator = Evaluator(
        task, backbone, backbone.tokenizer, lengths, evaluation, prompt.sees_input
    )
    train = task.load("train")
    variables = backbone.variables
    if method == "prompt_tuning":
        matrix = _initial_prompt(init_prompt, prompt_length, backbone, task, train, seed)
        variables = with_prompt(variables, matrix)
    freeze = freezing.make_freeze(variables, freezing.METHODS[method])
    trainable, frozen = freezing.split(variables, freeze)
    scores = _Scores(evaluator, train, backbone, seed, hard_prompt, other_hard_prompts or {})
    for split in (scores.selected_on, scores.split):
        evaluator.examples(split)  # what is wrong with them shows before the training, not after
    counts = {
        "trainable_parameters": freezing.sizes(trainable)[0],
        "frozen_parameters": freezing.sizes(frozen)[0],
    }
    metadata = _metadata(task, backbone, lengths, seed) | {"sees_input": prompt.sees_input}
    identity = _identity(metadata, method, prompt_length, batch_size, microbatches)
    if method == "hard_prompt":
        _refuse_another_run(model_dir / "checkpoints", identity)
        _report_sizes(method, backbone, trainable, {}, frozen)
        if dry_run:
            return {}
        results = scores.hard_prompt_only() | counts
        report_memory()
    else:
        source = tokenize_examples(train, backbone.tokenizer, lengths["inputs"], lengths["targets"])
        report_examples(task, "train", train)
        report_cut(source, lengths)
        if pack:
            batches = PackedBatches(
                source,
                batch_size=batch_size,
                seed=seed,
                prompt_slots=prompt_length if "prompt" in variables and prompt.sees_input else 0,
                row_length=row_length,
                row_multiple=microbatches * backbone.mesh.shape["data"],
            )
        else:
            sharding.check_batch_size(batch_size // microbatches, backbone.mesh)
            batches = TrainBatches(
                source, buckets=buckets or make_buckets(source), batch_size=batch_size, seed=seed
            )
        _report_padding(source, batches, lengths["inputs"], pack)
        rms = embedding_rms(backbone.variables["params"]["token_embedder"]["embedding"])
        locked = freezing.lock(optimizer.make(rms), freeze)
        state = _init_state(trainable, locked, seed, backbone)
        _report_sizes(method, backbone, state.trainable, state.opt_state, frozen)
        _report_rate(method, optimizer, rms)
        run = Run(
            model_dir,
            pace,
            identity=identity,
            exports=_exports(method, model_dir, backbone, metadata),
            metric=evaluator.metric,
            evaluate=lambda s: evaluator(freezing.combine(s.trainable, frozen), evaluation.split),
            rate_at=lambda step: float(optimizer.rate_at(step, rms)),
            config=config,
        )
        step = make_train_step(evaluator.apply_fn, locked, loss, microbatches=microbatches)
        run.fit(state, frozen, step, batches, backbone.mesh, dry_run=dry_run)
        if dry_run:
            return {}
        best = _load_best(method, run.exports.path(BEST), backbone)
        results = scores.tuned(best, variables) | {"step": run.progress.best_step} | counts
    if jax.process_index() == 0:
        if config and method == "hard_prompt":
            atomic.write_bytes(model_dir / "config.gin", config.encode())
        text = json.dumps(results, indent=2) + "\n"
        atomic.write_bytes(model_dir / "results.json", text.encode())
    return results


class _Scores:
    """The numbers of `results.json`, on the test split or else on the one selected on."""

    def __init__(
        self,
        evaluator: Evaluator,
        train: Sequence[Example],
        backbone: Backbone,
        seed: int,
        hard_prompt: HardPrompt | None,
        others: Mapping[str, HardPrompt],
    ) -> None:
        self.evaluator, self.train, self.backbone, self.seed = evaluator, train, backbone, seed
        self.main, self.others = hard_prompt, others
        self.metric = evaluator.metric
        self.selected_on = evaluator.settings.split
        self.split = "test" if "test" in evaluator.task.splits else self.selected_on

    def _hard_prompt(self, hard_prompt: HardPrompt) -> dict[str, float]:
        rewording = hard_prompt.rewording(self.train, self.seed)
        return self.evaluator(self.backbone.variables, self.split, rewording)

    def tuned(self, best: Tree, before: Tree) -> dict[str, Any]:
        hard = None if self.main is None else self._hard_prompt(self.main)[self.metric]
        before_value = self.evaluator(before, self.split)[self.metric]
        return self._results(self.evaluator(best, self.split), before_value, hard)

    def hard_prompt_only(self) -> dict[str, Any]:
        if self.main is None:
            raise InputError("method 'hard_prompt' needs a text: set tune.hard_prompt")
        metrics = self._hard_prompt(self.main)
        return self._results(metrics, None, metrics[self.metric]) | {"step": 0}

    def _results(
        self, metrics: dict[str, float], before: float | None, hard: float | None
    ) -> dict[str, Any]:
        return {
            "task": self.evaluator.task.name,
            "split": self.split,
            "metric": self.metric,
            "value": metrics[self.metric],
            "metrics": metrics,
            "seed": self.seed,
            "majority": self.evaluator.majority(self.train, self.split),
            "before": before,
            "hard_prompt": hard,
            "other_hard_prompts": {
                name: self._hard_prompt(other)[self.metric] for name, other in self.others.items()
            },
            "selected_on": self.selected_on,
        }


def _initial_prompt(
    initializer: Initializer | None,
    length: int,
    backbone: Backbone,
    task: Task,
    train: Sequence[Example],
    seed: int,
) -> jax.Array:
    """P [P, D], float32, replicated on the backbone's mesh."""
    if initializer is None:
        initializer = ClassLabels() if task.labels else SampledVocabulary()
    surroundings = Surroundings(
        embedding=backbone.variables["params"]["token_embedder"]["embedding"],
        tokenizer=backbone.tokenizer,
        labels=task.labels,
        texts=lambda: (example.inputs for example in train),
    )
    # Its own stream: the same seed drives dropout through the train state's key.
    key = jax.random.fold_in(jax.random.key(seed), 1)
    prompt = np.asarray(initializer(key, length, surroundings), np.float32)
    if prompt.shape != (length, backbone.config.emb_dim):
        raise InputError(
            f"the initial prompt has shape {prompt.shape}, the run wants "
            f"({length}, {backbone.config.emb_dim}); change PROMPT_LENGTH or the initialiser"
        )
    return jax.device_put(prompt, sharding.replicated(backbone.mesh))


def _init_state(trainable: Tree, optimizer: Any, seed: int, backbone: Backbone) -> TrainState:
    """The first state, on the mesh: one that is elsewhere would compile the step twice."""

    def init(trainable: Tree, key: jax.Array) -> TrainState:
        # A copy: the step donates its state, and these arrays belong to the caller.
        return init_train_state(jax.tree.map(jnp.copy, trainable), optimizer, key)

    key = jax.device_put(jax.random.key(seed), sharding.replicated(backbone.mesh))
    return jax.jit(init)(trainable, key)


def _metadata(
    task: Task, backbone: Backbone, lengths: Mapping[str, int], seed: int
) -> dict[str, Any]:
    """What an exported prompt says of itself."""
    tokenizer = backbone.tokenizer
    return {
        "ptjax_version": __version__,
        "backbone_name": backbone.name,
        "backbone_fingerprint": backbone.fingerprint,
        "tokenizer_fingerprint": tokenizer.fingerprint if tokenizer else None,
        "task": task.describe(),
        "input_length": lengths["inputs"],
        "target_length": lengths["targets"],
        "seed": seed,
    }


def _identity(
    metadata: dict[str, Any], method: str, prompt_length: int, batch_size: int, microbatches: int
) -> dict[str, Any]:
    """What may not change when a run goes on; as JSON gives it back."""
    # The same weights may have moved, and a newer ptjax may go on.
    kept = {k: v for k, v in metadata.items() if k not in ("backbone_name", "ptjax_version")}
    run = {"method": method, "batch_size": batch_size, "microbatches": microbatches}
    if method == "prompt_tuning":
        run["prompt_length"] = prompt_length
    return json.loads(json.dumps(kept | run))


def _refuse_another_run(directory: epath.Path, identity: dict[str, Any]) -> None:
    """A hard prompt has no checkpoints of its own; its results may not replace a run's."""
    if directory.exists():
        checkpoints = Checkpoints(directory)
        try:
            checkpoints.check_identity(identity)
        finally:
            checkpoints.close()


def _exports(
    method: str, model_dir: epath.Path, backbone: Backbone, metadata: dict[str, Any]
) -> Exports:
    def write_prompt(path: epath.Path, state: TrainState, more: dict[str, Any]) -> None:
        save_prompt(path, np.asarray(state.trainable["prompt"]["prompt"]), metadata | more)

    def write_model(path: epath.Path, state: TrainState, more: dict[str, Any]) -> None:
        # float32: the tuned weights as they are, whatever the backbone's activations.
        params = state.trainable["params"]
        save_backbone(path, backbone.config, params, tokenizer=backbone.tokenizer, dtype="float32")

    if method == "model_tuning":
        return Exports(model_dir / "models", "", write_model)
    return Exports(model_dir / "prompts", ".safetensors", write_prompt)


def _load_best(method: str, path: epath.Path, backbone: Backbone) -> Tree:
    """Variables with the best export, read back from its file."""
    if method == "model_tuning":
        dtype = backbone.config.dtype
        return load_backbone(path, dtype=dtype, mesh=backbone.mesh).variables
    return with_prompt(backbone.variables, load_prompt(path).prompt)


def _report_padding(
    source: TokenizedExamples, batches: TrainBatches | PackedBatches, length: int, pack: bool
) -> None:
    before = 1 - float(source.input_lengths.mean()) / length
    logging.info(
        "%d batches an epoch; padding of the inputs %.0f%% -> %.0f%% (to %d tokens -> %s)",
        batches.batches_per_epoch,
        100 * before,
        100 * batches.padding(),
        length,
        "packed, the prompt's places included" if pack else "in buckets",
    )


def _report_sizes(
    method: str, backbone: Backbone, trainable: Tree, opt_state: Tree, frozen: Tree
) -> None:
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
            "best: set Adafactor.learning_rate_scale = 'embedding_rms' and learning_rate = 0.03",
            100 * rate / rms,
        )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"
