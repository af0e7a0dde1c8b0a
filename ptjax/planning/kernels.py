"""Reads from a compiled program's HLO what each of its kernels moves and computes.

A kernel is an instruction that the device runs as one: a fusion, a product, a copy, a Pallas call.
"""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ptjax.planning.hlo import KINDS, array_bytes, arrays, computations, loops

# Instructions that move no bytes themselves: aliases, and calls whose bodies are counted.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
         "conditional", "opt-barrier", "after-all", "partition-id", "replica-id"}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")
_ALIASES = ("bitcast", "copy", "reshape", "transpose", "convert")
_PRODUCTS = ("dot", "convolution")


class Kernel(NamedTuple):
    """A kernel of a program.

    Attributes:
        name: its name in the HLO.
        times: how often it runs in one run of the program.
        bytes: what one run reads from and writes to the device's main memory. An array counts once
            for every kernel that uses it; a slice of an array counts as the slice. What a TPU's
            vector memory holds does not count.
        flops: FLOPs of one run's matrix products, by the dtype of their operands.
    """

    name: str
    times: int
    bytes: int
    flops: Mapping[str, int]


class _Instruction(NamedTuple):
    name: str
    type: str
    operation: str
    operands: list[str]
    line: str


_Bodies = Mapping[str, Sequence[_Instruction]]


def kernels(text: str) -> list[Kernel]:
    """Lists the kernels in the HLO of a compiled program (`Compiled.as_text`).

    The FLOPs of a Pallas call are those of its `cost_estimate`; on a GPU, those of a scope's name,
    "flops=". Those of collectives, sums and
    elementwise operations do not count.
    """
    lines, entry = computations(text)
    bodies = {name: list(map(_parse, body)) for name, body in lines.items()}
    bodies = {name: [x for x in body if x is not None] for name, body in bodies.items()}
    inside = {
        called
        for body in bodies.values()
        for instruction in body
        if instruction.operation != "call"
        for called in re.findall(r"(?:calls|to_apply)=(%[\w.\-]+)", instruction.line)
    }
    found = []
    for name, (times, _) in loops(lines, entry).items():
        if name in inside:
            continue
        types = {instruction.name: instruction.type for instruction in bodies[name]}
        for instruction in bodies[name]:
            if instruction.operation not in _FREE and not instruction.operation.endswith("-done"):
                moved = _moved(instruction, types, bodies)
                flops = _flops(instruction, types, bodies)
                found.append(Kernel(instruction.name, times, moved, flops))
    return found


def _parse(line: str) -> _Instruction | None:
    pattern = r"\s*(?:ROOT )?(%[\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)"
    if (match := re.match(pattern, line)) is None:
        return None
    name, type_, operation, operands = match.groups()
    if operation == "parameter":
        return _Instruction(name, type_, operation, [operands], line)
    return _Instruction(name, type_, operation, re.findall(r"%[\w.\-]+", operands), line)


def _memory_bytes(type_: str) -> int:
    """The bytes of the arrays in a type that lie in main memory, not in a TPU's VMEM, S(1)."""
    placed = re.findall(r"(\w+\[[\d,]*\])(\{[^}]*\})?", type_)
    return sum(_bytes(array) for array, layout in placed if "S(1)" not in layout)


def _bytes(type_: str) -> int:
    return sum(array_bytes(dtype, shape) for dtype, shape in arrays(type_))


def _moved(instruction: _Instruction, types: Mapping[str, str], bodies: _Bodies) -> int:
    """`Kernel.bytes`."""
    operation, type_ = instruction.operation, instruction.type
    if operation.endswith("-start") and type_.startswith("("):
        type_ = re.sub(r"[us]32\[\]", "", type_)  # its counters
        # (operands, results), or (result, operand). A "call": a collective on a TPU's SparseCores.
        if operation.removesuffix("-start") in (*KINDS, "copy", "call"):
            return _memory_bytes(type_)
        sizes = (array_bytes(dtype, shape) for dtype, shape in arrays(type_))
        slice_ = min(size for size in sizes if size)
        return slice_ if "S(1)" in type_ else 2 * slice_
    if operation == "custom-call" and "gemm" in instruction.line:
        type_ = re.sub(r"s8\[\d+\]", "", type_)  # cuBLAS's scratch space
    total = _written(instruction, types, bodies, type_)
    for index, operand in enumerate(instruction.operands):
        type_ = types.get(operand, "")
        if whole := _memory_bytes(type_):
            total += round(whole * min(1, _read(instruction, index, bodies, _elements(type_))))
    return total


def _called(instruction: _Instruction, bodies: _Bodies) -> Sequence[_Instruction]:
    match = re.search(r"calls=(%[\w.\-]+)", instruction.line)
    return bodies[match[1]] if match and instruction.operation == "fusion" else ()


def _read(instruction: _Instruction, index: int, bodies: _Bodies, elements: int) -> float:
    """The share of an operand with `elements` entries that an instruction reads."""
    operation = instruction.operation
    if operation in _SLICES and index == 0:
        return _elements(instruction.type) / elements
    if operation == "dynamic-update-slice" and index == 0:
        return 0  # in place
    body = _called(instruction, bodies)
    if not body:
        return 1
    names = _aliases(body, index, bodies)
    return sum(
        _read(user, place, bodies, elements)
        for user in body
        if user.name not in names
        for place, operand in enumerate(user.operands)
        if operand in names
    )


