"""`tune`: a task, a frozen backbone and a recipe become a prompt and `results.json`."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from ptjax import files, lock
from ptjax.backbone import Backbone
from ptjax.bank import Variant
from ptjax.checkpoint import Checkpoints
from ptjax.damage import check_weights
from ptjax.data.pipeline import Bucket
from ptjax.data.tasks import Task
from ptjax.errors import InputError, check_at_least, check_path, one_line
from ptjax.evaluation import Evaluation, HardPrompt
from ptjax.identity import check_same, make_identity
from ptjax.loop import Pace, Run, report_memory
from ptjax.model_dir import BEST, ModelDir
from ptjax.models.prompt import Initializer, Prompt
from ptjax.preparation import (
    Preparation,
    Start,
    Subject,
    check_settings,
    report_sizes,
    report_steps,
)
from ptjax.results import Scores, of_bank
from ptjax.scale import processes, sharding
from ptjax.scale.compiled import Recipe
from ptjax.training import freeze as freezing
from ptjax.training.loss import Loss
from ptjax.training.optimizer import Adafactor
from ptjax.training.step import TrainState

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
    bank: Mapping[str, Variant] | None = None,
    config: str = "",
    dry_run: bool = False,
) -> dict[str, Any]:
    """Trains, selects on `evaluation.split`, and scores the best on the test split.

    Args:
        model_dir: receives everything; a run that was stopped there goes on, one that is over
            stays as it is.
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
        bank: members by name, each a prompt of its own, trained together (`ptjax.bank`); the other
            arguments hold for what a member does not say.
        config: the settings as text, kept as `config.gin`.
        dry_run: compile, report, stop before the first step.

    Returns:
        What `results.json` holds.

    Raises:
        InputError: settings that do not fit together, or a `model_dir` of another run, or of one
            that is past `pace.train_steps` (`identity.FREE` lists what may change).
    """
    given = dict(locals())
    check_path("MODEL_DIR", model_dir)
    model_dir = epath.Path(model_dir).expanduser()
    check_at_least(0, RANDOM_SEED=seed)
    lengths = check_settings(
        method,
        prompt_length=prompt_length,
        batch_size=batch_size,
        microbatches=microbatches,
        feature_lengths=feature_lengths,
        quantize=backbone.quantize,
        bank=bank,
    )
    if method != "hard_prompt" and not pack:  # the rows of packed batches follow the mesh
        sharding.check_batch_size(batch_size, backbone.mesh, microbatches)
    preparation = Preparation(
        model_dir=model_dir,
        backbone=backbone,
        method=method,
        prompt=prompt,
        prompt_length=prompt_length,
        init_prompt=init_prompt,
        optimizer=optimizer,
        batch_size=batch_size,
        microbatches=microbatches,
        lengths=lengths,
        buckets=buckets,
        pack=pack,
        row_length=row_length,
        evaluation=evaluation,
    )
    # Some ways to say the same.
    given |= {"feature_lengths": lengths, "other_hard_prompts": other_hard_prompts or None}
    identify = functools.partial(_identify, given | {"bank": bank or None})
    scores = functools.partial(Scores, backbone, seed, hard_prompt, other_hard_prompts or {})

    def attempt(held: lock.Lock | None) -> dict[str, Any] | None:
        """The run. Without the lock only what writes nothing: a dry run, or a finished run's
        results (None if it is not finished)."""
        writes = held is not None
        if method == "hard_prompt":
            subject = preparation.load(task)
            identity = identify([subject])
            _refuse_another_run(model_dir, identity, held)
            results = None if dry_run else _scored(model_dir)
            if results is not None:
                return results
            report_sizes(method, backbone, {}, {}, backbone.variables)
            if not writes:
                return {} if dry_run else None
            results = scores(subject).hard_prompt_only() | _counts({}, backbone.variables)
            report_memory()
            if config:
                _write(ModelDir(model_dir).config, config, held)
            _write(ModelDir(model_dir).hard_prompt, json.dumps(identity, indent=2) + "\n", held)
        else:
            report_steps(pace.train_steps, backbone)
            starts = _start_members(preparation, task, bank or {"": Variant()}, seed)
            state, step = _compose(starts, preparation, loss, stacked=bool(bank))
            frozen = starts[0].frozen
            report_sizes(method, backbone, state.trainable, state.opt_state, frozen)
            counts = _counts(state.trainable, frozen)
            identity = identify([start.subject for start in starts])
            _refuse_a_hard_prompt(model_dir, identity)
            run = Run(
                model_dir,
                pace,
                [start.member for start in starts],
                identity=identity,
                config=config,
                lock=held,
                check_weights=lambda: check_weights(backbone.variables["params"], backbone.name),
            )
            if writes:
                run.remove_leftovers()
            results = None if dry_run else _finished(run)
            if results is not None or not (writes or dry_run):
                run.checkpoints.close()
                return results
            run.fit(state, frozen, step, backbone.mesh, dry_run=dry_run)
            if dry_run:
                return {}
            results = _score_best(preparation, starts, run, scores, several=bool(bank)) | counts
        _write(ModelDir(model_dir).results, json.dumps(results, indent=2) + "\n", held)
        return results

    try:
        with lock.hold(model_dir, needed=not dry_run) as held:
            results = attempt(held)
    except lock.NotWritableError:
        # A finished run has nothing to write, so it may be on a read-only disk.
        results = attempt(None) if ModelDir(model_dir).results.exists() else None
        if results is None:
            raise
    assert results is not None  # with the lock, `attempt` always returns results
    return results


def _score_best(
    preparation: Preparation,
    starts: Sequence[Start],
    run: Run,
    scores: Callable[[Subject], Scores],
    *,
    several: bool,
) -> dict[str, Any]:
    """What `results.json` holds of a run that is over, but for the sizes."""
    of_subject = {start.subject: scores(start.subject) for start in starts}
    members, prompts = {}, []
    for start, standing in zip(starts, run.progress.standings, strict=True):
        if standing.best_step is not None:
            best = preparation.load_best(start.member)
            tuned = of_subject[start.subject].tuned(best, start.variables, start.seed)
            members[start.member.name] = tuned | {"step": standing.best_step}
            prompts.append(best.get("prompt", {}).get("prompt"))
    results = of_bank(members, run) if several else members[""]
    if several and len(of_subject) == 1:
        evaluator = starts[0].subject.evaluator
        together = evaluator.ensemble(prompts, evaluator.reported_split)
        results["ensemble"] = together["ensemble"]
    return results | {"trained_steps": run.progress.step}


def _start_members(
    preparation: Preparation, task: Task, bank: Mapping[str, Variant], seed: int
) -> list[Start]:
    """The members as they start; those of one task share what was read of it."""
    subjects: list[Subject] = []
    starts = []
    for name, variant in bank.items():
        own = variant.task or task
        # By value: gin makes a new task of every reference to one.
        subject = next((one for one in subjects if one.task == own), None)
        if subject is None:
            subject = preparation.load(own)
            subjects.append(subject)
        starts.append(preparation.start(subject, variant, seed, name))
    return starts


def _compose(
    starts: Sequence[Start], preparation: Preparation, loss: Loss, *, stacked: bool
) -> tuple[TrainState, Callable[..., Any]]:
    """The first state, of one member or `stacked` of all of them, and its train step."""
    recipe = Recipe(
        preparation.method,
        preparation.optimizer,
        loss,
        preparation.microbatches,
        preparation.prompt.sees_input,
        stacked,
    )
    mesh, first = preparation.backbone.mesh, starts[0]
    apply_fn = first.subject.evaluator.apply_fn
    init, step = recipe.compose(apply_fn, first.freeze, mesh, preparation.embedding_rms)
    trainable, key = first.trainable, jax.random.key(first.seed)
    if stacked:
        trainable = jax.tree.map(lambda *x: jnp.stack(x), *(start.trainable for start in starts))
        trainable = jax.device_put(trainable, sharding.replicated(mesh))
        key = jnp.stack([jax.random.key(start.seed) for start in starts])
    # On the mesh: a first state that is elsewhere would compile the step twice.
    return jax.jit(init)(trainable, sharding.replicate_key(key, mesh)), step


def _counts(trainable: Tree, frozen: Tree) -> dict[str, int]:
    return {
        "trainable_parameters": freezing.sizes(trainable)[0],
        "frozen_parameters": freezing.sizes(frozen)[0],
    }


def _identify(given: Mapping[str, Any], subjects: Sequence[Subject]) -> dict[str, Any]:
    """The identity of a run with these arguments of `tune`, on what was read for it."""
    data: dict[str, Any] = {}
    for number, subject in enumerate(dict.fromkeys(subjects)):
        for name, parts in subject.describe_data().items():
            data[f"{name} ({number})" if name in data else name] = parts
    return make_identity(tune, given, data)


def _finished(run: Run) -> dict[str, Any] | None:
    """The results of a run that is over already; nothing is computed or written anew.

    None too where a best export is damaged, which resuming makes again.
    """
    progress = run.checkpoints.newest_progress()
    results = _read_results(run.model_dir)
    if progress is None or results is None:
        return None
    standings = progress["standings"]
    for member, standing in zip(run.members, standings, strict=True):
        best = standing["best_step"]
        if best is not None and any(map(member.exports.problem, (best, BEST))):
            return None
    stopped = all(standing["stopped"] for standing in standings)
    if progress["step"] < run.pace.train_steps and not stopped:
        return None
    if results.get("trained_steps") != progress["step"]:  # of a shorter run before this one
        return None
    logging.info("%s: the run is finished, at step %d", run.model_dir, progress["step"])
    return results


def _scored(model_dir: epath.Path) -> dict[str, Any] | None:
    """The results of a hard prompt that was scored already."""
    return _read_results(model_dir) if ModelDir(model_dir).hard_prompt.exists() else None


def _read_results(model_dir: epath.Path) -> dict[str, Any] | None:
    """What `results.json` holds; None if there is none, or a damaged one, which is said."""
    path = ModelDir(model_dir).results
    if not path.exists():
        return None
    try:
        results = files.read_json(path)
        if not isinstance(results, dict):
            raise ValueError("it has no results")
    except ValueError as error:
        logging.warning("%s: damaged (%s); made again", path, one_line(error))
        return None
    return results


def _refuse_another_run(
    model_dir: epath.Path, identity: dict[str, Any], held: lock.Lock | None
) -> None:
    """A hard prompt has no checkpoints of its own; its results may not replace a run's."""
    if held is not None:
        processes.check_shared(model_dir)
    if ModelDir(model_dir).checkpoints.exists():
        checkpoints = Checkpoints(ModelDir(model_dir).checkpoints, clean=held is not None)
        try:
            checkpoints.check_identity(identity)
        finally:
            checkpoints.close()
    _refuse_a_hard_prompt(model_dir, identity)


def _refuse_a_hard_prompt(model_dir: epath.Path, identity: dict[str, Any]) -> None:
    """InputError where `model_dir` has the results of another hard prompt, or a damaged file."""
    path = ModelDir(model_dir).hard_prompt
    if not path.exists():
        return
    try:
        saved = files.read_json(path)
        if not isinstance(saved, dict):
            raise ValueError("it has no settings")
    except ValueError as error:
        raise InputError(
            f"{path}: damaged ({one_line(error)}); put it back from a copy, or remove it "
            "and results.json to score anew"
        ) from error
    check_same(saved, identity, os.fspath(model_dir))


def _write(path: epath.Path, text: str, held: lock.Lock | None) -> None:
    if held is not None:
        held.check()
    if processes.first():
        files.write_bytes(path, text.encode())
