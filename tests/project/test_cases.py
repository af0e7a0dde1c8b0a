"""The cases that users bring have tests, and the faults that tests notice still apply."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
# Section of the list of cases -> its rows that have been taken up.
ROWS = {
    1: range(1, 17),  # backbone folders: another model or another text, without a word
    3: range(1, 15),  # data
    4: [row for row in range(1, 16) if row != 8],  # runs and commands; tfrecord is not read yet
    5: range(1, 15),  # reliability and files of strangers
}
PATCHES = sorted((TESTS / "faults").glob("*.patch"))


@pytest.mark.parametrize("row", [f"{s}_{row}" for s, rows in ROWS.items() for row in rows])
def test_every_case_has_a_test(row: str) -> None:
    named = re.compile(rf"^def test_case_{row}(_\w+)?\(", re.MULTILINE)
    assert any(named.search(file.read_text("utf-8")) for file in TESTS.rglob("test_*.py"))


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_every_fault_applies_and_its_tests_are_there(patch: Path, tmp_path: Path) -> None:
    """`make faults` runs them; here only what would leave it with nothing to run."""
    text = patch.read_text()
    for file in re.findall(r"^--- a/(\S+)$", text, re.MULTILINE):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    subprocess.run(["git", "apply", "--check", patch], cwd=tmp_path, check=True)
    tests = re.findall(r"^Fails: (\S+)::(\w+)", text, re.MULTILINE)
    assert tests
    for file, test in tests:
        assert f"def {test}(" in (ROOT / file).read_text("utf-8")
