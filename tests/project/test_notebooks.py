"""The notebooks of examples/: their cells run, and the outputs are of these cells."""

from __future__ import annotations

import ast
import inspect
import operator
import sys
import types
from pathlib import Path
from typing import Any

import nbformat
import notebooks
import pytest
from IPython.core.inputtransformer2 import TransformerManager

import ptjax
from ptjax.interop.prompt_file import PromptFile

PATHS = sorted(notebooks.EXAMPLES.glob("*.ipynb"))
COLAB = notebooks.EXAMPLES / "colab.ipynb"
OBJECTS = {"ptjax": ptjax, "run": ptjax.Run, "run.prompt": PromptFile}
"""What an expression of a cell stands for, where calls of its attributes are looked up."""
MOST_BYTES = 300_000


def codes(notebook: Any) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def calls(source: str) -> list[tuple[Any, ast.Call]]:
    """(what is called, the call) of each call that begins with a name of `OBJECTS`."""
    found = []
    for call in ast.walk(ast.parse(TransformerManager().transform_cell(source))):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        owner, _, rest = ast.unparse(call.func).rpartition(".")
        if owner.startswith("ptjax."):  # ptjax.Task.from_records
            owner, rest = "ptjax", f"{owner.removeprefix('ptjax.')}.{rest}"
        if owner in OBJECTS:
            found.append((operator.attrgetter(rest)(OBJECTS[owner]), call))
    return found


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_every_name_and_argument_of_ptjax_exists(path):
    sources = codes(nbformat.read(path, as_version=4))
    commented = [source.removeprefix("# ") for source in sources if source.startswith("# run.")]
    found = [pair for source in sources + commented for pair in calls(source)]
    assert any(called is PromptFile.push_to_hub for called, _ in found)
    for called, call in found:
        is_method = called.__qualname__.startswith("PromptFile.") or called is ptjax.Run.report
        arguments = [None] * (len(call.args) + is_method)
        keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
        inspect.signature(called).bind(*arguments, **keywords)


def test_a_name_or_argument_that_does_not_exist_fails():
    with pytest.raises(AttributeError):
        calls("ptjax.tunes(1)")
    ((called, call),) = calls("ptjax.tune(a, b, c, step=3)")
    with pytest.raises(TypeError, match="step"):
        inspect.signature(called).bind(*call.args, **{call.keywords[0].arg or "": 3})


@pytest.mark.parametrize(
    "path",
    [notebooks.QUICKSTART, pytest.param(COLAB, marks=pytest.mark.slow)],
    ids=lambda path: path.name,
)
def test_the_cells_run_on_a_random_backbone(path, backbone, tmp_path, monkeypatch):
    """In this process; what a cell needs from the network has a stand-in."""
    monkeypatch.chdir(tmp_path)
    rows = [{"sentence": f"a film of {i} words", "label": ("negative", "positive")[i % 2]}
            for i in range(100)]  # fmt: skip
    hub = types.SimpleNamespace(load_dataset=lambda _: {"train": rows, "validation": rows[:8]})
    monkeypatch.setitem(sys.modules, "datasets", hub)  # pyright: ignore[reportArgumentType]
    notebook = nbformat.read(path, as_version=4)
    small = {"STEPS": 2} | ({"BACKBONE": backbone.name} if path == COLAB else {})
    notebooks.set_parameters(notebook, small)
    names: dict[str, Any] = {}
    for source in codes(notebook):
        if not source.startswith("%pip"):
            source = source.replace('"ptjax-nano"', repr(backbone.name))
            exec(compile(source, path.name, "exec"), names)
    assert names["run"].finished
    assert (names["prompt"].prompt == names["run"].prompt.prompt).all()


def test_the_outputs_are_those_of_one_whole_execution_and_hold_no_times():
    notebook = nbformat.read(notebooks.QUICKSTART, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]
    text = notebooks.QUICKSTART.read_text("utf-8")
    assert len(text.encode()) < MOST_BYTES
    for path in (
        str(notebooks.EXAMPLES.parent),
        "/home/",
        "/root/",
        "/tmp/",
        "/Users/",
        "site-packages",
    ):
        assert path not in text
    assert nbformat.writes(notebooks.without_times(notebook)) + "\n" == text


def test_the_notebook_that_was_not_executed_has_no_outputs_and_says_so():
    notebook = nbformat.read(COLAB, as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs")]
    assert "**Not run there.**" in notebook.cells[0].source


@pytest.mark.slow
def test_the_quickstart_runs_in_a_kernel(tmp_path):
    executed = notebooks.execute(notebooks.QUICKSTART, tmp_path, {"STEPS": 2})
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    shown = {cell.source.split("(")[0]: cell.outputs for cell in cells}
    assert any(
        "step 2/2" in o.get("data", {}).get("text/html", "") for o in shown["run = ptjax.tune"]
    )
    assert "<svg" in shown["report = run.report"][0].data["text/html"]
    assert "(20, 128) True" in cells[-1].outputs[-1].text
    assert Path(tmp_path, "tickets", "README.md").exists()
    timed = nbformat.writes(executed)
    clean = nbformat.writes(notebooks.without_times(executed))
    assert "examples_per_second" in timed and "examples_per_second" not in clean
    for name in ("<dt>duration</dt>", "<dt>examples/s</dt>"):
        assert name in timed and name not in clean
