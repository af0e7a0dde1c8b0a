"""Prints plans: a table for each slice, and the best settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import IO

from rich.console import Console
from rich.table import Table

from ptjax.files import Metadata
from ptjax.planning.estimate import Report
from ptjax.planning.workload import ParallelConfig, StepSpec

_COLUMNS = (
    "layout", "verdict", "GiB a device", "FLOPs", "MB sent", "s a step", "examples/s", "MFU"
)  # fmt: skip


SettingLines = Callable[[Metadata], Sequence[str]]
"""Makes the lines that set a configuration, from the result of `ParallelConfig.settings`."""


def as_arguments(settings: Metadata) -> list[str]:
    """Returns the calls that set a configuration.

    >>> as_arguments({"MESH": "8x1", "FSDP": False, "dtype": None, "MICROBATCHES": 2})
    ["ptjax.load_backbone(..., mesh='8x1', fsdp=False)", 'ptjax.Batching(..., microbatches=2)']
    """
    given = {name.lower(): value for name, value in settings.items()}
    if given.get("dtype", "") is None:  # that of the run
        del given["dtype"]
    microbatches = given.pop("microbatches", None) or 1
    listed = "".join(f", {name}={value!r}" for name, value in given.items())
    parts = [f"ptjax.Batching(..., microbatches={microbatches})"] * (microbatches > 1)
    return [f"ptjax.load_backbone(...{listed})", *parts]


def show_run(console: Console, spec: StepSpec, counted: Report | None) -> None:
    """Prints the run that is planned: the network, the trainable parameters, the FLOPs of a step.

    Args:
        spec: the run's network, method and batch.
        counted: the report of any configuration that was not refused; its counts of parameters and
            FLOPs are printed. None omits them.
    """
    config, shape = spec.config, spec.shape()
    method = spec.method
    layers = f"{config.num_encoder_layers}+{config.num_decoder_layers} layers"
    console.print(f"T5 of {layers}, D = {config.emb_dim}, {config.dtype}; {method.name}")
    if counted:
        share = 100 * counted["trainable"] / counted["parameters"]
        console.print(
            f"{counted['parameters']:,} parameters, {counted['trainable']:,} train ({share:.4f}%)"
        )
        forward, useful = counted["flops"]["forward"], counted["flops"]["useful"]
        prompt = method.variable_shapes(config).get("prompt")
        prompts = f", prompts of {prompt['prompt'].shape[0]}" if prompt else ""
        console.print(
            f"a step of {shape}{prompts}: forward {forward:.4g} FLOPs, step {useful:.4g} "
            f"({useful / forward:.2f} forward)"
        )
    if spec.pack:
        console.print("(packed: counted as if no two of the longest examples shared a row)")
    console.print("s a step: estimates from published rates, from all overlapping to none hidden")


def show_slice(
    console: Console,
    plan: Report,
    *,
    own: str = "own",
    setting_lines: SettingLines = as_arguments,
) -> None:
    """Prints the plan for one slice of devices: a table of configurations, and the best settings.

    The rows of the table are the run's own configuration, those that were tried, and the best.

    Args:
        plan: the result of `planning.plan.plan_slice`.
        own: the label of the run's own configuration.
        setting_lines: how the best settings are written.
    """
    first, tried, best = plan["own"], plan["tried"], plan["best"]
    table = Table(box=None, pad_edge=False, header_style="")
    for name in (plan["slice"], *_COLUMNS):
        table.add_column(name, no_wrap=name not in ("layout", "MB sent"))
    rows = [(own, first), *(("tried", report) for report in tried)]
    for label, report in rows + [("best", best)] * (best is not None):
        table.add_row(label, *_row(report))
    console.print()
    console.print(table)
    reasons = set[str]()
    for label, report in rows:
        reason = report.get("reason")
        if reason and reason not in reasons:  # on a slice that is too small, many share one
            reasons.add(reason)
            console.print(f"  {label if report is first else _row(report)[0]}: {reason}")
    if best:
        _show_settings(console, "best:", best, setting_lines)
        # The highest precision is tried first, and of each the fastest last.
        fitting = [report for report in tried if report["verdict"] == "fits"]
        highest = [report for report in fitting if _rounding(report) == _rounding(fitting[0])]
        if highest and _rounding(highest[0]) != _rounding(best):
            _show_settings(console, "rounding the weights less:", highest[-1], setting_lines)
    elif plan["searched"]:
        verdicts = {report.get("verdict") for _, report in rows}
        if "fits" in verdicts:
            console.print("nothing else that may be faster fits")
        elif "tight" in verdicts:
            console.print("nothing fits with room to spare; a tight configuration may run")
        elif verdicts <= {"does not fit", "refused"}:
            console.print("nothing fits: more devices, a smaller batch, or shorter inputs")


def make_console(file: IO[str] | None = None) -> Console:
    """Makes the console to show plans on: standard output, or a file; 140 columns, or a terminal's.

    Args:
        file: None means standard output.
    """
    console = Console(file=file, highlight=False, markup=False)
    if console.is_terminal:
        return console
    return Console(file=file, highlight=False, markup=False, width=140)


def _rounding(report: Report) -> tuple[str, str | None]:
    return report["dtype"], report["settings"]["QUANTIZE"]


def _show_settings(
    console: Console, title: str, report: Report, setting_lines: SettingLines
) -> None:
    console.print(title)
    # Attention is not searched: what a gin file says of it, or 'auto', is as good elsewhere.
    settings = {k: value for k, value in report["settings"].items() if k != "ATTENTION"}
    for line in setting_lines(settings):
        console.print(f"  {line}")


def _row(report: Report) -> tuple[str, ...]:
    if "flops" not in report:
        return "", report["verdict"]
    usable = report["usable_bytes"] / 2**30
    peak = report.get("peak_bytes") or sum(report["bytes_per_device"].values())
    bound = "" if "peak_bytes" in report else "> "  # counted: a lower bound
    sent: dict[str, int] = {}
    for collective in report.get("collectives", ()):
        axes = " x ".join(collective["axes"])
        sent[axes] = sent.get(axes, 0) + collective["bytes"]
    low, high = report["estimate"]["low"], report["estimate"]["high"]
    least, most = report["estimate"]["utilisation"]
    examples = report["examples"]
    return (
        str(ParallelConfig.from_settings(report["settings"])),
        report.get("verdict", "counted"),
        f"{bound}{peak / 2**30:.2f} of {usable:.2f}",
        f"{report['flops']['executed']:.3g}",
        ", ".join(f"{size / 1e6:,.1f} {axes}" for axes, size in sent.items()),
        f"{low:.3g} - {high:.3g}" if high else f"> {low:.3g}",
        f"{examples / high:,.0f} - {examples / low:,.0f}" if high else f"< {examples / low:,.0f}",
        f"{least:.0%} - {most:.0%}" if high else f"< {most:.0%}",
    )
