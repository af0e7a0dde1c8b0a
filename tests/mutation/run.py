"""`make mutation`: of random small faults in a room, how many do the tests of that room notice?

    python tests/mutation/run.py [ROOM ...] [--mutants=60] [--seed=0] [--workers=N]

cosmic-ray makes the mutants: another comparison, a number one larger, a loop that never runs. A
mutant meets the tests of its room that run its line (coverage tells which), the fastest first, for
a minute of CPU at most. Nothing here is part of CI. Results are kept in `.mutation/`, by what the
file says: the same command resumes, and what survived is tried again when a test changed.

What survives is printed as a diff: a test is missing, or the mutant is equivalent (no test could
notice it), which `equivalent.toml` then says, with the reason. Exits 1 if a room has less than 90%.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import os
import queue
import random
import resource
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import coverage
from cosmic_ray.commands.init import _all_work_items
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".mutation"
PARTS = ("ptjax", "tests", "gin_configs", "examples", "docs", "benchmarks", "models", "tpu_scripts")
FILES = ("pyproject.toml", "README.md", "Makefile")
ROOMS = ("data", "training", "trainer", "methods", "interop", "inference")
GOAL = 0.9
SECONDS = 60
"""Of CPU, for the tests of a mutant; one that takes longer has changed how long a loop runs."""
WAIT = 5 * SECONDS
"""Of wall time: a mutant can also wait for ever."""
BUDGET = 30.0
"""CPU seconds that the chosen tests take without a mutant."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One small fault.

    Attributes:
        path: of the file, from the root.
        line, column: where it begins; lines count from 1.
        old, new: that line before and after.
        source: the whole file, mutated.
    """

    path: str
    line: int
    column: int
    operator: str
    old: str
    new: str
    source: str

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.path}\n{self.source}".encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Baseline:
    """What the tests of a room run when nothing is broken.

    Attributes:
        digest: of everything that was measured.
        seconds: CPU seconds of each test.
        tests: (path, line) -> the tests that run it.
    """

    digest: str
    seconds: dict[str, float]
    tests: dict[tuple[str, int], set[str]]

    def choose(self, mutant: Mutant) -> list[str]:
        """The tests for a mutant, the fastest first, `BUDGET` seconds of them."""
        tests = self.tests.get((mutant.path, mutant.line))
        if tests:
            return self.fastest(tests, BUDGET)
        # A line that importing runs: whatever runs anything of the file. Then the others: a test
        # that looks at a class (is it frozen?) runs no line of it.
        of_file = {t for (path, _), ts in self.tests.items() if path == mutant.path for t in ts}
        others = self.seconds.keys() - of_file if of_file else ()
        return self.fastest(of_file, BUDGET / 2) + self.fastest(others, BUDGET / 2)

    def fastest(self, tests: Iterable[str], budget: float) -> list[str]:
        chosen, total = [], 0.0
        for test in sorted(tests, key=lambda test: (self.seconds[test], test)):
            total += self.seconds[test]
            if chosen and total > budget:
                break
            chosen.append(test)
        return chosen


def copy_tree(target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for part in PARTS:
        ignored = shutil.ignore_patterns("__pycache__", "*.npz", "data")
        shutil.copytree(
            ROOT / part, target / part, ignore=ignored if part == "benchmarks" else None
        )
    for file in FILES:
        shutil.copy(ROOT / file, target / file)


def environment(tree: Path) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "tests" / "mutation")]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(WORK / "jax"),
    }


def measure(room: str, tree: Path) -> Baseline:
    """Runs the tests of a room once, under coverage.

    Raises:
        SystemExit: one fails without any mutant.
    """
    data, seconds = WORK / f"{room}.coverage", WORK / f"{room}.seconds.json"
    stamp = WORK / f"{room}.stamp"
    folders = ROOT.glob("tests/*.py"), (ROOT / "tests" / room).rglob("*.py")
    content = digest([*(ROOT / "ptjax").rglob("*.py"), *itertools.chain(*folders)])
    if not stamp.exists() or stamp.read_text() != content:
        command = [
            *(sys.executable, "-m", "coverage", "run", f"--data-file={data}", "--source=ptjax"),
            *("-m", "pytest", "-q", "-p", "recorder", "-p", "no:cacheprovider", f"tests/{room}"),
        ]
        variables = environment(tree) | {"PTJAX_TEST_SECONDS": str(seconds)}
        done = subprocess.run(
            command, cwd=tree, env=variables, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{room}: its tests fail without a mutant:\n{done.stdout[-3000:]}")
        stamp.write_text(content)
    found = coverage.CoverageData(basename=str(data))
    found.read()
    tests: dict[tuple[str, int], set[str]] = {}
    for file in found.measured_files():
        path = str(Path(file).relative_to(tree))
        for line, contexts in found.contexts_by_lineno(file).items():
            tests[path, line] = set(filter(None, contexts))
    return Baseline(content, json.loads(seconds.read_text()), tests)


def digest(files: list[Path]) -> str:
    whole = hashlib.sha256()
    for file in sorted(files):
        whole.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return whole.hexdigest()


def annotated(tree: ast.AST) -> Iterator[ast.AST]:
    """What is never evaluated: annotations, and what only a type checker imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign | ast.arg) and node.annotation:
            yield node.annotation
        elif isinstance(node, ast.FunctionDef) and node.returns:
            yield node.returns
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield node


