"""The parts of MODEL_DIR's lock: what is a holder, who is alive, what a failing storage means."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from ptjax.errors import InputError, TrainingError
from ptjax.trainer import lock
from ptjax.trainer.lock import Holder, Lock


def holder_of(**changes: Any) -> Holder:
    fields = {"host": "spot-7", "pid": 4321, "started": 1, "machine": "other", "token": "t"}
    return Holder(**fields | changes)


def saved(**changes: Any) -> bytes:
    """The text of such a holder's lock, of now."""
    fields = {"host": "spot-7", "pid": 4321, "started": 1, "machine": "other", "token": "t"}
    return json.dumps(fields | {"time": time.time()} | changes).encode()


@pytest.fixture
def held(tmp_path) -> Any:
    """A lock that this process holds, released at the end."""
    taken = Lock(epath.Path(tmp_path))
    assert taken.try_once()
    yield taken
    taken.release()


# What the file says


def test_a_lock_is_read_with_its_age():
    found, age = lock._parse(saved(time=time.time() - 50))
    assert found == holder_of() and age == pytest.approx(50, abs=5)
    assert str(found) == "process 4321 on spot-7"
    assert lock._parse(saved(started=None))[0] == holder_of(started=None)
    assert lock._parse(saved(pid=(1 << 32) - 1))[0] is not None
    assert lock._parse(saved(host="h" * 255))[0] is not None


@pytest.mark.parametrize(
    "changes",
    [
        *({"pid": 0}, {"pid": -1}, {"pid": 1 << 32}, {"pid": 1.5}, {"pid": "1"}, {"pid": None}),
        *({"started": "1"}, {"started": 1.5}),
        *({"host": "h" * 256}, {"host": "a\nb"}, {"host": "\x1b[2J"}, {"host": 5}, {"host": None}),
        *({"time": "soon"}, {"time": None}, {"more": 1}),
    ],
)
def test_a_lock_that_no_run_writes_has_no_holder(changes):
    """A pid goes to `kill`, and a host to the terminal."""
    assert lock._parse(saved(**changes)) == (None, 0.0)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b"\xff", b"{}", b'{"time": 1}'])
def test_what_is_not_a_lock_has_no_holder(text):
    assert lock._parse(text) == (None, 0.0)


# Who is alive


def test_this_process_is_here_and_alive():
    here = Holder.here()
    assert here.is_here and here.is_alive
    assert (here.host, here.pid) == (socket.gethostname(), os.getpid())
    assert Holder.here().token != here.token and len(here.token) == 32
    assert not holder_of(host=here.host).is_here
    assert not holder_of(machine=here.machine).is_here


@pytest.mark.parametrize(
    ("error", "alive"),
    [(None, True), (PermissionError, True), (ProcessLookupError, False)],
)
def test_without_proc_a_signal_tells_who_is_alive(monkeypatch, error, alive):
    """Another user's process refuses it."""
    sent = []

    def kill(pid: int, number: int) -> None:
        sent.append((pid, number))
        if error is not None:
            raise error

    monkeypatch.setattr(os, "kill", kill)
    assert holder_of(started=None).is_alive == alive
    assert sent == [(4321, 0)]


def test_a_zombie_has_ended():
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        deadline = time.monotonic() + 60
        # It stays a zombie until it is waited for.
        while lock._started(child.pid) is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert lock._started(child.pid) is None
        assert not holder_of(pid=child.pid, started=7).is_alive


# Taking and losing it


def test_of_two_on_one_machine_the_second_is_told_how_long_ago_the_first_was_seen(held, tmp_path):
    who = f"MODEL_DIR = {tmp_path}: in use by process {os.getpid()} on {socket.gethostname()} "
    with pytest.raises(InputError, match=rf"^{re.escape(who)}\(heartbeat \d+ s ago\); wait for"):
        Lock(epath.Path(tmp_path)).try_once()
    assert str(held._in_use(None, -5.0)) == (  # by the clock of another machine
        f"MODEL_DIR = {tmp_path}: in use by another run (heartbeat 0 s ago); wait for it to end, "
        "or choose another MODEL_DIR"
    )


