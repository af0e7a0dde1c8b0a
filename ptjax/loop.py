"""The loop: the only place with a clock, logging and the order of I/O.

A run may be killed at any instant and started again by the same command. What makes that exact:
everything that changes stands in the checkpoint, files beside it are written before the checkpoint
that mentions them and removed only after one that does not, and on resuming whatever lies ahead of
the checkpoint is dropped and made again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import grain
import jax
import jax.numpy as jnp
from absl import logging
from etils import epath
from jax.sharding import Mesh

from ptjax import atomic
from ptjax.checkpoint import Checkpoints
from ptjax.data.batch import count_examples
from ptjax.data.pipeline import Batches, Shape, make_iterator
from ptjax.display import Display
from ptjax.errors import check_at_least
from ptjax.scale import sharding
from ptjax.training.freeze import flatten_paths
from ptjax.training.step import TrainState

Tree = Any
BEST = "best"


class TrainingError(RuntimeError):
    """The run cannot go on; what it saved before is good. Exit code 1."""


@dataclasses.dataclass(frozen=True)
class Pace:
    """How long a run is and what happens when.

    Attributes:
        train_steps: of this run; the backbone's own pre-training steps do not count.
        eval_period: steps between evaluations, each of which exports and checkpoints.
        log_period: steps between lines of `metrics.jsonl`.
        patience: stop after this many evaluations without a gain; None never stops early.
        keep: exported prompts that stay beside the best one, the last ones.
    """

    train_steps: int = 30_000
    eval_period: int = 500
    log_period: int = 100
    patience: int | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        check_at_least(1, "Pace", **dataclasses.asdict(self))


@dataclasses.dataclass
class Progress:
    """Where a run stands; plain JSON inside the checkpoint. Sums start at the last logged step."""

    step: int = 0
    best_value: float | None = None
    best_step: int | None = None
    without_gain: int = 0
    stopped: bool = False
    loss_sum: float = 0.0
    norm_sum: float = 0.0
    steps_summed: int = 0


@dataclasses.dataclass(frozen=True)
class Exports:
    """What a run leaves behind at each evaluation.

    Attributes:
        directory: `MODEL_DIR/prompts`, say.
        suffix: of one export's name, "" when it is a folder.
        write: `(path, state, metadata)` writes one, whole or not at all.
    """

    directory: epath.Path
    suffix: str
    write: Callable[[epath.Path, TrainState, dict[str, Any]], None]

    def path(self, name: int | str) -> epath.Path:
        return self.directory / f"{name}{self.suffix}"

    def prune(self, keep: set[int | None], *, newer_than: int | None = None) -> None:
        """Removes exports by step: those not in `keep`, or those ahead of `newer_than`."""
        for path in self.directory.iterdir() if self.directory.exists() else ():
            name = path.name.removesuffix(self.suffix) if self.suffix else path.name
            if not name.isdigit():
                continue
            ahead = newer_than is not None and int(name) > newer_than
            if ahead or (newer_than is None and int(name) not in keep):
                path.rmtree() if path.is_dir() else path.unlink()

    def promote(self, step: int) -> None:
        """Makes the export of `step` the best one."""
        source, target = self.path(step), self.path(BEST)
        if not source.is_dir():
            atomic.write_bytes(target, source.read_bytes())
            return
        if target.exists():
            target.rmtree()
        for path in sorted(source.iterdir()):
            atomic.write_bytes(target / path.name, path.read_bytes())


class Run:
    """One training run in MODEL_DIR, from wherever it was left to its end."""

    def __init__(
        self,
        model_dir: epath.Path,
        pace: Pace,
        *,
        identity: dict[str, Any],
        exports: Exports,
        metric: str | None,
        evaluate: Callable[[TrainState], dict[str, float]] | None,
        rate_at: Callable[[int], float],
        config: str = "",
    ) -> None:
        self.model_dir, self.pace, self.identity = model_dir, pace, identity
        self.config = config
        self.exports, self.metric, self.evaluate = exports, metric, evaluate
        self.rate_at = rate_at
        self.checkpoints = Checkpoints(model_dir / "checkpoints")
        self.checkpoints.check_identity(identity)
        self.progress = Progress()
        self.rows: list[dict[str, Any]] = []

    def fit(
        self,
        state: TrainState,
        frozen: Tree,
        train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
        batches: Batches,
        mesh: Mesh,
        *,
        dry_run: bool = False,
    ) -> TrainState:
        """Trains to the end (or patience) and returns the last state; `progress` names the best.

        With `dry_run` it compiles the steps and returns.

        Raises:
            TrainingError: a loss is not finite.
            SystemExit: SIGTERM (143) or Ctrl-C (130), after saving.
        """
        hosts = jax.process_count()
        data = make_iterator(batches, self.pace.train_steps, host=jax.process_index(), hosts=hosts)
        if dry_run:
            compile_steps(train_step, state, frozen, batches.shapes, mesh)
            return state
        try:
            state = self._resume(state, data)
            if self.config and jax.process_index() == 0:
                atomic.write_bytes(self.model_dir / "config.gin", self.config.encode())
            with Display(self.model_dir, self.pace.train_steps, self.progress.step) as display:
                steps = compile_steps(train_step, state, frozen, batches.shapes, mesh)
                with _signals() as caught:
                    state = self._steps(state, frozen, steps, data, mesh, display, caught)
            self.checkpoints.wait()
            last = sorted(self._kept_steps())
            self.exports.prune({self.progress.best_step, *last[-self.pace.keep :]})
            report_memory()
        finally:
            # Also when something failed: what is being written is finished.
            self.checkpoints.close()
        return state

    def _steps(
        self,
        state: TrainState,
        frozen: Tree,
        steps: dict[Shape, Callable[..., Any]],
        data: grain.DatasetIterator,
        mesh: Mesh,
        display: Display,
        caught: list[int],
    ) -> TrainState:
        progress, pace = self.progress, self.pace
        waiting: dict[str, jax.Array] | None = None
        started, examples = time.perf_counter(), 0
        while progress.step < pace.train_steps and not progress.stopped:
            rows = next(data)
            batch = sharding.put_batch(rows, mesh)
            state, metrics = steps[shape_of(batch)](state, frozen, batch)
            # The metrics of the step before are there by now; these are not waited for.
            if waiting is not None:
                self._add(waiting)
            waiting = metrics
            progress.step += 1
            examples += count_examples(rows) * jax.process_count()
            at_end = progress.step == pace.train_steps
            log = progress.step % pace.log_period == 0 or at_end
            evaluation = progress.step % pace.eval_period == 0 or at_end
            if log or evaluation or caught:
                self._add(metrics)
                waiting = None
            if log:
                seconds = time.perf_counter() - started
                started = time.perf_counter()
                self._log(display, examples / seconds)
                examples = 0
            if evaluation:
                self._check_finite(state)
                self._evaluate(state, display)
                started, examples = time.perf_counter(), 0
            if evaluation or caught:
                self.checkpoints.save(
                    progress.step, state, data, dataclasses.asdict(progress), self.identity
                )
            if caught:
                self.checkpoints.wait()
                logging.info("saved at step %d; the same command goes on from here", progress.step)
                raise SystemExit(128 + caught[0])
            display.step(progress.step)
        return state

    def _resume(self, state: TrainState, data: grain.DatasetIterator) -> TrainState:
        rows = self.model_dir / "metrics.jsonl"
        if self.checkpoints.latest is None:
            rows.unlink(missing_ok=True)
            self.exports.prune(set())
            return state
        state, progress = self.checkpoints.restore(state, data)
        self.progress.__dict__.update(progress)
        step = self.progress.step
        logging.info("going on from step %d of %s", step, self.model_dir)
        self.exports.prune(set(), newer_than=step)
        if self.progress.best_step is not None:
            self.exports.promote(self.progress.best_step)
        lines = rows.read_text().splitlines() if rows.exists() else []
        self.rows = [row for row in map(json.loads, lines) if row["step"] <= step]
        return state

    def _add(self, metrics: dict[str, jax.Array]) -> None:
        loss, norm = float(metrics["loss"]), float(metrics["gradient_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._not_finite(f"the loss ({loss}, gradient norm {norm})")
        self.progress.loss_sum += loss
        self.progress.norm_sum += norm
        self.progress.steps_summed += 1

    def _check_finite(self, state: TrainState) -> None:
        """The last update comes after the last loss."""
        for path, array in flatten_paths(state.trainable).items():
            if not bool(jnp.isfinite(array).all()):
                raise self._not_finite(f"{path} after the update")

    def _not_finite(self, what: str) -> TrainingError:
        best = self.progress.best_step
        kept = f"the prompt of step {best} is kept" if best else "nothing was exported yet"
        return TrainingError(
            f"{what} of a step near {self.progress.step} is not finite; {kept}. A smaller learning "
            "rate usually helps"
        )

    def _log(self, display: Display, rate: float) -> None:
        progress = self.progress
        count = max(progress.steps_summed, 1)
        values = {
            "train/loss": progress.loss_sum / count,
            "train/gradient_norm": progress.norm_sum / count,
            "train/learning_rate": self.rate_at(progress.step - 1),
        }
        progress.loss_sum = progress.norm_sum = 0.0
        progress.steps_summed = 0
        self._write(display, values | {"time/examples_per_second": rate})

    def _write(self, display: Display, values: dict[str, float]) -> None:
        """One line of metrics.jsonl; the file is whole at any instant."""
        self.rows.append({"step": self.progress.step} | values)
        if jax.process_index() == 0:
            text = "".join(json.dumps(row) + "\n" for row in self.rows)
            atomic.write_bytes(self.model_dir / "metrics.jsonl", text.encode())
        display.metrics(self.progress.step, values)

    def _evaluate(self, state: TrainState, display: Display) -> None:
        """Evaluates, exports, and moves the selection state."""
        progress, value = self.progress, None
        if self.evaluate is not None and self.metric is not None:
            started = time.perf_counter()
            metrics = self.evaluate(state)
            value = metrics[self.metric]
            took = {"time/evaluation_seconds": time.perf_counter() - started}
            self._write(display, {f"validation/{k}": v for k, v in metrics.items()} | took)
        # Without an evaluation the newest is the best.
        gained = value is None or progress.best_value is None or value > progress.best_value
        metadata = {"step": progress.step, "metric": self.metric, "value": value}
        kept = sorted(self._kept_steps())
        if jax.process_index() == 0:
            self.exports.write(self.exports.path(progress.step), state, metadata)
        if gained:
            previous, progress.best_step, progress.best_value = (
                progress.best_step,
                progress.step,
                value,
            )
            progress.without_gain = 0
            self.exports.promote(progress.step)
        else:
            previous = progress.best_step
            progress.without_gain += 1
            patience = self.pace.patience
            progress.stopped = patience is not None and progress.without_gain >= patience
        # The last committed checkpoint may still name `previous`; one not yet written cannot.
        self.checkpoints.wait()
        self.exports.prune({previous, progress.best_step, progress.step, *kept[-self.pace.keep :]})

    def _kept_steps(self) -> list[int]:
        directory = self.exports.directory
        names = (
            [p.name.removesuffix(self.exports.suffix) for p in directory.iterdir()]
            if (directory.exists())
            else []
        )
        return [int(name) for name in names if name.isdigit()]


def report_memory() -> None:
    """The most memory that a device held, where it counts that (a CPU does not)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if peak := stats.get("peak_bytes_in_use"):
        logging.info("peak memory of a device: %.2f GB", peak / 1e9)


