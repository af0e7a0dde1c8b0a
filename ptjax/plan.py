"""`python -m ptjax.plan`: does a run fit a slice, what does a step cost, what is best there."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptjax import cli
from ptjax.cli import chosen, output
from ptjax.errors import InputError, check_at_least

if TYPE_CHECKING:
    from ptjax.planning.slices import Slice
    from ptjax.planning.workload import Layout, Report, Workload

NOT_NEEDED = {"MODEL_DIR": "", "DATA_DIR": "", "INITIAL_CHECKPOINT_PATH": ""}


def main() -> None:
    parser = cli.make_parser(
        "plan",
        """
        Says, before anyone rents hardware, whether the run of a gin file fits a slice, what a step
        costs there, and which mesh, remat and dtype are best. Only the gin files are needed: no
        weights (models/*.gin has the sizes; else they are read from the checkpoint's headers), no
        data, no TPU, no GPU.

        By default the train step is compiled for the slice by the devices' own compiler (pip
        install 'ptjax[plan]' for TPUs, 'ptjax[plan-gpu]' for GPUs), in a process of its own,
        first as the gin file has it and then in the layouts that may be faster, until one fits
        (all with SCAN_LAYERS = True). --quick counts parameters, FLOPs and bytes in seconds,
        without a verdict.

        Times are estimates from published rates: from compute, memory and links all overlapping to
        no sending hidden.

          python -m ptjax.plan --gin_file=models/t5_1_1_xxl.gin --gin_file=runs/prompt_tune.gin \\
              --gin.SCAN_LAYERS=True --slice=v5e-8
        """,
        gin_help="models/t5_1_1_xxl.gin and the like give sizes, runs/prompt_tune.gin the recipe.",
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
        "--exact", action="store_true", help="for TPUs, compile with all of the compiler's effort"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--timeout_seconds",
        type=int,
        default=900,
        metavar="S",
        help="of one compilation; default: 900",
    )
    parser.add_argument(
        "--cache_dir",
        default=os.path.join(
            os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ptjax", "plan"
        ),
        metavar="DIR",
        help="where answers are kept, by settings, ptjax and compiler; '' keeps none; "
        "default: %(default)s",
    )
    # What the process that compiles is told.
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    arguments = cli.parse(parser)
    cli.run(lambda: plan(arguments))


def plan(arguments: argparse.Namespace) -> None:
    from ptjax.planning.slices import ENVIRONMENT, parse_slice

    os.environ |= ENVIRONMENT
    names = [name.strip() for text in arguments.slice for name in text.split(",") if name.strip()]
    slices = [parse_slice(name) for name in names or [""]]
    check_at_least(1, **{"--timeout_seconds": arguments.timeout_seconds})
    cli.load_gin(arguments, defaults=NOT_NEEDED)
    from ptjax.planning import compiler

    workload, layout = read_workload()
    if arguments.compile is not None:
        print(json.dumps(compiler.answer(workload, slices[0], arguments.compile)))
        return
    if not arguments.quick:
        for where in slices:
            compiler.check_compiler(where)
    found = (plan_slice(workload, layout, where, arguments) for where in slices)
    if arguments.json:
        output.show(output.as_json(list(found), indent=2))
    else:
        _show(workload, found)


def read_workload() -> tuple[Workload, Layout]:
    """What the gin files ask for, and the layout that they choose."""
    from ptjax.planning.workload import Layout, PlannedBackbone, Workload
    from ptjax.settings import RunSettings
    from ptjax.trainer.sweep import check_members

    run = cli.settings(chosen.TUNE, "settings", "members")
    if not run:
        raise InputError(
            "no run to plan: add --gin_file=runs/prompt_tune.gin, or one of your own that binds "
            "ptjax.tune.settings (pre-training is not planned)"
        )
    settings, members = run.get("settings") or RunSettings(), run.get("members")
    loaded = cli.settings(
        chosen.LOAD_BACKBONE, "path", "dtype", "mesh", "fsdp", "quantize",
        *_config_fields(),
    )  # fmt: skip
    check_members(members or {}, settings)
    workload = Workload.of(_config(loaded), settings, len(members) if members else None)
    config, quantize = workload.config, loaded.get("quantize")
    settings.method.check(PlannedBackbone(config, quantize), settings.batching)
    mesh = loaded.get("mesh") or "auto"
    kept = (loaded.get("fsdp", False), config.scan_layers, config.remat, quantize)
    return workload, Layout(mesh, *kept)


def _config_fields() -> list[str]:
    from ptjax.models.config import T5Config

    return [field.name for field in dataclasses.fields(T5Config)]


def _config(loaded: Mapping[str, Any]) -> Any:
    """Sizes from models/*.gin, or from the headers of the checkpoint; settings from the run."""
    from ptjax.backbones.load import check_dtypes
    from ptjax.backbones.open import open_backbone, would_download
    from ptjax.models.config import T5Config

    own = ("path", "dtype", "mesh", "fsdp", "quantize")
    chosen_fields = {name: value for name, value in loaded.items() if name not in own}
    dtype = loaded.get("dtype") or "bfloat16"
    check_dtypes(dtype, loaded.get("quantize"))
    sizes = cli.settings(T5Config, *_config_fields())
    if sizes:
        config = cli.bound(T5Config, given=list(chosen_fields))(**chosen_fields, dtype=dtype)
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
    return open_backbone(loaded["path"], dtype=dtype, **chosen_fields).config


def plan_slice(
    workload: Workload, layout: Layout, where: Slice, arguments: argparse.Namespace
) -> Report:
    """What is found for one slice: the gin file's layout, those tried, the best of them."""
    from ptjax.planning.compiler import Compiler
    from ptjax.planning.search import search
    from ptjax.planning.workload import Layout, count, settle

    searched = not (arguments.quick or arguments.no_search)
    found: Report = {"slice": where.name, "own": {}, "searched": searched, "tried": []}
    found["best"] = None
    compiler = Compiler(
        workload,
        where,
        cli.config_text(),
        exact=arguments.exact,
        timeout=arguments.timeout_seconds,
        cache=Path(arguments.cache_dir).expanduser() if arguments.cache_dir else None,
    )
    try:
        layout = settle(workload, layout, where)
    except InputError as error:
        found["own"] = {"verdict": "refused", "reason": str(error)}
    else:
        quick = arguments.quick
        found["own"] = count(workload, layout, where) if quick else compiler(layout, timed=True)
    if not searched:
        return found
    tried, best = search(workload, where, layout.quantize, compiler)
    if best:
        again = compiler(Layout.of(best["settings"]), timed=True)
        best = again if again["verdict"] == "fits" else best
    return found | {"tried": tried, "best": best}


def _show(workload: Workload, found: Iterable[Report]) -> None:
    """Each slice as soon as it is planned."""
    from ptjax.cli import plans

    for i, one in enumerate(found):
        if i == 0:
            counted = [report for report in (one["own"], *one["tried"]) if "flops" in report]
            plans.show_run(workload, counted[0] if counted else None)
        plans.show_slice(one)


if __name__ == "__main__":
    main()