def test_a_process_of_this_machine_that_is_alive_but_silent_is_watched(tmp_path, caplog):
    """It may hang, or its clock may be ahead."""
    caplog.set_level("INFO", logger="absl")
    here = Holder.here()
    mine = {"host": here.host, "machine": here.machine, "pid": here.pid, "started": here.started}
    for age in (lock.SILENCE + 9, -60):
        caplog.clear()
        (tmp_path / "run.lock").write_bytes(saved(**mine, time=time.time() - age))
        assert not Lock(epath.Path(tmp_path)).try_once()
        assert caplog.messages == [
            f"{tmp_path} is locked by {here}; taking over if it stays silent for 120 s"
        ]


def test_a_watched_lock_is_free_after_the_silence_and_in_use_if_it_changes(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    path, watching = tmp_path / "run.lock", Lock(epath.Path(tmp_path))
    path.write_bytes(saved())
    assert not watching.try_once()
    now[0] += lock.SILENCE - 1
    assert not watching.try_once()
    now[0] += 1
    assert watching.try_once()
    watching.release()
    path.write_bytes(saved())
    watching = Lock(epath.Path(tmp_path))
    assert not watching.try_once()
    time.sleep(0.01)  # another version of the file: another time, and another inode
    path.unlink()
    path.write_bytes(saved(token="u"))
    with pytest.raises(InputError, match=r"in use by process 4321 on spot-7 \(heartbeat"):
        watching.try_once()


def test_the_lock_says_who_holds_it_and_is_removed(tmp_path):
    taken = Lock(epath.Path(tmp_path))
    assert taken.try_once()
    found, age = lock._parse((tmp_path / "run.lock").read_bytes())
    assert found == taken.holder and 0 <= age < 30
    taken.check()
    taken.release()
    assert not (tmp_path / "run.lock").exists()
    taken.check()  # it is over, and nothing is lost


def test_folders_that_were_made_for_the_lock_go_if_nothing_is_in_them(tmp_path):
    (tmp_path / "there").mkdir()
    taken = Lock(epath.Path(tmp_path / "there" / "new" / "run"))
    assert taken.try_once() and (tmp_path / "there" / "new" / "run" / "run.lock").exists()
    taken.release()
    assert list((tmp_path / "there").iterdir()) == []
    taken = Lock(epath.Path(tmp_path / "there" / "new" / "run"))
    assert taken.try_once()
    (tmp_path / "there" / "new" / "kept").write_text("")
    taken.release()
    assert [path.name for path in (tmp_path / "there" / "new").iterdir()] == ["kept"]


@pytest.mark.parametrize(
    ("text", "what"),
    [(saved(), "taken over by process 4321 on spot-7"), (b"x", "removed or replaced"), (None, "r")],
)
def test_who_took_it_over_is_said_and_it_is_not_removed(held, tmp_path, monkeypatch, text, what):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.0)
    path = tmp_path / "run.lock"
    path.unlink()
    if text is not None:
        path.write_bytes(text)
    for _ in range(2):  # and stays said
        with pytest.raises(TrainingError, match=f"{path} was {what}.* while this run held it; not"):
            held.check()
    held.release()
    assert path.exists() == (text is not None)


def test_a_check_costs_nothing_while_heartbeats_succeed(held, monkeypatch):
    beats = []
    monkeypatch.setattr(Lock, "_beat", lambda self: beats.append(1))
    clocks = lock._clocks()
    for pause, count in ((0.0, 0), (lock.HEARTBEAT, 0), (1.6 * lock.HEARTBEAT, 1)):
        later = clocks[0] + pause, clocks[1] + pause
        monkeypatch.setattr(lock, "_clocks", lambda later=later: later)
        held._confirmed = clocks
        held.check()
        assert len(beats) == count


@pytest.mark.parametrize(("silent", "ends"), [(100.0, False), (121.0, True)])
def test_a_lock_that_cannot_be_renewed_ends_the_run_after_the_silence(
    held, tmp_path, monkeypatch, silent, ends
):
    """Until then nobody else takes it over."""

    def fails(self: Lock) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(Lock, "_beat", fails)
    held._confirmed = tuple(clock - silent for clock in lock._clocks())
    if not ends:
        held.check()
        return
    with pytest.raises(TrainingError) as ended:
        held.check()
    assert str(ended.value) == (
        f"{tmp_path / 'run.lock'} could not be renewed for 120 s (no route to host); nothing more "
        "is written. Rerun the same command to resume from the last checkpoint"
    )


