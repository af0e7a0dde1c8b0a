"""Two real processes with four devices each do what one process with eight does, and survive."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PATIENCE, outcome, without_seconds
from safetensors.numpy import load_file
from tiny import save_tiny

from ptjax.launch import reserved_port

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]
HEARTBEAT = 20  # JAX sends one every half of it, which a busy machine may delay

GIN = """
from __gin__ import dynamic_registration
import ptjax

include 'runs/prompt_tune.gin'

ptjax.tune.task = @ptjax.Task()
ptjax.Task.name = 'words'
ptjax.Task.data_dir = %DATA
ptjax.Task.splits = {'train': 'train.jsonl', 'validation': 'validation.jsonl',
                     'test': 'test.jsonl'}
ptjax.Task.inputs = 'text: {text}'
ptjax.Task.label = 'label'
ptjax.Task.verbalizer = {'positive': 'positive', 'negative': 'negative'}
PROMPT_LENGTH = 4
TASK_FEATURE_LENGTHS = {'inputs': 32, 'targets': 4}
EVAL_PERIOD = 3
BATCH_SIZE = 8
LEARNING_RATE = 0.03
LEARNING_RATE_SCALE = 'embedding_rms'
RANDOM_SEED = 3
ptjax.TrainSchedule.log_period = 2
ptjax.Evaluation.batch_size = 16
"""
BANK = """
from __gin__ import dynamic_registration
import ptjax

ptjax.tune.members = @ptjax.sweep()
ptjax.sweep.seeds = (1, 2)
PACK = True
"""
STEPS = 48


class Machines:
    """Starts commands on a tiny random backbone; what is left of them is killed at the end."""

    def __init__(self, folder: Path, backbone: Any, task: Any) -> None:
        self.folder, self.started = folder, []
        text = GIN + f"DATA = '{task.data_dir}'\nINITIAL_CHECKPOINT_PATH = '{backbone.name}'\n"
        (folder / "run.gin").write_text(text)
        (folder / "bank.gin").write_text(BANK)
        config = dataclasses.replace(backbone.config, num_heads=8)
        save_tiny(folder / "eight_heads", config, tokenizer=backbone.tokenizer)

    def flags(self, name: str, *more: str, steps: int = STEPS) -> list[str]:
        """Of training in the folder `name`."""
        directory = f"--gin.MODEL_DIR='{self.folder / name}'"
        file = f"--gin_file={self.folder / 'run.gin'}"
        return [file, directory, f"--gin.TRAIN_STEPS={steps}", *more]

    def start(self, log: str, *command: str, devices: int = 4) -> subprocess.Popen[bytes]:
        """`python -m ptjax.COMMAND`, with all it says added to the file `log`."""
        environment = os.environ | {
            # Of a flag given twice the last one counts.
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} "
            f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(REPOSITORY),
        }
        with (self.folder / log).open("ab") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=self.folder,
                env=environment,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def run(self, log: str, *command: str, devices: int = 4) -> str:
        """The same to its end, which has to be a good one; what it said."""
        code = self.start(log, *command, devices=devices).wait(timeout=PATIENCE)
        said = (self.folder / log).read_text()
        assert code == 0, said[-3000:]
        return said

    def pair(
        self, name: str, log: str, other_name: str | None = None
    ) -> list[subprocess.Popen[bytes]]:
        """Process 0 and 1 of a training, as on two machines, when a new checkpoint is there.

        `other_name` is the folder of process 1, where it is not that of process 0.
        """
        begun = newest(self.folder / name)
        with reserved_port() as port:
            processes = [
                self.start(
                    f"{log}{number}",
                    *("ptjax.launch", "train", *self.flags(folder)),
                    f"--coordinator_address=127.0.0.1:{port}",
                    "--num_processes=2",
                    f"--process_id={number}",
                    f"--heartbeat_timeout_seconds={HEARTBEAT}",
                )
                for number, folder in enumerate((name, other_name or name))
            ]
            while newest(self.folder / name) == begun and all(p.poll() is None for p in processes):
                time.sleep(0.02)
        return processes


def newest(directory: Path) -> int:
    """Step of the newest complete checkpoint."""
    folder = directory / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def child_of(launcher: subprocess.Popen[bytes]) -> int:
    """The process that a launcher started and watches."""
    found = subprocess.run(["pgrep", "-P", str(launcher.pid)], check=True, capture_output=True)
    return int(found.stdout)


@pytest.fixture(scope="module")
def machines(
    backbone: Any, task: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machines]:
    made = Machines(tmp_path_factory.mktemp("machines"), backbone, task)
    yield made
    for process in made.started:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=PATIENCE)


@pytest.fixture(scope="module")
def one(machines: Machines) -> Path:
    """The run on one process with eight devices."""
    machines.run("one.log", "ptjax.train", *machines.flags("one"), devices=8)
    return machines.folder / "one"


@pytest.fixture(scope="module")
def two(machines: Machines) -> Path:
    """The same run on two processes with four devices each."""
    machines.run("two.log", "ptjax.launch", "--processes=2", "train", *machines.flags("two"))
    return machines.folder / "two"


def numbers(directory: Path) -> tuple[list[set[str]], np.ndarray]:
    """Names and values of all lines of metrics.jsonl, but for times."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(x).items() if "time/" not in k} for x in lines]
    return [set(row) for row in rows], np.array([v for row in rows for v in row.values()])


