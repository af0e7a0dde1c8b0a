"""`tune`: a task, a frozen backbone and settings become a prompt and `results.json`."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from ptjax import atomic, lock, untrusted
from ptjax.backbone import Backbone
from ptjax.callbacks import Callback
from ptjax.damage import check_weights
from ptjax.data.tasks import Task
from ptjax.errors import check_path
from ptjax.exports import BEST
from ptjax.identity import make_identity
from ptjax.interop.prompt_file import PromptFile, load_prompt
from ptjax.loop import TrainingLoop
from ptjax.preparation import (
    Preparation,
    Start,
    Subject,
    attends_to_input,
    check_settings,
    report_sizes,
    report_steps,
)
from ptjax.results import Scores, of_sweep
from ptjax.scale import processes, sharding
from ptjax.scale.compiled import Recipe
from ptjax.settings import RunSettings
from ptjax.sweep import MemberOverrides
from ptjax.training import freeze as freezing
from ptjax.training.step import TrainState

Tree = Any


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is over, in MODEL_DIR.

    Attributes:
        results: what `results.json` holds; empty after a dry run.
    """

    model_dir: epath.Path
    results: dict[str, Any]

    @functools.cached_property
    def prompt(self) -> PromptFile | None:
        """The best prompt, of a sweep the best member's; None where no prompt was tuned."""
        if "members" in self.results:
            best = self.model_dir / "prompts" / self.results["best"]["member"]
        else:
            best = self.model_dir / "prompts"
        path = best / f"{BEST}.safetensors"
        return load_prompt(path) if self.results and path.exists() else None


def tune(
    backbone: Backbone,
    task: Task,
    model_dir: str | os.PathLike[str],
    settings: RunSettings | None = None,
    *,
    members: Mapping[str, MemberOverrides] | None = None,
    steps: int | None = None,
    callbacks: Sequence[Callback] = (),
    dry_run: bool = False,
) -> Run:
    """Trains, selects on `settings.evaluation.split`, and scores the best on the test split.

    Args:
        model_dir: receives everything; a run that was stopped there goes on, one that is over
            stays as it is.
        settings: None is `RunSettings()`, the paper's.
        members: of a sweep, by name: each a prompt of its own, all trained together; `settings`
            hold for what a member does not say.
        steps: instead of `settings.schedule.train_steps`.
        callbacks: told what happens, see `ptjax.callbacks.Callback`.
        dry_run: compile, report, stop before the first step.

    Raises:
        InputError: settings that do not fit together, or a `model_dir` of another run, or of one
            that is past `train_steps` (`identity.FREE` lists what may change).
    """
    settings = RunSettings() if settings is None else settings
    if steps is not None:
        schedule = dataclasses.replace(settings.schedule, train_steps=steps)
        settings = dataclasses.replace(settings, schedule=schedule)
    check_path("MODEL_DIR", model_dir)
    directory = epath.Path(model_dir).expanduser()
    check_settings(settings, backbone.quantize, members)
    batching = settings.batching
    if not batching.pack:  # the rows of packed batches follow the mesh
        sharding.check_batch_size(batching.batch_size, backbone.mesh, batching.microbatches)
    preparation = Preparation(directory, backbone, settings)
    given = {"backbone": backbone, "task": task, "settings": settings, "members": members or None}
    attempt = functools.partial(_attempt, preparation, given, list(callbacks), dry_run)
    try:
        with lock.hold(directory, needed=not dry_run) as held:
            results = attempt(held)
    except lock.NotWritableError:
        # A finished run has nothing to write, so it may be on a read-only disk.
        results = attempt(None) if (directory / "results.json").exists() else None
        if results is None:
            raise
    assert results is not None  # with the lock, `_attempt` always returns results
    return Run(directory, results)


