"""Makes meshes of devices, `data` x `model`, from a name such as '4x2' or 'auto'."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from ptjax.errors import InputError
from ptjax.models.family import Config, Family
from ptjax.models.t5_family import T5_FAMILY
from ptjax.sharding import processes
from ptjax.sharding.devices import GIB, DeviceLike, usable_memory
from ptjax.sharding.quantize import weight_shapes
from ptjax.sharding.rules import AXES, bytes_per_device
from ptjax.trees import Tree

SHARE = 0.7
"""The share of a device's memory that 'auto' allows for the frozen weights; the rest is for
activations. The weights of T5 XXL in bfloat16, batch 32, take 66% at 4x2 on v5e-8 and at 8x1 on
v6e-8, and the compiled steps 76% and 71-85%."""


def make_mesh(shape: int | Sequence[int] = 1, devices: Iterable[jax.Device] | None = None) -> Mesh:
    """Arranges all `devices` as `data` x `model`, or as `replica` x `data` x `model`.

    Neighbours on `model`, the axis that communicates most, are neighbours in the machine. The first
    axis spans the slices, if there are several.

    Args:
        shape: the sizes of two or three axes; an int is the size of `model`, with all other devices
            of a slice on `data` and the slices, if there are several, on `replica`.
        devices: None takes all devices of all processes. They may belong to a topology for
            ahead-of-time compilation.

    Raises:
        InputError: the devices cannot be divided into this shape.
    """
    all_devices = list(jax.devices() if devices is None else devices)
    slices = count_slices(all_devices)
    if isinstance(shape, int):
        if shape < 1 or len(all_devices) // slices % shape:
            each = f"{len(all_devices)} devices" + (f" in {slices} slices" if slices > 1 else "")
            raise InputError(f"{each} cannot be divided into a model axis of {shape}")
        rest = len(all_devices) // slices // shape
        shape = (rest, shape) if slices == 1 else (slices, rest, shape)
    check_shape(shape, all_devices)
    arranged = _arrange(tuple(shape), slices, all_devices)
    return Mesh(arranged, AXES[-len(shape) :], axis_types=(AxisType.Auto,) * len(shape))


def check_shape(shape: Sequence[int], devices: Sequence[DeviceLike]) -> None:
    """Raises InputError unless the devices can form a mesh of this shape.

    The product of `shape` must be the number of devices, and its first axis a multiple of the
    number of slices.

    Args:
        shape: the axis sizes, data x model or replica x data x model.
    """
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
    except (ValueError, NotImplementedError, AssertionError) as error:  # JAX asserts some of it
        name = "x".join(map(str, shape))
        reason = str(error).splitlines()[0] if str(error) else "not a block of the machine"
        raise InputError(f"these devices cannot form a mesh of {name}: {reason}") from error


def count_slices(devices: Iterable[DeviceLike]) -> int:
    """Counts the slices that devices belong to; those without a `slice_index` are in slice 0."""
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
    """Makes the mesh for a backbone of `config`; if it has several devices, logs it and why.

    Args:
        mesh: a mesh, or a name: "data x model" ('4x2') or "replica x data x model" ('2x2x2').
            'auto' chooses the smallest model axis with which the frozen weights leave a device
            enough memory (`SHARE`), because a model axis communicates in every layer, a data axis
            once per step. None takes one device or, with several processes, all devices without a
            model axis.
        dtype, quantize: of the frozen weights, as for `load_backbone`.
        fsdp: whether the weights are divided over `data` too.
        devices: for a name; None takes all devices of all processes.

    Raises:
        InputError: the name is not valid, or the mesh does not divide the devices or the sizes.
    """
    if mesh is None:
        local = None if processes.several() else jax.local_devices()[:1]
        mesh, why = make_mesh(devices=local), "MESH is not set"
    elif isinstance(mesh, str):
        all_devices = list(jax.devices() if devices is None else devices)
        if mesh == "auto":
            weights = weight_shapes(config, dtype, quantize, family=family)
            shape, why = smallest_that_fits(config, weights, all_devices, fsdp, family=family)
        else:
            shape, why = parse_mesh(mesh), "as set by MESH"
        mesh = make_mesh(shape, all_devices)
    else:
        why = "as given"
    check_mesh(config, mesh, fsdp=fsdp, family=family)
    if mesh.size > 1:
        kind = mesh.devices.flat[0].device_kind
        axes = " x ".join(mesh.axis_names) + (", fsdp" if fsdp else "")
        logging.info("mesh %s (%s) of %d %s: %s", mesh_name(mesh), axes, mesh.size, kind, why)
    return mesh


def parse_mesh(name: str) -> tuple[int, ...]:
    """Returns the sizes of the axes in a mesh's name.

    >>> parse_mesh("2x4")
    (2, 4)

    Raises:
        InputError: it is not two or three positive numbers joined by "x".
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", name):
        raise InputError(
            f"MESH must be 'auto', data x model such as '8x1', or replica x data x model such as "
            f"'2x4x1', got {name!r}"
        )
    return tuple(map(int, name.split("x")))


