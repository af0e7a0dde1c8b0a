"""`tune`: trains a prompt (or what another method trains) for a task, and scores it."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence

from absl import logging
from etils import epath

from ptjax import files
from ptjax.backbones.damage import check_weights
from ptjax.backbones.load import Backbone, check_backbone
from ptjax.data.tasks import Task
from ptjax.errors import InputError, check_path, kind_of, one_line
from ptjax.files import JsonObject, PathLike
from ptjax.gin_text import describe_call
from ptjax.interop.prompt_file import PromptFile, load_prompt
from ptjax.methods.adapter import Adapter, load_adapter
from ptjax.model_dir import BEST, ModelDir
from ptjax.reports.files import write_page
from ptjax.reports.report import Report
from ptjax.settings import RunSettings
from ptjax.sharding import processes
from ptjax.sharding.arrays import check_batch_size
from ptjax.trainer import lock, signals
from ptjax.trainer.callbacks import Callback
from ptjax.trainer.config_file import ConfigFile
from ptjax.trainer.costs import run_costs
from ptjax.trainer.examples_report import report_examples_read
from ptjax.trainer.identity import make_identity
from ptjax.trainer.interrupted import best_so_far
from ptjax.trainer.loop import TrainingLoop
from ptjax.trainer.make_step import (
    check_dependence,
    count_parameters,
    make_step,
    no_memory_explained,
)
from ptjax.trainer.progress import RunProgress
from ptjax.trainer.results import Scores, describe_run, of_sweep
from ptjax.trainer.setup import MemberSetup, load_best, set_up_members
from ptjax.trainer.startup_report import report_sizes, report_steps
from ptjax.trainer.suggest import resolve_settings
from ptjax.trainer.sweep import MemberOverrides, check_members
from ptjax.trainer.written import write_results


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
    """A run: its folder and its results.

    Attributes:
        model_dir: MODEL_DIR, with `~` expanded.
        results: the content of `results.json`; empty after a dry run. Of a run that was
            interrupted, the validation scores of the best so far (see `finished`).
    """

    model_dir: epath.Path
    results: JsonObject

    def __repr__(self) -> str:
        """Its folder, its step and its score; the results would fill the screen."""
        results = self.results
        if not results:
            return f"<Run {self.model_dir}: dry>"
        said = "finished at" if self.finished else "interrupted at"
        of = results["members"][results["best"]["member"]] if "best" in results else results
        text = f"<Run {self.model_dir}: {said} step {results.get('trained_steps')}"
        if "metric" not in of:
            return f"{text}>"
        return f"{text}, {of['metric']} {of['value']:.3f} on {of['split']}>"

    @property
    def finished(self) -> bool:
        """Whether the run has trained to its end; False after Ctrl-C, and after a dry run.

        The same call of `tune` resumes a run that has not finished.
        """
        return bool(self.results) and self.results.get("finished", True)

    @property
    def _best_member(self) -> str:
        return self.results["best"]["member"] if "members" in self.results else ""

    @functools.cached_property
    def prompt(self) -> PromptFile | None:
        """The best prompt, read from its file; in a sweep the best member's.

        None if another method was used (see `adapter`), before the first evaluation, and after a
        dry run.
        """
        path = ModelDir(self.model_dir).best_prompt(self._best_member)
        return load_prompt(path) if self.results and path.exists() else None

    @functools.cached_property
    def adapter(self) -> Adapter | None:
        """The best adapter, if the run's method exports adapters; otherwise as `prompt`."""
        path = ModelDir(self.model_dir).best_adapter(self._best_member)
        return load_adapter(path) if self.results and path.exists() else None

    def report(self) -> Report:
        """Reads the run's report: print it, or show it in a notebook.

        Raises:
            InputError: it was a dry run or was interrupted, a file is damaged, or a library that
                reports need is not installed.
        """
        if not self.results:
            raise InputError(f"{self.model_dir}: a dry run has no report; train without dry_run")
        if not self.finished:  # MODEL_DIR may have the report of a shorter run before it
            raise InputError(
                f"{self.model_dir}: interrupted at step {self.results['trained_steps']}; the same "
                "call of tune resumes, and its end has a report"
            )
        return Report.read(self.model_dir)


