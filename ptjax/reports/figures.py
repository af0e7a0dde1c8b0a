"""Draws the figures of a report with matplotlib, as inline SVG.

Figures take the colours of the page: matplotlib draws with the colours of `INK` and the others, and
`_themed` replaces each by a CSS variable of the same meaning (see `style.py`), so that one file
suits light and dark screens. The output is the same for the same input: no dates, fixed ids.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ptjax.errors import needs
from ptjax.files import JsonObject
from ptjax.reports.markup import escape, number, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, LINE, ACCENT = "#1b2433", "#5d6b82", "#dde3ec", "#3563e9"
ON_ACCENT = "#ffffff"
OTHERS = ("#e0792f", "#1f9d76", "#b24fc4", "#c2405a", "#8a7a1f", "#2b93b8", "#7a5cd6")
"""The colours of a second and further series; `OTHERS[0]` also marks the best step."""
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    ACCENT: "--accent",
    ON_ACCENT: "--on-accent",
    **{color: f"--series-{i}" for i, color in enumerate(OTHERS, 2)},
}
"""The CSS variable of each colour."""
NUMBERED_CLASSES = 14
"""A confusion matrix of at most this many labels shows its numbers."""
_BAR_NAME = 48
"""Characters of a name beside a bar."""
_SETTINGS: dict[Any, Any] = {  # matplotlib's own type of the names is not public
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # a `$` in a label is a dollar
    "text.usetex": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


class Series(NamedTuple):
    """Values by step, with the name that a legend shows."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]


Margins = tuple[float, float, float, float]
"""Space around the axes: left, bottom, right, top, in points."""
_MARGINS: Margins = (44, 36, 12, 10)


def _draw(
    label: str,
    paint: Callable[[Axes], None],
    size: tuple[float, float] = (340, 210),
    margins: Margins = _MARGINS,
) -> str:
    """An SVG element: what `paint` draws on axes in a figure of `size` points.

    Args:
        label: describes the figure to readers who cannot see it.
    """
    with needs("report", "a report"):
        import matplotlib
        from matplotlib.figure import Figure

    width, height = size
    left, bottom, right, top = margins
    stream = io.StringIO()
    # Of the glyphs of a text only the widths are used: the browser has its own fonts.
    with warnings.catch_warnings(), matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": label}):
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure = Figure(figsize=(width / 72, height / 72))
        axes = figure.add_axes(
            (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
        )
        axes.patch.set_visible(False)
        paint(axes)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    return _themed(stream.getvalue(), label, size)


def _themed(svg: str, label: str, size: tuple[float, float]) -> str:
    """The SVG as an element of a page: without its header, in the page's colours."""
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")
    # `currentcolor` and texts of the data are left alone: colours are only replaced in styles.
    body = re.sub(
        r'style="[^"]*"',
        lambda match: re.sub(
            "#[0-9a-f]{6}",
            lambda color: f"var({VARIABLES[color[0]]})" if color[0] in VARIABLES else color[0],
            match[0],
        ),
        body,
    )
    body = re.sub(r"\s*\n\s*", "\n", body)
    width, height = size
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}" '
        f'style="max-width: {1.3 * width:g}px">{body}'
    )


def curves(
    label: str,
    series: Sequence[Series],
    best: tuple[int, float] | None = None,
    *,
    from_zero: bool = False,
) -> str:
    """Draws values by step.

    Args:
        label: the name of the values.
        series: at most 8 curves; with more than one, a legend names them.
        best: the step and value to mark.
        from_zero: whether the axis of the values, which are positive, begins at 0.
    """

    def paint(axes: Axes) -> None:
        for line, color in zip(series, (ACCENT, *OTHERS), strict=False):
            few = "o" if len(line.steps) < 3 else ""
            axes.plot(
                line.steps,
                line.values,
                few + "-",
                color=color,
                linewidth=1.8,
                markersize=4,
                label=shorten(line.name, 24),
            )
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.03, y=0.12)
        if from_zero:
            axes.set_ylim(0, 1.15 * max(max(line.values) for line in series) or 1)
        _few_ticks(axes)
        axes.set_xlabel("step")
        if best is not None:
            _mark(axes, *best)
        if len(series) > 1:
            axes.legend(fontsize=8, frameon=False, labelcolor=INK)

    return _draw(label, paint)


def _few_ticks(axes: Axes) -> None:
    with needs("report", "a report"):
        from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def _mark(axes: Axes, step: int, value: float) -> None:
    """A dot at the best step, with its value beside it, inside the axes."""
    color = OTHERS[0]
    axes.plot([step], [value], "o", color=color, markersize=6, zorder=5)
    low, high = axes.get_xlim()
    side = "right" if step > (low + high) / 2 else "left"
    axes.annotate(
        f"best {number(value)}",
        (step, value),
        xytext=(-7 if side == "right" else 7, 4),
        textcoords="offset points",
        ha=side,
        va="bottom",
        color=color,
        fontsize=10,
        fontweight="bold",
    )


