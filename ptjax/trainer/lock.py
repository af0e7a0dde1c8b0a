"""`MODEL_DIR/run.lock`: one run at a time in a MODEL_DIR.

The first process of a run writes the lock before anything else there, renews it every HEARTBEAT
seconds and removes it at the end. Every write is conditional on the version that it replaces (a
lock of the operating system on a local or network disk, a generation precondition on gs://), so of
two runs that start together one gets it, and a run whose lock was taken over notices.

A killed run does not remove its lock. On the same machine, the next run looks up the process and
starts immediately. On another machine it watches the lock: if it does not change for SILENCE
seconds by the watcher's own clock, the run is dead and the lock is taken over. Clocks of two
machines are compared in one case only: a lock older than ABANDONED seconds by the storage's clock
is not watched. If the clocks disagree by most of that, a running process notices and stops.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging
from etils import epath

from ptjax import files
from ptjax.errors import InputError, TrainingError, check_system, one_line
from ptjax.model_dir import LOCK, ModelDir
from ptjax.sharding import processes

HEARTBEAT = 30.0
"""Seconds between two heartbeats of the holder."""
SILENCE = 120.0
"""Seconds without a new heartbeat after which a lock is taken over."""
ABANDONED = 600.0
"""A lock that is older by the storage's clock is taken over without being watched."""
TIMEOUT = 30.0
"""Seconds for one write; a slower one may still succeed."""
POLL = 1.0
"""Seconds between two reads of a lock that is watched."""


