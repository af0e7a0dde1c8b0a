"""Meshes by name: what 'auto' takes, what does not divide, which devices are neighbours."""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ptjax.errors import InputError
from ptjax.models.config import T5Config
from ptjax.planning.slices import parse_slice
from ptjax.sharding import devices, meshes
from ptjax.sharding.meshes import make_mesh
from ptjax.sharding.quantize import weight_shapes

SMALL = T5Config(32128, 512, 6, 8, 8, 64, 1024)
XXL = T5Config(32128, 4096, 64, 24, 24, 64, 10240)
# 1.2 GB a layer and side: as large as XXL in few layers, which trace in no time.


def wide(fsdp: bool = False) -> T5Config:
    return T5Config(32128, 4096, 64, 2, 2, 64, 131072, scan_layers=fsdp)


def tpus(count, kind="TPU v5 lite", slices=1):
    """Chips that can be counted, but not compiled for; real ones are in the tests marked tpu."""
    return [
        SimpleNamespace(platform="tpu", device_kind=kind, slice_index=i * slices // count, id=i)
        for i in range(count)
    ]


# Names


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("8x1", {"data": 8, "model": 1}),
        ("2x4", {"data": 2, "model": 4}),
        ("2x2x2", {"replica": 2, "data": 2, "model": 2}),
        ("auto", {"data": 8, "model": 1}),
    ],
)
def test_a_name_is_a_mesh_of_all_devices(tiny, name, sizes):
    mesh = meshes.choose_mesh(name, tiny.config, "float32")
    assert dict(mesh.shape) == sizes and mesh.size == 8
    assert meshes.mesh_name(mesh) == ("8x1" if name == "auto" else name)


def test_none_is_one_device_and_a_mesh_is_itself(tiny):
    mesh = meshes.choose_mesh(None, tiny.config, "float32")
    assert mesh.shape == {"data": 1, "model": 1}
    assert list(mesh.devices.flat) == jax.local_devices()[:1]
    mesh = make_mesh(2)
    assert meshes.choose_mesh(mesh, tiny.config, "float32") is mesh


@pytest.mark.parametrize("name", ["", "8", "8x", "x8", "2x2x2x1", "0x8", "8X1", "2,4", "automatic"])
def test_what_is_no_name(tiny, name):
    with pytest.raises(
        InputError, match=f"^MESH must be 'auto', data x model such as .*, got '{name}'$"
    ):
        meshes.choose_mesh(name, tiny.config, "float32")


def test_the_log_says_which_mesh_and_why(tiny, caplog):
    caplog.set_level(logging.INFO, logger="absl")
    scanned = dataclasses.replace(tiny.config, scan_layers=True)
    meshes.choose_mesh("2x4", scanned, "float32", fsdp=True)
    meshes.choose_mesh("auto", tiny.config, "float32")
    meshes.choose_mesh(None, tiny.config, "float32")
    assert [record.getMessage() for record in caplog.records] == [
        "mesh 2x4 (data x model, fsdp) of 8 cpu: as set by MESH",
        "mesh 8x1 (data x model) of 8 cpu: the smallest model axis",
    ]


# Divisibility


@pytest.mark.parametrize(
    ("name", "fsdp", "message"),
    [
        ("2x4", False, "num_heads = 6 is not a multiple of 4, the model axis of the mesh 2x4; "),
        ("2x1x4", False, "the model axis of the mesh 2x1x4; MESH may be '2x4x1' or '2x2x2'"),
        ("1x8", False, "MESH may be '8x1' or '4x2'"),
        ("8x1", True, "FSDP = True needs SCAN_LAYERS = True"),
    ],
)
def test_what_t5_small_does_not_go_with(name, fsdp, message):
    with pytest.raises(InputError, match=message):
        meshes.choose_mesh(name, SMALL, "float32", fsdp=fsdp)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mlp_dim": 102},
            "mlp_dim = 102 is not a multiple of 4, the model axis .* '8x1' or '4x2'",
        ),
        ({"vocab_size": 101}, "vocab_size = 101 is not a multiple of 4, .* may be '8x1'$"),
        (
            {"emb_dim": 33},
            r"emb_dim = 33 .* 2, the data axis .* \(FSDP = True\); MESH may be '1x8'",
        ),
        ({"emb_dim": 33, "num_heads": 4}, "no mesh of 8 devices does"),
    ],
)
def test_each_size_that_the_table_divides_is_checked(changes, message):
    sizes = {"vocab_size": 64, "emb_dim": 32, "num_heads": 8, "head_dim": 4, "mlp_dim": 64}
    sizes |= {"num_encoder_layers": 1, "num_decoder_layers": 1, "scan_layers": True}
    config = T5Config(**(sizes | changes))
    with pytest.raises(InputError, match=message):
        meshes.choose_mesh("2x4", config, "float32", fsdp=True)


# 'auto'