def mesh_name(mesh: Mesh) -> str:
    """The mesh's name, such as "2x4". `parse_mesh` is the inverse."""
    return "x".join(map(str, mesh.axis_sizes))


def check_mesh(
    config: Config, mesh: Mesh, *, fsdp: bool = False, family: Family = T5_FAMILY
) -> None:
    """Raises InputError unless the mesh divides all dimensions that the family's table shards.

    For T5 these are heads, mlp and vocabulary over `model`, and with `fsdp` the width over `data`.
    Also raises it for `fsdp` without scanned layers.
    """
    if fsdp and not config.scan_layers:
        raise InputError(
            "FSDP = True needs SCAN_LAYERS = True: only a scan guarantees that a layer's weights "
            "are gathered no earlier than that layer runs"
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
    """The first (field, its size, axis) where the axis does not divide the size, or None."""
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
    """Lists the mesh shapes (data, model) of `devices` devices that `check_mesh` accepts.

    The one with the smallest model axis comes first.
    """
    shapes = [(devices // model, model) for model in range(1, devices + 1) if devices % model == 0]
    return [
        (data, model)
        for data, model in shapes
        if _indivisible(config, {"data": data, "model": model}, fsdp, family) is None
    ]


def smallest_that_fits(
    config: Config,
    weights: Tree,
    devices: Sequence[DeviceLike],
    fsdp: bool,
    *,
    family: Family = T5_FAMILY,
) -> tuple[tuple[int, ...], str]:
    """Chooses the mesh for MESH = 'auto', see `choose_mesh`.

    Returns:
        The sizes of the axes, and the reason as text.

    Args:
        weights: shapes and dtypes of the frozen weights (`quantize.weight_shapes`).

    Raises:
        InputError: no mesh divides the sizes, or the weights do not fit with any.
    """
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
    too_large: list[str] = []
    for data, model in fitting:
        sizes = {"data": data, "model": model}
        rules = family.sharding_rules
        size = bytes_per_device({"params": weights}, sizes, fsdp=fsdp, rules=rules)
        if memory is None:
            return (*front, data, model), "the smallest model axis"
        if size <= SHARE * memory:
            why = f"the frozen weights take {size / GIB:.2f} of {memory / GIB:.2f} GiB per device"
            if too_large:
                why += f" (at most {SHARE:.0%}; {too_large[-1]} GiB with a smaller model axis)"
            return (*front, data, model), why
        too_large.append(f"{size / GIB:.2f}")
    raise InputError(
        f"MESH = 'auto': on {within} {kind} the frozen weights take at least {too_large[-1]} GiB "
        f"per device, more than {SHARE:.0%} of its {(memory or 0) / GIB:.2f}; use more devices"
        + ("" if fsdp else " or FSDP = True")
        + ", or name a MESH to try anyway"
    )
