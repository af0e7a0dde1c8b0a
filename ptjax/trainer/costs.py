"""What a run costs, for `results.json`: sizes, FLOPs, memory and speed."""

from __future__ import annotations

import statistics

from absl import logging
from etils import epath

from ptjax.files import JsonObject
from ptjax.model_dir import BEST, ModelDir
from ptjax.planning.flops import count_jaxpr_flops
from ptjax.trainer.exports import Exports
from ptjax.trainer.metrics_log import read_rows
from ptjax.training import freeze as freezing
from ptjax.training.compile import CompiledStep, program_bytes
from ptjax.training.step import TrainState


def step_costs(step: CompiledStep) -> JsonObject:
    """Returns what a compiled train step costs.

    Returns:
        "flops_per_step", as `planning.flops.count_flops` counts; "step_bytes", the memory of a
        device that the compiler plans for the program, the frozen weights included. Either is None
        if it is unknown.
    """
    memory = step.compiled.memory_analysis()
    try:
        flops = count_jaxpr_flops(step.traced.jaxpr.jaxpr)
    except ValueError as error:  # a network of the user's own
        logging.info("the FLOPs of a step are not counted: %s", error)
        flops = None
    needed = None if memory is None else program_bytes(memory)
    return {"flops_per_step": flops, "step_bytes": needed}


def state_costs(state: TrainState) -> JsonObject:
    """Returns the bytes of the optimizer's state, and of a checkpoint's arrays."""
    optimizer_bytes = freezing.sizes(state.opt_state)[1]
    trained_bytes = freezing.sizes(state.trainable)[1]
    return {"optimizer_bytes": optimizer_bytes, "checkpoint_bytes": trained_bytes + optimizer_bytes}


def run_costs(model_dir: epath.Path, exports: Exports) -> JsonObject:
    """Returns the bytes of the best export, and the median of the logged examples per second."""
    best = exports.path(BEST)
    files = best.iterdir() if best.is_dir() else [best] * best.exists()
    rows, rate = read_rows(ModelDir(model_dir).metrics), "time/examples_per_second"
    rates = [row[rate] for row in rows if rate in row]
    return {
        "export_bytes": sum(file.stat().length for file in files),
        "examples_per_second": statistics.median(rates) if rates else None,
    }
