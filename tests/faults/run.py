"""`make faults`: the tests notice the faults that they are there for.

Each `*.patch` beside this file breaks ptjax in one place. Its text before the diff says how, and
names the tests that have to fail, one a line behind "Fails:". They are run in a copy of the tree:
all of them pass without a fault, and each fails with its own.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FAULTS = Path(__file__).parent
ROOT = FAULTS.parents[1]
PARTS = ("ptjax", "tests", "gin_configs", "pyproject.toml")
FAILED = 1  # pytest's exit code for failed tests; above it, something else went wrong


def tests_of(patch: Path) -> list[str]:
    """The tests that a fault has to make fail."""
    tests = re.findall(r"^Fails: (\S+)$", patch.read_text(), re.MULTILINE)
    if not tests:
        raise SystemExit(f"{patch}: it names no test; add a line 'Fails: tests/...'")
    return tests


def copy_tree(directory: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    for part in PARTS:
        source, target = ROOT / part, directory / part
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignore)
        else:
            shutil.copy(source, target)


def run_tests(directory: Path, tests: list[str]) -> subprocess.CompletedProcess[str]:
    # The copy has to stand before an installed ptjax, also in processes that a test starts.
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
    environment = os.environ | {
        "PYTHONPATH": str(directory),
        "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_COMPILATION_CACHE_DIR": cache,
    }
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", *tests]
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )


def try_fault(patch: Path) -> str:
    """What is wrong with a fault; "" if its tests notice it."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        copy_tree(directory)
        applied = subprocess.run(
            ["git", "apply", str(patch)], cwd=directory, capture_output=True, text=True, check=False
        )
        if applied.returncode:
            return f"it does not apply: {applied.stderr.strip()}"
        for test in tests_of(patch):
            ended = run_tests(directory, [test])
            if ended.returncode == 0:
                return f"{test} passes all the same"
            if ended.returncode != FAILED:
                return f"{test} cannot run:\n{ended.stdout}{ended.stderr}"
    return ""


def main() -> None:
    patches = sorted(FAULTS.glob("*.patch"))
    tests = list(dict.fromkeys(test for patch in patches for test in tests_of(patch)))
    with tempfile.TemporaryDirectory() as temporary:
        copy_tree(Path(temporary))
        clean = run_tests(Path(temporary), tests)
    if clean.returncode:
        raise SystemExit(f"without any fault:\n{clean.stdout}{clean.stderr}")
    print(f"{len(tests)} tests pass without a fault", flush=True)
    unnoticed = 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for patch, problem in zip(patches, pool.map(try_fault, patches), strict=True):
            print(f"{patch.stem}: {problem or 'noticed'}", flush=True)
            unnoticed += bool(problem)
    print(f"{len(patches) - unnoticed} passed, {unnoticed} failed")
    raise SystemExit(bool(unnoticed))


if __name__ == "__main__":
    main()
