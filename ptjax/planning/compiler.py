"""Compiles the train step ahead of time, for devices that this machine does not have.

Each compilation runs in a process of its own, because the compiler may crash or never return.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import jax

from ptjax import files
from ptjax.errors import InputError
from ptjax.files import JsonObject, Metadata
from ptjax.planning.estimate import (
    TIGHT,
    Report,
    count,
    kernel_seconds,
    link_seconds,
    step_seconds,
)
from ptjax.planning.hlo import collectives
from ptjax.planning.kernels import kernels
from ptjax.planning.slices import ENVIRONMENT, Slice, parse_slice
from ptjax.planning.workload import ParallelConfig, StepSpec, abstract_step
from ptjax.sharding import meshes
from ptjax.sharding.devices import FRACTIONS, GIB
from ptjax.sharding.meshes import make_mesh

_CRASHED, _LATE = "compiler crashed", "compiler took too long"
_REFUSED = 2
"""The exit code of a compiling process that raised an InputError."""
_PACKAGES = re.compile("jax.*|flax|optax|libtpu.*")

FAST: JsonObject = {"exec_time_optimization_effort": -1.0}
"""Compiler options that halve the compile time for TPUs. The reported peak memory is up to 1%
higher for T5 XXL, up to 25% for T5 small."""
UNTUNED: JsonObject = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
"""Compiler options for GPUs: matrix products call cuBLAS, because choosing the fastest kernel would
need a GPU."""


def check_compiler(slice_: Slice) -> None:
    """Raises InputError unless a compiler for the slice's devices is installed."""
    if not any(map(importlib.util.find_spec, slice_.compiler)):
        extra = "plan" if slice_.is_tpu else "plan-gpu"
        raise InputError(
            f"compiling for {slice_.name} needs {slice_.compiler[0]}: "
            f"pip install 'ptjax[{extra}]', or use --quick"
        )


def compile_ahead(
    spec: StepSpec,
    parallel: ParallelConfig,
    slice_: Slice,
    *,
    exact: bool = False,
) -> Report:
    """Compiles the step for the slice's devices; returns the report of `count` with more keys.

    Call it in a process of its own: a compiler that crashes ends the process.

    Args:
        parallel: the result of `resolve`.
        exact: for TPUs, compile with the options of a real run instead of the options `FAST`.

    Returns:
        The report of `count` with "verdict" and, if the step was compiled, the compiler's measures
        of memory, the collectives and a better "estimate". The verdict is "fits", "tight" (needs
        more than the share `TIGHT` of the memory), "does not fit" or "refused" (the devices cannot
        form the mesh). If it does not fit or is refused, "reason" says why.

    Raises:
        InputError: the compiler does not support this slice.
    """
    report = count(spec, parallel, slice_)
    devices = slice_.topology_devices()
    try:
        mesh = make_mesh(meshes.parse_mesh(parallel.mesh), devices)
    except InputError as error:
        return report | {"verdict": "refused", "reason": str(error)}
    options = compiler_options(slice_, exact)
    lowered, started = abstract_step(spec, parallel, mesh).lower(), time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED.*HBM", str(error)):
            raise
        return report | {"verdict": "does not fit", "reason": str(error).splitlines()[0]}
    memory = compiled.memory_analysis()
    assert memory is not None  # the compilers of TPUs and GPUs report it
    peak, usable = memory.peak_memory_in_bytes, slice_.usable_bytes
    if peak > usable:  # the compiler for GPUs accepts any program
        report["reason"] = (
            f"needs {peak / GIB:.2f} GiB; JAX gives a program {usable / GIB:.2f} of this GPU "
            f"({FRACTIONS[0]})"
        )
    found = kernels(compiled.as_text() or "")
    traffic: dict[tuple[str, ...], list[int]] = {}
    for collective in collectives(compiled, mesh):
        total = traffic.setdefault((collective.kind, *collective.axes), [0, 0, 0])
        for i, more in enumerate((1, collective.times, collective.bytes)):
            total[i] += more
    report |= {
        "verdict": _verdict(peak, usable),
        "compile_seconds": time.perf_counter() - started,
        "peak_bytes": peak,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "accessed_bytes": sum(kernel.times * kernel.bytes for kernel in found),
        "collectives": [
            {"kind": kind, "axes": list(axes), "places": n, "times": times, "bytes": size}
            for (kind, *axes), (n, times, size) in traffic.items()
        ],
    }
    estimate = report["estimate"]
    seconds = {name: estimate[name] for name in ("compute", "memory")}
    sent = {key: size for key, (*_, size) in traffic.items()}
    seconds["links"] = link_seconds(sent, mesh, slice_)
    seconds["kernels"] = kernel_seconds(found, slice_)
    seconds["memory_most"] = report["accessed_bytes"] / slice_.generation.memory_rate
    return report | {"estimate": step_seconds(seconds, estimate["ideal"])}


def _verdict(peak: int, usable: int) -> str:
    if peak > usable:
        return "does not fit"
    return "tight" if peak > TIGHT * usable else "fits"


