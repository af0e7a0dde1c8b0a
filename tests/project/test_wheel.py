"""The wheel alone, in a fresh environment of each Python: its size, and what it does and says."""

from __future__ import annotations

import functools
import glob
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ptjax.__main__ import COMMANDS

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]
MOST = 950_000_000
"""Bytes that the base installation adds to a fresh environment of Python 3.11."""


def find_python(version: str) -> str | None:
    """A Python of this version on this machine. CI has all three (.ci/run)."""
    installed = sorted(glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python")))
    here = f"{sys.version_info.major}.{sys.version_info.minor}" == version
    for python in [sys.executable] if here else [f"python{version}", *installed]:
        path = shutil.which(python)  # a shim may be there and have no Python behind it
        if path and not subprocess.run([path, "--version"], capture_output=True).returncode:
            return path
    return None


PYTHONS = [version for version in ("3.11", "3.12", "3.13") if find_python(version)]


def size_of(folder: Path) -> int:
    """The bytes of all files below it, as `du --apparent-size` counts them without folders."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(REPOSITORY)]
    subprocess.run(build, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


class Installed:
    """An environment with the wheel and what it needs; commands run in a folder beside it."""

    def __init__(self, version: str, wheel: Path, folder: Path) -> None:
        self.version, self.bin = version, folder / "env" / "bin"
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        made = [find_python(version), "-m", "venv", folder / "env"]
        subprocess.run(made, check=True, capture_output=True)
        before = size_of(folder / "env")
        # Byte code takes a fifth of the space and half of pip's time; 3.11 is what is measured.
        compiled = "--compile" if version == PYTHONS[0] else "--no-compile"
        pip = [self.bin / "python", "-m", "pip", "install", "--quiet", compiled, wheel]
        subprocess.run(pip, check=True, capture_output=True)
        self.added = size_of(folder / "env") - before

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"XLA_FLAGS": ""}
        return subprocess.run(
            [self.bin / program, *arguments],
            cwd=self.elsewhere,
            env=environment,
            capture_output=True,
            text=True,
        )

    def ptjax(self, *arguments: str) -> str:
        done = self.run("ptjax", *arguments)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    def refusal(self, *arguments: str) -> str:
        """The last line of a command that ends with 2."""
        done = self.run("ptjax", *arguments)
        assert done.returncode == 2, done.stderr[-2000:]
        assert "Traceback" not in done.stderr
        return done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def install(wheel, tmp_path_factory):
    """A function from a version of Python to its environment."""
    folders = []

    @functools.cache
    def made(version: str) -> Installed:
        folders.append(tmp_path_factory.mktemp(f"python{version}"))
        return Installed(version, wheel, folders[-1])

    yield made
    for folder in folders:
        shutil.rmtree(folder)  # most of a gigabyte each


def test_the_base_installation_is_small(install, record_property):
    added = install(PYTHONS[0]).added
    record_property(f"MB on {PYTHONS[0]}", added / 1e6)
    print(f"the base installation: {added / 1e6:.1f} MB on Python {PYTHONS[0]}")
    assert added <= MOST


GIN = "--gin_file=quickstart.gin"
IMPORTS = """
import importlib.util, sys, ptjax
print(ptjax.__file__)
for name in ptjax.__all__:
    getattr(ptjax, name)
assert not [name for name in ("tensorflow_datasets", "pyarrow", "sklearn", "matplotlib")
            if importlib.util.find_spec(name) or name in sys.modules]
"""


@pytest.mark.parametrize("version", PYTHONS)
def test_every_public_name_and_the_quickstart_are_there(install, version):
    installed = install(version)
    done = installed.run("python", "-c", IMPORTS)
    assert done.returncode == 0, done.stderr[-2000:]
    assert Path(done.stdout.strip()).is_relative_to(installed.bin.parent)
    assert installed.ptjax("--version").startswith("ptjax ")
    assert "usage: python -m ptjax.train" in installed.ptjax("train", "--help")
    installed.ptjax("train", GIN, "--gin.TRAIN_STEPS=10", "--gin.EVAL_PERIOD=5")
    model_dir = installed.elsewhere / "runs" / "quickstart"
    assert json.loads((model_dir / "results.json").read_text())["task"] == "tickets"
    said = installed.ptjax("infer", "--model_dir=runs/quickstart", "A lovely film.")
    assert json.loads(said)["prediction"] in ("negative", "positive", "unknown")


def test_every_other_command_works(install):
    installed = install(PYTHONS[0])
    for command in COMMANDS:
        assert f"usage: python -m ptjax.{command}" in installed.ptjax(command, "--help")
    assert "accuracy" in installed.ptjax("evaluate", "--model_dir=runs/quickstart")
    prompt = "runs/quickstart/prompts/best.safetensors"
    assert "20" in installed.ptjax("inspect", prompt)
    installed.ptjax("export", prompt, "--to=npy", "--output=best.npy")
    assert (installed.elsewhere / "best.npy").exists()
    assert "v5e-8" in installed.ptjax("plan", GIN, "--slice=v5e-8", "--quick")


def test_what_is_missing_is_named_in_one_line(install):
    installed = install(PYTHONS[0])
    line = installed.refusal("convert", "--from=.", "--to=new")
    assert line.endswith("needs tensorflow_datasets; pip install 'ptjax[tfds]'")
    train = ("train", "--gin_file=quickstart.gin", "--gin.MODEL_DIR='new'")
    splits = '{"train": "%s", "validation": "%s"}'
    tfds = "tfds:glue/sst2:2.0.0"
    line = installed.refusal(*train, "--gin.ptjax.Task.splits=" + splits % (tfds, tfds))
    assert line.endswith(f"{tfds} needs tensorflow_datasets; pip install 'ptjax[tfds]'")
    (installed.elsewhere / "a.parquet").write_bytes(b"PAR1")
    parquet = str(installed.elsewhere / "a.parquet")
    line = installed.refusal(*train, "--gin.ptjax.Task.splits=" + splits % (parquet, parquet))
    assert line.endswith(f"{parquet}: Parquet needs pyarrow; pip install 'ptjax[parquet]'")
    line = installed.refusal(*train, "--gin.ptjax.Task.metrics='mean_f1'")
    assert line.endswith("the metric mean_f1 needs sklearn; pip install 'ptjax[report]'")
    words = "--gin.ptjax.PromptTuning.initializer=@ptjax.FrequentWords()"
    line = installed.refusal(*train, words)
    assert line.endswith("ptjax.FrequentWords needs sklearn; pip install 'ptjax[report]'")
    assert not (installed.elsewhere / "new").exists()
    line = installed.refusal("inspect", "gs://bucket/prompt")
    assert line.endswith("paths of gs:// need gcsfs; pip install 'ptjax[gcs]'")
