"""A launcher that ends leaves no process of its command behind."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# As at a terminal, whatever these tests run under.
LAUNCH = """
import importlib, signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)
importlib.import_module("ptjax.launch").main()
"""


def state_of(pid: int) -> str:
    """The kernel's letter for a process; "" where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def waiting(tmp_path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A launcher of a command that waits for its standard input, and the command's pid."""
    command = [sys.executable, "-c", LAUNCH, "infer", "--prompt=none", "--input=-"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as launcher:
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
        wait_until(lambda: bool(children.read_text().split()))
        child = int(children.read_text().split()[0])
        yield launcher, child
        for pid in (launcher.pid, child):
            if state_of(pid) not in ("", "Z"):
                os.kill(pid, signal.SIGKILL)


def test_a_killed_launcher_takes_its_command_along(waiting):
    launcher, child = waiting
    launcher.kill()
    launcher.wait()
    wait_until(lambda: state_of(child) in ("", "Z"))


def test_a_closed_terminal_stops_the_command(waiting):
    launcher, child = waiting
    launcher.send_signal(signal.SIGHUP)
    assert launcher.wait(timeout=120) == 128 + signal.SIGTERM
    assert state_of(child) in ("", "Z")


def test_a_signal_between_two_starts_stops_both(monkeypatch, tmp_path):
    launch = importlib.import_module("ptjax.launch")
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handler is called by hand
    watch = launch._Watch()
    watch._pass_on(signal.SIGTERM, None)
    watch.start(["sleep", "60"], {}, str(tmp_path / "0.json"), 0)
    assert watch.wait() == 128 + signal.SIGTERM
    for stream in (watch.children[0].process.stdout, watch.children[0].process.stderr):
        stream.close()
    os.close(watch.pipe)
    os.close(watch._alive)


def test_under_nohup_a_closed_terminal_stops_nothing():
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)
    }
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        watch = importlib.import_module("ptjax.launch")._Watch()
        os.close(watch.pipe)
        os.close(watch._alive)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_lost_process_is_no_success_where_nobody_reads_the_error(monkeypatch):
    """The launcher's exit code says it all the same."""

    class Gone:
        def write(self, text: str) -> None:
            raise BrokenPipeError

    launch = importlib.import_module("ptjax.launch")
    child = launch._Child(subprocess.Popen(["sleep", "60"]), "", 0)
    child.process.kill()
    child.process.wait()
    watch = object.__new__(launch._Watch)
    watch.said, watch.interrupted, watch.children = False, False, [child]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Gone())
        assert watch.wait() == 128 + signal.SIGKILL
