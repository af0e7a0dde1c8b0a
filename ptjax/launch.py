"""`python -m ptjax.launch`: starts a command's processes and reports which one was lost."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Iterator
from typing import IO

from ptjax import cli
from ptjax.cli import distributed
from ptjax.files import JsonObject

COMMANDS = ("train", "pretrain", "evaluate", "infer")
# What JAX or a C++ library writes before it aborts a process; output is held back from the first
# such line on. The last pattern may follow another thread's output in the same line.
_FATAL = re.compile(
    r"([EF]\d{4} \S+ +\d+ (coordination_service\w*|client)"
    r"|[WE]\d{4} \S+ +\d+ preemption_sync_manager)\.(h|cc):\d+\] "
    r"|.*terminate called (after|recursively|without)"
)
_SILENT = re.compile(r"unhealthy \(stopped sending heartbeats\):\n((?:\d+\n)+)")
_STATUS = re.compile(r"(?:absl::Status|what\(\)): +(.*)")
# Gloo's threads abort the process when the collective after a broken one has another size.
_GLOO = re.compile(r"'gloo::\w+'|\bexternal/gloo/")
GLOO_GRACE = 1.0
"""Seconds to wait for the end of another process, which explains why Gloo aborted this one."""
# Gloo prints it for every connection, on standard output, among the results.
_CHATTER = b"[Gloo] Rank "


def main() -> None:
    """Parses the flags and runs the command."""
    parser = cli.make_parser(
        "launch",
        """
        Starts one of ptjax's commands and watches it. When a process is lost, on this machine or
        another, JAX aborts all others within the heartbeat's timeout; the launcher then reports in
        one line which was lost and ends non-zero. Rerun the same command to resume.

        In a TPU pod, under Slurm and under Open MPI run it once on each machine or for each task:
        the other processes are detected. --processes=N starts N on this machine alone. Ctrl-C,
        SIGTERM and a closed terminal save and stop all of them; if the launcher itself is killed,
        they end at once.

          python -m ptjax.launch train --gin_file=tasks/sst2.gin --gin_file=runs/prompt_tune.gin
          python -m ptjax.launch --processes=2 train --gin_file=quickstart.gin
        """,
        gin=False,
        exit_codes="exit codes: the command's own; 1 a process was lost; 130 and 143 stopped by "
        "Ctrl-C\n  and SIGTERM (saved); 128 + N killed by signal N. Rerun on any but 0 and 2",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="number on this machine, each with one of its GPUs; default: 1, with all of them",
    )
    parser.add_argument("command", choices=COMMANDS, help="what to start")
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="...", help="its flags")
    arguments = parser.parse_args()
    if arguments.processes < 1:
        parser.error(f"argument --processes: must be >= 1, got {arguments.processes}")
    raise SystemExit(launch(arguments.command, arguments.flags, arguments.processes))


def launch(command: str, flags: list[str], count: int) -> int:
    """Runs a command in `count` processes on this machine until all have ended.

    Args:
        command: one of `COMMANDS`.
        flags: the command's flags.

    Returns:
        the exit code of the launcher, that of the first process that failed.
    """
    with tempfile.TemporaryDirectory() as folder, reserved_port() as port:
        address = f"127.0.0.1:{port}"
        watch = _Watch()
        for number in range(count):
            # In sessions of their own: the launcher alone receives Ctrl-C, and passes it on.
            watch.start(
                [sys.executable, "-m", f"ptjax.{command}", *flags],
                _environment(address, count, number),
                os.path.join(folder, f"{number}.json"),
                number if count > 1 else None,
            )
        return watch.wait()


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """Yields a free port of this machine for JAX's coordinator, reserved while the context is open.

    gRPC listens with SO_REUSEPORT and can share the port; the system gives it to no other program,
    not even as the local port of a connection.
    """
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


def _environment(address: str, count: int, number: int) -> dict[str, str]:
    if count == 1:
        return {}
    return {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(number),
        "JAX_LOCAL_DEVICE_IDS": str(number),
    }


@dataclasses.dataclass
class _Child:
    """A process that the launcher started.

    Attributes:
        identity: the file in which it writes its process id and the machines of all processes.
        number: its process id, if the launcher assigned it.
        abort_lines: what JAX wrote while it aborted the process.
    """

    process: subprocess.Popen[bytes]
    identity: str
    number: int | None
    abort_lines: list[str] = dataclasses.field(default_factory=list)
    readers: list[threading.Thread] = dataclasses.field(default_factory=list)

    def introduction(self) -> JsonObject:
        """{"process": id or None, "hosts": machines}, as `distributed` writes it."""
        try:
            with open(self.identity, encoding="utf-8") as stream:
                return json.load(stream)
        except (OSError, ValueError):  # it ended before it wrote the file
            return {"process": self.number, "hosts": []}


class _Watch:
    """Watches the children: passes on their output, and reports the first that is lost."""

    def __init__(self) -> None:
        self.children: list[_Child] = []
        self.reported = False
        self.interrupted = False
        self.stopping = False
        self.pipe, self._alive = os.pipe()  # children read its end of file when this process ends
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
                signal.signal(number, self._pass_on)

    def start(
        self, command: list[str], more: dict[str, str], identity: str, number: int | None
    ) -> None:
        process = subprocess.Popen(
            command,
            env=os.environ
            | more
            | {distributed.IDENTITY_FILE: identity, distributed.LAUNCHER_PIPE: str(self.pipe)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            pass_fds=(self.pipe,),
        )
        child = _Child(process, identity, number)
        assert process.stdout is not None and process.stderr is not None
        for target, stream in ((_copy_output, process.stdout), (_copy_errors, process.stderr)):
            reader = threading.Thread(target=target, args=(stream, child))
            reader.start()
            child.readers.append(reader)
        self.children.append(child)
        if self.stopping:  # the signal came before this child started
            process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Waits until all have ended; returns the exit code of the first that failed."""
        ended, codes = threading.Condition(), []

        def await_one(child: _Child) -> None:
            child.process.wait()
            for reader in child.readers:
                reader.join()
            with ended:
                if self.children[1:] and _GLOO.search("".join(child.abort_lines)):
                    ended.wait_for(lambda: codes, GLOO_GRACE)
                codes.append(self._judge(child))
                ended.notify_all()

        waiters = [threading.Thread(target=await_one, args=(c,)) for c in self.children]
        for waiter in waiters:
            waiter.start()
        for waiter in waiters:
            waiter.join()
        code = next((code for code in codes if code), 0)
        return 128 + signal.SIGINT if self.interrupted and code == 128 + signal.SIGTERM else code

    def _judge(self, child: _Child) -> int:
        """The exit code for a child that has ended; reports once what was lost."""
        code, text = child.process.returncode, "".join(child.abort_lines)
        intro = child.introduction()
        me = "the process" if intro["process"] is None else _name(intro["process"], intro["hosts"])
        if text and code == -signal.SIGABRT:
            problem = explain(text, intro["hosts"], intro["process"])
            if problem is None:
                _write_error(text)
                status = _STATUS.search(text)
                problem = f"{me} was aborted: {status[1] if status else text.splitlines()[0]}"
            self._report(problem)
            return 1
        _write_error(text)
        if code < 0:
            self._report(f"{me} was killed by signal {-code} ({signal.Signals(-code).name})")
            return 128 - code
        return code

    def _report(self, problem: str) -> None:
        # The first problem is the cause; the other processes end because of it.
        if not self.reported:
            advice = "the last checkpoint is intact; rerun the same command to resume"
            _write_error(f"error: {problem}; {advice}\n")
        self.reported = True

    def _pass_on(self, number: int, frame: types.FrameType | None) -> None:
        self.stopping = True
        again = self.interrupted and number == signal.SIGINT
        self.interrupted = self.interrupted or number == signal.SIGINT
        for child in self.children:
            # On SIGTERM the processes agree on a step after which all stop.
            child.process.send_signal(signal.SIGKILL if again else signal.SIGTERM)


