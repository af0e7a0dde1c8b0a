"""`MODEL_DIR/run.lock`: one run at a time, whoever was killed before, whatever the clocks say."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest
from conftest import At, tune
from etils import epath

import ptjax
from ptjax.errors import InputError, TrainingError
from ptjax.settings import TrainSchedule

HOLD = """
import sys, time
from etils import epath
from ptjax.trainer import lock
with lock.hold(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def lock():
    """Here, so that only the tests that need the module fail without it."""
    from ptjax.trainer import lock

    return lock


def another(**changes) -> bytes:
    """The lock of a run on another machine."""
    fields = {"host": "spot-7", "pid": 4321, "started": 1, "machine": "other", "token": "t"}
    return json.dumps(fields | {"time": time.time()} | changes).encode()


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "run.lock" and "tensorboard" not in path.parts
    }


def test_case_5_3_a_second_run_is_refused_and_changes_nothing(backbone, task, tmp_path):
    """While one trains, the same command is given again."""
    second: list[BaseException] = []
    seen: list[bool] = []

    def start_another(step):
        before = files(tmp_path)
        with pytest.raises(InputError) as refused:
            tune(tmp_path, task, backbone)
        second.append(refused.value)
        seen.append(files(tmp_path) == before)

    schedule = TrainSchedule(train_steps=4, eval_period=2)
    tune(tmp_path, task, backbone, schedule=schedule, callbacks=[At({1}, start_another)])
    assert seen == [True]
    who = re.escape(f"in use by process {os.getpid()} on {socket.gethostname()}")
    assert re.search(rf"{who} \(heartbeat \d+ s ago\)", str(second[0]))
    assert not list(tmp_path.glob("run.lock*"))  # released at the end


