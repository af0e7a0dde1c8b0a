"""The built wheel runs the quickstart outside the clone, gin files and package data included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]


def test_the_wheel_runs_the_quickstart_elsewhere(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(REPOSITORY)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site]
    subprocess.run([*install, wheel], check=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = os.environ | {"PYTHONPATH": str(site), "XLA_FLAGS": ""}
    where = [sys.executable, "-c", "import ptjax; print(ptjax.__file__)"]
    found = subprocess.run(where, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert Path(found.stdout.strip()).is_relative_to(site)
    train = [*(sys.executable, "-m", "ptjax.train"), "--gin_file=quickstart.gin"]
    ran = subprocess.run(
        [*train, "--gin.TRAIN_STEPS=10", "--gin.EVAL_PERIOD=5"],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    results = json.loads((elsewhere / "runs" / "quickstart" / "results.json").read_text())
    assert results["task"] == "tickets"
    infer = [*(sys.executable, "-m", "ptjax.infer"), "--model_dir=runs/quickstart"]
    said = subprocess.run(
        [*infer, "A lovely film."], cwd=elsewhere, env=environment, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr[-2000:]
    assert json.loads(said.stdout)["prediction"] in ("positive", "negative")
