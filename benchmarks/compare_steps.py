"""Whether two checkouts of ptjax compile the same train steps: a refactoring must cost no speed.

    python benchmarks/compare_steps.py OLD NEW [--python=PYTHON]

Runs `python -m ptjax.train --dry_run` in both for every case and compares the StableHLO of all
steps that they compile, word for word, without locations, the names of functions and arguments,
and the order of the step's arguments. Both checkouts must have the gin files and macros that the
cases name (commits before runs/sweep.gin do not). The exit code is 1 if a step differs; both texts
are then kept in the folder that is named.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PROMPT_TUNING = ["runs/prompt_tune.gin"]
CASES: dict[str, tuple[list[str], dict[str, str]]] = {
    "prompt tuning": (PROMPT_TUNING, {}),
    "packed": (PROMPT_TUNING, {"PACK": "True"}),
    "not seeing its input": (PROMPT_TUNING, {"SEES_INPUT": "False"}),
    "packed, not seeing its input": (PROMPT_TUNING, {"SEES_INPUT": "False", "PACK": "True"}),
    "microbatches": (PROMPT_TUNING, {"MICROBATCHES": "4"}),
    "sweep": (["runs/sweep.gin"], {}),
    "scanned, int8": (PROMPT_TUNING, {"SCAN_LAYERS": "True", "QUANTIZE": "'int8'"}),
    "eight devices": (PROMPT_TUNING, {"MESH": "'4x2'", "FSDP": "True", "SCAN_LAYERS": "True"}),
    "model tuning": (["runs/model_tune.gin"], {}),
}
"""Name -> gin files after the task's, and macros."""
SETTINGS = {
    "INITIAL_CHECKPOINT_PATH": "'ptjax-nano'",
    "PROMPT_LENGTH": "20",
    "TASK_FEATURE_LENGTHS": "{'inputs': 64, 'targets': 4}",
}
"""Macros of every case."""
_NESTED = r"\((?:[^()]|\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))*\)"
"""Parentheses, up to four levels."""


def dump_steps(checkout: Path, case: str, python: str, folder: Path) -> list[str]:
    """The StableHLO of the steps that `checkout` compiles, normalised and sorted.

    Raises:
        SystemExit: the command failed or compiled no step.
    """
    files, macros = CASES[case]
    macros = SETTINGS | macros | {"MODEL_DIR": repr(str(folder / "run"))}
    devices = 8 if "MESH" in macros else 1
    command = [python, "-m", "ptjax.train", "--dry_run", "--gin_file=tasks/sentiment.gin"]
    command += [f"--gin_file={file}" for file in files]
    command += [f"--gin.{name}={value}" for name, value in macros.items()]
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "JAX_PLATFORMS": "cpu",
        "JAX_DUMP_IR_TO": str(folder),
        "JAX_DUMP_IR_MODES": "stablehlo",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0",
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    steps = sorted(normalize(file.read_text()) for file in folder.glob("*step_compile.mlir"))
    if done.returncode or not steps:
        raise SystemExit(f"{checkout}, {case}: no step was compiled\n{done.stderr[-2000:]}")
    return steps


def normalize(text: str) -> str:
    """A module without locations, and with its functions numbered in their order."""
    text = re.sub(r"(?m)^#loc\d*( = .*)?\n", "", text)
    text = re.sub(rf" ?loc{_NESTED}", "", text)
    text = re.sub(r'jax\.result_info = "[^"]*"(, )?', "", text)
    text = re.sub(r"module @\w+", "module", text)
    names = list(dict.fromkeys(re.findall(r"func\.func private @(\w+)", text)))
    for number, name in enumerate(names):
        text = re.sub(rf"@{name}\b", f"@function_{number}", text)
    return order_arguments(text)


def order_arguments(text: str) -> str:
    """The arguments of the public function named by their first use, which its signature follows.

    The order in which a step takes its arguments makes no difference to what it computes.
    """
    public = re.search(r"func\.func public @\w+\((.*?)\) -> ", text, re.DOTALL)
    assert public is not None
    arguments = re.findall(r"(%arg\d+): (.*?)(?=, %arg\d+: |$)", public[1], re.DOTALL)
    body = text.replace(public[1], "")
    names = {name: f"%a{n}" for n, name in enumerate(dict.fromkeys(re.findall(r"%arg\d+", body)))}
    signature = sorted(f"{names.get(name, 'unused')}: {kind}" for name, kind in arguments)
    return "\n".join([*signature, re.sub(r"%arg\d+", lambda name: names[name[0]], body)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="a checkout, for example a git worktree")
    parser.add_argument("new", type=Path, help="another one")
    parser.add_argument("--python", default=sys.executable)
    flags = parser.parse_args()
    kept = Path(tempfile.mkdtemp(prefix="compare_steps_"))
    differing = 0
    for case in CASES:
        found = {}
        for side in ("old", "new"):
            folder = kept / case.replace(" ", "_") / side
            folder.mkdir(parents=True)
            checkout = getattr(flags, side).resolve()
            found[side] = dump_steps(checkout, case, flags.python, folder)
        same = found["old"] == found["new"]
        differing += not same
        sizes = ", ".join(f"{len(step.splitlines()):,}" for step in found["old"])
        print(f"{case}: {'equal' if same else 'DIFFERENT'} (lines of a step: {sizes})", flush=True)
        if not same:
            for side, steps in found.items():
                (kept / case.replace(" ", "_") / f"{side}.mlir").write_text("\n".join(steps))
    if differing:
        print(f"{differing} of {len(CASES)} differ; both texts are in {kept}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