def shape_of(batch: Mapping[str, Any]) -> Shape:
    targets = batch["decoder_input_tokens"].shape[1]
    packed = "encoder_segment_ids" in batch
    rows, inputs = batch["encoder_input_tokens"].shape
    return Shape(rows, inputs, targets, packed)


def compile_steps(
    train_step: Callable[..., Any],
    state: TrainState,
    frozen: Tree,
    shapes: list[Shape],
    mesh: Mesh,
) -> dict[Shape, Callable[..., Any]]:
    """The step compiled for every batch shape, before the first batch is seen.

    A compiled step refuses any other shape, so nothing is ever compiled again on the way.
    """
    over_rows = sharding.batch_sharding(mesh)
    # The state goes out as it came in, so the next step takes it without moving anything.
    places = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(train_step, donate_argnums=0, out_shardings=(places, None))

    def compile_step(shape: Shape) -> Callable[..., Any]:
        batch = {
            name: jax.ShapeDtypeStruct(size, dtype, sharding=over_rows)
            for name, (size, dtype) in shape.arrays().items()
        }
        return jitted.lower(state, frozen, batch).compile()

    started = time.perf_counter()
    compiled = {shape: compile_step(shape) for shape in shapes}
    logging.info(
        "compiled the step for %d batch shapes in %.1f s: %s",
        len(shapes),
        time.perf_counter() - started,
        ", ".join(f"{rows}x{inputs}+{targets}" for rows, inputs, targets, _ in shapes),
    )
    return compiled


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Notes SIGTERM and the first Ctrl-C for the end of the step; a second Ctrl-C interrupts."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )
        logging.info("signal %d: saving at the end of this step", number)

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
