"""The loop: the only place with a clock, logging and the order of I/O.

A run may be killed at any instant and started again by the same command. What makes that exact:
everything that changes stands in the checkpoint, files beside it are written before the checkpoint
that mentions them and removed only after one that does not, and on resuming whatever lies ahead of
the checkpoint is dropped and made again. Several processes do all of this together; files are the
first one's, checkpoints are everybody's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from ptjax import files
from ptjax.backbones.damage import NotFiniteError, advice
from ptjax.data.batch import Batch, count_examples
from ptjax.data.pipeline import BankBatches, Batches, Shape, make_iterator
from ptjax.errors import InputError, TrainingError
from ptjax.model_dir import ModelDir
from ptjax.settings import TrainSchedule
from ptjax.sharding import processes
from ptjax.sharding.arrays import put_batch
from ptjax.trainer import signals
from ptjax.trainer.callbacks import Callback
from ptjax.trainer.checkpoints import Checkpoints
from ptjax.trainer.display import Display
from ptjax.trainer.lock import Lock
from ptjax.trainer.members import Member, Progress, Standing
from ptjax.trainer.metrics_log import MetricsLog
from ptjax.training.compile import compile_steps
from ptjax.training.step import TrainState
from ptjax.trees import Tree, flatten_paths


class TrainingLoop:
    """One training run in MODEL_DIR, from wherever it was left to its end.

    With several members (a bank) the arrays of the train state have a leading axis, one entry for
    every member that it holds, and so have those of the batches.
    """

    def __init__(
        self,
        model_dir: epath.Path,
        schedule: TrainSchedule,
        members: Sequence[Member],
        *,
        identity: dict[str, Any],
        callbacks: Sequence[Callback] = (),
        lock: Lock | None = None,
        check_weights: Callable[[], None] = lambda: None,
    ) -> None:
        """A run; nothing is written before `fit`.

        Args:
            callbacks: told on every process; see `ptjax.trainer.callbacks`.
            lock: MODEL_DIR's, which the caller holds; None writes nothing (a dry run).
            check_weights: raises an `InputError` that names a weight that is not finite.
        """
        self.check_weights = check_weights
        self.model_dir, self.schedule, self.members = model_dir, schedule, list(members)
        self.identity, self.lock = identity, lock
        self.callbacks = [MetricsLog(), *callbacks, Display(schedule.train_steps)]
        self.bank = any(member.name for member in members)
        if lock is not None:
            processes.check_shared(model_dir)
        self.checkpoints = Checkpoints(ModelDir(model_dir).checkpoints, clean=lock is not None)
        self.checkpoints.check_identity(identity)
        self.checkpoints.check_steps(schedule.train_steps)
        self._since = time.perf_counter()
        self.progress = Progress([Standing() for _ in members], list(range(len(members))))

    def fit(
        self,
        state: TrainState,
        frozen: Tree,
        train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
        mesh: Mesh,
        *,
        dry_run: bool = False,
    ) -> TrainState:
        """Trains to the end (or patience) and returns the last state; `progress` names the best.

        With `dry_run` it compiles the steps and returns.

        Raises:
            InputError: a loss is not finite, because a weight of the backbone is not; it is named.
            TrainingError: a loss is not finite (in a bank: the last one that was), or another run
                took MODEL_DIR's lock over.
            SystemExit: SIGTERM (143) or Ctrl-C (130), after saving.
        """

        def compile_all(state: TrainState) -> dict[Shape, Callable[..., Any]]:
            return compile_steps(train_step, state, frozen, self._batches().shapes, mesh)

        if dry_run:
            compile_all(state)
            return state
        self._since = time.perf_counter()
        with contextlib.closing(self.checkpoints):  # what is being written is finished
            state, data = self._resume(state)
            self._check_lock()
            with self._told():
                steps = compile_all(state)
                with signals.caught() as stop:
                    while data is not None:
                        state, data = self._steps(state, frozen, steps, data, mesh, stop)
                        if data is not None:
                            steps = compile_all(state)
            self.checkpoints.wait()
            self._check_lock()
            if processes.first():
                for member, standing in zip(self.members, self.progress.standings, strict=True):
                    last = member.exports.steps()[-self.schedule.keep :]
                    member.exports.prune({standing.best_step, standing.best_before, *last})
            processes.wait_for_all("the end of the run")
            report_memory()
            self._count_seconds()
        return state

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self._since
        self._since = now

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Callbacks hear the start, and whoever heard it hears the end."""
        with contextlib.ExitStack() as ended:
            for callback in self.callbacks:
                callback.on_start(self.model_dir, self.progress.step)
                ended.callback(lambda one=callback: one.on_end(self.progress.step))
            yield

    def _check_lock(self) -> None:
        """Before anything is written."""
        if self.lock is not None:
            self.lock.check()

    def _steps(
        self,
        state: TrainState,
        frozen: Tree,
        steps: dict[Shape, Callable[..., Any]],
        data: Iterator[Batch],
        mesh: Mesh,
        stop: signals.Stop,
    ) -> tuple[TrainState, Iterator[Batch] | None]:
        """Steps until the run is over (None), or its bank has become smaller (its new data)."""
        progress, schedule = self.progress, self.schedule
        waiting: dict[str, jax.Array] | None = None
        started, examples = time.perf_counter(), 0
        while progress.step < schedule.train_steps and progress.running:
            rows = next(data)
            settings = self._settings()
            examples += count_examples(rows, settings.get("active"))
            batch = put_batch(rows | settings, mesh)
            state, metrics = steps[Shape.of(batch)](state, frozen, batch)
            # The metrics of the step before are there by now; these are not waited for.
            if waiting is not None:
                self._add(waiting)
            waiting = metrics
            progress.step += 1
            for callback in self.callbacks:
                callback.on_step(progress.step)
            at_end = progress.step == schedule.train_steps
            log = progress.step % schedule.log_period == 0 or at_end
            evaluation = progress.step % schedule.eval_period == 0 or at_end
            if log or evaluation:
                self._add(metrics)
                waiting = None
            if log:
                seconds = time.perf_counter() - started
                started = time.perf_counter()
                self._log(examples / seconds)
                examples = 0
            smaller = None
            if evaluation:
                self._check_finite(state)
                self._evaluate(state)
                smaller = None if at_end else self._smaller()
                if smaller is not None:
                    state = _take(state, smaller)
                    progress.held = [progress.held[place] for place in smaller]
                started, examples = time.perf_counter(), 0
            stopping = stop.after(progress.step)
            if stopping and waiting is not None:
                self._add(waiting)
                waiting = None
            if evaluation or stopping:
                self._check_lock()
                self._count_seconds()
                self.checkpoints.save(
                    progress.step, state, dataclasses.asdict(progress), self.identity
                )
            if stopping:
                self.checkpoints.wait()
                logging.info("saved at step %d; the same command goes on from here", progress.step)
                raise SystemExit(stop.exit_code)
            if smaller is not None:
                return state, self._data()
        return state, None

    def _batches(self) -> Batches:
        """Those of the members that the train state holds."""
        held = [self.members[number].batches for number in self.progress.held]
        return BankBatches(held) if self.bank else held[0]

    def _data(self) -> Iterator[Batch]:
        """The batches that are left: every step takes one."""
        return make_iterator(self._batches(), self.schedule.train_steps, start=self.progress.step)

    def _settings(self) -> dict[str, np.ndarray]:
        """What a bank's step is told beside the batch: who trains, and how fast."""
        if not self.bank:
            return {}
        progress = self.progress
        active = [not progress.standings[number].stopped for number in progress.held]
        rates = [self.members[number].rate_at(progress.step) for number in progress.held]
        return {"active": np.array(active), "learning_rate": np.array(rates, np.float32)}

    def _smaller(self) -> list[int] | None:
        """Places in the train state that a bank of half the size, or less, keeps, if it can."""
        held, running = len(self.progress.held), self.progress.running
        size = held
        while running and size // 2 >= len(running):
            size //= 2
        if size == held:
            return None
        logging.info("%d of %d members still train: the bank goes on with %d places", len(running),
                     held, size)  # fmt: skip
        kept = [place for place, _ in running]
        others = [place for place in range(held) if place not in kept]
        return sorted(kept + others[: size - len(kept)])

    def remove_leftovers(self) -> None:
        """Removes what a kill left half-written; only with the lock."""
        if processes.first():
            files.remove_leftovers(self.model_dir)
            for member in self.members:
                member.exports.remove_leftovers()

    def _resume(self, state: TrainState) -> tuple[TrainState, Iterator[Batch]]:
        self.remove_leftovers()

        def like(loaded: dict[str, Any]) -> TrainState:
            held = Progress.from_json(loaded).held
            return _take(state, held) if len(held) < len(self.members) else state

        restored = self.checkpoints.restore(like)
        if restored is None:
            if processes.first():
                for member in self.members:
                    member.exports.prune(set())
            return state, self._data()
        self.progress = Progress.from_json(restored[1])
        step = self.progress.step
        logging.info("going on from step %d of %s", step, self.model_dir)
        self._restore_exports(restored[0])
        return restored[0], self._data()

    def _restore_exports(self, state: TrainState) -> None:
        """Drops those ahead of the checkpoint; makes the best as it names it.

        Raises:
            InputError: the best is missing or damaged, and nothing is left to make it again.
        """
        step = self.progress.step
        places = {number: place for place, number in enumerate(self.progress.held)}
        for number, member in enumerate(self.members):
            standing, problem = self.progress.standings[number], None
            if processes.first():
                member.exports.prune(set(), newer_than=step)
                if standing.best_step is not None:
                    problem = member.exports.recover(standing.best_step)
            damaged = processes.of_first(int(problem is not None))
            if damaged and standing.best_step == step and number in places:
                # Of this very state: what was exported then, byte for byte.
                logging.warning("%s; made again from the checkpoint of step %d", problem, step)
                self._export(number, self._trainable(state, places[number]), standing.best_value)
            elif damaged:
                raise InputError(
                    f"{problem or f'MODEL_DIR = {self.model_dir}: the best export is damaged'}, "
                    f"and the checkpoint of step {step} cannot make it again; put it back from a "
                    f"copy, or remove {self.checkpoints.directory} to start anew"
                )
            if processes.first() and standing.best_step is not None:
                member.exports.promote(standing.best_step)

    def _export(self, number: int, trainable: Tree, value: float | None) -> None:
        """A member's trainable variables of this step, with the value that selects."""
        member, step = self.members[number], self.progress.step
        metadata = {"step": step, "metric": member.metric, "value": value}
        member.exports.write(member.exports.path(step), trainable, metadata)

    def _add(self, metrics: dict[str, jax.Array]) -> None:
        losses, norms = (np.atleast_1d(metrics[name]) for name in ("loss", "gradient_norm"))
        for place, number in self.progress.running:
            loss, norm = float(losses[place]), float(norms[place])
            if not (math.isfinite(loss) and math.isfinite(norm)):
                updated = self.progress.step > 1
                self._fail(number, f"the loss ({loss}, gradient norm {norm})", updated=updated)
                continue
            self.progress.standings[number].loss_sum += loss
            self.progress.standings[number].norm_sum += norm
        self.progress.steps_summed += 1

    def _check_finite(self, state: TrainState) -> None:
        """The last update comes after the last loss."""
        for place, number in self.progress.running:
            for path, array in flatten_paths(self._trainable(state, place)).items():
                if not bool(jnp.isfinite(array).all()):
                    self._fail(number, f"{path} after the update")
                    break

    def _fail(self, number: int, what: str, *, updated: bool = True) -> None:
        """Ends a member's training, and the run's with the last one's."""
        self.check_weights()
        standing, name = self.progress.standings[number], self.members[number].name
        best = standing.best_step
        kept = f"the prompt of step {best} is kept" if best else "nothing was exported yet"
        problem = (
            f"{f'{name}: ' if name else ''}{what} of a step near {self.progress.step} is not "
            f"finite; {kept}. {advice(updated)}"
        )
        standing.stopped = standing.failed = True
        if all(other.failed for other in self.progress.standings):
            raise TrainingError(problem)
        logging.warning("%s. The others go on", problem)

    def _trainable(self, state: TrainState, place: int) -> Tree:
        """The trainable variables of one member."""
        return jax.tree.map(lambda x: x[place], state.trainable) if self.bank else state.trainable

    def _log(self, rate: float) -> None:
        progress = self.progress
        count = max(progress.steps_summed, 1)
        values = {}
        for _, number in progress.running:
            standing = progress.standings[number]
            values[number] = {
                "train/loss": standing.loss_sum / count,
                "train/gradient_norm": standing.norm_sum / count,
                "train/learning_rate": self.members[number].rate_at(progress.step - 1),
            }
            standing.loss_sum = standing.norm_sum = 0.0
        progress.steps_summed = 0
        row = self._named(values) | {"time/examples_per_second": rate}
        self._check_lock()
        for callback in self.callbacks:
            callback.on_log(progress.step, row)

    def _named(self, values: dict[int, dict[str, float]]) -> dict[str, float]:
        """Metrics by member's number as one row: in a bank, their mean and then each one's."""
        names = dict.fromkeys(name for metrics in values.values() for name in metrics)
        row = {
            name: statistics.fmean(metrics[name] for metrics in values.values() if name in metrics)
            for name in names
        }
        if self.bank:
            for number, metrics in values.items():
                row |= {f"{k}/{self.members[number].name}": v for k, v in metrics.items()}
        return row

    def _evaluate(self, state: TrainState) -> None:
        """Evaluates, exports, and moves the selection state."""
        progress, started = self.progress, time.perf_counter()
        running = [(n, self._trainable(state, place)) for place, n in progress.running]
        found = {}
        for number, trainable in running:
            evaluate = self.members[number].evaluate
            if evaluate is not None:
                try:
                    found[number] = evaluate(trainable)
                except NotFiniteError:
                    self._fail(number, "a score on the validation split")
        running = [(n, x) for n, x in running if not progress.standings[n].failed]
        if found:
            took = {"time/evaluation_seconds": time.perf_counter() - started}
            validation = {
                n: {f"validation/{k}": v for k, v in metrics.items()}
                for n, metrics in found.items()
            }
            row = self._named(validation) | took
            self._check_lock()
            for callback in self.callbacks:
                callback.on_evaluation(progress.step, row)
        keep = []
        self._check_lock()
        for number, trainable in running:
            exports, standing = self.members[number].exports, progress.standings[number]
            kept = exports.steps()[-self.schedule.keep :] if processes.first() else ()
            named = {standing.best_before, standing.best_step}
            self._select(number, trainable, found.get(number))
            keep.append((exports, named | {standing.best_step, progress.step, *kept}))
        # The two committed checkpoints may still name those of `named`; later ones cannot.
        self.checkpoints.wait()
        self._check_lock()
        if processes.first():
            for exports, steps in keep:
                exports.prune(steps)

    def _select(self, number: int, trainable: Tree, metrics: dict[str, float] | None) -> None:
        """Exports a member, and makes it the best if it is."""
        member, standing = self.members[number], self.progress.standings[number]
        value = metrics[member.metric] if metrics and member.metric else None
        # Without an evaluation the newest is the best.
        gained = value is None or standing.best_value is None or value > standing.best_value
        step, standing.best_before = self.progress.step, standing.best_step
        self._export(number, trainable, value)
        if gained:
            standing.best_step, standing.best_value, standing.without_gain = step, value, 0
            if processes.first():
                member.exports.promote(step)
        else:
            standing.without_gain += 1
            patience = self.schedule.patience
            standing.stopped = patience is not None and standing.without_gain >= patience


def _take(state: TrainState, places: Sequence[int]) -> TrainState:
    """The members of a bank at `places` of its state, where they were on the mesh."""
    index = np.array(places)
    return jax.tree.map(lambda x: jax.device_put(x[index], x.sharding), state)


def report_memory() -> None:
    """The most memory that a device held, where it counts that (a CPU does not)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if peak := stats.get("peak_bytes_in_use"):
        logging.info("peak memory of a device: %.2f GB", peak / 1e9)
