"""A command that runs on several processes: how they find each other, and how they end.

`jax.distributed` does the work. In a TPU pod, under Slurm and under Open MPI it finds out by itself
who they are; elsewhere three flags or environment variables say so. A command alone on its machine
asks nothing of anybody.
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
from typing import Any, NoReturn

from absl import logging

from ptjax.cli import logs
from ptjax.errors import InputError, check_at_least

HEARTBEAT_TIMEOUT = 30
"""JAX's own 100 s would leave the others hanging for more than a minute and a half."""
INITIALIZATION_TIMEOUT = 300
GRACE_SECONDS = 10
"""How long a process that failed waits for the others to have failed as well."""
IDENTITY_FILE = "PTJAX_LAUNCH_IDENTITY"
"""Environment variable of `ptjax.launch`: the file in which it reads who its child is."""
LAUNCHER_PIPE = "PTJAX_LAUNCH_PIPE"
"""The same: a pipe whose other end the launcher holds open for as long as it lives."""
_HOST_BYTES = 64


def add_flags(parser: argparse.ArgumentParser, *, saves: bool = False) -> None:
    """The flags of a command that can run on several processes.

    Args:
        saves: SIGTERM makes them save together; else it ends a process at once, as everywhere.
    """
    parser.set_defaults(saves=saves)
    described = (
        "The same command on each of them; MODEL_DIR and the data on storage that all share. In a "
        "TPU pod, under srun and under mpirun nothing needs to be said; elsewhere the first three "
        "flags, or the environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
        "JAX_PROCESS_ID. `python -m ptjax.launch` starts and watches them."
    )
    group = parser.add_argument_group("several processes", textwrap.fill(described, 90))
    group.add_argument(
        "--coordinator_address", metavar="HOST:PORT", help="a free port of process 0's machine"
    )
    group.add_argument(
        "--num_processes", type=int, metavar="N", help="how many; 1 ignores what is around"
    )
    group.add_argument("--process_id", type=int, metavar="I", help="0 to N - 1, another for each")
    group.add_argument(
        "--heartbeat_timeout_seconds",
        type=int,
        default=HEARTBEAT_TIMEOUT,
        metavar="S",
        help="a process that is silent for so long is lost, and the others end; "
        f"default: {HEARTBEAT_TIMEOUT}",
    )
    group.add_argument(
        "--initialization_timeout_seconds",
        type=int,
        default=INITIALIZATION_TIMEOUT,
        metavar="S",
        help=f"until all have found each other; default: {INITIALIZATION_TIMEOUT}",
    )


def start(arguments: argparse.Namespace | None) -> None:
    """Joins the other processes, if there are any; before JAX touches a device.

    Args:
        arguments: with the flags of `add_flags`; None for a command that runs alone.

    Raises:
        InputError: settings that are incomplete or do not fit together, or several processes for a
            command that runs alone.
    """
    _end_with_launcher()
    named = _named(arguments)
    cluster = None if named.get("num_processes") == 1 else _cluster()
    if named.get("num_processes") == 1 or (not named and cluster is None):
        return
    if arguments is None:
        if not named and cluster == "TPU":  # which may be this machine alone
            return
        raise InputError(
            "this command runs in one process, and here are several; start it once, with "
            "JAX_NUM_PROCESSES=1 in the environment"
        )
    heartbeat, patience = _timeouts(arguments)
    if cluster is None:
        _check_complete(named)
    import jax

    config: Any = jax.config
    if not os.environ.get("JAX_CPU_COLLECTIVES_IMPLEMENTATION"):
        config.update("jax_cpu_collectives_implementation", "gloo")
    config.update("jax_enable_preemption_service", arguments.saves)
    try:
        jax.distributed.initialize(
            **named,
            # What is said in full needs no detection, which asks the network in some places.
            cluster_detection_method="deactivate" if len(named) == 3 else None,
            heartbeat_timeout_seconds=heartbeat,
            initialization_timeout=patience,
        )
    except Exception as error:
        if cluster != "TPU" or named:
            raise InputError(f"several processes, but JAX cannot join them: {error}") from error
        # A TPU machine outside of Google's cloud, or without its metadata server.
        logging.warning("this TPU machine is taken to be alone; JAX found no others (%s)", error)
    if jax.process_count() > 1:
        _introduce()
    else:  # the preemption service, which nobody will ask, has taken the signal
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _end_with_launcher() -> None:
    """Ends this process when its launcher is killed.

    Otherwise it would keep running unseen and hold the devices and the lock of its MODEL_DIR.
    """
    pipe = os.environ.pop(LAUNCHER_PIPE, "")
    if not pipe.isdigit() or not stat.S_ISFIFO(os.fstat(int(pipe)).st_mode):
        return

    def wait() -> None:
        if not os.read(int(pipe), 1):  # nothing is ever written: the other end is closed
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="launcher", daemon=True).start()


