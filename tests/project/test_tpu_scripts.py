"""tpu_scripts/: every --dry_run and every refusal, word for word; and the real scripts against a
stand-in for gcloud whose two workers are folders, where what arrives over ssh really runs.

The transcripts are `fixtures/tpu_scripts/*.txt`: a shell line after `$ `, then all it prints, then
`[N]` where the exit code is not 0. After a change, `python tests/project/test_tpu_scripts.py`
writes them again from their `$ ` lines; read the difference.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from conftest import PATIENCE

CLONE = Path(__file__).parents[2]
SCRIPTS = CLONE / "tpu_scripts"
TRANSCRIPTS = Path(__file__).parents[1] / "fixtures" / "tpu_scripts"
FAKE = TRANSCRIPTS / "fake"
# What a dry run must not call.
FORBIDDEN = ("gcloud", "xpk", "tar", "rm", "srun", "scontrol")
AT = ("--project=lab", "--zone=us-east5-b")
SLICE = (*AT, "--name=sst2", "--accelerator=v6e-8")
ARGUMENTS = [
    "--gin_file=tasks/sst2.gin",
    "--gin.MODEL_DIR='gs://lab/sst2'",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 8}",
    '--gin.instruction/ptjax.HardPrompt.text="It\'s {text} `x` $HOME \\ !"',
    "*",
    "~",
    "",
    "two\nlines",
    "café; rm -rf /",
]


def transcript(text: str, home: Path) -> str:
    """What the `$ ` lines of a transcript print today, in its form."""
    forbidden = home / "forbidden"
    forbidden.mkdir()
    for name in FORBIDDEN:
        (forbidden / name).write_text(f"#!/bin/sh\necho CALLED {name}\n")
        (forbidden / name).chmod(0o755)
    path = f"{SCRIPTS}:{forbidden}:{os.environ['PATH']}"
    environment = {"PATH": path, "HOME": str(home), "LANG": "C.UTF-8"}
    printed = []
    for line in text.splitlines():
        if not line.startswith("$ "):
            continue
        ran = subprocess.run(
            ["bash", "-c", line[2:]],
            cwd=CLONE,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        output = ran.stdout.replace(str(CLONE), "/clone")
        printed += [line, output.rstrip("\n")] + [f"[{ran.returncode}]"] * bool(ran.returncode)
    return "\n".join(printed) + "\n"


@pytest.mark.parametrize("file", sorted(TRANSCRIPTS.glob("*.txt")), ids=lambda file: file.stem)
def test_transcripts(file: Path, tmp_path: Path) -> None:
    text = file.read_text()
    assert transcript(text, tmp_path) == text
    assert "CALLED" not in text


def test_every_script_has_a_transcript_a_help_and_an_executable_bit() -> None:
    for script in scripts():
        if script.name == "flags.sh":  # sourced
            continue
        assert f"{script.name} " in (TRANSCRIPTS / f"{script.stem}.txt").read_text()
        ran = subprocess.run([script, "--help"], cwd=CLONE, capture_output=True, text=True)
        assert ran.returncode == 0
        header = re.match(r"#!/usr/bin/env bash\n((?:#.*\n)+)\n", script.read_text())
        assert header
        assert ran.stdout == re.sub(r"(?m)^# ?", "", header[1])
        # What it accepts is what it explains.
        flags = re.search(r"^flags '(.*)'", script.read_text(), re.MULTILINE)
        for flag in (flags[1] if flags else "").split():
            assert f"--{flag}" in ran.stdout, (script.name, flag)


def scripts() -> list[Path]:
    return sorted([*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch")])


def test_shellcheck() -> None:
    beside = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=beside)
    assert shellcheck, "pip install -e '.[dev]' brings shellcheck"
    files = [*scripts(), *FAKE.iterdir(), CLONE / ".ci" / "run"]
    ran = subprocess.run([shellcheck, "-x", *files], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


def test_arguments_come_back_from_a_dry_run_as_they_were_given() -> None:
    ran = script("run.sh", *AT, "--name=sst2", "--dry_run", "--", *ARGUMENTS)
    *_, command = shlex.split(ran.stdout)
    assert shlex.split(command.removeprefix("--command="))[2:] == ["start", "20", "30", *ARGUMENTS]
    ran = script("slurm_gpu.sbatch", "--dry_run", "--", *ARGUMENTS)
    line = ran.stdout[: ran.stdout.index("\n# after")]
    assert shlex.split(line)[-len(ARGUMENTS) :] == ARGUMENTS
    xpk = (*AT, "--name=sst2", "--cluster=tpus", "--accelerator=v6e-16")
    ran = script("gke_xpk.sh", *xpk, "--dry_run", "--", *ARGUMENTS)
    command = shlex.split(ran.stdout[ran.stdout.index("\nxpk") :])[-1]
    assert shlex.split(command)[-len(ARGUMENTS) :] == ARGUMENTS


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPTS / name), *arguments],
        cwd=CLONE,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


class Cloud:
    """A folder that stands in for Cloud TPU (`fixtures/tpu_scripts/fake/gcloud`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def plan(self, *steps: str) -> None:
        """What the Nth start of the training does on each worker (`fake/python`)."""
        (self.folder / "plan").write_text("\n".join(steps) + "\n")

    def script(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        path = f"{FAKE}:{os.environ['PATH']}"
        return script(name, *arguments, CLOUD=str(self.folder), PATH=path)

    def supervise(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        flags = (*SLICE, "--spot", "--pause=0", *arguments)
        return self.script("supervise.sh", *flags, "--", *ARGUMENTS)

    def calls(self) -> list[str]:
        """What was asked of gcloud, but for looking: its verb, or what ran on the workers."""
        lines = (self.folder / "calls").read_text()
        on_workers = r"worker\.sh (install|start|stop)\b"
        verbs = rf"(?m)^compute tpus \S+ (create|delete|scp) |{on_workers}"
        return [first or second for first, second in re.findall(verbs, lines)]

    def starts(self, worker: int) -> int:
        file = self.folder / f"python-worker-{worker}"
        return file.read_text().count("\n") if file.exists() else 0

    def exit_codes(self) -> list[str]:
        files = sorted(self.folder.glob("worker-*/ptjax-run/exit_code"))
        return [file.read_text().strip() for file in files]


@pytest.fixture
def cloud(tmp_path: Path):
    cloud = Cloud(tmp_path)
    yield cloud
    if (tmp_path / "state").exists():
        (tmp_path / "state").write_text("SUSPENDED\n")
        cloud.script("delete.sh", *AT, "--name=sst2", "--yes")  # ends what still runs


BEGIN = ["create", "scp", "install", "stop", "start"]


def test_supervise_restarts_processes_and_slices_until_the_run_is_over(cloud: Cloud) -> None:
    cloud.plan("1", "143", "preempt", "134", "0")
    ran = cloud.supervise()
    assert ran.returncode == 0, ran.stderr
    assert cloud.calls() == [*BEGIN, "delete", *BEGIN]
    assert [cloud.starts(0), cloud.starts(1)] == [5, 5]
    assert cloud.exit_codes() == ["0", "0"]
    arguments = (cloud.folder / "arguments").read_text().removesuffix("\0").split("\0")
    assert arguments == ["-m", "ptjax.train", *ARGUMENTS]
    log = (cloud.folder / "worker-0" / "ptjax-run" / "log").read_text()
    assert re.findall(r"exit code (\d+)", log) == ["134", "0"]  # of the second slice


@pytest.mark.slow
def test_supervise_starts_again_what_a_reboot_took_and_deletes_at_the_end(cloud: Cloud) -> None:
    cloud.plan("reboot", "0")
    ran = cloud.supervise("--delete_when_done")
    assert ran.returncode == 0, ran.stderr
    assert cloud.calls() == [*BEGIN, "stop", "start", "delete"]
    assert not (cloud.folder / "state").exists()


def test_supervise_does_not_repeat_bad_input(cloud: Cloud) -> None:
    cloud.plan("2")
    ran = cloud.supervise()
    assert ran.returncode == 2
    assert "bad input" in ran.stderr
    assert cloud.calls() == BEGIN
    assert cloud.starts(0) == 1


@pytest.mark.slow
def test_supervise_gives_up(cloud: Cloud) -> None:
    cloud.plan("1", "3", "1")
    ran = cloud.supervise("--max_restarts=1")
    assert ran.returncode == 3
    assert cloud.starts(0) == 2
    assert cloud.calls() == BEGIN


@pytest.mark.slow
def test_supervise_gives_up_on_a_slice_that_is_always_lost(cloud: Cloud) -> None:
    cloud.plan("preempt_node", "preempt")
    ran = cloud.supervise("--max_restarts=1")
    assert ran.returncode == 1
    assert "was made 2 times" in ran.stderr
    assert cloud.calls() == [*BEGIN, "delete", *BEGIN]


def test_supervise_makes_nothing_when_gcloud_fails(cloud: Cloud) -> None:
    (cloud.folder / "broken").touch()
    ran = cloud.supervise()
    assert ran.returncode == 1
    assert "not logged in" in ran.stderr
    assert not (cloud.folder / "calls").exists()


def test_run_refuses_a_second_run_and_restart_lets_the_first_save(cloud: Cloud) -> None:
    at = (*AT, "--name=sst2")
    cloud.plan("train", "0")
    for ready in (("create.sh", *SLICE, "--pause=0"), ("install.sh", *at)):
        assert cloud.script(*ready).returncode == 0
    assert cloud.script("run.sh", *at, "--", "first").returncode == 0
    for worker in range(2):
        wait_for(cloud.folder / f"training-worker-{worker}")

    second = cloud.script("run.sh", *at, "--", "second")
    assert second.returncode != 0
    assert "already running" in second.stderr
    watch = cloud.script("watch.sh", *at).stdout
    assert re.findall(r"ptjax-status: (\w+)", watch) == ["running", "running"]

    assert cloud.script("run.sh", *at, "--restart", "--", "second").returncode == 0
    for worker in range(2):
        wait_for(cloud.folder / f"worker-{worker}" / "ptjax-run" / "exit_code")
    assert cloud.exit_codes() == ["0", "0"]
    log = (cloud.folder / "worker-0" / "ptjax-run" / "log").read_text()
    assert re.findall(r"exit code (\d+)", log) == ["143", "0"]  # 143 was not started again


@pytest.mark.slow
def test_a_worker_restarts_the_real_training_which_goes_on(tmp_path: Path) -> None:
    (tmp_path / "ptjax").symlink_to(CLONE)
    python = tmp_path / "ptjax-venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    run, state = tmp_path / "run", tmp_path / "ptjax-run"
    settings = ("--gin.TRAIN_STEPS=60", "--gin.EVAL_PERIOD=8", "--gin.EVAL_EXAMPLES=24")
    arguments = ("--gin_file=quickstart.gin", f"--gin.MODEL_DIR='{run}'", *settings)
    environment = {"HOME": str(tmp_path), "XLA_FLAGS": ""}
    assert script("worker.sh", "start", "3", "0", *arguments, **environment).returncode == 0

    try:
        keep = (state / "pid").read_text().strip()
        wait_for(run / "checkpoints" / "8")
        training = Path(f"/proc/{keep}/task/{keep}/children").read_text().split()
        os.kill(int(training[0]), signal.SIGKILL)
        wait_for(state / "exit_code")
    finally:
        script("worker.sh", "stop", **environment)
    log = (state / "log").read_text()
    assert re.findall(r"worker.sh: .* exit code (\d+)", log) == ["137", "0"], log[-2000:]
    assert (run / "results.json").exists()
    assert "ptjax-status: exit 0" in script("worker.sh", "status", **environment).stdout


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} did not appear"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("answer", "code", "deleted"), [("y", 0, True), ("n", 1, False), ("", 1, False)]
)
def test_delete_asks(cloud: Cloud, answer: str, code: int, deleted: bool) -> None:
    cloud.script("create.sh", *SLICE, "--pause=0")
    command = shlex.join([str(SCRIPTS / "delete.sh"), *AT, "--name=sst2"])
    environment = os.environ | {"CLOUD": str(cloud.folder), "PATH": f"{FAKE}:{os.environ['PATH']}"}
    ran = subprocess.run(
        ["bash", "-c", f"echo '{answer}' | {command}"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == code
    assert "Delete the slice sst2 in us-east5-b of project lab?" in ran.stderr
    assert ("delete" in cloud.calls()) == deleted


@pytest.mark.parametrize(
    ("code", "restarts", "requeued", "ends"),
    [(0, 0, False, 0), (2, 0, False, 2), (1, 0, True, 1), (143, 1, True, 143), (1, 2, False, 1)],
)
def test_slurm_requeues(
    tmp_path: Path, code: int, restarts: int, requeued: bool, ends: int
) -> None:
    (tmp_path / "srun").write_text(f"#!/bin/sh\nexit {code}\n")
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    ran = script(
        "slurm_gpu.sbatch",
        *("--max_restarts=2", "--", "--gin_file=quickstart.gin"),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        SLURM_JOB_ID="7",
        SLURM_RESTART_COUNT=str(restarts),
    )
    assert ran.returncode == ends
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_sky_yaml_runs_what_it_says(tmp_path: Path) -> None:
    task = yaml.safe_load((SCRIPTS / "sky_tpu.yaml").read_text())
    assert task["resources"]["accelerators"] == "tpu-v6e-8"
    given = {"MODEL_DIR": "gs://lab/it", "DATA_DIR": "gs://lab/d", "INITIAL_CHECKPOINT_PATH": "t5"}
    assert {name for name, value in task["envs"].items() if value is None} == set(given)
    environment = os.environ | task["envs"] | given
    environment |= {"HOME": str(tmp_path), "CLOUD": str(tmp_path)}
    environment |= {"PATH": f"{FAKE}:{os.environ['PATH']}"}
    (tmp_path / "plan").write_text("0\n")
    for part in ("setup", "run"):
        subprocess.run(["bash", "-c", task[part]], cwd=CLONE, env=environment, check=True)
    assert (tmp_path / "arguments").read_text().split("\0")[:-1] == [
        *("-m", "ptjax.train", "--gin_file=tasks/sst2.gin", "--gin_file=runs/prompt_tune.gin"),
        "--gin.MODEL_DIR='gs://lab/it'",
        "--gin.DATA_DIR='gs://lab/d'",
        "--gin.INITIAL_CHECKPOINT_PATH='t5'",
    ]


if __name__ == "__main__":
    for file in sorted(TRANSCRIPTS.glob("*.txt")):
        with tempfile.TemporaryDirectory() as home:
            file.write_text(transcript(file.read_text(), Path(home)))
