"""The layout holds: imports go down, Flax and gin stay where they belong, files stay small."""

from __future__ import annotations

import ast
import functools
import graphlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ptjax

PACKAGE = Path(ptjax.__file__).parent

# From the data to the commands; a module imports from its own room and from those before it.
ROOMS = (
    "errors",
    "atomic",
    "untrusted",
    "data",
    "models",
    "training",
    "scale",
    "interop",
    "fingerprint",
    "backbone",
    "prompting",
    "answering",
    "inference",
    "ensembling",
    "evaluation",
    "prediction",
    "inspection",
    "checkpoint",
    "display",
    "exports",
    "members",
    "loop",
    "bank",
    "preparation",
    "results",
    "tuning",
    "pretraining",
    "planning",
    "compiling",
    "searching",
    "cli",
)
COMMANDS = {"train", "evaluate", "infer", "inspect", "export", "pretrain", "launch", "plan"}
MAX_LINES = 450


@functools.cache
def modules() -> dict[str, Path]:
    """Dotted name (without "ptjax.") -> file, of everything but the package's own `__init__`."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        *parents, name = file.relative_to(PACKAGE).with_suffix("").parts
        parts = parents if name == "__init__" else [*parents, name]
        if parts:
            found[".".join(parts)] = file
    return found


@functools.cache
def imports(file: Path) -> tuple[str, ...]:
    """Every name that a file imports, wherever it does: "a.b.c" for `from a.b import c`."""
    names = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(names)


def own_imports(file: Path) -> Iterator[str]:
    """The modules of ptjax among them."""
    for name in imports(file):
        if name.startswith("ptjax."):
            parts = name.split(".")[1:]
            known = [".".join(parts[:n]) for n in (len(parts), len(parts) - 1)]
            yield from [module for module in known if module in modules()][:1]


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_module_has_a_room() -> None:
    assert len(modules()) > 20
    homeless = {room(module) for module in modules()} - set(ROOMS) - COMMANDS
    assert not homeless, f"say in ROOMS where {sorted(homeless)} belong in the flow"


def test_imports_go_down_the_flow() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, file in modules().items()
        if room(module) in ROOMS
        for imported in own_imports(file)
        if room(imported) not in ROOMS[: ROOMS.index(room(module)) + 1]
    ]
    assert not wrong


def test_nobody_imports_a_command() -> None:
    importers = [
        f"{module} imports {imported}"
        for module, file in modules().items()
        for imported in own_imports(file)
        if room(imported) in COMMANDS
    ]
    assert not importers


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {module: set(own_imports(file)) - {module} for module, file in modules().items()}
    assert sum(map(len, graph.values())) > 40
    list(graphlib.TopologicalSorter(graph).static_order())


def users_of(library: str) -> dict[str, set[str]]:
    """Module -> the names it imports from `library`."""
    found = {
        module: {name for name in imports(file) if name.split(".")[0] == library}
        for module, file in modules().items()
    }
    return {module: names for module, names in found.items() if names}


def test_flax_stays_in_the_models() -> None:
    users = users_of("flax")
    assert "models.t5" in users
    outside = {module: names for module, names in users.items() if room(module) != "models"}
    for module, names in outside.items():
        assert module == "untrusted", f"{module} imports {names}"
        assert all(name.startswith("flax.serialization") for name in names), names


def test_gin_stays_in_the_command_layer() -> None:
    users = {room(module) for module in users_of("gin")}
    assert "cli" in users
    assert users <= {"cli"} | COMMANDS


def test_neither_torch_nor_tensorflow_is_imported_anywhere() -> None:
    for library in ("torch", "tensorflow"):
        assert not users_of(library)


def test_importing_ptjax_imports_nothing_heavy() -> None:
    heavy = ("jax", "flax", "optax", "numpy", "orbax", "grain", "transformers", "tensorstore")
    code = f"import sys, ptjax; print([m for m in {heavy} if m in sys.modules], ptjax.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["[]", ptjax.__file__], done.stderr


def test_files_stay_small_and_say_what_they_are() -> None:
    for module, file in modules().items():
        lines = len(file.read_text("utf-8").splitlines())
        assert lines <= MAX_LINES, f"{module} has {lines} lines"
        assert file.stem not in {"utils", "util", "common", "helpers", "misc"}
        assert not file.stem.startswith("base_")
        assert ast.get_docstring(ast.parse(file.read_text("utf-8"))), f"{module}: no docstring"