class NotWritableError(InputError):
    """MODEL_DIR cannot be locked, because it is not writable."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        started: start time of the process in the kernel's clock ticks; None without /proc.
        machine: boot id and process namespace, within which `pid` and `started` are valid; ""
            without /proc.
        token: random, different for every run.
    """

    host: str
    pid: int
    started: int | None
    machine: str
    token: str

    @classmethod
    def here(cls) -> Holder:
        """Describes the current process, with a new token."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _started(pid), _machine(), secrets.token_hex(16))

    @property
    def is_here(self) -> bool:
        """Whether the holder is in this machine's current boot and process namespace."""
        return (self.host, self.machine) == (socket.gethostname(), _machine())

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs; only meaningful if `is_here`.

        Without /proc, a later process with the same pid cannot be told from it.
        """
        if self.started is not None:
            return _started(self.pid) == self.started
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True  # it belongs to another user
        return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lock:
    """The lock file of one MODEL_DIR. Use `hold` to take it; only the first process writes it."""

    def __init__(self, model_dir: epath.Path) -> None:
        check_system()
        self.model_dir, self.holder = model_dir, Holder.here()
        self._path = ModelDir(model_dir).lock
        self._mutex = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._generation: bytes | None = None  # of the version that this run wrote
        self._confirmed = _clocks()
        self._lost: str | None = None
        self._watched: tuple[bytes, float] | None = None  # generation, since when
        self._made: list[Path] = []  # folders, the innermost first

    def try_once(self) -> bool:
        """Takes the lock if it is free or its holder is dead; returns whether it took it.

        False means that the holder may be dead, but it is not certain yet: call it again later.

        Raises:
            InputError: a running process holds it.
            NotWritableError: MODEL_DIR cannot be written to.
        """
        self._open()
        text, generation = self._read()
        reason = ""
        if text is not None:
            holder, age = _parse(text)
            reason = self._why_free(holder, age, generation)
            if not reason:
                return False
            reason = f"{holder or 'an unreadable lock'}: {reason}"
        self._confirmed = _clocks()
        try:
            self._generation = self._write(generation)
        except (OSError, ValueError) as error:
            raise cannot_write(self.model_dir, error) from error
        if self._generation is None:  # another run was faster
            return False
        if reason:
            logging.info("%s: taking over the lock of %s", self.model_dir, reason)
        self._thread = threading.Thread(target=self._beat_until_ended, name=LOCK, daemon=True)
        self._thread.start()
        return True

    def check(self) -> None:
        """Checks that this run still holds the lock. Call it before writing to MODEL_DIR.

        It does no I/O, except when a heartbeat is overdue (the process was paused): it sends one.

        Raises:
            TrainingError: another run has the lock, or renewing it failed for `SILENCE` seconds.
        """
        if self._generation is None:
            return
        if _elapsed(self._confirmed) > 1.5 * HEARTBEAT:
            try:
                self._beat()
            except Exception as error:  # storages have exceptions of their own
                if _elapsed(self._confirmed) > SILENCE:
                    raise TrainingError(
                        f"{self._path} could not be renewed for {SILENCE:.0f} s "
                        f"({one_line(error)}); nothing more is written. Rerun the same command "
                        "to resume from the last checkpoint"
                    ) from error
        if self._lost is not None:
            raise TrainingError(self._lost)

    def release(self) -> None:
        """Removes the lock if this run still holds it, and then empty folders that it created."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._generation is None or self._lost is not None:
            return
        try:
            # An earlier write may have succeeded although its response was lost.
            generation = self._own_write() or self._generation
            self._store.write(LOCK, None, if_equal=generation).result(timeout=TIMEOUT)
        except (OSError, ValueError) as error:
            logging.warning("%s was not removed: %s", self._path, one_line(error))
        self._generation = None
        with contextlib.suppress(OSError):  # a run that was refused leaves no folders
            for path in self._made:
                path.rmdir()

    def _open(self) -> None:
        import tensorstore as ts

        directory = self.model_dir
        try:
            if "://" in os.fspath(directory):
                url = os.fspath(directory)
            else:
                whole = Path(directory).absolute()
                url = whole.as_uri()
                self._made += [path for path in (whole, *whole.parents) if not path.exists()]
                directory.mkdir(parents=True, exist_ok=True)
            self._store: Any = ts.KvStore.open(url + "/").result()
        except (OSError, ValueError) as error:
            raise cannot_write(directory, error) from error

    def _read(self) -> tuple[bytes | None, bytes]:
        """The content of the file (None if it does not exist) and its generation."""
        try:
            result = self._store.read(LOCK).result()
        except (OSError, ValueError) as error:
            raise cannot_write(self.model_dir, error) from error
        return (result.value if result.state == "value" else None), result.stamp.generation

    def _write(self, generation: bytes) -> bytes | None:
        """Replaces that generation of the file; returns the new one, or None if it has changed."""
        text = json.dumps(dataclasses.asdict(self.holder) | {"time": time.time()}).encode()
        written = self._store.write(LOCK, text, if_equal=generation)
        return written.result(timeout=TIMEOUT).generation or self._own_write()

    def _own_write(self) -> bytes | None:
        """The generation of the file, if this run wrote it.

        A write whose response was lost is retried, and refused because the first one succeeded.
        """
        text, generation = self._read()
        holder = None if text is None else _parse(text)[0]
        return generation if holder == self.holder else None

    def _why_free(self, holder: Holder | None, age: float, generation: bytes) -> str:
        """Why the lock may be taken over; "" if it must be watched further."""
        if holder is not None and holder.is_here:
            if not holder.is_alive:
                return "it has ended"
            if 0 <= age < SILENCE:
                raise self._in_use(holder, age)
        now = time.monotonic()
        if self._watched is None:
            # Only the first time: later, a remote file's age may come from a cache.
            if _age_by_storage(self._path) > ABANDONED:
                return f"silent for more than {ABANDONED:.0f} s"
            self._watched = generation, now
            logging.info(
                "%s is locked by %s; taking over if it stays silent for %.0f s",
                self.model_dir,
                holder or "an unreadable file",
                SILENCE,
            )
        elif self._watched[0] != generation:
            raise self._in_use(holder, age)
        return f"silent for {SILENCE:.0f} s" if now - self._watched[1] >= SILENCE else ""

    def _in_use(self, holder: Holder | None, age: float) -> InputError:
        who = holder or "another run"
        return InputError(
            f"MODEL_DIR = {self.model_dir}: in use by {who} (heartbeat {max(age, 0.0):.0f} s ago); "
            "wait for it to end, or choose another MODEL_DIR"
        )

    def _beat(self) -> None:
        with self._mutex:
            if self._generation is None or self._lost is not None:
                return
            started = _clocks()
            generation = self._write(self._generation)
            if generation is not None:
                self._generation, self._confirmed = generation, started
                return
            text, _ = self._read()
            other = None if text is None else _parse(text)[0]
            self._lost = (
                f"{self._path} was "
                f"{f'taken over by {other}' if other else 'removed or replaced'} while this run "
                "held it; nothing more is written here"
            )

    def _beat_until_ended(self) -> None:
        failed = False
        while not self._ended.wait(HEARTBEAT) and self._lost is None:
            try:
                self._beat()
                failed = False
            except Exception as error:  # of any kind: the next heartbeat may succeed
                if not failed:
                    logging.warning("%s could not be renewed: %s", self._path, one_line(error))
                failed = True


