"""Slices by their names: sizes, devices, and what libtpu makes of them."""

from __future__ import annotations

import math

import pytest
from jax.experimental import topologies

from ptjax.errors import InputError
from ptjax.planning import slices
from ptjax.sharding.devices import usable_memory

DEVICES = {
    "v5e-1": 1,
    "v5e-8": 8,
    "v5litepod-16": 16,
    "v4-16": 8,
    "v5p-8": 4,
    "v6e-8": 8,
    "tpu7x-8": 8,
    "v3-8": 8,
    "2xv5e-16": 32,
    "h100x8": 8,
    "a100x4": 4,
    "h200x16": 16,
    "b200x8": 8,
}


@pytest.mark.parametrize(("name", "count"), DEVICES.items())
def test_what_cloud_names_count_becomes_devices(name, count):
    found = slices.parse_slice(name)
    devices = found.devices()
    assert len(devices) == len({device.id for device in devices}) == count
    assert usable_memory(devices[0]) == found.usable_bytes
    assert len({device.slice_index for device in devices}) == found.slices


@pytest.mark.parametrize(
    ("name", "chips"),
    [
        ("v5e-8", (2, 4)),
        ("v5e-32", (4, 8)),
        ("v6e-256", (16, 16)),
        ("v4-16", (2, 2, 2)),
        ("v4-64", (2, 4, 4)),
        ("v5p-128", (4, 4, 4)),
        ("tpu7x-8", (2, 2, 1)),
    ],
)
def test_a_slice_is_a_torus(name, chips):
    assert slices.parse_slice(name).chips == chips


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e-3", "unknown size; the nearest are v5e-1, v5e-4, v5e-8"),
        ("v5e-512", "unknown size; the nearest are v5e-64, v5e-128, v5e-256"),
        ("v4-4", "unknown size; the nearest are v4-8, v4-16, v4-32"),
        ("v5-8", "unknown slice; did you mean v5p-8?"),
        ("h100-8", "unknown slice; did you mean h100x8?"),
        ("v5ex8", "unknown slice; did you mean v5e-8?"),
        ("", "unknown slice; examples: v5e-8, v4-16"),
        ("0xv5e-8", "the number of slices must be 1 to 64"),
        ("h100x12", "GPUs are h100x1 to h100x8, or whole machines of 8, at most 64"),
        ("h100x520", "GPUs are h100x1 to h100x8, or whole machines of 8"),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(InputError, match=f"^--slice={name}: {message}"):
        slices.parse_slice(name)


GPUS = [name for name in DEVICES if not slices.parse_slice(name).is_tpu]


@pytest.mark.cuda
@pytest.mark.parametrize("name", GPUS)
def test_xla_takes_the_gpu(name):
    found = slices.parse_slice(name)
    devices = found.topology_devices()
    assert {device.platform for device in devices} == {"gpu"}
    # As they are counted, and in that order. A machine is the slice_index of a real run's devices,
    # and of a topology's the process_index.
    assert [(device.id, device.device_kind, device.process_index) for device in devices] == [
        (device.id, device.device_kind, device.slice_index) for device in found.devices()
    ]


def test_of_a_gpu_a_program_has_the_fraction_that_jax_takes(monkeypatch):
    where = slices.parse_slice("H100x8")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".5")
    assert where.usable_bytes == 39 * 2**30
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    assert where.usable_bytes == 71 * 2**30 == usable_memory(where.devices()[0])
    for wrong in ("1.5", "most"):
        monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", wrong)
        with pytest.raises(InputError, match=f"^XLA_CLIENT_MEM_FRACTION must be .* got '{wrong}'"):
            _ = where.usable_bytes


def test_a_topology_that_the_compiler_refuses_is_said(monkeypatch):
    def refuse(**kwargs):
        raise ValueError("no\nsuch thing")

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    for name, who in (("v5e-8", "libtpu"), ("h100x8", "XLA's CUDA plugin")):
        with pytest.raises(InputError, match=f"^{name}: {who} supports no such topology: no$"):
            slices.parse_slice(name).topology_devices()


@pytest.mark.tpu
@pytest.mark.parametrize("name", [name for name in DEVICES if name not in GPUS])
def test_libtpu_knows_the_slice(name):
    found = slices.parse_slice(name)
    devices = found.topology_devices()
    assert len(devices) == DEVICES[name]
    assert {device.device_kind for device in devices} == {found.generation.device_kind}
    assert {device.platform for device in devices} == {"tpu"}
    hosts = {device.process_index for device in devices}
    chips = math.prod(found.chips) * found.slices
    assert len(hosts) == (1 if len(found.chips) == 2 and chips <= 8 else chips // 4)