def _write_error(text: str) -> None:
    """Writes to standard error, unless it is closed."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _copy_output(stream: IO[bytes], child: _Child) -> None:
    for line in stream:
        # Keeps reading even if standard output is closed (`| head -1`, a closed terminal).
        with contextlib.suppress(OSError):
            if not line.startswith(_CHATTER):
                sys.stdout.buffer.write(line)
                sys.stdout.flush()


def _copy_errors(stream: IO[bytes], child: _Child) -> None:
    """Passes lines on, but holds them back from the first sign of an abort on."""
    for line in stream:
        text = line.decode(errors="replace")
        if child.abort_lines or _FATAL.match(text):
            child.abort_lines.append(text)
        else:
            _write_error(text)


def explain(text: str, hosts: list[str], me: int | None) -> str | None:
    """Explains which process was lost, from the output of one that JAX aborted; None if unclear.

    Args:
        text: what JAX wrote while it aborted the process.
        hosts: the machine of each process.
        me: the number of the aborted process, if it is known.
    """
    if silent := _SILENT.search(text):
        names = [_name(int(number), hosts) for number in silent[1].split()]
        were = "were" if names[1:] else "was"
        return f"{' and '.join(names)} {were} lost: no heartbeat"
    if "Failed to send RPC to coordination service" in text:
        return f"{_name(0, hosts)} was lost: the coordinator no longer answers"
    if "RegisterTask" in text:
        return "the processes did not connect: start all, and check that each can reach process 0"
    if _GLOO.search(text):
        others = [_name(number, hosts) for number in range(len(hosts)) if number != me]
        other = others[0] if len(others) == 1 else "another process"
        return f"{other} was lost during a message, or runs another command"
    return None


def _name(number: int, hosts: list[str]) -> str:
    return f"process {number}" + (f" on {hosts[number]}" if number < len(hosts) else "")


if __name__ == "__main__":
    main()