def _attempt(
    preparation: Preparation,
    given: Mapping[str, Any],
    callbacks: Sequence[Callback],
    dry_run: bool,
    held: lock.Lock | None,
) -> dict[str, Any] | None:
    """The run. Without the lock only what writes nothing: a dry run, or a finished run's results
    (None if it is not finished).

    Args:
        given: the arguments of `tune` that decide what is learnt.
    """
    settings, backbone = preparation.settings, preparation.backbone
    model_dir = preparation.model_dir
    members, writes = given["members"], held is not None
    report_steps(settings.schedule.train_steps, backbone)
    starts = _start_members(preparation, given["task"], members or {"": MemberOverrides()})
    state, step = _compose(starts, preparation, stacked=bool(members))
    frozen = starts[0].frozen
    report_sizes(settings.method, backbone, state.trainable, state.opt_state, frozen)
    counts = _counts(state.trainable, frozen)
    run = TrainingLoop(
        model_dir,
        settings.schedule,
        [start.member for start in starts],
        identity=_identify(given, [start.subject for start in starts]),
        callbacks=callbacks,
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
    results = _score_best(preparation, starts, run, several=bool(members)) | counts
    _write(model_dir / "results.json", json.dumps(results, indent=2) + "\n", held)
    return results


def _score_best(
    preparation: Preparation,
    starts: Sequence[Start],
    run: TrainingLoop,
    *,
    several: bool,
) -> dict[str, Any]:
    """What `results.json` holds of a run that is over, but for the sizes."""
    backbone, settings = preparation.backbone, preparation.settings
    of_subject = {start.subject: Scores(backbone, settings, start.subject) for start in starts}
    members, prompts = {}, []
    for start, standing in zip(starts, run.progress.standings, strict=True):
        if standing.best_step is not None:
            best = preparation.load_best(start.member)
            tuned = of_subject[start.subject].tuned(best, start.variables, start.seed)
            members[start.member.name] = tuned | {"step": standing.best_step}
            prompts.append(best.get("prompt", {}).get("prompt"))
    results = of_sweep(members, run) if several else members[""]
    if several and len(of_subject) == 1:
        evaluator = starts[0].subject.evaluator
        together = evaluator.ensemble(prompts, evaluator.reported_split)
        results["ensemble"] = together["ensemble"]
    return results | {"trained_steps": run.progress.step}


def _start_members(
    preparation: Preparation, task: Task, members: Mapping[str, MemberOverrides]
) -> list[Start]:
    """The members as they start; those of one task share what was read of it."""
    subjects: list[Subject] = []
    starts = []
    for name, overrides in members.items():
        own = overrides.task or task
        # By value: gin makes a new task of every reference to one.
        subject = next((one for one in subjects if one.task == own), None)
        if subject is None:
            subject = preparation.load(own)
            subjects.append(subject)
        starts.append(preparation.start(subject, overrides, name))
    return starts


def _compose(
    starts: Sequence[Start], preparation: Preparation, *, stacked: bool
) -> tuple[TrainState, Callable[..., Any]]:
    """The first state, of one member or `stacked` of all of them, and its train step."""
    settings = preparation.settings
    recipe = Recipe(
        settings.method.name,
        settings.optimizer,
        settings.loss,
        settings.batching.microbatches,
        attends_to_input(settings),
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


def _finished(run: TrainingLoop) -> dict[str, Any] | None:
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
    if progress["step"] < run.schedule.train_steps and not stopped:
        return None
    if results.get("trained_steps") != progress["step"]:  # of a shorter run before this one
        return None
    logging.info("%s: the run is finished, at step %d", run.model_dir, progress["step"])
    return results


def _read_results(model_dir: epath.Path) -> dict[str, Any] | None:
    """What `results.json` holds; None if there is none, or a damaged one, which is said."""
    path = model_dir / "results.json"
    if not path.exists():
        return None
    try:
        results = untrusted.read_json(path)
        if not isinstance(results, dict):
            raise ValueError("it has no results")
    except ValueError as error:
        logging.warning("%s: damaged (%s); made again", path, atomic.one_line(error))
        return None
    return results


def _write(path: epath.Path, text: str, held: lock.Lock | None) -> None:
    if held is not None:
        held.check()
    if processes.first():
        atomic.write_bytes(path, text.encode())
