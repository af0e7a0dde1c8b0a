"""T5 XXL on TPU and GPU slices, compiled ahead of time: which layouts fit, and what they send.

    python benchmarks/slice_table.py

Prints the table of docs/planning.md. Every row is a `python -m ptjax.plan --no_search --json`,
which caches its answers: an interrupted table resumes. Needs libtpu, XLA's CUDA plugin and
cuDNN (`pip install nvidia-cudnn-cu13`), no TPU and no GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys

ROWS = (  # size, slice, batch, mesh, settings
    ("xl", "v5e-1", 32, "1x1", "REMAT='full'"),
    ("xxl", "v5e-1", 8, "1x1", "REMAT='full' QUANTIZE='int8'"),
    ("xxl", "v5e-1", 8, "1x1", "REMAT='full' QUANTIZE='int8_products'"),
    ("xxl", "v5e-1", 32, "1x1", "REMAT='full' QUANTIZE='int8_products' MICROBATCHES=4"),
    ("xxl", "v5e-4", 32, "1x4", "REMAT='full'"),
    ("xxl", "v5e-4", 32, "1x4", "REMAT='full' QUANTIZE='int8'"),
    ("xxl", "v5e-8", 32, "1x8", "REMAT='full'"),
    ("xxl", "v5e-8", 32, "1x8", "REMAT='dots'"),
    ("xxl", "v5e-8", 32, "2x4", "REMAT='full'"),
    ("xxl", "v5e-8", 32, "2x4", "REMAT='dots'"),
    ("xxl", "v5e-8", 32, "2x4", "REMAT='full' FSDP=True"),
    ("xxl", "v5e-8", 32, "4x2", "REMAT='full'"),
    ("xxl", "v5e-8", 32, "4x2", "REMAT='dots' QUANTIZE='int8'"),
    ("xxl", "v5e-8", 32, "8x1", "REMAT='full' QUANTIZE='int8'"),
    ("xxl", "v5e-8", 32, "8x1", "REMAT='full' QUANTIZE='int8_products'"),
    ("xxl", "v5e-8", 32, "8x1", "REMAT='none' QUANTIZE='int8_products' MICROBATCHES=2"),
    ("xxl", "v5e-16", 32, "2x8", "REMAT='full'"),
    ("xxl", "v5e-16", 32, "4x4", "REMAT='dots'"),
    ("xxl", "v5e-16", 32, "8x2", "REMAT='full'"),
    ("xxl", "v5e-16", 32, "8x2", "REMAT='dots' QUANTIZE='int8'"),
    ("xxl", "v5e-16", 32, "16x1", "REMAT='full' FSDP=True"),
    ("xxl", "2xv5e-16", 32, "2x2x8", "REMAT='full'"),
    ("xl", "v6e-1", 32, "1x1", "REMAT='full'"),
    ("xxl", "v6e-8", 32, "1x8", "REMAT='full'"),
    ("xxl", "v6e-8", 32, "8x1", "REMAT='full'"),
    ("xxl", "v6e-8", 32, "8x1", "REMAT='dots'"),
    ("xxl", "v6e-8", 32, "8x1", "REMAT='none'"),
    ("xxl", "v6e-8", 32, "8x1", "REMAT='none' QUANTIZE='int8_products'"),
    ("xxl", "v4-16", 32, "2x4", "REMAT='full'"),
    ("xxl", "v4-16", 32, "8x1", "REMAT='full'"),
    ("xxl", "v4-16", 32, "8x1", "REMAT='dots' QUANTIZE='int8'"),
    ("xxl", "v5p-8", 32, "1x4", "REMAT='full'"),
    ("xxl", "v5p-8", 32, "4x1", "REMAT='dots'"),
    ("xxl", "v5p-8", 32, "4x1", "REMAT='dots' QUANTIZE='int8'"),
    ("xxl", "tpu7x-8", 32, "8x1", "REMAT='dots'"),
    ("xl", "h100x1", 32, "1x1", "REMAT='dots'"),
    ("xl", "h100x1", 32, "1x1", "REMAT='dots' ATTENTION='fused'"),
    ("xxl", "h100x1", 32, "1x1", "REMAT='full' QUANTIZE='int8'"),
    ("xxl", "h200x1", 32, "1x1", "REMAT='full'"),
    ("xxl", "a100x8", 32, "8x1", "REMAT='none'"),
    ("xxl", "h100x8", 32, "8x1", "REMAT='none'"),
    ("xxl", "h100x8", 32, "8x1", "REMAT='dots'"),
    ("xxl", "h100x8", 32, "8x1", "REMAT='dots' QUANTIZE='int8'"),
    ("xxl", "h100x8", 32, "2x4", "REMAT='none'"),
    ("xxl", "h100x16", 32, "2x8x1", "REMAT='none'"),
    ("xxl", "b200x8", 32, "8x1", "REMAT='none'"),
)


def main() -> None:
    print("| T5 1.1 | slice | batch | MESH | settings | peak, GiB of | verdict | sent | s a step |")
    print("|---|---|--:|---|---|--:|---|---|--:|")
    for size, where, batch, mesh, settings in ROWS:
        chosen = ["SCAN_LAYERS=True", f"MESH={mesh!r}", f"BATCH_SIZE={batch}", *settings.split()]
        command = [
            *("-m", "ptjax.plan", "--no_search", "--json", f"--slice={where}"),
            *(f"--gin_file=models/t5_1_1_{size}.gin", "--gin_file=runs/prompt_tune.gin"),
            *(f"--gin.{one}" for one in chosen),
        ]
        done = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE)
        [found] = json.loads(done.stdout)
        report = found["own"]
        if report["verdict"] == "refused":
            raise SystemExit(f"{where}: {report['reason']}")
        usable, peak = report["usable_bytes"] / 2**30, report.get("peak_bytes")
        sent = ", ".join(
            f"{x['kind']} over {' x '.join(x['axes'])} {x['bytes'] / 1e9:.3g} GB ({x['times']})"
            for x in report.get("collectives", ())
        )
        low, high = report["estimate"]["low"], report["estimate"]["high"]
        cells = (
            size.upper(),
            where,
            str(batch),
            mesh,
            settings.replace(" ", ", "),
            (f"{peak / 2**30:.2f} of " if peak else "") + f"{usable:.2f}",
            report["verdict"],
            sent or ("nothing" if "collectives" in report else ""),
            f"{low:.3g} - {high:.3g}" if high else "",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
