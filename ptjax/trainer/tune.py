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

from ptjax import files
from ptjax.backbones.damage import check_weights
from ptjax.backbones.load import Backbone
from ptjax.data.tasks import Task
from ptjax.errors import check_path, one_line
from ptjax.interop.prompt_file import PromptFile, load_prompt
from ptjax.model_dir import BEST, ModelDir
from ptjax.settings import RunSettings
from ptjax.sharding import processes
from ptjax.sharding.arrays import check_batch_size, replicate_key, replicated
from ptjax.trainer import lock
from ptjax.trainer.callbacks import Callback
from ptjax.trainer.identity import make_identity
from ptjax.trainer.loop import TrainingLoop
from ptjax.trainer.results import Scores, describe_run, of_sweep
from ptjax.trainer.setup import MemberSetup, load_best, set_up_members
from ptjax.trainer.startup_report import report_sizes, report_steps
from ptjax.trainer.sweep import MemberOverrides, check_members
from ptjax.training import freeze as freezing
from ptjax.training.compile import batch_shapes
from ptjax.training.dependence import check_used
from ptjax.training.step import TrainState
from ptjax.trees import Tree


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
        member = self.results["best"]["member"] if "members" in self.results else ""
        path = ModelDir(self.model_dir).best_prompt(member)
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
        callbacks: told what happens, see `ptjax.trainer.callbacks.Callback`.
        dry_run: compile, report, stop before the first step.

    Raises:
        InputError: settings that do not fit together, or a `model_dir` of another run, or of one
            that is past `train_steps` (`identity.FREE` lists what may change).
    """
    settings = RunSettings() if settings is None else settings
    if steps is not None:
        schedule = dataclasses.replace(settings.schedule, train_steps=steps)
        settings = dataclasses.replace(settings, schedule=schedule)
    _check(backbone, model_dir, settings, members or {})
    directory = epath.Path(model_dir).expanduser()

    def attempt(held: lock.Lock | None) -> dict[str, Any] | None:
        """The results. Without the lock only of what writes nothing: a dry run, or a run that is
        finished (None if it is not)."""
        report_steps(settings.schedule.train_steps, backbone)
        own = members or {"": MemberOverrides()}
        setups = set_up_members(backbone, task, directory, settings, own)
        state, step = _compose(setups, settings, stacked=bool(members))
        frozen = setups[0].frozen
        report_sizes(settings.method, backbone, state.trainable, state.opt_state, frozen)
        run = TrainingLoop(
            directory,
            settings.schedule,
            [setup.member for setup in setups],
            identity=_identify(backbone, task, settings, members, setups),
            callbacks=callbacks,
            lock=held,
            check_weights=lambda: check_weights(backbone.variables["params"], backbone.name),
        )
        if held is not None:
            run.remove_leftovers()
        results = None if dry_run else _finished(run)
        if results is not None or (held is None and not dry_run):
            run.checkpoints.close()
            return results
        _check_used(setups[0], settings)
        sizes = _counts(state.trainable, frozen)  # the first step takes the state's arrays
        run.fit(state, frozen, step, backbone.mesh, dry_run=dry_run)
        if dry_run:
            return {}
        scores = _score_best(setups, settings, run, several=bool(members))
        results = scores | sizes | describe_run(backbone, settings, run.progress.seconds)
        _write(ModelDir(directory).results, json.dumps(results, indent=2) + "\n", held)
        return results

    return Run(directory, _under_lock(directory, attempt, needed=not dry_run))


def _under_lock(
    directory: epath.Path,
    attempt: Callable[[lock.Lock | None], dict[str, Any] | None],
    *,
    needed: bool,
) -> dict[str, Any]:
    """What `attempt` gives with MODEL_DIR's lock, or without it where nothing can be written."""
    try:
        with lock.hold(directory, needed=needed) as held:
            results = attempt(held)
    except lock.NotWritableError:
        # A finished run has nothing to write, so it may be on a read-only disk.
        results = attempt(None) if ModelDir(directory).results.exists() else None
        if results is None:
            raise
    assert results is not None  # with the lock, `attempt` always returns results
    return results


