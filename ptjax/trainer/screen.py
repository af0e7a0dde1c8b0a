"""How a run looks while it trains: a bar on a terminal, a cell's output, or plain lines."""

from __future__ import annotations

import dataclasses
import html
import importlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from absl import logging
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

SILENCE = 10.0
"""Seconds after which plain lines say how far the run is, though nothing was measured."""
_REFRESH = 0.5
"""Seconds between two pictures of a notebook's output."""
_ROWS = 12
"""The number of evaluations that are shown; the best one is shown too."""


@dataclasses.dataclass
class ShownProgress:
    """What there is to show of a run.

    Attributes:
        steps: the step at which the run ends.
        step: the step that it has reached.
        latest: the newest value of each number, by name.
        rows: of each evaluation the step, the loss and the metrics, by column.
        best: the index in `rows` of the best evaluation; None if nothing selects.
    """

    steps: int
    step: int = 0
    latest: dict[str, float] = dataclasses.field(default_factory=dict)
    rows: list[dict[str, float]] = dataclasses.field(default_factory=list)
    best: int | None = None

    def add_evaluation(self, step: int, metrics: Mapping[str, float], selects: str | None) -> bool:
        """Adds a row; returns whether it is the best so far.

        Args:
            selects: the name of the metric whose highest value is the best.
        """
        loss = {"loss": self.latest["loss"]} if "loss" in self.latest else {}
        self.rows.append({"step": step, **loss, **metrics})
        if selects is None or selects not in metrics:
            return False
        if self.best is None or metrics[selects] > self.rows[self.best][selects]:
            self.best = len(self.rows) - 1
        return self.best == len(self.rows) - 1

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(the names of the columns, the cells of the newest rows and of the best one)."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        newest = range(max(0, len(self.rows) - _ROWS), len(self.rows))
        chosen = sorted({*newest} if self.best is None else {self.best, *newest})
        cells = [
            [*(_number(self.rows[i].get(name)) for name in names), "best" * (i == self.best)]
            for i in chosen
        ]
        return [*names, ""], cells


class View(Protocol):
    """Shows a run. Its methods are called after what they show has changed."""

    def start(self) -> None: ...
    def step(self) -> None: ...
    def logged(self, fresh: Mapping[str, float]) -> None: ...
    def evaluated(self, fresh: Mapping[str, float], is_best: bool) -> None: ...
    def stop(self) -> None: ...


def choose_view(run: ShownProgress) -> View:
    """The view that fits where this process writes to."""
    if (display := notebook_display()) is not None:
        return Notebook(run, display)
    # A dumb terminal cannot draw over what it shows: the bar would appear at the end alone.
    draws = sys.stderr.isatty() and not Console(stderr=True).is_dumb_terminal
    return Terminal(run) if draws else Lines(run)


def notebook_display() -> Callable[[object], Any] | None:
    """A function that shows an object in a notebook's cell, and returns what updates it."""
    get = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)
    if getattr(get(), "kernel", None) is None:
        return None
    display = importlib.import_module("IPython.display").display
    return lambda shown: display(shown, display_id=True)


