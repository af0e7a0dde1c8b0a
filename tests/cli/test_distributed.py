"""How a command learns that it is one of several processes; joining is in test_multiprocess."""

from __future__ import annotations

import argparse
import socket

import jax
import pytest

from ptjax.cli import distributed

pytestmark = pytest.mark.usefixtures("own_process")


@pytest.mark.parametrize(
    ("flags", "variables", "said"),
    [
        (["--num_processes=2"], {}, "several processes need --coordinator_address too"),
        (["--process_id=0"], {}, "several processes need --coordinator_address too"),
        (
            ["--coordinator_address=h:1", "--num_processes=2"],
            {},
            "several processes need --process_id too (or JAX_PROCESS_ID)",
        ),
        (
            ["--coordinator_address=h", "--num_processes=2", "--process_id=0"],
            {},
            "--coordinator_address must be HOST:PORT, got h",
        ),
        (
            ["--coordinator_address=h:65536", "--num_processes=2", "--process_id=0"],
            {},
            "--coordinator_address must be HOST:PORT, got h:65536",
        ),
        (
            ["--coordinator_address=h:1", "--num_processes=2", "--process_id=2"],
            {},
            "--process_id must be >= 0 and < 2, got 2",
        ),
        (
            ["--coordinator_address=h:1", "--num_processes=0", "--process_id=0"],
            {},
            "--num_processes must be >= 1, got 0",
        ),
        (
            ["--heartbeat_timeout_seconds=0"],
            {"JAX_NUM_PROCESSES": "2"},
            "--heartbeat_timeout_seconds must be >= 1, got 0",
        ),
        ([], {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES must be a whole number, got two"),
        ([], {"JAX_NUM_PROCESSES": "2"}, "several processes need --coordinator_address too"),
    ],
)
def test_what_does_not_fit_together_is_bad_input(call, monkeypatch, flags, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, out, err = call("train", "--gin_file=quickstart.gin", *flags)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(f"error: {said}")


@pytest.mark.parametrize("command", ["inspect", "export"])
@pytest.mark.parametrize(
    "variables",
    [
        {"JAX_NUM_PROCESSES": "2"},
        {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "node[1-2]"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
    ],
)
def test_a_command_for_one_process_refuses_several(call, monkeypatch, command, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    arguments = {"inspect": ["ptjax-nano"], "export": ["nothing", "--to=npy", "--output=x"]}
    code, out, err = call(command, *arguments[command])
    assert (code, out) == (2, "")
    assert err.startswith("error: this command supports one process only")
    # The way out that it names.
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    assert "several" not in call(command, *arguments[command])[2]


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1"}, None),
        ({"SLURM_NTASKS": "8"}, None),  # inside of an allocation, but not of srun
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "node1"}, "Slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "Open MPI"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, None),
    ],
)
def test_the_environment_tells_of_a_cluster(monkeypatch, variables, found):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed._cluster() == found


def test_a_command_alone_joins_nobody(monkeypatch):
    parser = argparse.ArgumentParser()
    distributed.add_flags(parser)
    monkeypatch.setattr(jax.distributed, "initialize", None)  # calling it would fail
    distributed.start(parser.parse_args([]))
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    distributed.start(parser.parse_args(["--num_processes=1"]))
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize("shared", [False, True])
def test_a_port_that_another_program_listens_on_is_bad_input(call, shared):
    """JAX would die of it by signal 11. A coordinator, which shares its port, is no exception."""
    with socket.socket() as another:
        another.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
        another.bind(("", 0))
        another.listen()
        port = another.getsockname()[1]
        flags = [f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2", "--process_id=0"]
        code, out, err = call("train", "--gin_file=quickstart.gin", *flags)
    assert (code, out, err) == (
        2,
        "",
        f"error: --coordinator_address=127.0.0.1:{port}: process 0 cannot listen on port {port} "
        "(Address already in use); choose another one, the same for all processes\n",
    )
