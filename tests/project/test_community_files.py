"""The files for contributors are true: commands, paths, rooms and the version exist."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from test_architecture import PACKAGE, ROOMS

import ptjax
from ptjax.__main__ import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = ("AGENTS.md", "CONTRIBUTING.md", "SECURITY.md", "docs/architecture.md")
PACKAGES = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


@pytest.mark.parametrize("page", PAGES)
def test_paths_targets_and_commands_exist(page):
    text = (ROOT / page).read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in re.findall(r"(?:^|`)make ([a-z -]+)(?:`| +#|$)", text, re.MULTILINE):
        assert set(words.split()) <= targets
    code = re.findall(r"`([\w./-]+/|[\w./-]+\.(?:py|md|toml|gin))`", text)
    code += re.findall(r"\]\(([^)#]+)\)", text)
    for path in set(code) - {"config.gin", "utils.py"}:  # of a run; one that must not exist
        bases = (ROOT, PACKAGE, ROOT / "gin_configs", (ROOT / page).parent)
        assert any((base / path).exists() for base in bases), path
    assert set(re.findall(r"python -m ptjax\.(\w+)", text)) <= set(COMMANDS)


def test_the_tree_of_the_docs_names_every_package_and_no_other():
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert set(re.findall(r"^ptjax/(\w+)/ +\S", text, re.MULTILINE)) == PACKAGES


def test_agents_lists_the_packages_in_the_order_of_the_architecture():
    listed = (ROOT / "AGENTS.md").read_text().partition("## Rooms")[2].partition("The exact")[0]
    names = [name for name in re.findall(r"`(\w+)`", listed) if name in PACKAGES]
    assert names == [name for name in reversed(ROOMS) if name in PACKAGES]


def test_the_citation_has_the_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["authors"]
    assert str(citation["version"]) == project["version"] == ptjax.__version__
    assert citation["license"] == project["license"]
    [paper] = citation["references"]
    assert "2104.08691" in paper["url"] and paper["url"] in (ROOT / "README.md").read_text()


HELP = """
import runpy, sys
from ptjax.__main__ import COMMANDS
for command in COMMANDS:
    sys.argv = [f"ptjax.{command}", "--help"]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert end.code == 0, command
    heavy = [name for name in ("jax", "flax", "optax", "orbax", "grain") if name in sys.modules]
    assert not heavy, (command, heavy)
"""


def test_the_help_of_every_command_needs_no_jax():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f"usage: python -m ptjax.{command}" in done.stdout