def _aliases(body: Sequence[_Instruction], index: int, bodies: _Bodies) -> set[str]:
    """A fusion's operand and what only renames, moves or casts its elements: nothing is written."""
    names: set[str] = set()
    for x in body:
        if x.operation == "parameter":
            same = x.operands == [str(index)]
        else:
            same = x.operands[:1] != [] and x.operands[0] in names and x.operation in _ALIASES
            inner = _called(x, bodies)
            if inner and len(x.operands) == 1 and x.operands[0] in names:
                same = inner[-1].name in _aliases(inner, 0, bodies)
        if same:
            names.add(x.name)
    return names


def _elements(type_: str) -> int:
    return sum(math.prod(shape) for _, shape in arrays(type_))


def _written(
    instruction: _Instruction, types: Mapping[str, str], bodies: _Bodies, type_: str
) -> int:
    """The bytes that an instruction writes; of an update in place, those of the update."""
    if instruction.operation == "dynamic-update-slice":
        return _bytes(types.get(instruction.operands[1], ""))
    body = _called(instruction, bodies)
    if not body or "dynamic-update-slice" not in "".join(x.operation for x in body):
        return _memory_bytes(type_)
    inner = {x.name: x for x in body}
    roots = [next(x for x in body if x.line.lstrip().startswith("ROOT"))]
    if roots[0].operation == "tuple":
        roots = [inner[name] for name in roots[0].operands]
    total = 0
    for root in roots:
        while root.operation == "bitcast" and root.operands[0] in inner:
            root = inner[root.operands[0]]
        total += _written(root, {x.name: x.type for x in body}, bodies, root.type)
    return total


def _flops(
    instruction: _Instruction, types: Mapping[str, str], bodies: _Bodies
) -> collections.Counter[str]:
    """`Kernel.flops`."""
    line, found = instruction.line, collections.Counter[str]()
    body = _called(instruction, bodies)
    inner = {x.name: x.type for x in body}
    for x in body:
        found += _flops(x, inner, bodies)
    estimate = re.search(r'"cost_estimate":\{"flops":"(\d+)"|/flops=(\d+)/pallas_call"', line)
    if "__cudnn$fmha" in line:  # attention: two products, and five in the backward pass
        logits = re.search(r'"dimensions":\s*\[([\d", ]+)\]', line)
        [(dtype, result), *_] = arrays(instruction.type)
        size = math.prod(map(int, re.findall(r"\d+", logits[1]))) if logits else 0
        found[dtype] += (5 if "Backward" in line else 2) * 2 * size * result[-1]
        return found
    contracted = re.search(r'lhs_contracting_dim\w*"?[=:][\[{]?"?([\d,"]*)', line)
    if instruction.operation not in _PRODUCTS and not estimate and "gemm" not in line:
        return found
    [(dtype, left), *_] = arrays(types.get(instruction.operands[0], "")) or [("", ())]
    result = arrays(instruction.type)[0][1]
    if estimate:
        found[dtype] += int(estimate[1] or estimate[2])
    elif instruction.operation == "convolution":
        found[dtype] += 2 * _multiplications(line, types, instruction, result)
    elif contracted and left:
        axes = map(int, re.findall(r"\d+", contracted[1]))
        found[dtype] += 2 * math.prod(result) * math.prod(left[axis] for axis in axes)
    return found


def _multiplications(
    line: str, types: Mapping[str, str], instruction: _Instruction, result: Sequence[int]
) -> int:
    """Those of a convolution, as which a TPU's compiler writes products: without padding's."""
    [(_, left)], [(_, right)] = (arrays(types[name]) for name in instruction.operands)
    of_left, of_right, _ = re.split("_|->", re.search(r"dim_labels=([^,\s]+)", line)[1])  # pyright: ignore[reportOptionalSubscript]
    count = math.prod(result) * right[of_right.index("i")]
    spatial = sorted(label for label in of_left if label.isdigit())
    for place, label in enumerate(spatial):
        outputs, valid = _window(line, place, left[of_left.index(label)])
        count = count * valid // outputs
    return count


def _window(line: str, place: int, size: int) -> tuple[int, int]:
    """(outputs along a spatial axis of the left operand, of `size`; pairs of output and weight)."""

    def field(name: str, default: str) -> str:
        match = re.search(rf"window=\{{[^}}]*\b{name}=(\S+?)[\s}}]", line)
        return match[1].split("x")[place] if match else default

    taps, stride = int(field("size", "1")), int(field("stride", "1"))
    low, high = map(int, field("pad", "0_0").split("_"))
    spread, gap = int(field("lhs_dilate", "1")), int(field("rhs_dilate", "1"))
    reach = (size - 1) * spread + 1
    outputs = (reach + low + high - ((taps - 1) * gap + 1)) // stride + 1
    positions = (
        output * stride + tap * gap - low
        for output, tap in itertools.product(range(outputs), range(taps))
    )
    return outputs, sum(0 <= position < reach and position % spread == 0 for position in positions)


def totals(found: Sequence[Kernel]) -> tuple[int, dict[str, int]]:
    """Returns (bytes, FLOPs by dtype) of one run of the program."""
    flops = collections.Counter[str]()
    for kernel in found:
        flops.update({dtype: kernel.times * count for dtype, count in kernel.flops.items()})
    return sum(kernel.times * kernel.bytes for kernel in found), dict(flops)


def slowest(found: Sequence[Kernel]) -> Iterator[Kernel]:
    """Yields the kernels, those that move the most bytes first."""
    yield from sorted(found, key=lambda kernel: -kernel.times * kernel.bytes)
