"""What a run that was interrupted in an interactive session returns: the best so far."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from absl import logging

from ptjax.files import JsonObject
from ptjax.model_dir import ModelDir
from ptjax.trainer.loop import TrainingLoop
from ptjax.trainer.metrics_log import read_rows
from ptjax.trainer.setup import MemberSetup
from ptjax.trainer.signals import StoppedError


def _returns(stop: BaseException, run: TrainingLoop) -> bool:
    """Whether `tune` returns the best so far after `stop`, which Ctrl-C or a signal raised.

    It does after Ctrl-C in a notebook or at Python's prompt, which must survive that, if the run
    was saved: at the end of a step, or before it is scored. A script or a command ends instead.
    """
    interactive = hasattr(sys, "ps1") or bool(sys.flags.interactive)
    if isinstance(stop, StoppedError):
        return interactive and stop.number == signal.SIGINT
    return interactive and isinstance(stop, KeyboardInterrupt) and run.has_finished()


def best_so_far(
    stop: BaseException, run: TrainingLoop, setups: Sequence[MemberSetup]
) -> JsonObject:
    """Describes a run that was interrupted and saved, and logs how to resume; or raises `stop`.

    It raises `stop` unless that is Ctrl-C in a notebook or at Python's prompt, which must survive
    it: a script or a command ends. Nothing is computed: the scores are those by which the best
    export was selected.

    Returns:
        "finished": False, "trained_steps" and, once the run has been evaluated, "task", "split",
        "metric", "value", "metrics" and "step" of the best export. In a sweep the latter are by
        name of a member in "members", with the best one's name and value in "best".
    """
    if not _returns(stop, run):
        raise stop
    metrics = _validation_metrics(run)
    members: JsonObject = {}
    for setup, progress in zip(setups, run.progress.members, strict=True):
        if progress.best_step is None or progress.best_value is None:
            continue
        evaluator = setup.data.evaluator
        members[setup.member.name] = {
            "task": setup.data.task.name,
            "split": evaluator.settings.split,
            "metric": evaluator.metric,
            "value": progress.best_value,
            "metrics": metrics.get((progress.best_step, setup.member.name), {}),
            "step": progress.best_step,
        }
    results: JsonObject = {"finished": False, "trained_steps": run.progress.step}
    if not members:
        best = "no evaluation yet"
    elif not run.members.is_sweep:
        results |= members[""]
        best = "the best so far is step {step} ({metric} {value:.3f} on {split})".format(**results)
    else:
        name = max(members, key=lambda name: members[name]["value"])
        value = members[name]["value"]
        results |= {"members": members, "best": {"member": name, "value": value}}
        best = f"the best so far is {name} ({value:.3f})"
    logging.info(
        "interrupted at step %d of %d and saved in %s; %s. The same call resumes",
        run.progress.step,
        run.schedule.train_steps,
        run.model_dir,
        best,
    )
    return results


def _validation_metrics(run: TrainingLoop) -> dict[tuple[int, str], dict[str, float]]:
    """(step, name of the member) -> the metrics in the rows of `metrics.jsonl`."""
    found: dict[tuple[int, str], dict[str, float]] = {}
    for row in read_rows(ModelDir(run.model_dir).metrics):
        for key, value in row.items():
            kind, _, rest = key.partition("/")
            metric, _, member = rest.partition("/")  # without a member: of the run, or the mean
            if kind == "validation" and bool(member) == run.members.is_sweep:
                found.setdefault((row["step"], member), {})[metric] = value
    return found
