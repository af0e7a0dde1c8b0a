"""`python -m ptjax.plan`: predicts if a run fits a slice, a step's cost, and the best settings."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ptjax import cli
from ptjax.cli import model_flags, output
from ptjax.errors import InputError, check_at_least
from ptjax.files import Metadata
from ptjax.planning import slices

if TYPE_CHECKING:
    from ptjax.models.config import T5Config
    from ptjax.planning.estimate import Report
    from ptjax.planning.plan import Planning
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
        default=slices.default_cache(),
        metavar="DIR",
        help="cache of results, keyed by settings, ptjax and compiler; '' disables it; "
        "default: %(default)s",
    )
    arguments = cli.parse(parser)
    cli.run(lambda: plan(arguments))


def plan(arguments: argparse.Namespace) -> None:
    """Prints, for each group of TPUs or GPUs that --slice names, whether and how a run fits on it.

    A plan has the mesh, the memory of a device, and the time and traffic of a step; no accelerator
    is needed. Sets environment variables that make JAX use the CPU; call it before JAX is imported.

    Args:
        arguments: the parsed flags.
    """
    os.environ |= slices.ENVIRONMENT
    chosen = slices.find_slices(arguments.slice)
    check_at_least(1, **{"--timeout_seconds": arguments.timeout_seconds})
    cli.load_gin(arguments, defaults=NOT_NEEDED)
    from ptjax.planning import plan

    spec, parallel = read_spec()
    how: Planning = {
        "quick": arguments.quick,
        "search": not arguments.no_search,
        "exact": arguments.exact,
        "timeout_seconds": arguments.timeout_seconds,
        "cache_dir": arguments.cache_dir,
    }
    plan.check_planning(chosen, **how)
    reports = (plan.plan_slice(spec, parallel, slice_, **how) for slice_ in chosen)
    if arguments.json:
        output.show(output.as_json(list(reports), indent=2))
    else:
        show(spec, reports)


def read_spec() -> tuple[StepSpec, ParallelConfig]:
    """Returns the train step and its layout on devices, as the gin files describe them.

    The gin files must be loaded before (`cli.load_gin`).

    Raises:
        InputError: the gin files do not configure a run (`ptjax.tune.settings`), neither they nor
            a checkpoint give the network's sizes, or the settings contradict each other.
    """
    from ptjax.planning.plan import make_spec
    from ptjax.planning.workload import ParallelConfig
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
        model_flags.LOAD_BACKBONE, "path", "dtype", "mesh", "fsdp", "quantize", "attention",
        *_config_fields(),
    )  # fmt: skip
    check_members(members or {}, settings)
    config = _config(loaded)
    parallel = ParallelConfig(
        loaded.get("mesh") or "auto",
        loaded.get("fsdp", False),
        config.scan_layers,
        config.remat,
        loaded.get("quantize"),
        attention=loaded.get("attention", "auto"),
    )
    return make_spec(config, settings, parallel, len(members) if members else None), parallel


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
    from ptjax.backbones.load import check_numerics
    from ptjax.models.config import T5Config
    from ptjax.planning.plan import read_config

    others = ("path", "dtype", "mesh", "fsdp", "quantize", "attention")
    overrides = {name: value for name, value in loaded.items() if name not in others}
    dtype = loaded.get("dtype") or "bfloat16"
    check_numerics(dtype, loaded.get("quantize"), loaded.get("attention", "auto"))
    sizes = cli.settings(T5Config, *_config_fields())
    if sizes:
        config = cli.bound(T5Config, given=list(overrides))(**overrides, dtype=dtype)
        return dataclasses.replace(config, mlp_activations=tuple(config.mlp_activations))
    if not loaded.get("path"):
        raise InputError(
            "which T5? Add its sizes (--gin_file=models/t5_1_1_xxl.gin) or the checkpoint "
            "(--gin.INITIAL_CHECKPOINT_PATH=\"'...'\")"
        )
    return read_config(loaded["path"], dtype, **overrides)


def show(spec: StepSpec, reports: Iterable[Report]) -> None:
    """Prints the plan for each slice as soon as it is made."""
    from ptjax.planning import show
    from ptjax.planning.plan import counted

    console = show.make_console()
    for i, report in enumerate(reports):
        if i == 0:
            show.show_run(console, spec, counted(report))
        show.show_slice(console, report, own="gin file", setting_lines=gin_lines)


def gin_lines(settings: Metadata) -> list[str]:
    """Returns settings as lines of gin: macros that the gin files have, else arguments."""
    homes = {"MICROBATCHES": "Batching"}

    def argument(name: str) -> str:
        return f"ptjax.{homes.get(name, 'load_backbone')}.{name.lower()}"

    return [
        f"{name if cli.has_macro(name) else argument(name)} = {value!r}"
        for name, value in settings.items()
        if name != "dtype" or value is not None  # None keeps the dtype of the gin file
    ]


if __name__ == "__main__":
    main()
