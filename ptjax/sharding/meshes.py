"""Which mesh: a name such as '4x2', or 'auto', becomes devices in `data` x `model`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from ptjax.errors import InputError
from ptjax.models.family import Config, Family
from ptjax.models.t5_family import T5_FAMILY
from ptjax.sharding import processes
from ptjax.sharding.devices import GIB, usable_memory
from ptjax.sharding.quantize import weight_shapes
from ptjax.sharding.rules import AXES, bytes_per_device

SHARE = 0.7
"""Of a device's memory, what 'auto' gives to the frozen weights; the rest is for activations. T5
XXL in bfloat16, batch 32, takes 66% at 4x2 on v5e-8 and at 8x1 on v6e-8, and those compile with
76% and 71-85% of the memory in use."""


def make_mesh(shape: int | Sequence[int] = 1, devices: Iterable[jax.Device] | None = None) -> Mesh:
    """All `devices` as `data` x `model`, or as `replica` x `data` x `model`.

    Neighbours on `model`, the axis that communicates most, are neighbours in the machine; the first
    axis goes over the slices, where there are several. The devices may be of a topology that is
    only compiled for.

    Args:
        shape: the sizes of two or three axes; an int is `model` alone, `data` has the rest and
            `replica` the slices, if there are several.

    Raises:
        InputError: the devices cannot be divided so.
    """
    found = list(jax.devices() if devices is None else devices)
    slices = count_slices(found)
    if isinstance(shape, int):
        if shape < 1 or len(found) // slices % shape:
            each = f"{len(found)} devices" + (f" in {slices} slices" if slices > 1 else "")
            raise InputError(f"{each} cannot be divided into a model axis of {shape}")
        rest = len(found) // slices // shape
        shape = (rest, shape) if slices == 1 else (slices, rest, shape)
    check_shape(shape, found)
    axis_types = (AxisType.Auto,) * len(shape)
    return Mesh(_arrange(tuple(shape), slices, found), AXES[-len(shape) :], axis_types=axis_types)


def check_shape(shape: Sequence[int], devices: Sequence[Any]) -> None:
    """InputError unless a mesh of `shape` takes all devices and its first axis the slices."""
    slices = count_slices(devices)
    name = "x".join(map(str, shape))
    if len(shape) not in (2, 3) or min(shape) < 1 or math.prod(shape) != len(devices):
        raise InputError(
            f"a mesh of {name} is {math.prod(shape)} devices, and there are {len(devices)}; it is "
            "data x model, or replica x data x model"
        )
    if shape[0] % slices:
        raise InputError(
            f"a mesh of {name}: the devices are in {slices} slices, and the first axis, "
            f"{shape[0]}, is not a multiple of them"
        )


def _arrange(shape: tuple[int, ...], slices: int, devices: list[jax.Device]) -> np.ndarray:
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        within = (shape[0] // slices, *shape[1:])
        across = (slices, *(1 for _ in shape[1:]))
        return mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )
    except (ValueError, NotImplementedError, AssertionError) as error:
        name = "x".join(map(str, shape))
        reason = str(error).splitlines()[0] if str(error) else "not a block of the machine"
        raise InputError(f"these devices make no mesh of {name}: {reason}") from error


def count_slices(devices: Iterable[Any]) -> int:
    """In how many slices they are; those that do not say are in one."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def choose_mesh(
    mesh: Mesh | str | None,
    config: Config,
    dtype: str,
    *,
    fsdp: bool = False,
    quantize: str | None = None,
    devices: Iterable[jax.Device] | None = None,
    family: Family = T5_FAMILY,
) -> Mesh:
    """The mesh that `mesh` means for a backbone of `config`; logs which, and why.

    Args:
        mesh: a name, "data x model" ('4x2') or "replica x data x model" ('2x2x2'); 'auto' is the
            smallest model axis whose part of the frozen weights leaves a device enough of its
            memory (`SHARE`), for a model axis communicates in every layer and a data axis once a
            step; None is this process's first device.
        dtype, quantize: of the frozen weights, as for `load_backbone`.
        fsdp: whether they are divided over `data` too.
        devices: default all.

    Raises:
        InputError: the name is none, or the mesh does not divide the devices or the sizes.
    """
    if mesh is None:
        chosen = None if processes.several() else jax.local_devices()[:1]
        mesh, why = make_mesh(devices=chosen), "as none is named"
    elif isinstance(mesh, str):
        found = list(jax.devices() if devices is None else devices)
        if mesh == "auto":
            held = weight_shapes(config, dtype, quantize, family=family)
            shape, why = smallest_that_fits(config, held, found, fsdp, family=family)
        else:
            shape, why = parse_mesh(mesh), "as MESH says"
        mesh = make_mesh(shape, found)
    else:
        why = "as given"
    check_mesh(config, mesh, fsdp=fsdp, family=family)
    if mesh.size > 1:
        kind = mesh.devices.flat[0].device_kind
        axes = " x ".join(mesh.axis_names) + (", fsdp" if fsdp else "")
        logging.info("mesh %s (%s) of %d %s: %s", mesh_name(mesh), axes, mesh.size, kind, why)
    return mesh


