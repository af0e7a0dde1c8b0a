"""`python -m ptjax.plan`: predicts if a run fits a slice, what a step costs, the best settings."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ptjax import cli
from ptjax.cli import model_flags, output
from ptjax.errors import InputError, check_at_least
from ptjax.files import Metadata

if TYPE_CHECKING:
    from ptjax.models.config import T5Config
    from ptjax.planning.estimate import Report
    from ptjax.planning.slices import Slice
    from ptjax.planning.workload import ParallelConfig, StepSpec

# Macros of a run's gin files that planning does not need, with values for `load_gin`.
NOT_NEEDED = {"MODEL_DIR": "", "DATA_DIR": "", "INITIAL_CHECKPOINT_PATH": ""}


def main() -> None:
    """Parses the flags and runs the command."""
    parser = cli.make_parser(
        "plan",
        """
        Says, before anyone rents hardware, whether the run of a gin file fits a slice, what a step
        costs there, and which mesh, remat and dtype are best. Only the gin files are needed: no
        weights (models/*.gin has the sizes; else they are read from the checkpoint's headers), no
        data, no TPU, no GPU.

        By default the train step is compiled for the slice by the devices' own compiler (pip
        install 'ptjax[plan]' for TPUs, 'ptjax[plan-gpu]' for GPUs), in a process of its own:
        first in the gin file's layout, then in the layouts that may be faster, until one fits
        (all with SCAN_LAYERS = True). --quick counts parameters, FLOPs and bytes in seconds,
        without a verdict.

        Times are estimates from published rates: the lower one if compute, memory and links all
        overlap, the upper one if communication overlaps with nothing.

          python -m ptjax.plan --gin_file=models/t5_1_1_xxl.gin --gin_file=runs/prompt_tune.gin \\
              --gin.SCAN_LAYERS=True --slice=v5e-8
        """,
        gin_help="models/t5_1_1_xxl.gin and the like set sizes, runs/prompt_tune.gin the rest.",
        exit_codes=cli.EXIT_CODES + " (a run that does not fit is an answer: 0)",
    )
    parser.add_argument(
        "--slice",
        action="append",
        required=True,
        metavar="NAME",
        help="v5e-8, v4-16, v5p-8, v6e-8, tpu7x-8, 2xv5e-16, h100x8, ...; may be repeated, or "
        "several with commas",
    )
    parser.add_argument("--quick", action="store_true", help="count only: seconds, no compiler")
    parser.add_argument(
        "--no_search", action="store_true", help="compile the gin file's own layout alone"
    )
    parser.add_argument(
        "--exact", action="store_true", help="for TPUs, compile with the full effort of a real run"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--timeout_seconds",
        type=int,
        default=900,
        metavar="S",
        help="limit for one compilation; default: 900",
    )
    parser.add_argument(
        "--cache_dir",
        default=os.path.join(
            os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ptjax", "plan"
        ),
        metavar="DIR",
        help="cache of results, keyed by settings, ptjax and compiler; '' disables it; "
        "default: %(default)s",
    )
    # The job of a compiling process, see planning/compiler.py.
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    arguments = cli.parse(parser)
    cli.run(lambda: plan(arguments))


def plan(arguments: argparse.Namespace) -> None:
    """Prints the plans for the slices of --slice; `arguments` are the parsed flags.

    Sets environment variables that make JAX use the CPU; call it before JAX is imported.
    """
    from ptjax.planning.slices import ENVIRONMENT, parse_slice

    os.environ |= ENVIRONMENT
    names = [name.strip() for text in arguments.slice for name in text.split(",") if name.strip()]
    slices = [parse_slice(name) for name in names or [""]]
    check_at_least(1, **{"--timeout_seconds": arguments.timeout_seconds})
    cli.load_gin(arguments, defaults=NOT_NEEDED)
    from ptjax.planning import compiler

    spec, parallel = read_spec()
    if arguments.compile is not None:
        print(json.dumps(compiler.answer(spec, slices[0], arguments.compile)))
        return
    if not arguments.quick:
        for slice_ in slices:
            compiler.check_compiler(slice_)
    plans = (plan_slice(spec, parallel, slice_, arguments) for slice_ in slices)
    if arguments.json:
        output.show(output.as_json(list(plans), indent=2))
    else:
        _show(spec, plans)


def read_spec() -> tuple[StepSpec, ParallelConfig]:
    """Makes the step and the parallel configuration from the gin files, which are loaded already.

    Raises:
        InputError: the gin files have no run or no sizes of a network, or settings do not fit.
    """
    from ptjax.planning.workload import ParallelConfig, PlannedBackbone, StepSpec
    from ptjax.settings import RunSettings
    from ptjax.trainer.sweep import check_members

    run = cli.settings(model_flags.TUNE, "settings", "members")
    if not run:
        raise InputError(
            "no run to plan: add --gin_file=runs/prompt_tune.gin, or one of your own that binds "
            "ptjax.tune.settings (pre-training is not planned)"
        )
    settings, members = run.get("settings") or RunSettings(), run.get("members")
    loaded = cli.settings(
        model_flags.LOAD_BACKBONE, "path", "dtype", "mesh", "fsdp", "quantize",
        *_config_fields(),
    )  # fmt: skip
    check_members(members or {}, settings)
    spec = StepSpec.from_settings(_config(loaded), settings, len(members) if members else None)
    config, quantize = spec.config, loaded.get("quantize")
    settings.method.check(PlannedBackbone(config, quantize), settings.batching)
    mesh = loaded.get("mesh") or "auto"
    fsdp = loaded.get("fsdp", False)
    return spec, ParallelConfig(mesh, fsdp, config.scan_layers, config.remat, quantize)


def _config_fields() -> list[str]:
    from ptjax.models.config import T5Config

    return [field.name for field in dataclasses.fields(T5Config)]


def _config(loaded: Metadata) -> T5Config:
    """The network: sizes from models/*.gin or from the checkpoint's headers, settings from the run.

    Args:
        loaded: the arguments of `load_backbone` that the gin files bind.

    Raises:
        InputError: nothing gives the sizes.
    """
    from ptjax.backbones.load import check_dtypes
    from ptjax.backbones.open import open_backbone, would_download
    from ptjax.models.config import T5Config

    others = ("path", "dtype", "mesh", "fsdp", "quantize")
    overrides = {name: value for name, value in loaded.items() if name not in others}
    dtype = loaded.get("dtype") or "bfloat16"
    check_dtypes(dtype, loaded.get("quantize"))
    sizes = cli.settings(T5Config, *_config_fields())
    if sizes:
        config = cli.bound(T5Config, given=list(overrides))(**overrides, dtype=dtype)
        return dataclasses.replace(config, mlp_activations=tuple(config.mlp_activations))
    if not loaded.get("path"):
        raise InputError(
            "which T5? Add its sizes (--gin_file=models/t5_1_1_xxl.gin) or the checkpoint "
            "(--gin.INITIAL_CHECKPOINT_PATH=\"'...'\")"
        )
    if would_download(loaded["path"]):
        raise InputError(
            f"{loaded['path']} is not on this machine, and planning downloads no weights; add its "
            "sizes instead (--gin_file=models/t5_1_1_xxl.gin or the like)"
        )
    return open_backbone(loaded["path"], dtype=dtype, **overrides).config


def plan_slice(
    spec: StepSpec, parallel: ParallelConfig, slice_: Slice, arguments: argparse.Namespace
) -> Report:
    """Makes the plan for one slice; unless --quick is set, it compiles the step.

    Args:
        spec, parallel: the results of `read_spec`.
        arguments: the parsed flags.

    Returns:
        "slice": its name; "own": the report for the gin file's configuration; "tried": the reports
        for other configurations that were compiled; "best": the report for the best that fits, or
        None; "searched": whether others were tried at all.
    """
    from ptjax.planning.compiler import Compiler
    from ptjax.planning.estimate import count
    from ptjax.planning.search import search
    from ptjax.planning.workload import ParallelConfig, resolve

    searched = not (arguments.quick or arguments.no_search)
    plan: Report = {"slice": slice_.name, "own": {}, "searched": searched, "tried": []}
    plan["best"] = None
    compiler = Compiler(
        spec,
        slice_,
        cli.config_text(),
        exact=arguments.exact,
        timeout=arguments.timeout_seconds,
        cache=Path(arguments.cache_dir).expanduser() if arguments.cache_dir else None,
    )
    try:
        parallel = resolve(spec, parallel, slice_)
    except InputError as error:
        plan["own"] = {"verdict": "refused", "reason": str(error)}
    else:
        quick = arguments.quick
        plan["own"] = count(spec, parallel, slice_) if quick else compiler(parallel, timed=True)
    if not searched:
        return plan
    tried, best = search(spec, slice_, parallel.quantize, compiler)
    if best:
        timed = compiler(ParallelConfig.from_settings(best["settings"]), timed=True)
        best = timed if timed["verdict"] == "fits" else best
    return plan | {"tried": tried, "best": best}


def _show(spec: StepSpec, slice_plans: Iterable[Report]) -> None:
    """Prints each plan as soon as it is made."""
    from ptjax.cli import plans

    for i, slice_plan in enumerate(slice_plans):
        if i == 0:
            reports = (slice_plan["own"], *slice_plan["tried"])
            counted = [report for report in reports if "flops" in report]
            plans.show_run(spec, counted[0] if counted else None)
        plans.show_slice(slice_plan)


if __name__ == "__main__":
    main()
