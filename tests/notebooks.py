"""Executes the notebook of examples/ and writes its outputs into it (`make notebooks`).

What differs at every execution, such as times, is left out of the outputs, so that a change of them
means something.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbclient
import nbformat

EXAMPLES = Path(__file__).parents[1] / "examples"
QUICKSTART = EXAMPLES / "quickstart.ipynb"

_TIMED_LINE = re.compile(r".*( in \d[\d.]* s\b|examples_per_second).*\n")
_TIMES = (
    (re.compile(r", \d[\d.]* (s|min|h) left"), ""),
    (re.compile(r" +examples_per_second [\d.e+]+"), ""),
    (re.compile(r"<dt>(duration|examples/s)</dt>\s*<dd>[^<]*</dd>"), ""),
)
_KEPT = ("text/html", "text/markdown", "text/plain")


def set_parameters(notebook: Any, parameters: Mapping[str, object]) -> None:
    """Gives names in the cell with the tag "parameters" other values."""
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    for name, value in parameters.items():
        cell.source, changed = re.subn(
            rf"^{name} = .*$", f"{name} = {value!r}", cell.source, flags=re.MULTILINE
        )
        assert changed == 1, name


def execute(path: Path, folder: Path, parameters: Mapping[str, object] | None = None) -> Any:
    """Executes a notebook in `folder` by a kernel of its own; returns it with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    set_parameters(notebook, parameters or {})
    client = nbclient.NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    return notebook


def without_times(notebook: Any) -> Any:
    """The notebook without what differs at every execution."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [_clean(output) for output in _joined(cell.outputs)]
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def _joined(outputs: list[Any]) -> list[Any]:
    """The outputs with adjacent texts of one stream as one, however the kernel cut them."""
    joined: list[Any] = []
    for output in outputs:
        last: Any = joined[-1] if joined else {}
        if output.output_type == "stream" and last.get("name") == output.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def _clean(output: Any) -> Any:
    if output.output_type == "stream":
        output.text = _TIMED_LINE.sub("", output.text)
    for kind, text in output.get("data", {}).items():
        assert kind in _KEPT, kind
        for pattern, replacement in _TIMES:
            text = pattern.sub(replacement, text)
        output.data[kind] = text
    return output


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        executed = without_times(execute(QUICKSTART, Path(place)))
    nbformat.write(executed, QUICKSTART)
