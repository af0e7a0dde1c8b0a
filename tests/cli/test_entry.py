"""`python -m ptjax`: the commands by name, and its version, without JAX."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import ptjax
from ptjax import __main__ as entry
from ptjax.interop.prompt_file import load_prompt

REPOSITORY = Path(__file__).parents[2]
LIGHT = """
import runpy, sys
sys.argv[1:] = {arguments}
try:
    runpy.run_module("ptjax", run_name="__main__", alter_sys=True)
finally:
    assert not [name for name in ("jax", "numpy") if name in sys.modules]
"""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 0, "python -m ptjax.inspect   describes a checkpoint or a prompt"),
        (["--version"], 0, f"ptjax {ptjax.__version__}\n"),
        (["infre"], 2, "error: unknown command infre; did you mean infer?\n"),
        (["train", "--help"], 0, "usage: python -m ptjax.train"),
    ],
)
def test_case_4_9_ptjax_itself_is_a_command(arguments, code, said):
    done = subprocess.run(
        [sys.executable, "-c", LIGHT.format(arguments=arguments)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code and said in done.stdout + done.stderr


def test_case_4_9_every_command_is_listed_and_is_a_script():
    modules = {path.stem for path in (REPOSITORY / "ptjax").glob("*.py")}
    commands = {
        name for name in modules if "__main__" in (REPOSITORY / "ptjax" / f"{name}.py").read_text()
    }
    assert set(entry.COMMANDS) == commands - {"__main__"}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"ptjax": "ptjax.__main__:main"}
    readme = (REPOSITORY / "README.md").read_text()
    assert all(f"| `python -m ptjax.{name}` | " in readme for name in entry.COMMANDS)


@pytest.mark.usefixtures("own_process")
def test_case_4_9_peft_and_huggingface_are_one_format(call, backbone, tmp_path):
    import numpy as np

    np.save("p.npy", np.ones((3, 16), np.float32))
    for name in ("peft", "huggingface"):
        flags = (f"--to={name}", f"--output={name}", f"--backbone={backbone.name}")
        code, _, err = call("export", "p.npy", *flags)
        assert code == 0, err
        assert json.loads(Path(name, "adapter_config.json").read_text())["peft_type"]
        np.testing.assert_array_equal(load_prompt(name).prompt, np.load("p.npy"))
    files = [sorted(p.name for p in Path(name).iterdir()) for name in ("peft", "huggingface")]
    assert files[0] == files[1]


def test_case_4_13_no_release_that_fails_is_allowed():
    """`make test-lowest` runs the oldest ones that are; these did not get through the quickstart, a
    damaged checkpoint, TFDS data or the tests' ban on deprecated calls."""
    failed = {
        "etils": "1.13.0",
        "flax": "0.12.7",
        "orbax-checkpoint": "0.12.6",
        "tensorflow-datasets": "4.9.9",
        "transformers": "5.2.0",
    }
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"]["tfds"]]
    requirements = {r.name: r.specifier for r in map(Requirement, listed)}
    assert all(any(s.operator == ">=" for s in x) for x in requirements.values())
    assert not [name for name, version in failed.items() if version in requirements[name]]
