"""Runs a command on several processes: how they find each other, and how they end.

`jax.distributed` does the work. In a TPU pod, under Slurm and under Open MPI it detects the other
processes; elsewhere three flags or environment variables name them. A command that is the only
process does not need any of this.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import signal
import socket
import stat
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Iterator
from typing import NoReturn

from absl import logging

from ptjax.cli import logs
from ptjax.errors import InputError, check_at_least
from ptjax.files import JsonObject

HEARTBEAT_TIMEOUT = 30
"""Seconds of silence after which a process counts as lost. With JAX's default, 100, the other
processes would hang for a minute and a half."""
INITIALIZATION_TIMEOUT = 300
"""Seconds within which all processes must connect."""
GRACE_SECONDS = 10
"""How long a failed process waits for the others to fail as well."""
IDENTITY_FILE = "PTJAX_LAUNCH_IDENTITY"
"""Environment variable set by `ptjax.launch`: the file in which a child writes its number."""
LAUNCHER_PIPE = "PTJAX_LAUNCH_PIPE"
"""Environment variable set by `ptjax.launch`: a pipe that closes when the launcher ends."""
_HOST_BYTES = 64


def add_flags(parser: argparse.ArgumentParser, *, saves: bool = False) -> None:
    """Adds the flags of a command that can run on several processes.

    Args:
        saves: whether SIGTERM makes all processes save together (and the command handles it);
            else it ends a process immediately.
    """
    parser.set_defaults(saves=saves)
    described = (
        "Run the same command on each of them, with MODEL_DIR and the data on shared storage. In a "
        "TPU pod, under srun and under mpirun no flag is needed; elsewhere give the first three "
        "flags, or the environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
        "JAX_PROCESS_ID. `python -m ptjax.launch` starts and watches the processes."
    )
    group = parser.add_argument_group("several processes", textwrap.fill(described, 90))
    group.add_argument(
        "--coordinator_address", metavar="HOST:PORT", help="a free port of process 0's machine"
    )
    group.add_argument(
        "--num_processes",
        type=int,
        metavar="N",
        help="number of processes; 1 ignores any cluster environment",
    )
    group.add_argument("--process_id", type=int, metavar="I", help="0 to N - 1, different for each")
    group.add_argument(
        "--heartbeat_timeout_seconds",
        type=int,
        default=HEARTBEAT_TIMEOUT,
        metavar="S",
        help="a process that is silent for S seconds is lost, and the others end; "
        f"default: {HEARTBEAT_TIMEOUT}",
    )
    group.add_argument(
        "--initialization_timeout_seconds",
        type=int,
        default=INITIALIZATION_TIMEOUT,
        metavar="S",
        help=f"limit for all to connect; default: {INITIALIZATION_TIMEOUT}",
    )


def start(arguments: argparse.Namespace | None) -> None:
    """Joins the other processes, if there are any. Call it before JAX uses a device.

    It changes JAX's configuration. If `ptjax.launch` started this process, it also makes it end
    when the launcher ends.

    Args:
        arguments: the flags of `add_flags`; None for a command that supports one process only.

    Raises:
        InputError: the flags are incomplete or inconsistent, or there are several processes but the
            command supports one only.
    """
    _end_with_launcher()
    named = _named(arguments)
    cluster = None if named.get("num_processes") == 1 else _cluster()
    if named.get("num_processes") == 1 or (not named and cluster is None):
        return
    if arguments is None:
        if not named and cluster == "TPU":  # this machine may be the only one
            return
        raise InputError(
            "this command supports one process only; start it once, with JAX_NUM_PROCESSES=1 in "
            "the environment"
        )
    heartbeat, patience = _timeouts(arguments)
    if cluster is None:
        _check_complete(named)
    import jax

    config = jax.config
    if not os.environ.get("JAX_CPU_COLLECTIVES_IMPLEMENTATION"):
        config.update("jax_cpu_collectives_implementation", "gloo")
    # Processes with several CPU devices each sometimes wait for each other forever; with this, less
    # often (jaxlib 0.10).
    config.update("jax_cpu_enable_async_dispatch", False)
    config.update("jax_enable_preemption_service", arguments.saves)
    try:
        jax.distributed.initialize(
            **named,
            # Detection may access the network and is not needed if all three are set.
            cluster_detection_method="deactivate" if len(named) == 3 else None,
            heartbeat_timeout_seconds=heartbeat,
            initialization_timeout=patience,
        )
    except Exception as error:
        if cluster != "TPU" or named:
            raise InputError(f"JAX cannot connect the processes: {error}") from error
        # A TPU machine outside of Google Cloud, or without its metadata server.
        logging.warning("using this TPU machine alone; JAX found no others (%s)", error)
    if jax.process_count() > 1:
        _introduce()
    else:  # undo the preemption service's signal handler, which nothing reads here
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _end_with_launcher() -> None:
    """Ends this process when its launcher is killed.

    Otherwise it would keep running and hold the devices and the lock of its MODEL_DIR.
    """
    pipe = os.environ.pop(LAUNCHER_PIPE, "")
    if not pipe.isdigit() or not stat.S_ISFIFO(os.fstat(int(pipe)).st_mode):
        return

    def wait() -> None:
        if not os.read(int(pipe), 1):  # nothing is ever written: the other end is closed
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="launcher", daemon=True).start()


def _named(arguments: argparse.Namespace | None) -> JsonObject:
    """Arguments of `jax.distributed.initialize` from the flags, or else environment variables."""
    named: JsonObject = {}
    for name, kind in (("coordinator_address", str), ("num_processes", int), ("process_id", int)):
        value = getattr(arguments, name, None)
        variable = f"JAX_{name.upper()}"
        if value is None and (text := os.environ.get(variable)):
            try:
                value = kind(text)
            except ValueError:
                raise InputError(f"{variable} must be a whole number, got {text}") from None
        if value is not None:
            named[name] = value
    return named


def _check_complete(named: JsonObject) -> None:
    names = ("coordinator_address", "num_processes", "process_id")
    if missing := [name for name in names if name not in named]:
        raise InputError(
            f"several processes need --{missing[0]} too (or JAX_{missing[0].upper()}); give all of "
            "--coordinator_address, --num_processes and --process_id"
        )
    address, count, number = (named[name] for name in names)
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port[:6]) < 2**16:
        raise InputError(f"--coordinator_address must be HOST:PORT, got {address}")
    check_at_least(1, **{"--num_processes": count})
    if not 0 <= number < count:
        raise InputError(f"--process_id must be >= 0 and < {count}, got {number}")
    if number == 0:
        _check_port(address, int(port))


def _check_port(address: str, port: int) -> None:
    """InputError if JAX's coordinator cannot listen on `port`; JAX itself would abort.

    The probe binds with SO_REUSEPORT, as gRPC does, since the launcher reserves the port that way.
    Another coordinator would share the port too, so the probe also tries to connect to one.
    """
    with socket.socket() as probe, socket.socket() as client:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        client.settimeout(1)
        try:
            probe.bind(("", port))
            if client.connect_ex(("127.0.0.1", port)) == 0:
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        except OSError as error:
            raise InputError(
                f"--coordinator_address={address}: process 0 cannot listen on port {port} "
                f"({error.strerror}); choose another one, the same for all processes"
            ) from error


def _timeouts(arguments: argparse.Namespace) -> tuple[int, int]:
    heartbeat = arguments.heartbeat_timeout_seconds
    patience = arguments.initialization_timeout_seconds
    check_at_least(
        1,
        **{"--heartbeat_timeout_seconds": heartbeat, "--initialization_timeout_seconds": patience},
    )
    return heartbeat, patience


def _cluster() -> str | None:
    """The cluster that may have started several processes, judged by the environment, or None.

    An indexed job of Kubernetes does not count: its pods may be separate runs.
    """
    for name, count, also in (
        ("Slurm", "SLURM_NTASKS", "SLURM_STEP_NODELIST"),  # set inside of srun only
        ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ):
        text = os.environ.get(count, "")
        if text.isdigit() and int(text) > 1 and also in os.environ:
            return name
    import jax

    # JAX sets it on a machine with TPU chips, unless the user chose another platform.
    platforms = getattr(jax.config, "jax_platforms", None) or ""
    return "TPU" if "tpu" in platforms.split(",") else None


def _introduce() -> None:
    """Logs the processes and their machines, and reports them to the launcher."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    name = socket.gethostname().encode()[:_HOST_BYTES].ljust(_HOST_BYTES)
    names = multihost_utils.process_allgather(np.frombuffer(name, np.uint8))
    hosts = [bytes(row).decode(errors="replace").strip() for row in np.asarray(names)]
    if path := os.environ.get(IDENTITY_FILE):
        with open(path, "w", encoding="utf-8") as stream:
            json.dump({"process": jax.process_index(), "hosts": hosts}, stream)
    logs.name_process(jax.process_index())
    logging.info(
        "%d processes with %d devices, on %s",
        len(hosts),
        jax.device_count(),
        ", ".join(dict.fromkeys(hosts)),
    )


