"""The lines of a run where there is no terminal, and its TensorBoard."""

import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath

import ptjax
from ptjax.trainer import screen
from ptjax.trainer.display import Display


def test_a_line_shows_what_was_just_measured_and_nothing_older(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="absl")
    display = Display(steps=4)
    display.on_start(epath.Path(tmp_path), 0)
    display.on_log(1, {"train/loss": 2.5, "train/gradient_norm": 7.0})
    display.on_evaluation(2, {"validation/loss": 0.25, "time/evaluation_seconds": 3.0})
    display.on_end(2)
    # Checkpoints of other tests may still be finishing, and say so.
    said = [message for message in caplog.messages if message.startswith("step ")]
    assert said == ["step 1/4  loss 2.5", "step 2/4  validation loss 0.25"]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_run_does_not_import_torch(tmp_path):
    """Which tensorboardX would for a type; afterwards torch can be imported as ever."""
    (tmp_path / "torch.py").write_text("imported = True\n")
    code = (
        "import sys\n"
        "from etils import epath\n"
        "from ptjax.trainer.display import Display\n"
        "Display(steps=4).on_start(epath.Path('run'), 0)\n"
        "assert 'torch' not in sys.modules\n"
        "import torch\n"
        "assert torch.imported\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(ptjax.__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": paths}
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def evaluated(display: Display, step: int, value: float) -> None:
    display.on_log(step, {"train/loss": 10.0 - step, "time/examples_per_second": 5.0})
    display.on_evaluation(step, {"validation/accuracy": value, "validation/accuracy/a": 0.5})


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if message.startswith("step ")]


def test_lines_mark_the_best_so_far_also_of_an_earlier_start(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="absl")
    rows = [{"step": 2, "validation/accuracy": 0.7}, {"step": 9, "validation/accuracy": 0.9}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + "{a damaged line\n")
    display = Display(8, "accuracy")
    display.on_start(epath.Path(tmp_path), 4)  # step 9 is trained again
    for step, value in ((5, 0.6), (6, 0.75), (7, 0.75)):
        display.on_evaluation(step, {"validation/accuracy": value})
    display.on_end(7)
    assert lines_of(caplog) == [
        "step 5/8  validation accuracy 0.6",
        "step 6/8  validation accuracy 0.75  (best so far)",
        "step 7/8  validation accuracy 0.75",  # the first of equal ones is kept
    ]


def test_lines_are_never_silent_for_long(tmp_path, caplog, monkeypatch):
    """60 steps without anything to log: a line as soon as `SILENCE` has passed."""
    caplog.set_level(logging.INFO, logger="absl")
    now = 0.0
    monkeypatch.setattr(screen.time, "perf_counter", lambda: now)
    display = Display(60)
    display.on_start(epath.Path(tmp_path), 0)
    for step in range(1, 61):
        now += 3.0
        display.on_step(step)
    display.on_end(60)
    said = lines_of(caplog)
    assert said[:2] == ["step 4/60  3 min left", "step 8/60  3 min left"]
    assert said[-1] == "step 60/60" and len(said) == 15


class Cell:
    """What a notebook shows: the newest picture."""

    def __init__(self, picture: object) -> None:
        self.pictures = [picture]

    def update(self, picture: object) -> None:
        self.pictures.append(picture)


def test_a_notebook_shows_the_table_as_it_grows(tmp_path, monkeypatch):
    cells: list[Cell] = []

    def display_in_cell(picture: object) -> Cell:
        cells.append(Cell(picture))
        return cells[-1]

    monkeypatch.setattr(screen, "notebook_display", lambda: display_in_cell)
    display = Display(8, "accuracy")
    display.on_start(epath.Path(tmp_path), 0)
    evaluated(display, 2, 0.75)
    evaluated(display, 4, 0.5)
    display.on_end(4)
    (cell,) = cells  # it is updated, not shown again and again
    assert len(cell.pictures) == 6
    assert repr(cell.pictures[0]) == "step 0/8"
    assert repr(cell.pictures[-1]).splitlines() == [
        "step  loss  validation accuracy",
        "   2     8                 0.75  best",
        "   4     6                  0.5",
        "step 4/8  loss 6  examples_per_second 5  validation accuracy 0.5",
    ]
    page = cell.pictures[-1]._repr_html_()  # pyright: ignore[reportAttributeAccessIssue]
    assert '<progress value="0.5000" max="1"' in page
    assert "<td><b>0.75</b></td><td><b>best</b></td>" in page
    assert "<td><span>0.5</span></td>" in page


def test_a_long_table_has_the_newest_rows_and_the_best(tmp_path):
    run = screen.ShownProgress(100)
    values = [0.5, 0.9, *(0.01 * n for n in range(30))]
    marked = [run.add_evaluation(n, {"a <b>": x}, "a <b>") for n, x in enumerate(values)]
    assert [n for n, is_best in enumerate(marked) if is_best] == [0, 1]
    names, rows = run.table()
    assert names == ["step", "a <b>", ""]
    assert rows[0] == ["1", "0.9", "best"] and rows[-1] == ["31", "0.29", ""]
    assert [row[0] for row in rows[1:]] == [str(n) for n in range(20, 32)]
    assert "<b>" not in screen.Picture(run, "").__repr__().replace("a <b>", "")
    assert "a &lt;b&gt;" in screen.Picture(run, "")._repr_html_()


def test_a_terminal_that_cannot_redraw_gets_lines(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    for name, kind in (("dumb", screen.Lines), ("xterm", screen.Terminal)):
        monkeypatch.setenv("TERM", name)
        assert isinstance(screen.choose_view(screen.ShownProgress(3)), kind)


def test_a_terminal_shows_the_table_above_the_bar(tmp_path, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    display = Display(8, "accuracy")
    display.on_start(epath.Path(tmp_path), 0)
    evaluated(display, 2, 0.75)
    evaluated(display, 4, 0.5)
    display.on_end(4)
    shown = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", terminal.getvalue())
    last = [line.split() for line in shown.splitlines() if line.strip()][-4:]
    assert last[0] == ["step", "loss", "validation", "accuracy"]
    assert last[1] == ["2", "8", "0.75", "best"] and last[2] == ["4", "6", "0.5"]
    assert last[3][:2] == ["step", "4/8"]