def tune(
    backbone: Backbone,
    task: Task,
    model_dir: PathLike,
    settings: RunSettings | None = None,
    *,
    members: Mapping[str, MemberOverrides] | None = None,
    steps: int | None = None,
    callbacks: Sequence[Callback] = (),
    dry_run: bool = False,
) -> Run:
    """Trains a prompt (or what `settings.method` trains) for `task`, and scores the best one.

    The best of the exports is selected on `settings.evaluation.split`, and scored on the test split
    or, if the task has none, on that same split.

    Args:
        model_dir: the folder for all files of the run. If it holds this run, unfinished, the run is
            resumed; if it holds this run, finished, its results are returned.
        settings: default: those of `suggest_settings`, logged. `RunSettings()` is the paper's.
        members: the members of a sweep, by name. Each trains its own prompt, all in one job, with
            the `settings` that it does not override. None means an ordinary run.
        steps: replaces `settings.schedule.train_steps`.
        callbacks: notified of events, see `ptjax.Callback`.
        dry_run: load the data, compile the train step and log sizes, but do not train, and write
            nothing to `model_dir`.

    Raises:
        InputError: the settings, data or backbone cannot be used, or `model_dir` holds another run
            or one already past `train_steps`; the message names a setting that must not change.
        TrainingError: a loss, score or trained variable is not finite (in a sweep: of every
            member), the disk is full, or another run took over `model_dir`.
        SystemExit: after SIGTERM or Ctrl-C, when saved; in a notebook Ctrl-C returns the best.
    """
    check_path("MODEL_DIR", model_dir)
    _check_kinds(backbone, task, settings, members, callbacks)
    settings = resolve_settings(settings, backbone, task, members or {}, steps)
    _check(backbone, settings, members or {})
    directory = epath.Path(model_dir).expanduser()
    callbacks = _with_config(callbacks, model_dir, _given(backbone, task, settings, members))

    def attempt(run_lock: lock.Lock | None) -> JsonObject | None:
        """The results; without the lock only of a dry or finished run, else None: no writing."""
        setups = _set_up(backbone, task, directory, settings, members)
        state, step = make_step(backbone, setups, settings, sweep=bool(members))
        frozen = setups[0].frozen
        report_sizes(settings.method, backbone, state.trainable, state.opt_state, frozen)
        run = TrainingLoop(
            directory,
            settings.schedule,
            [setup.member for setup in setups],
            identity=_identify(backbone, task, settings, members, setups),
            callbacks=callbacks,
            lock=run_lock,
            check_weights=lambda: check_weights(backbone.variables["params"], backbone.name),
        )
        if run_lock is not None:
            run.remove_leftovers()
        results = None if dry_run else _finished(run)
        if results is not None or (run_lock is None and not dry_run):
            run.checkpoints.close()
            return results
        check_dependence(backbone, setups, settings)
        report_examples_read(setup.data for setup in setups)
        sizes = count_parameters(state.trainable, frozen)  # the first step takes the state's arrays
        explained = no_memory_explained(backbone, setups, settings, state, run)
        try:
            with explained:
                run.fit(state, frozen, step, backbone.mesh, dry_run=dry_run)
            scores, records = ({}, {}) if dry_run else _score_best(backbone, setups, settings, run)
        except (signals.StoppedError, KeyboardInterrupt) as stop:
            return best_so_far(stop, run, setups)
        if dry_run:
            return {}
        costs = run.costs | run_costs(directory, run.members[0].exports)
        results = scores | sizes | {"costs": costs}
        results |= describe_run(backbone, settings, run.progress.seconds)
        return write_results(directory, results, records, run_lock)

    return Run(directory, _under_lock(directory, attempt, needed=not dry_run))


def _under_lock(
    directory: epath.Path,
    attempt: Callable[[lock.Lock | None], JsonObject | None],
    *,
    needed: bool,
) -> JsonObject:
    """Calls `attempt` with MODEL_DIR's lock; without it if MODEL_DIR is not writable."""
    try:
        with lock.hold(directory, needed=needed) as run_lock:
            results = attempt(run_lock)
            if results and processes.first():
                write_page(directory, again=False)  # a kill may have come before it
    except lock.NotWritableError:
        # A finished run writes nothing, so its disk may be read-only.
        results = attempt(None) if ModelDir(directory).results.exists() else None
        if results is None:
            raise
    assert results is not None  # with the lock, `attempt` always returns results
    return results


def _check_kinds(
    backbone: object, task: object, settings: object, members: object, callbacks: object
) -> None:
    """Rejects arguments of `tune` of another kind, before they fail somewhere else."""
    check_backbone(backbone)
    if not isinstance(task, Task):
        raise InputError(
            f"tune needs a ptjax.Task to train on, got {kind_of(task)}; make one with "
            "ptjax.Task.from_records"
        )
    if settings is not None and not isinstance(settings, RunSettings):
        raise InputError(f"tune needs ptjax.RunSettings as settings, got {kind_of(settings)}")
    if members is not None and not isinstance(members, Mapping):
        raise InputError(
            f"members is {kind_of(members)}; give a dict of name to MemberOverrides, such "
            "as ptjax.sweep makes"
        )
    if not isinstance(callbacks, Sequence) or any(
        isinstance(x, type) or not hasattr(x, "on_step") for x in callbacks
    ):
        raise InputError(f"callbacks is {callbacks!r}; give a list of objects of ptjax.Callback")