@contextlib.contextmanager
def ending(arguments: argparse.Namespace | None) -> Iterator[None]:
    """Wraps a command, so that a failing process among several ends with its own exit code.

    When a process exits, JAX waits for the others to exit too, and aborts all of them if they do
    not, which would replace the exit code. A process that failed alone therefore ends without
    waiting for long; the others end when its heartbeat stops.

    Args:
        arguments: the flags of `add_flags`; None for a command that supports one process only.
    """
    import jax

    try:
        yield
    except SystemExit as end:
        if end.code and jax.distributed.is_initialized():
            _leave(end.code if isinstance(end.code, int) else 1)
        raise
    except Exception as error:
        if arguments is None or not jax.distributed.is_initialized():
            raise
        if isinstance(error, jax.errors.JaxRuntimeError) and logs.speaker():
            # If a process is lost, a collective fails in some of the others and hangs in the rest,
            # which would take this process for the lost one if it ended at once.
            seconds = arguments.heartbeat_timeout_seconds + GRACE_SECONDS
            first = str(error).splitlines()[0]
            print(f"waiting {seconds} s to learn if a process was lost: {first}", file=sys.stderr)
            time.sleep(seconds)
        traceback.print_exc()
        _leave(1)


def _leave(code: int) -> NoReturn:
    """Ends with `code`, after waiting a while for the others to end as well."""
    import jax

    together = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    together.start()
    together.join(GRACE_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # JAX's own exit handler would wait for the others