@pytest.mark.parametrize(
    ("found", "dtype", "fsdp", "shape"),
    [
        (tpus(8), "bfloat16", False, (4, 2)),
        (tpus(8), "bfloat16", True, (8, 1)),
        (tpus(8), "float32", False, (2, 4)),
        (tpus(4), "bfloat16", False, (2, 2)),
        (tpus(8, "TPU v6 lite"), "bfloat16", False, (8, 1)),
        (tpus(8, "TPU v4"), "bfloat16", False, (8, 1)),
        (tpus(4, "TPU v5"), "float32", False, (4, 1)),
        (tpus(8, slices=2), "bfloat16", False, (2, 2, 2)),
        (tpus(8, "something new"), "bfloat16", False, (8, 1)),
    ],
)
def test_auto_takes_the_smallest_model_axis_that_fits(found, dtype, fsdp, shape):
    chosen, _ = meshes.smallest_that_fits(wide(fsdp), weight_shapes(wide(fsdp), dtype), found, fsdp)
    assert chosen == shape


def test_int8_fits_a_smaller_model_axis():
    """The kernels of 13.24 GiB in bfloat16 take 6.5, embedding and logits stay at 0.49."""
    held = weight_shapes(wide(), "bfloat16", "int8")
    chosen, why = meshes.smallest_that_fits(wide(), held, tpus(8), False)
    assert chosen == (8, 1) and why.startswith("the frozen weights take 6.87 of 15.75 GiB")


def test_auto_says_why():
    _, why = meshes.smallest_that_fits(wide(), weight_shapes(wide(), "bfloat16"), tpus(8), False)
    assert why == (
        "the frozen weights take 6.62 of 15.75 GiB per device (at most 70%; 13.24 GiB with a "
        "smaller model axis)"
    )


def test_auto_leaves_out_what_does_not_divide():
    narrow = T5Config(32064, 4096, 6, 2, 2, 64, 131072 * 3)
    chosen, _ = meshes.smallest_that_fits(
        narrow, weight_shapes(narrow, "bfloat16"), tpus(12), False
    )
    assert chosen == (2, 6)  # 4 would do, were there not 6 heads


@pytest.mark.parametrize(
    ("found", "fsdp", "message"),
    [
        (tpus(1), False, "at least 13.24 GiB per device, more than 70% of its 15.75; use"),
        (tpus(1), False, "use more devices or FSDP = True, or name a MESH to try anyway"),
        (tpus(2, "TPU v2"), True, "use more devices, or name a MESH"),
        (tpus(3), True, "FSDP = True: no mesh of 3 TPU v5 lite divides emb_dim = 4096"),
    ],
)
def test_auto_without_a_mesh_that_fits(found, fsdp, message):
    with pytest.raises(InputError, match=message):
        meshes.smallest_that_fits(wide(fsdp), weight_shapes(wide(fsdp), "bfloat16"), found, fsdp)


def test_memory_of_devices():
    assert devices.usable_memory(jax.devices()[0]) is None
    assert devices.usable_memory(tpus(1)[0]) == 15.75 * devices.GIB
    assert devices.usable_memory(tpus(1, "something new")[0]) is None


# Slices


def test_a_first_axis_that_the_slices_do_not_divide():
    with pytest.raises(InputError, match="in 2 slices, and the first axis, 1, is not a multiple"):
        make_mesh((1, 8), tpus(8, slices=2))
    with pytest.raises(InputError, match="in 2 slices cannot be divided into a model axis of 8"):
        make_mesh(8, tpus(8, slices=2))


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("name", "dtype", "sizes"),
    [
        ("v5e-8", "bfloat16", (4, 2)),
        ("v5e-4", "bfloat16", (2, 2)),
        ("v6e-8", "bfloat16", (8, 1)),
        ("v4-16", "bfloat16", (8, 1)),
        ("v5p-8", "float32", (4, 1)),
        ("tpu7x-8", "bfloat16", (8, 1)),
        ("2xv5e-16", "bfloat16", (2, 8, 2)),
    ],
)
def test_auto_for_xxl_on_tpus(name, dtype, sizes):
    found = parse_slice(name).topology_devices()
    mesh = meshes.choose_mesh("auto", XXL, dtype, devices=found)
    assert mesh.devices.shape == sizes
    assert set(mesh.devices.flat) == set(found)
    if "replica" in mesh.axis_names:  # every slice is one member of it
        slices = [{device.slice_index for device in part.flat} for part in mesh.devices]
        assert slices == [{0}, {1}]


@pytest.mark.tpu
@pytest.mark.parametrize("shape", [(8, 2), (2, 8), (16, 1), (2, 2, 4)])
def test_the_model_axis_is_of_neighbours(shape):
    """Whoever talks most stands in a line or block: 4x4 chips are cut where it has to be."""
    mesh = make_mesh(shape, parse_slice("v5e-16").topology_devices())
    for group in mesh.devices.reshape(-1, shape[-1]):
        places = np.array([device.coords for device in group])
        assert np.prod(np.ptp(places, axis=0) + 1) == shape[-1]
