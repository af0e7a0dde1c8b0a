"""The train step compiled ahead of time for devices that are not there.

In processes of their own: the compiler may crash, or never end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ptjax import files
from ptjax.errors import InputError
from ptjax.planning.hlo import bytes_accessed, collectives
from ptjax.planning.slices import Slice
from ptjax.planning.workload import (
    TIGHT,
    Layout,
    Report,
    Workload,
    count,
    link_seconds,
    place,
)
from ptjax.sharding import meshes
from ptjax.sharding.devices import FRACTIONS, GIB
from ptjax.sharding.meshes import make_mesh

_CRASHED, _LATE = "compiler crashed", "compiler took too long"
_PACKAGES = re.compile("jax.*|flax|optax|libtpu.*")

FAST: dict[str, Any] = {"exec_time_optimization_effort": -1.0}
"""Half the time of the TPU's compiler; the peak of T5 XXL comes out up to 1% higher, that of small
25%."""
UNTUNED: dict[str, Any] = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
"""Products as XLA calls cuBLAS for them: which kernel is fastest only a GPU can tell."""


def check_compiler(where: Slice) -> None:
    """InputError unless what compiles for the slice is installed."""
    if not any(map(importlib.util.find_spec, where.compiler)):
        extra = "plan" if where.is_tpu else "plan-gpu"
        raise InputError(
            f"compiling for {where.name} needs {where.compiler[0]}: pip install 'ptjax[{extra}]', "
            "or use --quick"
        )


def compile_ahead(
    workload: Workload, layout: Layout, where: Slice, *, exact: bool = False, timed: bool = False
) -> Report:
    """`count`, and what the compiler for the slice's devices makes of the step.

    In a process of its own: the compiler may take that one with it.

    Args:
        layout: settled.
        exact: for TPUs, at the effort of a real run instead of half the time.
        timed: also count what it reads and writes, from two shallow networks more.

    Returns:
        With "verdict": "fits", "tight" (over `TIGHT` of the memory), "does not fit", or
        "refused": the devices make no such mesh.

    Raises:
        InputError: nothing compiles for this slice.
    """
    report = count(workload, layout, where)
    devices = where.topology_devices()
    try:
        mesh = make_mesh(meshes.parse_mesh(layout.mesh), devices)
    except InputError as error:
        return report | {"verdict": "refused", "reason": str(error)}
    options = compiler_options(where, exact)
    lowered, started = place(workload, layout, mesh).lower(), time.perf_counter()
    try:
        compiled: Any = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED.*HBM", str(error)):
            raise
        return report | {"verdict": "does not fit", "reason": str(error).splitlines()[0]}
    memory = compiled.memory_analysis()
    peak, usable = memory.peak_memory_in_bytes, where.usable_bytes
    if peak > usable:  # a GPU's compiler refuses nothing
        report["reason"] = (
            f"needs {peak / GIB:.2f} GiB; JAX gives a program {usable / GIB:.2f} of this GPU "
            f"({FRACTIONS[0]})"
        )
    traffic: dict[tuple[str, ...], list[int]] = {}
    for one in collectives(compiled, mesh):
        total = traffic.setdefault((one.kind, *one.axes), [0, 0, 0])
        for i, more in enumerate((1, one.times, one.bytes)):
            total[i] += more
    report |= {
        "verdict": _verdict(peak, usable),
        "compile_seconds": time.perf_counter() - started,
        "peak_bytes": peak,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "collectives": [
            {"kind": kind, "axes": list(axes), "places": n, "times": times, "bytes": size}
            for (kind, *axes), (n, times, size) in traffic.items()
        ],
    }
    estimate = report["estimate"]
    seconds = {name: estimate[name] for name in ("compute", "memory")}
    sent = {key: size for key, (*_, size) in traffic.items()}
    seconds["links"] = link_seconds(sent, mesh, where)
    if timed:
        try:
            accessed = _accessed_bytes(workload, layout, mesh, where, options)
        except jax.errors.JaxRuntimeError:
            pass  # the step itself compiled: its verdict stands, without an upper end
        else:
            seconds["memory_most"] = accessed / where.generation.memory_rate
    return report | {"estimate": estimate(seconds, estimate["ideal"])}


def _verdict(peak: int, usable: int) -> str:
    if peak > usable:
        return "does not fit"
    return "tight" if peak > TIGHT * usable else "fits"


def compiler_options(where: Slice, exact: bool = False) -> dict[str, Any]:
    """What the compiler of the slice's devices is told."""
    if not where.is_tpu:
        return UNTUNED
    return {} if exact else FAST