class _Clock:
    """Measures the steps from the second one on: the first waits for what was prepared."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def tick(self, step: int) -> None:
        """To be called after each step."""
        self._first = self._first or (step, time.perf_counter())

    def left(self, run: ShownProgress) -> str:
        """How long the rest takes, in words; "" if that is not known, or nothing is left."""
        if self._first is None or not self._first[0] < run.step < run.steps:
            return ""
        step, began = self._first
        seconds = time.perf_counter() - began
        return _duration((run.steps - run.step) * seconds / (run.step - step))


class Lines:
    """A line of the log for everything measured, and one after `SILENCE` seconds without any."""

    def __init__(self, run: ShownProgress) -> None:
        self._run, self._clock = run, _Clock()

    def start(self) -> None:
        self._said = time.perf_counter()

    def step(self) -> None:
        """Says how far the run is if nothing was said for a while."""
        self._clock.tick(self._run.step)
        if time.perf_counter() - self._said >= SILENCE:
            left = self._clock.left(self._run)
            self._say("step %d/%d%s", self._run.step, self._run.steps, left and f"  {left} left")

    def logged(self, fresh: Mapping[str, float]) -> None:
        self._say("step %d/%d  %s", self._run.step, self._run.steps, _text(fresh))

    def evaluated(self, fresh: Mapping[str, float], is_best: bool) -> None:
        mark = "  (best so far)" if is_best else ""
        self._say("step %d/%d  %s%s", self._run.step, self._run.steps, _text(fresh), mark)

    def stop(self) -> None:
        pass

    def _say(self, message: str, *arguments: object) -> None:
        logging.info(message, *arguments)
        self._said = time.perf_counter()


class Terminal:
    """The table of evaluations, and below it the bar, on standard error."""

    def __init__(self, run: ShownProgress) -> None:
        self._run = run
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
            console=self._console,
        )
        self._live = Live(self._bar, console=self._console, vertical_overflow="visible")

    def start(self) -> None:
        run = self._run
        self._task = self._bar.add_task("train", total=run.steps, completed=run.step, shown="")
        self._live.update(self._picture())
        self._live.start()

    def step(self) -> None:
        self._bar.update(self._task, completed=self._run.step)

    def logged(self, fresh: Mapping[str, float]) -> None:
        del fresh
        self._bar.update(self._task, completed=self._run.step, shown=_text(self._run.latest))

    def evaluated(self, fresh: Mapping[str, float], is_best: bool) -> None:
        del is_best
        self.logged(fresh)
        self._live.update(self._picture())

    def stop(self) -> None:
        self._live.stop()

    def _picture(self) -> Group | Progress:
        if not self._run.rows:
            return self._bar
        names, rows = self._run.table()
        table = Table(*names, box=None)
        for row in rows:
            table.add_row(*row, style="bold" if row[-1] else None)
        return Group(table, self._bar)


class Notebook:
    """The bar and the table of evaluations in the output of a notebook's cell.

    Args:
        display: shows an object and returns what updates it (`notebook_display`).
    """

    def __init__(self, run: ShownProgress, display: Callable[[object], Any]) -> None:
        self._run, self._display = run, display
        self._clock, self._drawn = _Clock(), 0.0
        self._handle: Any = None

    def start(self) -> None:
        self._draw()

    def step(self) -> None:
        self._clock.tick(self._run.step)
        if time.perf_counter() - self._drawn >= _REFRESH:
            self._draw()

    def logged(self, fresh: Mapping[str, float]) -> None:
        del fresh
        self._draw()

    def evaluated(self, fresh: Mapping[str, float], is_best: bool) -> None:
        del fresh, is_best
        self._draw()

    def stop(self) -> None:
        self._draw()

    def _draw(self) -> None:
        self._drawn = time.perf_counter()
        picture = Picture(self._run, self._status())
        if self._handle is None:
            self._handle = self._display(picture)
        else:
            self._handle.update(picture)

    def _status(self) -> str:
        run, left = self._run, self._clock.left(self._run)
        status = f"step {run.step}/{run.steps}{left and f', {left} left'}"
        return f"{status}  {_text(run.latest)}".rstrip()


class Picture:
    """What a notebook shows of a run at one time, as HTML and, for other readers, as text."""

    def __init__(self, run: ShownProgress, status: str) -> None:
        self._status, self._share = status, run.step / run.steps
        self._names, self._rows = run.table() if run.rows else ([], [])

    def _repr_html_(self) -> str:
        bar = f'<progress value="{self._share:.4f}" max="1" style="width: 20em"></progress>'
        text = f"<div>{bar} {html.escape(self._status)}</div>"
        if not self._rows:
            return text
        heads = "".join(f"<th>{html.escape(name)}</th>" for name in self._names)
        rows = "".join(f"<tr>{_cells(row)}</tr>" for row in self._rows)
        return f"{text}<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"

    def __repr__(self) -> str:
        lines = [self._names, *self._rows] if self._rows else []
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([*texts, self._status])


def _cells(row: Sequence[str]) -> str:
    kind = "b" if row[-1] else "span"
    return "".join(f"<td><{kind}>{html.escape(cell)}</{kind}></td>" for cell in row)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    """ "12 s", "3 min" or "2.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _text(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
