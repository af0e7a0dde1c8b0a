"""`python -m ptjax.plan`: does a run fit a slice, what does a step cost, what is best there."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
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
        costs there, and which mesh, remat and dtype are best. Only the gin files are needed: no
        weights (models/*.gin has the sizes; else they are read from the checkpoint's headers), no
        data, no TPU.

        By default the train step is compiled for the slice by the TPU's own compiler (pip
        install 'ptjax[plan]'), in a process of its own, first as the gin file has it and then in
        the layouts that may be faster, until one fits (all with SCAN_LAYERS = True). --quick
        counts parameters, FLOPs and bytes in seconds, without a verdict. GPUs are only counted.

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
    from ptjax.scale.slices import ENVIRONMENT, parse_slice

    os.environ |= ENVIRONMENT
    names = [name.strip() for text in arguments.slice for name in text.split(",") if name.strip()]
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
    from ptjax.preparation import check_settings
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
    if method == "hard_prompt":
        raise InputError(f"method = {method!r} trains nothing; there is no step to plan")
    loaded = cli.settings(
        chosen.LOAD_BACKBONE, "path", "dtype", "mesh", "fsdp", "quantize",
        *_config_fields(),
    )  # fmt: skip
    bank = run.get("bank")
    sizes = {
        "prompt_length": run.get("prompt_length", 100),
        "batch_size": run.get("batch_size", 32),
    }
    microbatches, pack = run.get("microbatches", 1), run.get("pack", False)
    lengths = check_settings(
        method,
        **sizes,
        microbatches=microbatches,
        feature_lengths=run.get("feature_lengths"),
        quantize=loaded.get("quantize"),
        bank=bank,
    )
    if (buckets := run.get("buckets")) and not pack:
        lengths = {"inputs": max(t for t, _ in buckets), "targets": max(n for _, n in buckets)}
    row_length = run.get("row_length")
    check_at_least(1, "TASK_FEATURE_LENGTHS", **lengths)
    check_at_least(1, row_length=row_length)
    workload = Workload(
        _config(loaded),
        Recipe(
            method,
            run.get("optimizer") or Adafactor(),
            run.get("loss") or Loss(),
            microbatches,
            (run.get("prompt") or Prompt()).sees_input,
            bool(bank),
        ),
        **sizes,
        **lengths,
        pack=pack,
        row_length=row_length,
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
    from ptjax.backbone import check_dtypes, open_backbone, would_download
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
        again = compiler(planning.Layout(**_fields(best["settings"])), timed=True)
        best = again if again["verdict"] == "fits" else best
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
        self.known: dict[str, Report] = {}

    def __call__(self, layout: Layout, timed: bool = False) -> Report:
        """The answer for one layout: what is known of it, or a compilation."""
        jobs = [
            {"layout": layout.settings(), "exact": self.exact, "timed": with_time}
            for with_time in ((True,) if timed else (True, False))  # a timed answer has all of it
        ]
        keys = [self._key(job) for job in jobs]
        for key in keys:
            if key not in self.known and (found := self._read(key)):
                self.known[key] = found
            if key in self.known:
                return self.known[key]
        print(f"{self.where.name}: compiling {layout} ...", file=sys.stderr, flush=True)
        report = self._compile(layout, jobs[-1])
        self.known[keys[-1]] = report
        # A crash or a timeout may have been the machine's; it is tried again another time.
        if report["verdict"] not in (_CRASHED, _LATE):
            self._write(keys[-1], report)
        return report

    def _read(self, key: str) -> Report | None:
        try:
            return None if self.cache is None else json.loads((self.cache / key).read_text("utf-8"))
        except (OSError, ValueError):
            return None

    def _write(self, key: str, report: Report) -> None:
        if self.cache is None:
            return
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            atomic.write_bytes(self.cache / key, json.dumps(report).encode())
        except OSError as error:
            print(f"warning: answers are not kept: {error}", file=sys.stderr)
            self.cache = None

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
                    env=os.environ | {"JAX_TRACEBACK_FILTERING": "off"},
                    capture_output=True,
                    text=True,
                    timeout=self.timeout,
                )
            except subprocess.TimeoutExpired:
                counted = planning.count(self.workload, layout, self.where)
                return counted | {"verdict": _LATE, "reason": f"more than {self.timeout} s"}
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        counted = planning.count(self.workload, layout, self.where)
        if done.returncode == 2:
            said = done.stderr.strip().splitlines()[-1].removeprefix("error: ")
            return counted | {"verdict": "refused", "reason": said}
        return counted | {"verdict": _CRASHED, "reason": _reason(done)}

    def _key(self, job: Mapping[str, Any]) -> str:
        """Whatever an answer depends on: the run, the slice, the compiler and this program."""
        digest = hashlib.sha256()
        used = {"jax", "jaxlib", "flax", "optax", "libtpu", "libtpu-nightly"}
        versions = [f"{x.name} {x.version}" for x in importlib.metadata.distributions()
                    if x.name in used]  # fmt: skip
        flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
        for part in (self.gin, self.where.name, json.dumps(job), *sorted(versions), *flags):
            digest.update(part.encode() + b"\0")
        for source in sorted(Path(__file__).parent.rglob("*.py")):
            digest.update(source.read_bytes())
        return f"{digest.hexdigest()[:32]}.json"


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Why a compilation ended: its signal, and the line that tells most."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    telling = [x for x in lines if re.match(r"F\d{4} |.*(Check failed|Error|STACK OVERFLOW)", x)]
    last = (telling or lines or [""])[-1][:300]
    if done.returncode >= 0:
        return last
    killed = "; was this machine's memory enough?" if done.returncode == -9 else ""
    return f"signal {-done.returncode}{killed} {last}".strip()


def _compile(workload: Workload, where: Slice, job: Mapping[str, Any]) -> Report:
    from ptjax import planning

    layout = planning.Layout(**_fields(job["layout"]))
    return planning.compile_ahead(workload, layout, where, exact=job["exact"], timed=job["timed"])


def _show(workload: Workload, found: list[Report], quick: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    config, shape = workload.config, workload.shape()
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=140)
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
        elif own.get("verdict") == "fits":
            console.print("nothing else that may be faster fits")
        elif any(report["verdict"] == "tight" for report in one["tried"]):
            console.print("nothing fits with room to spare; what is tight may run")
        elif "flops" in own and not quick:
            console.print("nothing fits: more devices, a smaller batch, or shorter inputs")
    console.print(
        "\ns a step is an estimate from published rates: from all overlapping to no sending hidden"
    )


_BINDINGS = {"MESH": "mesh", "FSDP": "fsdp", "SCAN_LAYERS": "scan_layers", "REMAT": "remat",
             "QUANTIZE": "quantize"}  # fmt: skip


def _show_settings(console: Any, title: str, report: Report) -> None:
    """As lines of gin: macros where the files have them, else the arguments."""
    macros = all(map(cli.has_macro, report["settings"]))
    console.print(title)
    for name, value in report["settings"].items():
        bound = name if macros else f"backbone.load_backbone.{_BINDINGS[name]}"
        console.print(f"  {bound} = {value!r}")


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
