"""Benchmarks are run by hand; that they follow what they import is held here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NEEDS_TORCH = {"methods_peft_side", "peft_side"}
NAMES = sorted(file.stem for file in BENCHMARKS.glob("*.py"))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.oracle if n in NEEDS_TORCH else ()) for n in NAMES],
)
def test_a_benchmark_finds_all_that_it_imports(name, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while it is executed.
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