def _check(
    backbone: Backbone, settings: RunSettings, members: Mapping[str, MemberOverrides]
) -> None:
    """Rejects settings that the backbone or the mesh does not support."""
    settings.method.check(backbone, settings.batching)
    check_members(members, settings)
    batching = settings.batching
    if not batching.pack:  # the rows of packed batches follow the mesh
        check_batch_size(batching.batch_size, backbone.mesh, batching.microbatches)


def _given(
    backbone: Backbone,
    task: Task,
    settings: RunSettings,
    members: Mapping[str, MemberOverrides] | None,
) -> dict[str, object]:
    """The arguments of `tune` that its identity and its config.gin have in common."""
    return {"backbone": backbone, "task": task, "settings": settings, "members": members or None}


def _with_config(
    callbacks: Sequence[Callback], model_dir: PathLike, given: Mapping[str, object]
) -> Sequence[Callback]:
    """The callbacks, after one that writes config.gin; a command has its own."""
    if any(isinstance(callback, ConfigFile) for callback in callbacks):
        return callbacks
    own = ConfigFile(describe_call("ptjax.tune", {"model_dir": model_dir, **given}))
    return [own, *callbacks]


def _set_up(
    backbone: Backbone,
    task: Task,
    directory: epath.Path,
    settings: RunSettings,
    members: Mapping[str, MemberOverrides] | None,
) -> list[MemberSetup]:
    """Sets up the members; an ordinary run has one, without a name."""
    report_steps(settings.schedule.train_steps, backbone)
    logging.info("preparing data and variables")
    started = time.perf_counter()
    overrides = members or {"": MemberOverrides()}
    setups = set_up_members(backbone, task, directory, settings, overrides)
    logging.info("prepared data and variables in %.1f s", time.perf_counter() - started)
    return setups


def _score_best(
    backbone: Backbone, setups: Sequence[MemberSetup], settings: RunSettings, run: TrainingLoop
) -> tuple[JsonObject, dict[str, JsonObject]]:
    """The scores of a finished run, and each member's recorded predictions."""
    sweep = run.members.is_sweep
    logging.info("scoring the best and what it is compared with")
    scores = {setup.data: Scores(backbone, settings, setup.data) for setup in setups}
    members, records, prompts = {}, {}, []
    for setup, progress in zip(setups, run.progress.members, strict=True):
        if progress.best_step is not None:
            best = load_best(setup, settings)
            name = setup.member.name
            tuned, records[name] = scores[setup.data].tuned(best, setup.variables, setup.seed)
            members[name] = tuned | {"step": progress.best_step}
            prompts.append(best.get("prompt", {}).get("prompt"))
    results = of_sweep(members, run) if sweep else members[""]
    if sweep and len(scores) == 1 and settings.method.supports_rows:
        evaluator = setups[0].data.evaluator
        together = evaluator.ensemble(prompts, evaluator.reported_split)
        results["ensemble"] = together["ensemble"]
    return results | {"trained_steps": run.progress.step}, records


def _identify(
    backbone: Backbone,
    task: Task,
    settings: RunSettings,
    members: Mapping[str, MemberOverrides] | None,
    setups: Sequence[MemberSetup],
) -> JsonObject:
    """The identity of a run: these arguments of `tune`, and the data that it read."""
    given = _given(backbone, task, settings, members)
    read: JsonObject = {}
    for number, data in enumerate(dict.fromkeys(setup.data for setup in setups)):
        for name, parts in data.describe().items():
            read[f"{name} ({number})" if name in read else name] = parts
    return make_identity(tune, given, read)


def _finished(run: TrainingLoop) -> JsonObject | None:
    """The results of a run that has finished before; nothing is computed or written.

    None also if a best export is damaged: resuming restores it.
    """
    saved = run.checkpoints.newest_progress()
    results = _read_results(run.model_dir)
    if saved is None or results is None:
        return None
    progress = RunProgress.from_json(saved)
    for member, own in zip(run.members, progress.members, strict=True):
        best = own.best_step
        if best is not None and any(map(member.exports.problem, (best, BEST))):
            return None
    if progress.step < run.schedule.train_steps and progress.running:
        return None
    if results.get("trained_steps") != progress.step:  # of a shorter run before this one
        return None
    logging.info("%s: the run has finished, at step %d", run.model_dir, progress.step)
    return results


def _read_results(model_dir: epath.Path) -> JsonObject | None:
    """The content of `results.json`; None without the file, or if it is damaged (a warning)."""
    path = ModelDir(model_dir).results
    if not path.exists():
        return None
    try:
        results = files.read_json(path)
        if not isinstance(results, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        logging.warning("%s: damaged (%s); it is written again", path, one_line(error))
        return None
    return results
