"""FLOPs of the prompt-tuning step, beside those of the forward pass, for every T5 1.1.

    python benchmarks/step_flops.py [--output=FILE.json]

Counted from the jaxpr (`ptjax.planning.flops`): no weights exist and XXL takes seconds. Going back
through a frozen network costs its activations' gradients alone: step / forward is 2 and a little.
3.0 would mean that the gradients of frozen weights are computed too. Exits 1 above 2.25.
"""

from __future__ import annotations

import argparse
import json
import sys

import jax
from prompt_step import SIZES, count_step_flops, t5_1_1

from ptjax.data.pipeline import Shape

LIMIT = 2.25


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--inputs", type=int, default=512, help="T, input tokens")
    parser.add_argument("--prompt", type=int, default=100, help="P, rows of the prompt")
    parser.add_argument("--targets", type=int, default=16, help="L, target tokens")
    parser.add_argument("--output", help="a JSON file to write")
    flags = parser.parse_args()
    shape = {name: getattr(flags, name) for name in ("batch", "inputs", "prompt", "targets")}

    arrays = Shape(flags.batch, flags.inputs, flags.targets).arrays()
    batch = {name: jax.ShapeDtypeStruct(*array) for name, array in arrays.items()}
    print(f"T5 1.1, prompt tuning, {shape}")
    print(f"{'size':6} {'forward':>10} {'step':>10} {'step / forward':>15}")
    rows = []
    for size in SIZES:
        forward, step = count_step_flops(t5_1_1(size), flags.prompt, batch)
        print(f"{size:6} {forward:10.3e} {step:10.3e} {step / forward:15.3f}")
        rows.append({"size": size, "forward": forward, "step": step, "ratio": step / forward})
    if flags.output:
        result = {"shape": shape, "jax": jax.__version__, "limit": LIMIT, "sizes": rows}
        with open(flags.output, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
    if above := [row["size"] for row in rows if row["ratio"] > LIMIT]:
        print(f"above {LIMIT}, so gradients of frozen weights are computed: {', '.join(above)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