@contextlib.contextmanager
def hold(model_dir: epath.Path, *, needed: bool = True) -> Iterator[Lock | None]:
    """A context manager that holds MODEL_DIR's lock: takes it, yields it, and releases it.

    Everything that changes MODEL_DIR runs inside. All processes must call it together. If another
    run holds the lock but may be dead, it waits up to `SILENCE` seconds to be certain.

    Args:
        needed: False (a dry run) takes no lock and yields None.

    Raises:
        InputError: another run holds the lock. Raised on all processes.
        NotWritableError: MODEL_DIR cannot be written to. Raised on all processes.
        TrainingError: the disk became full inside the context.
    """
    if not needed:
        yield None
        return
    lock = Lock(model_dir)
    try:
        while not _agreed(lock):
            time.sleep(POLL)
        yield lock
    except Exception as error:
        if (reason := files.full_reason(error)) is None:
            raise
        raise TrainingError(
            f"MODEL_DIR = {model_dir}: it is full ({reason}); free some space and rerun the same "
            "command to resume from the last checkpoint"
        ) from error
    finally:
        lock.release()


def _agreed(lock: Lock) -> bool:
    """The outcome of `try_once` on the first process, on all processes."""
    problem: Exception | None = None
    outcome = 0
    if processes.first():
        try:
            outcome = int(lock.try_once())
        except Exception as error:
            outcome, problem = 3 if isinstance(error, NotWritableError) else 2, error
    outcome = processes.of_first(outcome)
    if problem is not None:
        raise problem
    if outcome > 1:
        kind = NotWritableError if outcome == 3 else InputError
        raise kind(f"MODEL_DIR = {lock.model_dir}: process 0 cannot lock it; see its message")
    return outcome == 1


def _parse(text: bytes) -> tuple[Holder | None, float]:
    """The holder (None if the text is not a lock's) and its age in seconds by its own clock."""
    try:
        fields = files.parse_json(text)
        age = time.time() - float(fields.pop("time"))
        holder = Holder(**fields)
        started_fits = holder.started is None or isinstance(holder.started, int)
        if not (isinstance(holder.pid, int) and 0 < holder.pid < 1 << 32 and started_fits):
            raise ValueError(fields)
        host = holder.host
        if not (isinstance(host, str) and len(host) < 256 and host.isprintable()):
            raise ValueError(fields)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return None, 0.0
    return holder, age


def _started(pid: int) -> int | None:
    """Start time of a process in clock ticks; None without such a process, or without /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])  # a zombie has ended


def _machine() -> str:
    """Boot id and process namespace: containers share host names, and names are reused."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _age_by_storage(path: epath.Path) -> float:
    """Seconds since the last write; 0 if the storage does not report it."""
    try:
        return time.time() - float(path.stat().mtime)
    except (OSError, TypeError, ValueError):
        return 0.0


def _clocks() -> tuple[float, float]:
    """One clock runs while the machine sleeps, the other while a virtual machine is frozen."""
    kind = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(kind), time.time()


def _elapsed(since: tuple[float, float]) -> float:
    return max(now - before for now, before in zip(_clocks(), since, strict=True))


def cannot_write(directory: epath.Path, error: Exception) -> NotWritableError:
    """Makes the exception for a MODEL_DIR that is not writable, with the reason from `error`."""
    why = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
    if isinstance(error, FileExistsError):  # as mkdir reports a file
        why = os.strerror(errno.ENOTDIR)
    return NotWritableError(
        f"MODEL_DIR = {directory}: it cannot be written to ({why}); choose another"
    )