def bars(label: str, values: Mapping[str, float], first: str) -> str:
    """Draws a horizontal bar for each value, with its name and number.

    Args:
        label: what the values are.
        values: by name, from the top.
        first: the name of the bar in the accent colour; the others are grey.
    """
    names = list(values)
    lowest, highest = min(0.0, *values.values()), max(values.values())

    def paint(axes: Axes) -> None:
        places = range(len(names))
        colors = [ACCENT if name == first else MUTED for name in names]
        for place, name, color in zip(places, names, colors, strict=True):
            alpha = 1.0 if name == first else 0.45
            axes.barh(place, values[name], 0.62, color=color, alpha=alpha, linewidth=0)
            axes.annotate(
                number(values[name]),
                (max(values[name], 0), place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontweight="bold" if name == first else "normal",
            )
        axes.set_yticks(places, [shorten(name, _BAR_NAME) for name in names])
        for tick, name in zip(axes.get_yticklabels(), names, strict=True):
            tick.set_color(INK if name == first else MUTED)
        axes.invert_yaxis()
        axes.set_xlim(lowest, max(highest * 1.16, 1e-6))
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)

    left = 20 + _width(names, _BAR_NAME)
    return _draw(label, paint, (760, 26 * len(names) + 8), (left, 4, 6, 4))


def _width(texts: Sequence[str], longest: int) -> float:
    """About the width in points of the longest of the shortened texts."""
    return 6.1 * max(len(shorten(text, longest)) for text in texts)


def confusion(label: str, matrix: JsonObject) -> str:
    """Draws a confusion matrix: each row is a target, shaded by its shares of predictions."""
    counts = np.array(matrix["counts"], float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows, columns = matrix["rows"], matrix["columns"]
    numbered = len(rows) <= NUMBERED_CLASSES
    side = min(max(300 // len(columns), 46), 96) if numbered else max(560 // len(columns), 12)
    longest = 18

    def paint(axes: Axes) -> None:
        with needs("report", "a report"):
            from matplotlib.patches import Rectangle

        if not numbered:  # there may be thousands of empty cells
            frame = (len(columns), len(rows))
            axes.add_patch(Rectangle((-0.5, -0.5), *frame, facecolor=ACCENT, alpha=0.06, lw=0))
        for (row, column), share in np.ndenumerate(shares):
            if share == 0 and not numbered:
                continue
            corner = (column - 0.47, row - 0.47)
            alpha = 0.06 + 0.94 * float(share)
            axes.add_patch(Rectangle(corner, 0.94, 0.94, facecolor=ACCENT, alpha=alpha, lw=0))
            if numbered:
                axes.text(
                    column,
                    row,
                    f"{counts[row, column]:.0f}",
                    ha="center",
                    va="center",
                    color=ON_ACCENT if share > 0.5 else INK,
                    fontweight="bold" if row == column else "normal",
                )
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [shorten(name, longest) for name in rows])
        slanted = _width(columns, longest) > side * 1.05
        axes.set_xticks(
            range(len(columns)),
            [shorten(name, longest) for name in columns],
            rotation=40 if slanted else 0,
            ha="right" if slanted else "center",
            rotation_mode="anchor",
        )
        axes.set_xlabel("predicted")
        axes.set_ylabel("expected")
        for spine in axes.spines.values():
            spine.set_visible(False)

    wide = _width(columns, longest)
    below = 0.7 * wide + 32 if wide > side * 1.05 else 40
    left = 30 + _width(rows, longest)
    size = (left + side * len(columns) + 24, below + side * len(rows) + 6)
    return _draw(label, paint, size, (left, below, 24, 6))


def reliability(label: str, calibration: JsonObject) -> str:
    """Draws the share of right predictions against their probability, and the bins' sizes."""
    bins = calibration["bins"]
    total = sum(each["count"] for each in bins)

    def paint(axes: Axes) -> None:
        for each in bins:
            share = each["count"] / total
            low, width = each["low"], each["high"] - each["low"]
            axes.bar(low, 0.25 * share, width, color=MUTED, alpha=0.28, align="edge", linewidth=0)
        axes.plot([0, 1], [0, 1], "--", color=MUTED, linewidth=1)
        x, y = ([each[name] for each in bins] for name in ("confidence", "accuracy"))
        axes.plot(x, y, "o-", color=ACCENT, linewidth=1.8, markersize=5)
        axes.grid(axis="both")
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(0, 1.04)
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.set_xlabel("probability of the prediction")
        axes.set_ylabel("share that is right")
        axes.spines["left"].set_visible(False)

    return _draw(label, paint, (340, 290), (44, 38, 12, 8))