def mutants_of(file: Path) -> list[Mutant]:
    """All mutants of a file, but for those in annotations."""
    source = file.read_text("utf-8")
    path = str(file.relative_to(ROOT))
    unused = [
        ((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset))
        for n in annotated(ast.parse(source))
        if isinstance(n, ast.expr | ast.stmt)
    ]
    made = []
    for item in _all_work_items([file], {}):
        mutation = item.mutations[0]
        start = tuple(mutation.start_pos)
        if any(begin <= start < end for begin, end in unused):
            continue
        operator = get_operator(mutation.operator_name)(**mutation.operator_args)
        try:
            changed = mutate_code(source, operator, mutation.occurrence)
        except AttributeError:  # cosmic-ray cannot replace `zlib.error`, a name with a dot
            continue
        if changed is None or changed == source:
            continue
        line, column = start
        old, new = (line_of(text, line) for text in (source, changed))
        name = mutation.operator_name.removeprefix("core/")
        made.append(Mutant(path, line, column, name, old, new, changed))
    return made


def line_of(text: str, number: int) -> str:
    """A line without its indentation; "" after the end."""
    return "".join(text.splitlines()[number - 1 : number]).strip()


def choose_mutants(room: str, count: int, seed: int) -> list[Mutant]:
    """One mutant at each of `count` random places: a `+` has eleven mutants and a `<` has six."""
    places: dict[tuple[str, int, int], list[Mutant]] = {}
    for file in sorted((ROOT / "ptjax" / room).rglob("*.py")):
        for mutant in mutants_of(file):
            places.setdefault((mutant.path, mutant.line, mutant.column), []).append(mutant)
    chance = random.Random(seed)
    chosen = chance.sample(sorted(places), min(count, len(places)))
    return [chance.choice(places[place]) for place in chosen]


def attempt(mutant: Mutant, tests: list[str], tree: Path) -> str:
    """ "killed", "survived", "too slow", or "not run" where no test reaches the file."""
    if not tests:
        return "not run"
    file = tree / mutant.path
    file.write_text(mutant.source)
    chosen = tree / "chosen.txt"
    chosen.write_text("\n".join(tests))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"@{chosen}"]
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            env=environment(tree),
            capture_output=True,
            text=True,
            timeout=WAIT,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5)),
        )
    except subprocess.TimeoutExpired:
        return "too slow"
    finally:
        shutil.copy(ROOT / mutant.path, file)
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return "too slow"
    found = [test for test in tests if f"ERROR: not found: {tree / test}\n" not in done.stderr]
    if len(found) < len(tests):  # a test whose id depends on the clock or on the mutant
        return attempt(mutant, found, tree)
    return "killed" if done.returncode else "survived"


def run_room(
    room: str, count: int, seed: int, workers: int, equivalent: set[tuple[str, str, str]]
) -> float:
    """The share that was noticed; prints a line for each that was not."""
    trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for number in range(workers):
        tree = WORK / f"tree{number}"
        copy_tree(tree)
        trees.put(tree)
    baseline = measure(room, WORK / "tree0")
    sample = choose_mutants(room, count, seed)
    kept = WORK / f"{room}.jsonl"
    rows = map(json.loads, kept.read_text().splitlines()) if kept.exists() else ()
    outcomes = {
        row["key"]: row["outcome"]
        for row in rows
        if row["outcome"] in ("killed", "too slow") or row["tests"] == baseline.digest
    }

    def work(mutant: Mutant) -> str:
        tree = trees.get()
        try:
            return attempt(mutant, baseline.choose(mutant), tree)
        finally:
            trees.put(tree)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool, kept.open("a") as log:
        todo = {pool.submit(work, m): m for m in sample if m.key not in outcomes}
        for done in concurrent.futures.as_completed(todo):
            key = todo[done].key
            outcomes[key] = done.result()
            row = {"key": key, "outcome": outcomes[key], "tests": baseline.digest}
            log.write(json.dumps(row) + "\n")
            log.flush()
    counts = dict.fromkeys(("killed", "too slow", "survived", "not run", "equivalent"), 0)
    for mutant in sample:
        outcome = outcomes[mutant.key]
        if outcome in ("survived", "not run"):
            if (mutant.path, mutant.old, mutant.new) in equivalent:
                outcome = "equivalent"
            else:
                print(f"{outcome}: {mutant.path}:{mutant.line} ({mutant.operator})")
                print(f"  - {mutant.old}\n  + {mutant.new}", flush=True)
        counts[outcome] += 1
    share = 1 - (counts["survived"] + counts["not run"]) / len(sample)
    shown = ", ".join(f"{n} {name}" for name, n in counts.items())
    print(f"{room}: {len(sample)} mutants: {shown}; {share:.1%}", flush=True)
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rooms", nargs="*", default=ROOMS, help=f"default: {' '.join(ROOMS)}")
    parser.add_argument("--mutants", type=int, default=60, help="of each room; default: 60")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    cpus = os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cpus, help=f"at once; default here: {cpus}")
    flags = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    table = tomllib.loads((Path(__file__).parent / "equivalent.toml").read_text())
    equivalent = {(row["path"], row["old"], row["new"]) for row in table.get("mutant", [])}
    shares = [
        run_room(room, flags.mutants, flags.seed, flags.workers, equivalent) for room in flags.rooms
    ]
    raise SystemExit(min(shares) < GOAL)


if __name__ == "__main__":
    main()