def parse_mesh(name: str) -> tuple[int, ...]:
    """The sizes in a mesh's name.

    >>> parse_mesh("2x4")
    (2, 4)
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", name):
        raise InputError(
            f"MESH = {name!r}: it is 'auto', data x model such as '8x1', or replica x data x model "
            "such as '2x4x1'"
        )
    return tuple(map(int, name.split("x")))


def mesh_name(mesh: Mesh) -> str:
    """ "2x4" """
    return "x".join(map(str, mesh.axis_sizes))


def check_mesh(
    config: Config, mesh: Mesh, *, fsdp: bool = False, family: Family = T5_FAMILY
) -> None:
    """InputError unless the mesh's axes divide what the family's table divides over them.

    For T5 that is heads, mlp and vocabulary over `model`, and with `fsdp`, which needs scanned
    layers, the width over `data`.
    """
    if fsdp and not config.scan_layers:
        raise InputError(
            "FSDP = True needs SCAN_LAYERS = True: only in a scan is a layer's weights' gathering "
            "sure to wait for that layer"
        )
    wrong = _indivisible(config, mesh.shape, fsdp, family)
    if wrong is None:
        return
    name, size, axis = wrong
    replicas = mesh.shape.get("replica")
    within = mesh.size // (replicas or 1)
    front = [] if replicas is None else [replicas]
    shapes = fitting_shapes(config, within, fsdp, family=family)
    fitting = [repr("x".join(map(str, [*front, *s]))) for s in shapes]
    hint = f"MESH may be {' or '.join(fitting)}" if fitting else f"no mesh of {within} devices does"
    raise InputError(
        f"{name} = {size} is not a multiple of {mesh.shape[axis]}, the {axis} axis of the mesh "
        f"{mesh_name(mesh)}" + (" (FSDP = True)" if axis == "data" else "") + f"; {hint}"
    )


def _indivisible(
    config: Config, sizes: Mapping[str, int], fsdp: bool, family: Family
) -> tuple[str, int, str] | None:
    """(field, its size, axis) that do not go together."""
    over = dict.fromkeys(family.divided, "model")
    for name, axis in (
        over | dict.fromkeys(family.divided_by_fsdp if fsdp else (), "data")
    ).items():
        if getattr(config, name) % sizes[axis]:
            return name, getattr(config, name), axis
    return None


def fitting_shapes(
    config: Config, devices: int, fsdp: bool, *, family: Family = T5_FAMILY
) -> list[tuple[int, int]]:
    """The (data, model) of that many devices that divide the sizes, the smallest model first."""
    shapes = [(devices // model, model) for model in range(1, devices + 1) if devices % model == 0]
    return [
        (data, model)
        for data, model in shapes
        if _indivisible(config, {"data": data, "model": model}, fsdp, family) is None
    ]


def smallest_that_fits(
    config: Config,
    weights: Any,
    devices: list[Any],
    fsdp: bool,
    *,
    family: Family = T5_FAMILY,
) -> tuple[tuple[int, ...], str]:
    """(sizes of the axes, why) of 'auto'."""
    slices = count_slices(devices)
    within, kind = len(devices) // slices, devices[0].device_kind
    fitting = fitting_shapes(config, within, fsdp, family=family)
    if not fitting:  # a model axis of 1 divides everything but a width over `data`
        raise InputError(
            f"FSDP = True: no mesh of {within} {kind} divides emb_dim = {config.emb_dim} over data "
            "and heads, mlp and vocabulary over model; set FSDP = False"
        )
    memory = usable_memory(devices[0])
    front = () if slices == 1 else (slices,)
    held: list[str] = []
    for data, model in fitting:
        sizes = {"data": data, "model": model}
        rules = family.sharding_rules
        size = bytes_per_device({"params": weights}, sizes, fsdp=fsdp, rules=rules)
        if memory is None:
            return (*front, data, model), "the smallest model axis"
        if size <= SHARE * memory:
            why = f"the frozen weights take {size / GIB:.2f} of {memory / GIB:.2f} GiB a device"
            if held:
                why += f" (at most {SHARE:.0%}; {held[-1]} GiB with a smaller model axis)"
            return (*front, data, model), why
        held.append(f"{size / GIB:.2f}")
    raise InputError(
        f"MESH = 'auto': on {within} {kind} the frozen weights take at least {held[-1]} GiB a "
        f"device, more than {SHARE:.0%} of its {(memory or 0) / GIB:.2f}; take more devices"
        + ("" if fsdp else " or FSDP = True")
        + ", or name a MESH to try it all the same"
    )