def compiler_options(slice_: Slice, exact: bool = False) -> JsonObject:
    """The compiler's options for the slice's devices; `exact` is as for `compile_ahead`."""
    if not slice_.is_tpu:
        return UNTUNED
    return {} if exact else FAST


class Compiler:
    """Runs `compile_ahead` for one slice, each time in a new process; caches the reports.

    Args:
        spec: the train step. The new process reads it from a pipe, pickled: only this package can
            write to that pipe.
        exact: see `compile_ahead`.
        timeout: seconds that one compilation may take.
        cache: the folder for cached reports; None caches them in memory only.
    """

    def __init__(
        self,
        spec: StepSpec,
        slice_: Slice,
        *,
        exact: bool = False,
        timeout: int = 900,
        cache: Path | None = None,
    ) -> None:
        self.spec, self.slice_ = spec, slice_
        self.exact, self.timeout, self.cache = exact, timeout, cache
        self.reports: dict[str, Report] = {}

    @functools.cached_property
    def _pickled(self) -> bytes:
        """The step and the slice, for the process that compiles."""
        try:
            return cloudpickle.dumps((self.spec, self.slice_.name))
        except Exception as error:  # a method of the user's may hold anything
            raise InputError(
                f"the run's settings cannot be sent to the process that compiles ({error}); plan "
                "with quick=True, or with settings that can be pickled"
            ) from error

    def __call__(self, parallel: ParallelConfig) -> Report:
        """Returns the report for one configuration, from the cache or compiled now.

        If the compiler crashes or takes too long, the report has that "verdict", and a "reason".

        Raises:
            InputError: the compiler does not support the slice.
        """
        job = {"parallel": parallel.settings(), "exact": self.exact}
        key = self._key(job)
        if key not in self.reports and (cached := self._read(key)):
            self.reports[key] = cached
        if key in self.reports:
            return self.reports[key]
        print(f"{self.slice_.name}: compiling {parallel} ...", file=sys.stderr, flush=True)
        report = self.reports[key] = self._compile(parallel, job)
        # This machine may have caused a crash or a timeout, so the next run tries again.
        if report["verdict"] not in (_CRASHED, _LATE):
            self._write(key, report)
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
            print(f"warning: reports are not cached: {error}", file=sys.stderr)
            self.cache = None

    def _compile(self, parallel: ParallelConfig, job: Metadata) -> Report:
        # What this process can import, the new one can: a method may be in the user's own module.
        environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)}
        try:
            done = subprocess.run(
                [sys.executable, "-c", f"from {__name__} import answer; answer()"],
                input=cloudpickle.dumps((self._pickled, json.dumps(job))),
                env=environment | {"JAX_TRACEBACK_FILTERING": "off"},
                capture_output=True,
                timeout=self.timeout,
            )
        except subprocess.TimeoutExpired:
            counted = count(self.spec, parallel, self.slice_)
            return counted | {"verdict": _LATE, "reason": f"more than {self.timeout} s"}
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        if done.returncode == _REFUSED:  # not the run's settings, which were checked before
            raise InputError(done.stderr.decode(errors="replace").strip().splitlines()[-1])
        counted = count(self.spec, parallel, self.slice_)
        return counted | {"verdict": _CRASHED, "reason": _reason(done)}

    def _key(self, job: Metadata) -> str:
        """A hash of everything that a report depends on: run, slice, compiler and this package."""
        digest = hashlib.sha256()
        versions = [
            f"{package.name} {package.version}"
            for package in importlib.metadata.distributions()
            if _PACKAGES.fullmatch(package.name)
        ]
        flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", *FRACTIONS)]
        digest.update(self._pickled)
        for part in (json.dumps(job), *sorted(versions), *flags):
            digest.update(part.encode() + b"\0")
        for source in sorted(Path(__file__).parent.rglob("*.py")):
            digest.update(source.read_bytes())
        return f"{digest.hexdigest()[:32]}.json"


def answer() -> None:
    """Runs `compile_ahead` in the process that `Compiler` has started; prints the report as JSON.

    Standard input is what `Compiler` has pickled.
    """
    pickled, job = pickle.load(sys.stdin.buffer)
    (spec, name), wanted = pickle.loads(pickled), json.loads(job)
    parallel = ParallelConfig.from_settings(wanted["parallel"])
    try:
        report = compile_ahead(spec, parallel, parse_slice(name), exact=wanted["exact"])
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(_REFUSED) from None
    print(json.dumps(report))


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    """Why a compilation ended: its signal, and the most informative line of its errors."""
    stderr = done.stderr.decode(errors="replace")
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = [x for x in lines if re.match(r"F\d{4} |.*(Check failed|Error|STACK OVERFLOW)", x)]
    last = (telling or lines or [""])[-1][:300]
    if done.returncode >= 0:
        return last
    killed = "; was this machine's memory enough?" if done.returncode == -9 else ""
    return f"signal {-done.returncode}{killed} {last}".strip()