def assert_alike(directory: Path, expected: Path) -> None:
    """The same files, evaluations and results; numbers up to the order of sums.

    Sums over eight devices are added in another order when a network lies between them. Adafactor
    lets the differences grow: they stay below 1e-4 of the entries' RMS, 1, over the run.
    """
    names, values = numbers(directory)
    expected_names, expected_values = numbers(expected)
    assert names == expected_names
    np.testing.assert_allclose(values, expected_values, rtol=1e-4)
    files = sorted(p.relative_to(expected) for p in expected.rglob("*.safetensors"))
    assert files == sorted(p.relative_to(directory) for p in directory.rglob("*.safetensors"))
    for file in files:
        arrays, wanted = load_file(directory / file), load_file(expected / file)
        for name, array in wanted.items():
            np.testing.assert_allclose(arrays[name], array, rtol=0, atol=1e-4, err_msg=f"{file}")
    results = [
        without_seconds(json.loads((d / "results.json").read_text())) for d in (directory, expected)
    ]
    assert results[0] == results[1]
    checkpoints = [
        sorted(p.name for p in (d / "checkpoints").iterdir()) for d in (directory, expected)
    ]
    assert checkpoints[0] == checkpoints[1]


def test_training_equals_that_of_one_process(one: Path, two: Path) -> None:
    assert_alike(two, one)


def test_a_dry_run_of_several_processes_makes_no_model_dir(machines: Machines) -> None:
    launched = ("ptjax.launch", "--processes=2", "train", *machines.flags("dry"), "--dry_run")
    assert "trainable parameters" in machines.run("dry.log", *launched)
    assert not (machines.folder / "dry").exists()


