"""A launcher that ends leaves no process of its command behind."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE

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
    end = time.monotonic() + PATIENCE
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
    assert launcher.wait(timeout=PATIENCE) == 128 + signal.SIGTERM
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
    watch.reported, watch.interrupted, watch.children = False, False, [child]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Gone())
        assert watch.wait() == 128 + signal.SIGKILL


GLOO = """terminate called after throwing an instance of 'gloo::EnforceNotMet'
  what():  [enforce fail at external/gloo/gloo/transport/tcp/pair.cc:459] op.preamble.length <= \
op.nbytes. 6000 vs 2000. Received data size doesn't match expected size. Is there a distributed \
collective mismatch in your code?
"""
"""Written by jaxlib 0.10.2 in one of two processes that gathered arrays of unequal sizes."""
AGAIN = "the last checkpoint is intact; rerun the same command to resume"


def watched(tmp_path: Path, *scripts: str) -> int:
    """The launcher's exit code for children that are these shell scripts, on the machines a, b.."""
    launch = importlib.import_module("ptjax.launch")
    watch = launch._Watch()
    for number, script in enumerate(scripts):
        identity = tmp_path / f"{number}.json"
        hosts = [chr(ord("a") + i) for i in range(max(2, len(scripts)))]
        identity.write_text(json.dumps({"process": number, "hosts": hosts}))
        watch.start(["sh", "-c", script], {"GLOO": GLOO}, str(identity), number)
    code = watch.wait()
    for child in watch.children:
        child.process.stdout.close()
        child.process.stderr.close()
    os.close(watch.pipe)
    os.close(watch._alive)
    return code


@pytest.fixture
def unhandled(monkeypatch):
    """The signals of the test process stay as they are."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)


@pytest.mark.usefixtures("unhandled")
@pytest.mark.parametrize("before", ["", "printf 'step 3/9  loss 2.1 ' >&2; "])
def test_a_process_that_gloo_aborts_names_the_lost_one(tmp_path, capfd, before):
    """In one line, also where gloo's words follow those of another thread in a line."""
    assert watched(tmp_path, before + "printf '%s' \"$GLOO\" >&2; kill -ABRT $$") == 1
    assert capfd.readouterr().err == (
        f"error: process 1 on b was lost during a message, or runs another command; {AGAIN}\n"
    )


@pytest.mark.usefixtures("unhandled")
def test_of_a_killed_and_an_aborted_process_the_killed_one_is_the_cause(
    tmp_path, capfd, monkeypatch
):
    launch = importlib.import_module("ptjax.launch")
    monkeypatch.setattr(launch, "GLOO_GRACE", PATIENCE)
    aborted = "printf '%s' \"$GLOO\" >&2; kill -ABRT $$"
    assert watched(tmp_path, aborted, "sleep 0.5; kill -KILL $$") == 128 + signal.SIGKILL
    assert capfd.readouterr().err == (
        f"error: process 1 on b was killed by signal 9 (SIGKILL); {AGAIN}\n"
    )


@pytest.mark.usefixtures("unhandled")
def test_any_other_abort_is_told_as_it_is(tmp_path, capfd):
    text = "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad\n"
    assert watched(tmp_path, f'printf "{text}" >&2; kill -ABRT $$') == 1
    assert capfd.readouterr().err == (
        f"{text}error: process 0 on a was aborted: std::bad; {AGAIN}\n"
    )


def test_a_reserved_port_is_given_to_nobody_but_its_coordinator():
    launch = importlib.import_module("ptjax.launch")
    with launch.reserved_port() as port, launch.reserved_port() as other:
        assert port != other
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
        with socket.socket() as coordinator:
            coordinator.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            coordinator.bind(("", port))
            coordinator.listen()
            socket.create_connection(("127.0.0.1", port)).close()
