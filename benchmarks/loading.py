"""What loading a backbone reads and holds: time, bytes, and the peak of a host's memory.

    python benchmarks/loading.py --data_dir=DIR [--output=FILE.json]

Writes a checkpoint of T5 1.1 XL's shapes in random bfloat16 (2.85 B parameters, 5.7 GB) in each of
the three formats that `load_backbone` reads, Orbax also as one that was saved from eight shards,
and loads each in new processes on eight virtual CPU devices: two processes of four, as on two
hosts, and one of eight. One checkpoint at a time is on the disk, unless with --keep.

A CPU's device arrays lie in the host's memory. So what a process has to hold is the bytes of the
shards of its own devices, int8 where kernels are quantized; its peak is the largest resident memory
while it loads (VmHWM, set back before; mapped pages of files count) less what was resident before,
compiling included. Files are dropped from the page cache before a load, as far as the system does
that. `read` is what a process got from read calls, in which mapped files are not, and `disk` what
all processes together brought in from the disk, mapped or not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
from prompt_step import SIZES, t5_1_1
from random_checkpoints import FORMATS, written

from ptjax.backbones.load import load_backbone
from ptjax.cli import distributed
from ptjax.launch import reserved_port
from ptjax.sharding import processes

DEVICES = 8


@dataclasses.dataclass(frozen=True)
class Case:
    """How a backbone is loaded: `settings` are `load_backbone`'s."""

    processes: int
    settings: dict[str, Any]

    def __str__(self) -> str:
        named = [name if value is True else value for name, value in self.settings.items()]
        return f"{self.processes} x {DEVICES // self.processes} | {', '.join(named)}"


CASES = (
    Case(2, {"mesh": "1x8"}),
    Case(1, {"mesh": "1x8"}),
    Case(2, {"mesh": "1x8", "scan_layers": True}),
    Case(2, {"mesh": "2x4", "scan_layers": True, "fsdp": True}),
    Case(2, {"mesh": "1x8", "quantize": "int8"}),
    Case(2, {"mesh": "1x8", "quantize": "int8", "scan_layers": True}),
)


def numbers(file: str) -> dict[str, int]:
    """The lines "name: number" of a file of /proc/self."""
    lines = (line.split() for line in Path(f"/proc/self/{file}").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) for line in lines if line[1:2] and line[1].isdigit()}


def load(arguments: argparse.Namespace) -> dict[str, Any]:
    """Loads a checkpoint in this process, one of several or alone; what that took."""
    distributed.start(arguments)
    jax.block_until_ready(jax.numpy.zeros(()))
    processes.wait_for_all("loading begins")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM to what is resident now
    io, began = numbers("io"), time.perf_counter()
    resident = numbers("status")["VmRSS"]
    backbone = load_backbone(arguments.load, dtype="bfloat16", **json.loads(arguments.settings))
    arrays = jax.block_until_ready(jax.tree.leaves(backbone.variables))
    seconds, io_after = time.perf_counter() - began, numbers("io")
    return {
        "seconds": seconds,
        "read_bytes": io_after["rchar"] - io["rchar"],
        "disk_bytes": io_after["read_bytes"] - io["read_bytes"],
        "shard_bytes": sum(s.data.nbytes for x in arrays for s in x.addressable_shards),
        "peak_bytes": 1024 * (numbers("status")["VmHWM"] - resident),
        "fingerprint": backbone.fingerprint,
    }


def measure(checkpoint: Path, case: Case) -> list[dict[str, Any]]:
    """`load` in each of the processes of a case."""
    for file in filter(Path.is_file, checkpoint.rglob("*")):
        with file.open("rb") as stream:
            os.fsync(stream)
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    flag = f"--xla_force_host_platform_device_count={DEVICES // case.processes}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}
    command = [sys.executable, __file__, f"--load={checkpoint}"]
    command += [f"--settings={json.dumps(case.settings)}", f"--num_processes={case.processes}"]
    with reserved_port() as port:
        command += [f"--coordinator_address=127.0.0.1:{port}"]
        started = [
            subprocess.Popen(
                [*command, f"--process_id={number}"],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(case.processes)
        ]
        answers = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"loading {checkpoint} on {case} failed")
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


def row(name: str, case: Case, answers: list[dict[str, Any]]) -> str:
    """A line of the table; of several processes the one that is worst."""
    most = {key: max(a[key] for a in answers) for key in answers[0] if key != "fingerprint"}
    ratio = max(a["peak_bytes"] / a["shard_bytes"] for a in answers)
    sizes = (
        most["read_bytes"],
        sum(a["disk_bytes"] for a in answers),
        most["shard_bytes"],
        most["peak_bytes"],
    )
    cells = " | ".join(f"{size / 1e9:.2f}" for size in sizes)
    return f"| {name} | {case} | {most['seconds']:.0f} | {cells} | {ratio:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    divisible = [size for size, (_, heads, *_) in SIZES.items() if heads % DEVICES == 0]
    parser.add_argument("--data_dir", type=Path, help="where the checkpoints are written")
    parser.add_argument("--size", choices=divisible, default="xl", help="of T5 1.1; default: xl")
    parser.add_argument("--formats", default=";".join(FORMATS), help="default: %(default)s")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints there")
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    parser.add_argument("--load", help="load this, as one of the processes (internal)")
    parser.add_argument("--settings", help="of load_backbone, as JSON (internal)")
    distributed.add_flags(parser)
    flags = parser.parse_args()
    if flags.load:
        print(json.dumps(load(flags)), flush=True)
        return
    print("| format | processes | how | s | read, GB | disk, GB | shards, GB | peak, GB | ratio |")
    print("|---|---|---|--:|--:|--:|--:|--:|--:|")
    results = []
    for name in flags.formats.split(";"):
        checkpoint = written(flags.data_dir, name, t5_1_1(flags.size))
        for case in CASES:
            answers = measure(checkpoint, case)
            print(row(name, case, answers), flush=True)
            results.append({"format": name, **dataclasses.asdict(case), "answers": answers})
        if not flags.keep:
            shutil.rmtree(checkpoint)
    if len({a["fingerprint"] for result in results for a in result["answers"]}) > 1:
        raise SystemExit("the formats do not hold the same backbone")
    if flags.output:
        flags.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