def _check(
    backbone: Backbone,
    model_dir: str | os.PathLike[str],
    settings: RunSettings,
    members: Mapping[str, MemberOverrides],
) -> None:
    """Refuses what can be judged before any data are read."""
    check_path("MODEL_DIR", model_dir)
    settings.method.check(backbone, settings.batching)
    check_members(members, settings)
    batching = settings.batching
    if not batching.pack:  # the rows of packed batches follow the mesh
        check_batch_size(batching.batch_size, backbone.mesh, batching.microbatches)


def _score_best(
    setups: Sequence[MemberSetup], settings: RunSettings, run: TrainingLoop, *, several: bool
) -> dict[str, Any]:
    """The scores of a run that is over."""
    backbone = setups[0].data.evaluator.backbone
    scores = {setup.data: Scores(backbone, settings, setup.data) for setup in setups}
    members, prompts = {}, []
    for setup, standing in zip(setups, run.progress.standings, strict=True):
        if standing.best_step is not None:
            best = load_best(setup, settings)
            tuned = scores[setup.data].tuned(best, setup.variables, setup.seed)
            members[setup.member.name] = tuned | {"step": standing.best_step}
            prompts.append(best.get("prompt", {}).get("prompt"))
    results = of_sweep(members, run) if several else members[""]
    if several and len(scores) == 1 and settings.method.supports_rows:
        evaluator = setups[0].data.evaluator
        together = evaluator.ensemble(prompts, evaluator.reported_split)
        results["ensemble"] = together["ensemble"]
    return results | {"trained_steps": run.progress.step}


def _compose(
    setups: Sequence[MemberSetup], settings: RunSettings, *, stacked: bool
) -> tuple[TrainState, Callable[..., Any]]:
    """The first state, of one member or `stacked` of all of them, and its train step."""
    recipe = settings.recipe(bank=stacked)
    first, evaluator = setups[0], setups[0].data.evaluator
    mesh = evaluator.backbone.mesh
    kind = {
        "small": freezing.is_small(*_counts(first.trainable, first.frozen).values()),
        "attends_to_input": settings.method.attends_to_input,
    }
    init, step = recipe.compose(evaluator.apply_fn, first.freeze, mesh, first.rms, **kind)
    trainable, key = first.trainable, jax.random.key(first.seed)
    if stacked:
        trainable = jax.tree.map(lambda *x: jnp.stack(x), *(setup.trainable for setup in setups))
        trainable = jax.device_put(trainable, replicated(mesh))
        key = jnp.stack([jax.random.key(setup.seed) for setup in setups])
    # On the mesh: a first state that is elsewhere would compile the step twice.
    return jax.jit(init)(trainable, replicate_key(key, mesh)), step


def _check_used(setup: MemberSetup, settings: RunSettings) -> None:
    """InputError if the loss does not depend on all that trains; one batch shape tells it."""
    evaluator, shape = setup.data.evaluator, min(setup.member.batches.shapes)
    batch = batch_shapes(shape, evaluator.backbone.mesh)
    check_used(evaluator.apply_fn, settings.loss, setup.trainable, setup.frozen, batch)


def _counts(trainable: Tree, frozen: Tree) -> dict[str, int]:
    return {
        "trainable_parameters": freezing.sizes(trainable)[0],
        "frozen_parameters": freezing.sizes(frozen)[0],
    }


def _identify(
    backbone: Backbone,
    task: Task,
    settings: RunSettings,
    members: Mapping[str, MemberOverrides] | None,
    setups: Sequence[MemberSetup],
) -> dict[str, Any]:
    """The identity of a run with these arguments of `tune`, on what was read for it."""
    given = {"backbone": backbone, "task": task, "settings": settings, "members": members or None}
    read: dict[str, Any] = {}
    for number, data in enumerate(dict.fromkeys(setup.data for setup in setups)):
        for name, parts in data.describe().items():
            read[f"{name} ({number})" if name in read else name] = parts
    return make_identity(tune, given, read)


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


def _write(path: epath.Path, text: str, held: lock.Lock | None) -> None:
    if held is not None:
        held.check()
    if processes.first():
        files.write_bytes(path, text.encode())