def test_only_the_first_process_speaks_and_writes(machines: Machines, two: Path) -> None:
    said = (machines.folder / "two.log").read_text()
    assert said.count("2 processes with 8 devices, on ") == 1
    assert said.count(f"step {STEPS}/{STEPS}  loss") == 1
    assert said.count("words, accuracy on test:") == 1
    assert len(list((two / "tensorboard").iterdir())) == 1
    steps = [json.loads(x)["step"] for x in (two / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == STEPS // 2 + STEPS // 3
    # Warnings come from all, and say from which.
    assert "process 0: warning: 11 of 48 inputs" in said
    assert "process 1: warning: 11 of 48 inputs" in said
    assert not [path for path in two.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("command", "flags", "answers"),
    [
        ("evaluate", ["--split=test", "--output=evaluated", "--force"], "evaluated"),
        ("infer", ["--input=texts.txt", "--output=inferred", "--force", "--decode"], "inferred"),
    ],
)
def test_evaluation_equals_that_of_one_process(
    machines: Machines, two: Path, command: str, flags: list[str], answers: str
) -> None:
    (machines.folder / "texts.txt").write_text("lovely\nawful and dull\nbright\n")
    flags = [f"--model_dir={two}", *flags]
    said = [
        machines.run(f"{command}.log", f"ptjax.{command}", *flags, devices=8),
        machines.run(f"{command}2.log", "ptjax.launch", "--processes=2", command, *flags),
    ]
    rows = [json.loads(line) for line in (machines.folder / answers).read_text().splitlines()]
    assert len(rows) == {"evaluate": 16, "infer": 3}[command]
    if command == "evaluate":
        scores = [json.loads(text[text.index("{") : text.rindex("}") + 1]) for text in said]
        assert scores[0] == scores[1]
        assert scores[0]["value"] == np.mean([r["prediction"] == r["targets"] for r in rows])


@pytest.mark.parametrize(
    "settings",
    [
        # Every weight lies across the two processes.
        [
            "--gin.MESH='1x8'",
            "--gin.INITIAL_CHECKPOINT_PATH='eight_heads'",
            "--gin.ptjax.RunSettings.method=@ptjax.ModelTuning()",
            "--gin.LEARNING_RATE=0.001",
            "--gin.LEARNING_RATE_SCALE='absolute'",
        ],
        # Rows lie across the two processes, weights over the devices of each.
        ["--gin_file=bank.gin", "--gin.MESH='4x2'"],
    ],
    ids=["model tuning, weights over both", "a packed bank, rows over both"],
)
def test_other_ways_equal_those_of_one_process(
    machines: Machines, settings: list[str], request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    flags = [machines.flags(f"{name} {count}", *settings, steps=9) for count in (1, 2)]
    machines.run(f"{name} 1.log", "ptjax.train", *flags[0], devices=8)
    machines.run(f"{name} 2.log", "ptjax.launch", "--processes=2", "train", *flags[1])
    assert_alike(machines.folder / f"{name} 2", machines.folder / f"{name} 1")


READS = """
import argparse
import sys

import jax

from ptjax.backbones.load import load_backbone
from ptjax.cli import distributed
from ptjax.interop import bytes_on_disk

parser = argparse.ArgumentParser()
distributed.add_flags(parser)
distributed.start(parser.parse_args())
read, read_part = [], bytes_on_disk.read_part


def counting(*arguments):
    part = read_part(*arguments)
    read.append(part.nbytes)
    return part


bytes_on_disk.read_part = counting
for settings in ({}, {"scan_layers": True}):
    read.clear()
    backbone = load_backbone("eight_heads", dtype="float32", mesh="1x8", **settings)
    divided = [x for x in jax.tree.leaves(backbone.variables) if not x.is_fully_replicated]
    whole = [x for x in jax.tree.leaves(backbone.variables) if x.is_fully_replicated]
    held = sum(shard.data.nbytes for x in divided for shard in x.addressable_shards)
    assert 2 * held == sum(x.nbytes for x in divided) > 0
    # Of norm scales, which all devices hold, each process reads one copy.
    assert sum(read) == held + sum(x.nbytes for x in whole), (sum(read), held)
"""


def test_a_process_reads_the_shards_of_its_own_devices(machines: Machines) -> None:
    (machines.folder / "reads.py").write_text(READS)
    with reserved_port() as port:
        flags = [f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2"]
        started = [
            machines.start(f"reads{i}.log", "reads", *flags, f"--process_id={i}") for i in range(2)
        ]
        codes = [process.wait(timeout=PATIENCE) for process in started]
    assert codes == [0, 0], [(machines.folder / f"reads{i}.log").read_text() for i in range(2)]


def interrupt(machines: Machines, name: str, number: int, victim: int) -> list[str]:
    """Sends a signal to one of two processes in the middle of the run; what both said.

    Asserts that both end, and not well.
    """
    log = f"{name}-{signal.Signals(number).name}-{victim}-"
    processes = machines.pair(name, log)
    os.kill(child_of(processes[victim]), number)
    codes = [process.wait(timeout=PATIENCE) for process in processes]
    lost = {signal.SIGTERM: (143, 143), signal.SIGKILL: (137, 1) if victim == 0 else (1, 137)}
    said = [(machines.folder / f"{log}{i}").read_text() for i in range(2)]
    assert tuple(codes) == lost[signal.Signals(number)], "\n\n".join(said)
    assert not (machines.folder / name / "results.json").exists()
    return said


def test_stopped_and_lost_processes(machines: Machines, one: Path, two: Path) -> None:
    """Stopped, killed, killed at process 0: in the end everything is as if nothing had been."""
    said = interrupt(machines, "hard", signal.SIGTERM, victim=1)
    assert f"saved at step {newest(machines.folder / 'hard')};" in said[0]

    for victim in (1, 0):
        said = interrupt(machines, "hard", signal.SIGKILL, victim=victim)
        errors = [[x for x in text.splitlines() if x.startswith("error: ")] for text in said]
        [own], [other] = errors[victim], errors[1 - victim]
        host = socket.gethostname()
        assert own.startswith(f"error: process {victim} on {host} was killed by signal 9 (SIGKILL)")
        assert other.startswith(f"error: process {victim} on {host} was lost")
        # No trace, whether the heartbeat, a broken collective or Gloo, which then aborts, told it.
        traces = ("stack trace", "Traceback", "terminate called", "what():")
        assert not any(trace in text for trace in traces for text in said)

    # The last checkpoint is whole: one process alone goes on from it as well.
    subprocess.run(["cp", "-r", machines.folder / "hard", machines.folder / "alone"], check=True)
    machines.run("hard.log", "ptjax.launch", "--processes=2", "train", *machines.flags("hard"))
    assert outcome(machines.folder / "hard") == outcome(two)
    machines.run("alone.log", "ptjax.train", *machines.flags("alone"), devices=8)
    assert_alike(machines.folder / "alone", one)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gin.PROMPT_LENGTH=0"], "error: PROMPT_LENGTH must be >= 1, got 0"),
        (["--gin.load_backbone.path='nowhere/at/all'"], "error: "),
    ],
)
def test_bad_input_is_said_and_ends_all_with_2(
    machines: Machines, flags: list[str], said: str
) -> None:
    command = ["ptjax.launch", "--processes=2", "train", *machines.flags("bad", *flags)]
    started = machines.start("bad.log", *command)
    assert started.wait(timeout=PATIENCE) == 2
    assert f"process 1: {said}" in (machines.folder / "bad.log").read_text()


def test_a_model_dir_that_is_not_shared_is_refused(machines: Machines) -> None:
    """As on two machines with a disk of their own each."""
    processes = machines.pair("here", "unshared", "there")
    assert [process.wait(timeout=PATIENCE) for process in processes] == [2, 2]
    for number in range(2):
        said = (machines.folder / f"unshared{number}").read_text()
        assert f"process {number}: error: MODEL_DIR = " in said
        assert "process 1 does not see what process 0 writes" in said


def test_processes_that_never_come_are_given_up(machines: Machines) -> None:
    alone = ["--coordinator_address=127.0.0.1:1", "--num_processes=2", "--process_id=1"]
    alone.append("--initialization_timeout_seconds=2")
    started = machines.start("never.log", "ptjax.launch", "train", *machines.flags("new", *alone))
    assert started.wait(timeout=PATIENCE) == 1
    [line] = (machines.folder / "never.log").read_text().splitlines()
    assert line.startswith("error: the processes did not connect")