def test_either_clock_tells_of_a_pause(monkeypatch):
    """A machine slept, or a virtual machine was frozen."""
    monkeypatch.setattr(lock, "_clocks", lambda: (10.0, 20.0))
    assert lock._elapsed((7.0, 19.0)) == 3.0
    assert lock._elapsed((9.0, 15.0)) == 5.0
    monkeypatch.undo()
    first, second = lock._clocks()
    assert abs(second - time.time()) < 30 and first > 0


def test_heartbeats_that_fail_are_said_once_until_one_succeeds(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="absl")
    monkeypatch.setattr(lock, "HEARTBEAT", 0.001)
    outcomes, done = iter([False, False, True, True, False]), threading.Event()

    def beat(self: Lock) -> None:
        succeeds = next(outcomes, None)
        if succeeds is None:
            done.set()
        elif not succeeds:
            raise OSError("no route to host")

    monkeypatch.setattr(Lock, "_beat", beat)
    with lock.hold(epath.Path(tmp_path)):
        assert done.wait(30)
    said = [line for line in caplog.messages if "could not be renewed" in line]
    assert said == [f"{tmp_path / 'run.lock'} could not be renewed: no route to host"] * 2


# What cannot be written to


def test_a_folder_that_is_no_url_cannot_be_written_to():
    """tensorstore refuses it with a ValueError."""
    with pytest.raises(lock.NotWritableError, match="MODEL_DIR = gs://A/run: it cannot be written"):
        Lock(epath.Path("gs://A/run")).try_once()


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (FileExistsError(errno.EEXIST, "File exists"), "Not a directory"),
        (OSError("a reason"), "a reason"),
        (ValueError("NOT_FOUND: bucket\nmore"), "NOT_FOUND: bucket"),
    ],
)
def test_why_it_cannot_be_written_to(error, why):
    refused = lock.cannot_write(epath.Path("/run"), error)
    assert str(refused) == f"MODEL_DIR = /run: it cannot be written to ({why}); choose another"


def test_a_full_disk_while_the_lock_is_held_is_one_line_and_other_errors_are_their_own(tmp_path):
    with pytest.raises(TrainingError) as full, lock.hold(epath.Path(tmp_path)):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(full.value) == (
        f"MODEL_DIR = {tmp_path}: it is full (No space left on device); free some space and rerun "
        "the same command to resume from the last checkpoint"
    )
    with pytest.raises(OSError, match="Input/output"), lock.hold(epath.Path(tmp_path)):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert list(tmp_path.iterdir()) == []


def test_the_age_is_that_of_the_file_or_unknown(tmp_path: Path):
    path = epath.Path(tmp_path / "file")
    path.write_text("")
    os.utime(path, (time.time() - 500, time.time() - 500))
    assert lock._age_by_storage(path) == pytest.approx(500, abs=30)
    assert lock._age_by_storage(epath.Path(tmp_path / "none")) == 0.0


@pytest.mark.parametrize(
    ("outcome", "kind"), [(1, None), (0, None), (2, InputError), (3, lock.NotWritableError)]
)
def test_every_process_has_the_first_ones_outcome(tmp_path, monkeypatch, outcome, kind):
    """As on the second of two processes, which does not lock by itself."""
    monkeypatch.setattr(lock.processes, "first", lambda: False)
    monkeypatch.setattr(lock.processes, "of_first", lambda number: outcome)
    other = Lock(epath.Path(tmp_path))
    if kind is None:
        assert lock._agreed(other) == bool(outcome)
    else:
        with pytest.raises(InputError, match="process 0 cannot lock it; see its message") as raised:
            lock._agreed(other)
        assert type(raised.value) is kind
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.parametrize("error", [InputError("in use"), lock.NotWritableError("not writable")])
def test_the_first_process_tells_the_others_and_raises_its_own_error(tmp_path, monkeypatch, error):
    told: list[int] = []

    def fails(self: Lock) -> bool:
        raise error

    monkeypatch.setattr(Lock, "try_once", fails)
    monkeypatch.setattr(lock.processes, "of_first", lambda number: told.append(number) or number)
    with pytest.raises(InputError) as raised:
        lock._agreed(Lock(epath.Path(tmp_path)))
    assert raised.value is error
    assert told == [3 if isinstance(error, lock.NotWritableError) else 2]