def _accessed_bytes(
    workload: Workload, layout: Layout, mesh: Mesh, where: Slice, options: Any
) -> float:
    """Bytes that a device's program reads and writes, those kept on the chip included.

    Of one and two layers unrolled, and of one microbatch: the TPU's compiler counts the body of a
    loop once, and a GPU's loop takes slices of stacks, which would be counted whole.
    """
    config, step_config = workload.config, workload.step_config
    parts = step_config.microbatches
    encoder, decoder = config.num_encoder_layers, config.num_decoder_layers
    unrolled = dataclasses.replace(layout, scan_layers=False, fsdp=False)

    def accessed(layers: tuple[int, int]) -> float:
        sizes = {"num_encoder_layers": layers[0], "num_decoder_layers": layers[1]}
        shallow = dataclasses.replace(
            workload,
            config=dataclasses.replace(config, **sizes),
            step_config=dataclasses.replace(step_config, microbatches=1),
            batch_size=workload.batch_size // parts,
        )
        lowered = place(shallow, unrolled, mesh).lower()
        compiled: Any = lowered.compile(compiler_options=options)
        if where.is_tpu:
            return parts * float(compiled.cost_analysis()["bytes accessed"])
        return parts * bytes_accessed(compiled)

    one = accessed((1, 1))
    if encoder == decoder:
        return one + (encoder - 1) * (accessed((2, 2)) - one)
    more = (encoder - 1) * (accessed((2, 1)) - one) + (decoder - 1) * (accessed((1, 2)) - one)
    return one + more


class Compiler:
    """`compile_ahead` for one slice in a process of its own, each answer kept.

    Args:
        gin: all settings of the run, as `ptjax.plan --compile` reads them.
        exact: see `compile_ahead`.
        timeout: seconds of one compilation.
        cache: the folder of the answers; None keeps none.
    """

    def __init__(
        self,
        workload: Workload,
        where: Slice,
        gin: str,
        *,
        exact: bool = False,
        timeout: int = 900,
        cache: Path | None = None,
    ) -> None:
        self.workload, self.where, self.gin = workload, where, gin
        self.exact, self.timeout, self.cache = exact, timeout, cache
        self.known: dict[str, Report] = {}

    def __call__(self, layout: Layout, timed: bool = False) -> Report:
        """The answer for one layout: what is known of it, or a compilation."""
        jobs = [
            {"layout": layout.settings(), "exact": self.exact, "timed": with_time}
            for with_time in ((True,) if timed else (True, False))  # a timed answer has all of it
        ]
        keys = [self._key(job) for job in jobs]
        for key in keys:
            if key not in self.known and (found := self._read(key)):
                self.known[key] = found
            if key in self.known:
                return self.known[key]
        print(f"{self.where.name}: compiling {layout} ...", file=sys.stderr, flush=True)
        report = self._compile(layout, jobs[-1])
        self.known[keys[-1]] = report
        # A crash or a timeout may have been the machine's; it is tried again another time.
        if report["verdict"] not in (_CRASHED, _LATE):
            self._write(keys[-1], report)
        return report

    def _read(self, key: str) -> Report | None:
        try:
            return None if self.cache is None else json.loads((self.cache / key).read_text("utf-8"))
        except (OSError, ValueError):
            return None

    def _write(self, key: str, report: Report) -> None:
        if self.cache is None:
            return
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            files.write_bytes(self.cache / key, json.dumps(report).encode())
        except OSError as error:
            print(f"warning: answers are not kept: {error}", file=sys.stderr)
            self.cache = None

    def _compile(self, layout: Layout, job: Mapping[str, Any]) -> Report:
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "plan.gin"
            config.write_text(self.gin, "utf-8")
            command = [sys.executable, "-m", "ptjax.plan", f"--gin_file={config}"]
            command += [f"--slice={self.where.name}", f"--compile={json.dumps(job)}"]
            try:
                done = subprocess.run(
                    command,
                    env=os.environ | {"JAX_TRACEBACK_FILTERING": "off"},
                    capture_output=True,
                    text=True,
                    timeout=self.timeout,
                )
            except subprocess.TimeoutExpired:
                counted = count(self.workload, layout, self.where)
                return counted | {"verdict": _LATE, "reason": f"more than {self.timeout} s"}
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        if done.returncode == 2:  # the run is no reason: its settings were read here already
            raise InputError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
        counted = count(self.workload, layout, self.where)
        return counted | {"verdict": _CRASHED, "reason": _reason(done)}

    def _key(self, job: Mapping[str, Any]) -> str:
        """Whatever an answer depends on: the run, the slice, the compiler and this program."""
        digest = hashlib.sha256()
        versions = [
            f"{one.name} {one.version}"
            for one in importlib.metadata.distributions()
            if _PACKAGES.fullmatch(one.name)
        ]
        flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", *FRACTIONS)]
        for part in (self.gin, self.where.name, json.dumps(job), *sorted(versions), *flags):
            digest.update(part.encode() + b"\0")
        for source in sorted(Path(__file__).parent.rglob("*.py")):
            digest.update(source.read_bytes())
        return f"{digest.hexdigest()[:32]}.json"


def answer(workload: Workload, where: Slice, job: str) -> Report:
    """What the process does that `Compiler` starts.

    Args:
        job: of `--compile`.
    """
    wanted = json.loads(job)
    layout = Layout.of(wanted["layout"])
    return compile_ahead(workload, layout, where, exact=wanted["exact"], timed=wanted["timed"])


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Why a compilation ended: its signal, and the line that tells most."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    telling = [x for x in lines if re.match(r"F\d{4} |.*(Check failed|Error|STACK OVERFLOW)", x)]
    last = (telling or lines or [""])[-1][:300]
    if done.returncode >= 0:
        return last
    killed = "; was this machine's memory enough?" if done.returncode == -9 else ""
    return f"signal {-done.returncode}{killed} {last}".strip()
