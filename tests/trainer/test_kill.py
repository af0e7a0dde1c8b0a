"""A real process, killed at random moments and started again, ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PATIENCE, outcome

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]
STEPS = 64


def start(directory: Path, log: Path) -> subprocess.Popen[bytes]:
    """`python -m ptjax.train` on the shipped backbone, a run of a few seconds behind start-up."""
    command = [
        *(sys.executable, "-m", "ptjax.train", "--gin_file=quickstart.gin"),
        f"--gin.MODEL_DIR='{directory}'",
        f"--gin.TRAIN_STEPS={STEPS}",
        "--gin.ptjax.Evaluation.hard_prompts={}",
        "--gin.EVAL_PERIOD=8",
        "--gin.EVAL_EXAMPLES=24",
        "--gin.DROPOUT_RATE=0.1",
        "--gin.ptjax.TrainSchedule.log_period=3",
    ]
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(REPOSITORY)}
    with log.open("ab") as stream:
        return subprocess.Popen(
            command, cwd=directory.parent, env=environment, stdout=stream, stderr=stream
        )


def test_killed_at_random_moments(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert start(tmp_path / "whole", log).wait(timeout=PATIENCE) == 0, log.read_text()[-2000:]

    rng = random.Random(0)
    killed, directory = tmp_path / "killed", tmp_path / "killed"
    steps: list[int] = []
    for number in range(4):
        process = start(killed, log)
        begun = newest(directory)
        # Some are killed while they start; most when they have come a little further.
        if number % 4 != 3:
            while newest(directory) == begun and process.poll() is None:
                time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 0.6))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:  # it was done already
            break
        steps.append(newest(directory))
    assert len(steps) >= 3, f"the runs were over too soon to be killed: {steps}"
    assert start(killed, log).wait(timeout=PATIENCE) == 0, log.read_text()[-2000:]
    assert outcome(killed) == outcome(tmp_path / "whole")


def newest(directory: Path) -> int:
    """Step of the newest complete checkpoint."""
    folder = directory / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_it_saves_and_says_so(tmp_path: Path, number: int, code: int) -> None:
    log = tmp_path / "log"
    process = start(tmp_path / "run", log)
    while newest(tmp_path / "run") == 0 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=PATIENCE) == code
    assert not (tmp_path / "run" / "results.json").exists()
    assert "saved at step" in log.read_text()


def test_case_5_3_of_two_at_once_one_trains(tmp_path: Path) -> None:
    """Both are started together; one ends at once and says why, the other one as if alone."""
    logs = [tmp_path / "log0", tmp_path / "log1"]
    both = [start(tmp_path / "run", log) for log in logs]
    codes = [process.wait(timeout=PATIENCE) for process in both]
    assert sorted(codes) == [0, 2], [log.read_text()[-2000:] for log in logs]
    winner, loser = codes.index(0), codes.index(2)
    refused = logs[loser].read_text().splitlines()[-1]
    assert f"MODEL_DIR = {tmp_path / 'run'}: in use by process {both[winner].pid} on " in refused
    assert newest(tmp_path / "run") == STEPS
    assert (tmp_path / "run" / "results.json").exists()
