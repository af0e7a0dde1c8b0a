"""`python -m ptjax.plan`: does a run fit a slice, what does a step cost, what is best there."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptjax import atomic, cli
from ptjax.cli import chosen
from ptjax.errors import InputError, check_at_least

if TYPE_CHECKING:
    from ptjax.planning import Layout, Report, Workload
    from ptjax.scale.slices import Slice

NOT_NEEDED = {"MODEL_DIR": "", "DATA_DIR": "", "INITIAL_CHECKPOINT_PATH": ""}
_CRASHED, _LATE = "compiler crashed", "compiler took too long"


def main() -> None:
    parser = cli.make_parser(
        "plan",
        """
        Says, before anyone rents hardware, whether the run of a gin file fits a slice, what a step
        costs there, and which mesh, remat and dtype are best. Nothing of it is needed but the gin
        files: no weights (models/*.gin has the sizes; else they are read from the checkpoint's
        headers), no data, no TPU.

        By default the train step is compiled for the slice by the TPU's own compiler (pip
        install 'ptjax[plan]'), in a process of its own, first as the gin file has it and then in
        the layouts that may be faster, until one fits. --quick counts parameters, FLOPs and bytes
        in seconds.

        Times are estimates from published rates: from everything at once to nothing hidden.

          python -m ptjax.plan --gin_file=models/t5_1_1_xxl.gin --gin_file=runs/prompt_tune.gin \\
              --slice=v5e-8
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
        "--exact", action="store_true", help="compile with all of the compiler's effort"
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
            os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "ptjax", "plan"
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
    from ptjax.scale.slices import ENVIRONMENT, parse_slice

    os.environ |= ENVIRONMENT
    names = [name for text in arguments.slice for name in text.split(",")]
    slices = [parse_slice(name) for name in names]
    check_at_least(1, **{"--timeout_seconds": arguments.timeout_seconds})
    cli.load_gin(arguments, defaults=NOT_NEEDED)
    workload, layout = read_workload()
    if arguments.compile is not None:
        print(json.dumps(_compile(workload, slices[0], json.loads(arguments.compile))))
        return
    compiles = not arguments.quick and any(where.is_tpu for where in slices)
    if compiles and importlib.util.find_spec("libtpu") is None:
        raise InputError("compiling needs libtpu: pip install 'ptjax[plan]', or use --quick")
    found = [plan_slice(workload, layout, where, arguments) for where in slices]
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        _show(workload, found, arguments.quick)


def read_workload() -> tuple[Workload, Layout]:
    """What the gin files ask for, and the layout that they choose."""
    from ptjax.models.prompt import Prompt
    from ptjax.planning import Layout, Workload
    from ptjax.scale.compiled import Recipe
    from ptjax.training.loss import Loss
    from ptjax.training.optimizer import Adafactor

    run = cli.settings(
        chosen.TUNE, "method", "prompt", "prompt_length", "optimizer", "loss", "batch_size",
        "microbatches", "feature_lengths", "buckets", "pack", "row_length", "bank",
    )  # fmt: skip
    if not run:
        raise InputError("no run to plan: add --gin_file=runs/prompt_tune.gin, or one of your own")
    method = run.get("method", "prompt_tuning")
    if method not in ("prompt_tuning", "model_tuning"):
        raise InputError(f"method = {method!r} trains nothing; there is no step to plan")
    lengths = {"inputs": 512, "targets": 16} | (run.get("feature_lengths") or {})
    if buckets := run.get("buckets"):
        lengths = dict(zip(("inputs", "targets"), max(buckets), strict=True))
    loaded = cli.settings(
        chosen.LOAD_BACKBONE, "path", "dtype", "mesh", "fsdp", "quantize",
        *(field for field in _config_fields()),
    )  # fmt: skip
    bank = run.get("bank")
    workload = Workload(
        _config(loaded),
        Recipe(
            method,
            run.get("optimizer") or Adafactor(),
            run.get("loss") or Loss(),
            run.get("microbatches", 1),
            (run.get("prompt") or Prompt()).sees_input,
            bool(bank),
        ),
        batch_size=run.get("batch_size", 32),
        **lengths,
        prompt_length=run.get("prompt_length", 100),
        pack=run.get("pack", False),
        row_length=run.get("row_length"),
        members=len(bank) if bank else None,
    )
    config = workload.config
    mesh = loaded.get("mesh") or "auto"
    kept = (loaded.get("fsdp", False), config.scan_layers, config.remat, loaded.get("quantize"))
    return workload, Layout(mesh, *kept)


def _config_fields() -> list[str]:
    from ptjax.models.config import T5Config

    return [field.name for field in dataclasses.fields(T5Config)]


def _config(loaded: Mapping[str, Any]) -> Any:
    """Sizes from models/*.gin, or from the headers of the checkpoint; settings from the run."""
    from ptjax.backbone import open_backbone
    from ptjax.models.config import T5Config

    own = ("path", "dtype", "mesh", "fsdp", "quantize")
    chosen_fields = {name: value for name, value in loaded.items() if name not in own}
    dtype = loaded.get("dtype") or "bfloat16"
    sizes = cli.settings(T5Config, *_config_fields())
    if sizes:
        return cli.bound(T5Config, given=list(chosen_fields))(**chosen_fields, dtype=dtype)
    if not loaded.get("path"):
        raise InputError(
            "which T5? Add its sizes (--gin_file=models/t5_1_1_xxl.gin) or the checkpoint "
            "(--gin.INITIAL_CHECKPOINT_PATH=\"'...'\")"
        )
    return open_backbone(loaded["path"], dtype=dtype, **chosen_fields).config


def plan_slice(
    workload: Workload, layout: Layout, where: Slice, arguments: argparse.Namespace
) -> Report:
    """What is found for one slice: the gin file's layout, those tried, the best of them."""
    from ptjax import planning, searching

    compiler = _Compiler(workload, where, arguments)
    own: Report
    try:
        layout = planning.settle(workload, layout, where)
    except InputError as error:
        own = {"slice": where.name, "verdict": "refused", "reason": str(error)}
    else:
        quick = arguments.quick or not where.is_tpu
        own = planning.count(workload, layout, where) if quick else compiler(layout, timed=True)
    found: Report = {"slice": where.name, "own": own, "tried": [], "best": None}
    if arguments.quick or arguments.no_search or not where.is_tpu:
        return found
    tried, best = searching.search(workload, where, layout.quantize, compiler)
    if best:
        best = compiler(planning.Layout(**_fields(best["settings"])), timed=True)
    return found | {"tried": tried, "best": best}


def _fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`Layout.settings()` back to fields."""
    return {name.lower(): value for name, value in settings.items()}


class _Compiler:
    """`planning.compile_ahead` in a process of its own, each answer kept."""

    def __init__(self, workload: Workload, where: Slice, arguments: argparse.Namespace) -> None:
        self.workload, self.where = workload, where
        self.exact, self.timeout = arguments.exact, arguments.timeout_seconds
        self.cache = Path(arguments.cache_dir).expanduser() if arguments.cache_dir else None
        self.gin = cli.config_text()

    def __call__(self, layout: Layout, timed: bool = False) -> Report:
        job = {"layout": layout.settings(), "exact": self.exact, "timed": timed}
        file = None if self.cache is None else self.cache / f"{self._key(job)}.json"
        if file is not None and file.exists():
            return json.loads(file.read_text("utf-8"))
        print(f"{self.where.name}: compiling {layout} ...", file=sys.stderr, flush=True)
        report = self._compile(layout, job)
        # A crash or a timeout may have been the machine's; it is tried again.
        if file is not None and report["verdict"] not in (_CRASHED, _LATE):
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_bytes(file, json.dumps(report).encode())
        return report

    def _compile(self, layout: Layout, job: Mapping[str, Any]) -> Report:
        from ptjax import planning

        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "plan.gin"
            config.write_text(self.gin, "utf-8")
            command = [sys.executable, "-m", "ptjax.plan", f"--gin_file={config}"]
            command += [f"--slice={self.where.name}", f"--compile={json.dumps(job)}"]
            try:
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    timeout=self.timeout,
                )
            except subprocess.TimeoutExpired:
                counted = planning.count(self.workload, layout, self.where)
                return counted | {"verdict": _LATE, "reason": f"more than {self.timeout} s"}
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        last = (done.stderr.strip().splitlines() or [""])[-1]
        if done.returncode == 2:
            raise InputError(last.removeprefix("error: "))
        counted = planning.count(self.workload, layout, self.where)
        how = f"signal {-done.returncode}" if done.returncode < 0 else last[:200]
        return counted | {"verdict": _CRASHED, "reason": how}

    def _key(self, job: Mapping[str, Any]) -> str:
        """Whatever an answer depends on: the run, the slice, the compiler and this program."""
        digest = hashlib.sha256()
        versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")]
        for part in (repr(self.workload), self.where.name, json.dumps(job), *versions):
            digest.update(part.encode() + b"\0")
        for source in sorted(Path(__file__).parent.rglob("*.py")):
            digest.update(source.read_bytes())
        return digest.hexdigest()[:32]


def _compile(workload: Workload, where: Slice, job: Mapping[str, Any]) -> Report:
    from ptjax import planning

    layout = planning.Layout(**_fields(job["layout"]))
    return planning.compile_ahead(workload, layout, where, exact=job["exact"], timed=job["timed"])


def _show(workload: Workload, found: list[Report], quick: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    config, shape = workload.config, workload.shape()
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)
    layers = f"{config.num_encoder_layers}+{config.num_decoder_layers} layers"
    console.print(f"T5 of {layers}, D = {config.emb_dim}, {config.dtype}; {workload.recipe.method}")
    counted = [one["own"] for one in found if "flops" in one["own"]]
    if counted:
        first = counted[0]
        share = 100 * first["trainable"] / first["parameters"]
        console.print(
            f"{first['parameters']:,} parameters, {first['trainable']:,} train ({share:.4f}%)"
        )
        forward, useful = first["flops"]["forward"], first["flops"]["useful"]
        prompted = workload.recipe.method == "prompt_tuning"
        console.print(
            f"a step of {shape}"
            + (f", prompts of {workload.prompt_length}" if prompted else "")
            + f": forward {forward:.4g} FLOPs, step {useful:.4g} ({useful / forward:.2f} forward)"
        )
    if workload.pack:
        console.print("(packed: counted as if no two of the longest examples shared a row)")
    for one in found:
        own, best = one["own"], one["best"]
        table = Table(box=None, pad_edge=False, header_style="")
        columns = ("layout", "verdict", "GiB a device", "FLOPs", "MB sent", "s a step", "MFU")
        for name in (own["slice"], *columns):
            table.add_column(name, no_wrap=name not in ("layout", "MB sent"))
        rows = [("gin file", own), *(("tried", report) for report in one["tried"])]
        for label, report in rows + [("best", best)] * (best is not None):
            table.add_row(label, *_row(report))
        console.print()
        console.print(table)
        if own.get("reason"):
            console.print(f"  gin file: {own['reason']}")
        elif "verdict" not in own and not quick:
            console.print("  GPUs are counted, not compiled for")
        if best:
            _show_settings(console, "best:", best)
            whole = [
                report
                for report in one["tried"]
                if report["verdict"] == "fits" and report["settings"]["QUANTIZE"] is None
            ]
            if whole and best["settings"]["QUANTIZE"]:
                _show_settings(console, "without rounding the kernels to int8:", whole[0])
        elif one["tried"]:
            console.print("nothing that was tried fits: more devices, or a smaller batch")
    console.print("\ns a step: estimated from published rates, all at once - nothing sent unseen")


def _show_settings(console: Any, title: str, report: Report) -> None:
    console.print(title)
    for name, value in report["settings"].items():
        console.print(f"  {name} = {value!r}")


def _row(report: Report) -> tuple[str, ...]:
    if "flops" not in report:
        return "", report["verdict"]
    from ptjax.planning import Layout

    usable = report["usable_bytes"] / 2**30
    held = report.get("peak_bytes") or sum(report["bytes_per_device"].values())
    least_known = "" if "peak_bytes" in report else "> "
    sent: dict[str, int] = {}
    for one in report.get("collectives", ()):
        axes = " x ".join(one["axes"])
        sent[axes] = sent.get(axes, 0) + one["bytes"]
    low, high = report["estimate"]["low"], report["estimate"]["high"]
    least, most = report["estimate"]["utilisation"]
    return (
        str(Layout(**_fields(report["settings"]))),
        report.get("verdict", "counted"),
        f"{least_known}{held / 2**30:.2f} of {usable:.2f}",
        f"{report['flops']['executed']:.3g}",
        ", ".join(f"{size / 1e6:,.1f} {axes}" for axes, size in sent.items()),
        f"{low:.3g} - {high:.3g}" if high else f"> {low:.3g}",
        f"{least:.0%} - {most:.0%}" if high else f"< {most:.0%}",
    )


if __name__ == "__main__":
    main()
