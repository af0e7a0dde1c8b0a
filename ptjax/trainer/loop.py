"""The training loop, which determines the order of all reads and writes of a run.

A run may be killed at any point; the same command resumes it bit-exactly. Three rules ensure that:
everything that changes is in the checkpoint; files outside of it are written before the checkpoint
that refers to them, and removed only after one that no longer does; and what is ahead of the
checkpoint is dropped on resuming and written again. With several processes, all of them run this
code together: the first one writes the files, all of them write the checkpoints.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh

from ptjax.data.batch import count_examples
from ptjax.data.pipeline import Shape, make_iterator
from ptjax.files import JsonObject
from ptjax.model_dir import ModelDir
from ptjax.settings import TrainSchedule
from ptjax.sharding import processes
from ptjax.sharding.arrays import put_batch, put_replicated
from ptjax.trainer import signals
from ptjax.trainer.callbacks import Callback, CallbackList
from ptjax.trainer.checkpoints import Checkpoints
from ptjax.trainer.costs import state_costs, step_costs
from ptjax.trainer.display import Display
from ptjax.trainer.failures import Failures
from ptjax.trainer.lock import Lock
from ptjax.trainer.members import Member, Members
from ptjax.trainer.metrics_log import MetricsLog
from ptjax.trainer.progress import RunProgress
from ptjax.trainer.resume import remove_leftovers, resume
from ptjax.trainer.selection import Selection
from ptjax.trainer.train_metrics import TrainMetrics
from ptjax.training.compile import CompiledStep, compile_steps
from ptjax.training.step import TrainState, TrainStep
from ptjax.trees import Tree


class TrainingLoop:
    """One training run in MODEL_DIR: resumes from its newest checkpoint and runs to the end."""

    def __init__(
        self,
        model_dir: epath.Path,
        schedule: TrainSchedule,
        members: Sequence[Member],
        *,
        identity: JsonObject,
        callbacks: Sequence[Callback] = (),
        lock: Lock | None = None,
        check_weights: Callable[[], None] = lambda: None,
    ) -> None:
        """Checks that MODEL_DIR holds no other run, and none that is already past its end.

        Args:
            identity: the result of `make_identity`, saved in the checkpoints.
            callbacks: notified on every process; see `ptjax.trainer.callbacks`.
            lock: MODEL_DIR's lock, which the caller holds; None writes nothing (a dry run).
            check_weights: raises an `InputError` that names a weight that is not finite.
        """
        self.model_dir, self.schedule = model_dir, schedule
        self.members = Members(members)
        if lock is not None:
            processes.check_shared(model_dir)
        self.checkpoints = Checkpoints(ModelDir(model_dir).checkpoints, clean=lock is not None)
        self.checkpoints.check_identity(identity)
        self.checkpoints.check_steps(schedule.train_steps)
        self._identity, self._lock = identity, lock
        metric = None if self.members.is_sweep else members[0].metric
        display = Display(schedule.train_steps, metric)
        self._callbacks = CallbackList([MetricsLog(), *callbacks, display])
        self._failures = Failures(self.members, check_weights)
        self._metrics = TrainMetrics(self.members, self._failures)
        limits = {"patience": schedule.patience, "keep": schedule.keep}
        self._selection = Selection(self.members, self._failures, **limits)
        self._since = time.perf_counter()
        self._has_evaluated = False
        self.costs: JsonObject = {}  # of the first step that `fit` compiled for the largest batches

    @property
    def progress(self) -> RunProgress:
        """The run's progress: the step that it has reached, each member's best export, and more."""
        return self.members.progress

    def fit(
        self,
        state: TrainState,
        frozen: Tree,
        train_step: TrainStep,
        mesh: Mesh,
        *,
        dry_run: bool = False,
    ) -> TrainState:
        """Trains until the last step, or until every member has stopped; returns the last state.

        Args:
            state: the state of step 0. Its arrays are donated: do not use them afterwards.
            frozen: the frozen variables.
            train_step: the train step, not compiled.
            dry_run: only compile the step for every batch shape, and return `state`.

        Raises:
            InputError: a weight of the backbone is not finite (the message names it), or the
                checkpoints or exports to resume from are damaged.
            TrainingError: a loss, score or trained variable is not finite (in a sweep: of every
                member), or MODEL_DIR's lock was lost.
            StoppedError: after SIGTERM (143) or Ctrl-C (130), when a checkpoint has been saved.
        """

        def compile_all(state: TrainState) -> dict[Shape, CompiledStep]:
            logging.info("compiling the train step")
            return compile_steps(train_step, state, frozen, self.members.batches().shapes, mesh)

        if dry_run:
            compile_all(state)
            return state
        self._since = time.perf_counter()
        with contextlib.closing(self.checkpoints):  # which finishes pending writes
            state = resume(self.model_dir, self.members, self.checkpoints, state)
            self._check_lock()
            with self._callbacks.started(self.model_dir, self.progress):
                steps = compile_all(state)
                self.costs = state_costs(state) | step_costs(steps[max(steps)])
                with signals.caught() as stop:
                    while not self.has_finished():
                        state = self._train(state, frozen, steps, mesh, stop)
                        if not self.has_finished():  # the sweep has shrunk
                            steps = compile_all(state)
            self.checkpoints.wait()
            self._check_lock()
            self._selection.prune_all()
            processes.wait_for_all("the end of the run")
            report_memory()
            self._count_seconds()
        return state

    def _train(
        self,
        state: TrainState,
        frozen: Tree,
        steps: dict[Shape, CompiledStep],
        mesh: Mesh,
        stop: signals.Stop,
    ) -> TrainState:
        """Trains until the run has finished, or its sweep has shrunk and needs other programs."""
        progress, schedule = self.progress, self.schedule
        data = make_iterator(self.members.batches(), schedule.train_steps, start=progress.step)
        places = len(progress.member_ids)
        self._metrics.restart_clock()
        while not self.has_finished() and len(progress.member_ids) == places:
            batch, sweep_inputs = next(data), self.members.sweep_inputs()
            arrays = put_batch(batch, mesh), *put_replicated(sweep_inputs, mesh)
            state, metrics = steps[Shape.of(batch)](state, frozen, *arrays)
            self._metrics.add(metrics, count_examples(batch, *sweep_inputs[:1]))
            progress.step += 1
            self._callbacks.on_step(progress.step)
            if self._is_due(schedule.log_period):
                self._log()
            evaluating = self._is_due(schedule.eval_period)
            if evaluating:
                self._evaluate(state)
                if not self.has_finished():
                    state = self.members.shrink(state)
                self._metrics.restart_clock()
            stopping = stop.after(progress.step)
            if evaluating or stopping:
                self._save(state)
            if stopping:
                self.checkpoints.wait()
                logging.info("saved at step %d; the same command or call resumes", progress.step)
                raise signals.StoppedError(stop)
        return state

    def has_finished(self) -> bool:
        """Whether the last step has been trained, or no member trains any more."""
        progress = self.progress
        return progress.step >= self.schedule.train_steps or not progress.running

    def _is_due(self, period: int) -> bool:
        """Whether this step ends a period, or the run."""
        step = self.progress.step
        return step % period == 0 or step == self.schedule.train_steps

    def _log(self) -> None:
        row = self._metrics.take_row()
        self._check_lock()
        self._callbacks.on_log(self.progress.step, row)

    def _evaluate(self, state: TrainState) -> None:
        """Evaluates, exports, and removes exports that are no longer needed."""
        self._metrics.flush()
        self._failures.check_trainable(state)
        if not self._has_evaluated:
            logging.info("evaluating at step %d; the first time compiles too", self.progress.step)
            self._has_evaluated = True
        started = time.perf_counter()
        scores = self._selection.evaluate(state)
        if scores:
            seconds = time.perf_counter() - started
            row = self.members.merge(
                {
                    member_id: {f"validation/{name}": x for name, x in metrics.items()}
                    for member_id, metrics in scores.items()
                }
            )
            self._check_lock()
            self._callbacks.on_evaluation(
                self.progress.step, row | {"time/evaluation_seconds": seconds}
            )
        self._check_lock()
        keep = self._selection.export(state, scores)
        # Exports may go once the checkpoints that refer to them are committed.
        self.checkpoints.wait()
        self._check_lock()
        self._selection.prune(keep)

    def _save(self, state: TrainState) -> None:
        """Starts to write a checkpoint."""
        self._metrics.flush()
        self._check_lock()
        self._count_seconds()
        progress = self.progress
        self.checkpoints.save(progress.step, state, progress.to_json(), self._identity)

    def _check_lock(self) -> None:
        """To be called before anything is written."""
        if self._lock is not None:
            self._lock.check()

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self._since
        self._since = now

    def remove_leftovers(self) -> None:
        """Removes half-written files of a killed run; see `resume.remove_leftovers`."""
        remove_leftovers(self.model_dir, self.members)


def report_memory() -> None:
    """Logs the peak memory of the first device, if the platform measures it (a CPU does not)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if peak := stats.get("peak_bytes_in_use"):
        logging.info("peak memory of a device: %.2f GB", peak / 1e9)
