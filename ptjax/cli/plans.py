"""Prints plans: a table for each slice, and the best settings as lines of a gin file."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ptjax.cli.gin_macros import has_macro
from ptjax.planning.estimate import Report
from ptjax.planning.workload import ParallelConfig, StepSpec

_COLUMNS = (
    "layout", "verdict", "GiB a device", "FLOPs", "MB sent", "s a step", "examples/s", "MFU"
)  # fmt: skip


def show_run(spec: StepSpec, counted: Report | None) -> None:
    """Prints the run that is planned: the network, the trainable parameters, the FLOPs of a step.

    Args:
        counted: a report for one of the slices; None if the run is impossible on all of them.
    """
    config, shape = spec.config, spec.shape()
    console, method = _console(), spec.method
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


def show_slice(plan: Report) -> None:
    """Prints the plan for one slice: a table of layouts, and the best settings.

    Args:
        plan: the result of `ptjax.plan.plan_slice`.
    """
    own, tried, best = plan["own"], plan["tried"], plan["best"]
    console = _console()
    table = Table(box=None, pad_edge=False, header_style="")
    for name in (plan["slice"], *_COLUMNS):
        table.add_column(name, no_wrap=name not in ("layout", "MB sent"))
    rows = [("gin file", own), *(("tried", report) for report in tried)]
    for label, report in rows + [("best", best)] * (best is not None):
        table.add_row(label, *_row(report))
    console.print()
    console.print(table)
    reasons = set[str]()
    for label, report in rows:
        reason = report.get("reason")
        if reason and reason not in reasons:  # on a slice that is too small, many share one
            reasons.add(reason)
            console.print(f"  {label if report is own else _row(report)[0]}: {reason}")
    if best:
        _show_settings(console, "best:", best)
        # The highest precision is tried first.
        fitting = [report for report in tried if report["verdict"] == "fits"]
        if fitting and _rounding(fitting[0]) != _rounding(best):
            _show_settings(console, "rounding the weights less:", fitting[0])
    elif plan["searched"]:
        verdicts = {report.get("verdict") for _, report in rows}
        if "fits" in verdicts:
            console.print("nothing else that may be faster fits")
        elif "tight" in verdicts:
            console.print("nothing fits with room to spare; a tight configuration may run")
        elif verdicts <= {"does not fit", "refused"}:
            console.print("nothing fits: more devices, a smaller batch, or shorter inputs")


def _console() -> Console:
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=140)


def _rounding(report: Report) -> tuple[str, str | None]:
    return report["dtype"], report["settings"]["QUANTIZE"]


def _show_settings(console: Console, title: str, report: Report) -> None:
    """Prints settings as lines of gin: macros that the gin files have, else arguments."""
    console.print(title)
    for name, value in report["settings"].items():
        bound = name if has_macro(name) else f"ptjax.load_backbone.{name.lower()}"
        if name != "dtype" or value is not None:  # None keeps the dtype of the gin file
            console.print(f"  {bound} = {value!r}")


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