def test_case_5_3_killed_and_the_same_again_at_once(lock, tmp_path, caplog):
    """A living process of this machine is refused by name, a dead one's lock is taken over."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path],
        env=os.environ | {"PYTHONPATH": str(Path(ptjax.__file__).parents[1])},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == b"held\n"
        with (
            pytest.raises(InputError, match=f"in use by process {process.pid} on .*; wait"),
            lock.hold(epath.Path(tmp_path)),
        ):
            pass
        process.send_signal(signal.SIGKILL)
        while process.poll() is None:
            time.sleep(0.01)
        started = time.monotonic()
        with caplog.at_level(logging.INFO, logger="absl"), lock.hold(epath.Path(tmp_path)):
            assert time.monotonic() - started < lock.SILENCE / 2
            held = json.loads((tmp_path / "run.lock").read_text())
            assert held["pid"] == os.getpid()
    taken = [line for line in caplog.messages if "taking over" in line]
    assert len(taken) == 1 and f"process {process.pid} on " in taken[0]
    assert not (tmp_path / "run.lock").exists()


def test_case_5_3_a_pid_that_was_given_again_is_another_process(lock, tmp_path):
    mine = lock.Holder.here()
    if mine.started is None:  # no /proc
        assert mine.is_alive
        return
    other = {"host": mine.host, "machine": mine.machine, "started": mine.started - 1}
    (tmp_path / "run.lock").write_bytes(another(pid=os.getpid(), **other))
    with lock.hold(epath.Path(tmp_path)) as held:
        held.check()


@pytest.mark.parametrize(
    "text",
    [
        *(another(), another(time=time.time() + 9e5), another(time=10**400), b"", b"{cut"),
        *(b"[" * 10_000, another(host="h" * 5000), another(pid=10**3000)),
    ],
    ids=range(8),
)
def test_case_5_3_a_silent_lock_of_another_machine_is_taken_over(
    lock, tmp_path, monkeypatch, caplog, text
):
    """Whatever its clock said, and also if the file is damaged."""
    monkeypatch.setattr(lock, "SILENCE", 0.3)
    monkeypatch.setattr(lock, "POLL", 0.02)
    (tmp_path / "run.lock").write_bytes(text)
    started = time.monotonic()
    with caplog.at_level(logging.INFO, logger="absl"), lock.hold(epath.Path(tmp_path)):
        assert time.monotonic() - started > 0.3
    assert sum("taking over the lock" in line for line in caplog.messages) == 1
    assert all(len(line) < 500 for line in caplog.messages)


def test_case_5_3_a_lock_that_the_storage_calls_old_is_not_watched(lock, tmp_path):
    path = tmp_path / "run.lock"
    path.write_bytes(another())
    hour_ago = time.time() - 3600
    os.utime(path, (hour_ago, hour_ago))
    with lock.hold(epath.Path(tmp_path)):  # SILENCE is two minutes here
        pass


def test_case_5_3_a_beating_lock_of_another_machine_is_refused(lock, tmp_path, monkeypatch):
    """Though its clock is an hour behind."""
    monkeypatch.setattr(lock, "POLL", 0.02)
    path, ended = tmp_path / "run.lock", threading.Event()
    path.write_bytes(another(time=time.time() - 3600))

    def beat() -> None:
        while not ended.wait(0.1):
            path.write_bytes(another(time=time.time() - 3600))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with (
            pytest.raises(InputError, match="in use by process 4321 on spot-7"),
            lock.hold(epath.Path(tmp_path)),
        ):
            pass
    finally:
        ended.set()
        thread.join()
    assert json.loads(path.read_text())["host"] == "spot-7"


def test_case_5_3_of_many_at_once_one_gets_it(lock, tmp_path):
    (tmp_path / "run.lock").write_bytes(another())
    os.utime(tmp_path / "run.lock", (0, 0))
    locks = [lock.Lock(epath.Path(tmp_path)) for _ in range(16)]
    ready, outcomes = threading.Barrier(16), []

    def start(one) -> None:
        ready.wait()
        try:
            outcomes.append(one.try_once())
        except InputError:
            outcomes.append(False)

    threads = [threading.Thread(target=start, args=(one,)) for one in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in locks:
        one.release()
    assert sorted(outcomes) == [False] * 15 + [True]


def test_case_5_3_the_heartbeat_renews_and_does_not_outlive_the_lock(lock, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.02)
    path = tmp_path / "run.lock"
    with lock.hold(epath.Path(tmp_path)) as held:
        first = json.loads(path.read_text())
        while json.loads(path.read_text())["time"] == first["time"]:
            time.sleep(0.01)
        assert json.loads(path.read_text()) | {"time": 0} == first | {"time": 0}
        held.check()
        beating = [thread for thread in threading.enumerate() if thread.name == "run.lock"]
        assert [thread.daemon for thread in beating] == [True]
    assert not beating[0].is_alive()


def test_case_5_3_a_run_whose_lock_was_taken_over_writes_nothing_more(
    lock, backbone, task, tmp_path, monkeypatch
):
    """As after the machine slept for an hour: the heartbeat's thread has not noticed yet."""
    seen = {}

    def wakes(step):
        while not (tmp_path / "checkpoints" / "3").exists():  # written in the background
            time.sleep(0.01)
        monkeypatch.setattr(lock, "HEARTBEAT", 0.0)
        (tmp_path / "run.lock").write_bytes(another())
        seen.update(files(tmp_path))

    with pytest.raises(TrainingError, match="was taken over by process 4321 on spot-7") as lost:
        tune(tmp_path, task, backbone, callbacks=[At({4}, wakes)])
    assert len(str(lost.value).splitlines()) == 1
    assert seen and files(tmp_path) == seen
    assert json.loads((tmp_path / "run.lock").read_text())["token"] == "t"  # not ours to remove


def test_case_5_3_a_dry_run_and_a_refused_run_leave_nothing(lock, tmp_path):
    with lock.hold(epath.Path(tmp_path / "dry"), needed=False) as held:
        assert held is None
    with pytest.raises(KeyError), lock.hold(epath.Path(tmp_path / "new" / "run")):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    assert jax.process_count() == 1