def _named(arguments: argparse.Namespace | None) -> dict[str, Any]:
    """What flags, or else environment variables, say of the processes, under JAX's names."""
    named: dict[str, Any] = {}
    for name, kind in (("coordinator_address", str), ("num_processes", int), ("process_id", int)):
        value = getattr(arguments, name, None)
        variable = f"JAX_{name.upper()}"
        if value is None and (text := os.environ.get(variable)):
            try:
                value = kind(text)
            except ValueError:
                raise InputError(f"{variable}={text}: it has to be a whole number") from None
        if value is not None:
            named[name] = value
    return named


def _check_complete(named: dict[str, Any]) -> None:
    names = ("coordinator_address", "num_processes", "process_id")
    if missing := [name for name in names if name not in named]:
        raise InputError(
            f"several processes need --{missing[0]} too (or JAX_{missing[0].upper()}); all three "
            "of --coordinator_address, --num_processes and --process_id go together"
        )
    address, count, number = (named[name] for name in names)
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port[:6]) < 2**16:
        raise InputError(f"--coordinator_address={address}: it has to be HOST:PORT")
    check_at_least(1, **{"--num_processes": count})
    if not 0 <= number < count:
        raise InputError(f"--process_id={number}: it has to be from 0 to {count - 1}")
    if number == 0:
        _check_port(address, int(port))


def _check_port(address: str, port: int) -> None:
    """Raises InputError where JAX's coordinator cannot listen, of which JAX dies by a signal.

    Bound as gRPC binds, which shares its port: the launcher reserves it in that way. Another
    coordinator, which would share it as well, is one that answers.
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
    """What may have started several of us, told by the environment alone; JAX finds out the rest.

    An indexed job of Kubernetes is none: its pods may as well be a sweep of separate runs.
    """
    for name, count, also in (
        ("Slurm", "SLURM_NTASKS", "SLURM_STEP_NODELIST"),  # the latter only inside of srun
        ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ):
        text = os.environ.get(count, "")
        if text.isdigit() and int(text) > 1 and also in os.environ:
            return name
    import jax

    # JAX puts it there on a machine that has TPU chips, unless the user chose another platform.
    config: Any = jax.config
    return "TPU" if "tpu" in (config.jax_platforms or "").split(",") else None


def _introduce() -> None:
    """Says who is there, here and to the launcher."""
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
    """Around a command: how a process ends that is one of several.

    JAX lets a process that ends wait for the others, and when they do not come aborts all of them,
    this one as well, whatever its exit code was to be. One that failed alone must not wait: with
    its heartbeat gone the others end too.
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
            # A collective without one of its processes fails here and hangs there. Ending at once
            # would make the others take this one for the lost one.
            seconds = arguments.heartbeat_timeout_seconds + GRACE_SECONDS
            first = str(error).splitlines()[0]
            print(f"waiting {seconds} s to learn if a process was lost: {first}", file=sys.stderr)
            time.sleep(seconds)
        traceback.print_exc()
        _leave(1)


def _leave(code: int) -> NoReturn:
    """Ends with `code`, together with the others if they end as well."""
    import jax

    together = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    together.start()
    together.join(GRACE_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # JAX's own exit handler would wait for the others
