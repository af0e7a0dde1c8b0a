"""ptjax beside Hugging Face PEFT: real examples a second, memory, and accuracy, in one run.

    python benchmarks/against_peft.py --data_dir=DIR --output_dir=DIR [--peft_python=PYTHON]
        [--part=speed] [--device=gpu --size=xl]

Speed: both tune the same prompt (P = 100) on the same random T5 1.1, on real examples that were
tokenised once, 32 a step, with dropout and Adafactor. PEFT pads a batch to its longest example, as
its users' collators do. ptjax goes four ways: as in the paper (length buckets), packed, with a
prompt that does not see its input, and both. The timed batches stand for an epoch: all its batches,
sorted by size, are cut into equal parts, and the middle one of each part is taken. Making batches
is not timed. Each side runs in a process of its own, so that its peak memory is its own, and has
compiled and warmed up before the clock starts. The logits must agree before anything is timed.

On a CPU the sides take turns for several rounds, and the ratio is the median over the rounds: what
else the machine does slows all. With --threads=1 the CPU seconds, compared too, hardly see that
other work (with more, PyTorch's threads count the time in which they wait for each other). On a
GPU, in bfloat16, each side has the device for itself; PEFT comes with torch.compile too, and FLOP/s
are set against the device's peak. The FLOPs are those of the matrix products on the batches as each
side pads them, counted by ptjax.planning.flops.

Accuracy: the shipped backbone on the CPU, SST-2, 1,000 steps of 32 examples, P = 20, the recipe of
`sst2.py`, the same first prompts; the best step on validation, judged on the test split by the
likelihood of the two labels. ptjax's runs are `python -m ptjax.train`; what is finished is not run
again.

Writes OUTPUT_DIR/against_peft.json and .png. DATA_DIR is laid out as the tasks' gin files say.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import numpy as np
from turns import SideError, Turns

HERE = Path(__file__).resolve().parent
NAMES = {  # in the order of the table; the first is what the others are compared with
    "peft": "PEFT",
    "peft_compiled": "PEFT, torch.compile",
    "paper": "ptjax, as in the paper",
    "packed": "ptjax, packed",
    "unseeing": "ptjax, sees_input = False",
    "both": "ptjax, packed, sees_input = False",
}
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Of the logits, in units of their standard deviation."""
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
"""A second, dense, bfloat16, as the maker's data sheets have it."""


# Speed


def measure_speed(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """A result for every side of every task."""
    results = []
    sides = [side for side in NAMES if side != "peft_compiled" or flags.device == "gpu"]
    for task in flags.tasks.split(","):
        name, length = task.split(":")
        with tempfile.TemporaryDirectory() as folder:
            results += compare(flags, Path(folder), name, int(length), sides)
    return results


def compare(
    flags: argparse.Namespace, folder: Path, task: str, length: int, sides: list[str]
) -> list[dict[str, Any]]:
    """Times every side on one task."""
    from ptjax_side import write_speed_inputs
    from real_batches import load_examples, make_task

    source = load_examples(make_task(task, flags.data_dir), flags.tokenizer, length)
    flops = write_speed_inputs(folder, flags, source, sides)
    about: dict[str, Any] = {}
    answers: dict[str, Any] = {}
    commands = {side: command(flags, folder, side) for side in sides}
    with Turns(commands, environment(flags), optional=["peft_compiled"]) as turns:
        for group in [sides] if flags.device == "cpu" else [[side] for side in sides]:
            turns.warm(group)
            about |= turns.about
            check_agreement(folder, about, TOLERANCE[flags.dtype])
            answers |= turns.take(flags.rounds)
            turns.end(turns.about.keys() & group)
    return [
        result(flags, side, given, answers["peft"], flops[side]) | {"task": task, "length": length}
        for side, given in answers.items()
    ]


def command(flags: argparse.Namespace, folder: Path, side: str) -> list[str]:
    """The command that starts a side."""
    if side.startswith("peft"):
        return [flags.peft_python, str(HERE / "peft_side.py"), "step", str(folder), side]
    return [sys.executable, str(HERE / "ptjax_side.py"), str(folder), side]


def result(
    flags: argparse.Namespace,
    side: str,
    ours: list[dict[str, Any]],
    theirs: list[dict[str, Any]],
    flops: float,
) -> dict[str, Any]:
    """The result of a side (`ours`), with its ratios to PEFT (`theirs`).

    Args:
        flops: per example.
    """
    taken, cpu = ([one[name] for one in ours] for name in ("seconds", "cpu_seconds"))
    rate = flags.batch * flags.batches / statistics.median(taken)
    ratio, cpu_ratio = (
        statistics.median(them[name] / us[name] for us, them in zip(ours, theirs, strict=True))
        for name in ("seconds", "cpu_seconds")
    )
    found = [one.get("product_flops_per_second") for one in ours]
    products = None if None in found else statistics.median(found)
    return {
        "side": side,
        "examples_per_second": rate,
        "ratio": ratio,
        "cpu_ratio": cpu_ratio,
        "peak_bytes": max(one["peak_bytes"] for one in ours),
        "flops_per_example": flops,
        "flops_per_second": flops * rate,
        "product_flops_per_second": products,
        "seconds": taken,
        "cpu_seconds": cpu,
    }


def check_agreement(folder: Path, about: dict[str, Any], tolerance: float) -> None:
    """Ends the run unless sides of one kind of prompt compute the same logits and train alike."""
    for kind in ({"unseeing", "both"}, set(NAMES) - {"unseeing", "both"}):
        first, *others = [side for side in about if side in kind] or [None]
        for other in others:
            if (worst := difference(folder, first, other)) > tolerance:
                raise SystemExit(f"the logits of {first} and {other} differ by {worst:.1e}")
    if len({told["trained"] for told in about.values()}) != 1:
        raise SystemExit(f"the sides train differently many numbers: {about}")


def difference(folder: Path, one: str, other: str) -> float:
    """The largest difference of two sides' logits, in units of their standard deviation."""
    first, second = (np.load(folder / f"{side}_logits.npy") for side in (one, other))
    return float(np.abs(second - first).max() / first.std())


def environment(flags: argparse.Namespace) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    return os.environ | {
        "JAX_PLATFORMS": "cpu" if flags.device == "cpu" else "cuda,cpu",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "OMP_NUM_THREADS": str(flags.threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": path,
    }


# Accuracy


def measure_accuracy(flags: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Each side's results by seed."""
    import runs
    import sst2
    from ptjax_side import WAYS, write_accuracy_inputs

    run, settings = sst2.METHODS["prompt tuning, P = 20"]
    settings = sst2.COMMON | settings | {"DATA_DIR": flags.data_dir}
    train = {
        "device": "cpu",
        "dtype": "float32",
        "threads": flags.threads,
        "batch_size": 32,
        "weight_decay": 1e-5,
        "train_steps": settings["TRAIN_STEPS"],
        "eval_period": settings["EVAL_PERIOD"],
    }
    found: dict[str, list[dict[str, Any]]] = {"peft": []}
    with tempfile.TemporaryDirectory() as folder:
        write_accuracy_inputs(Path(folder), flags, settings, train)
        for seed in range(flags.seeds):
            result = flags.output_dir / f"peft_{seed}.json"
            if not result.exists():
                program = [flags.peft_python, str(HERE / "peft_side.py"), "train", folder]
                done = subprocess.run(
                    [*program, str(seed)],
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment(flags),
                )
                result.write_text(done.stdout)
            found["peft"].append(json.loads(result.read_text()))
    for side, (attends_to_input, pack) in WAYS.items():
        found[side] = [
            runs.train(
                flags.output_dir / side / str(seed),
                ["tasks/sst2.gin", f"runs/{run}.gin"],
                settings | {"SEES_INPUT": attends_to_input, "PACK": pack, "RANDOM_SEED": seed},
            )
            for seed in range(flags.seeds)
        ]
    return found


# What comes out


def describe_machine(flags: argparse.Namespace) -> dict[str, Any]:
    here = machine.describe()
    code = (
        "import importlib.metadata as m, json; "
        "print(json.dumps({n: m.version(n) for n in ('torch', 'transformers', 'peft')}))"
    )
    theirs = subprocess.run([flags.peft_python, "-c", code], capture_output=True, check=True)
    gpu = None
    if flags.device == "gpu":
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpu = subprocess.run(query, capture_output=True, check=True, text=True).stdout.splitlines()
    versions = here["versions"] | json.loads(theirs.stdout)
    return here | {"gpu": gpu and gpu[0], "versions": versions}


def peak_flops(flags: argparse.Namespace, where: dict[str, Any]) -> float | None:
    if flags.peak_tflops:
        return flags.peak_tflops * 1e12
    return next((peak for n, peak in PEAK_FLOPS.items() if n in (where["gpu"] or "")), None)


def show_speed(results: list[dict[str, Any]], peak: float | None) -> None:
    """A Markdown table."""
    share = "| of the peak " if peak else ""
    heads = "examples/s | ratio | CPU ratio | peak GB | GFLOP / example | GFLOP/s | of products"
    print(f"\n| | | {heads} {share}|")
    print("|---|---|" + "--:|" * (8 if peak else 7))
    for one in results:
        products = one.get("product_flops_per_second")  # older results have none
        share = f"| {one['flops_per_second'] / products:.2f} " if products else "| "
        share += f"| {one['flops_per_second'] / peak:.1%} " if peak else ""
        print(
            f"| {one['task']}, T <= {one['length']} | {NAMES[one['side']]} "
            f"| {one['examples_per_second']:.2f} | {one['ratio']:.2f} "
            f"| {one['cpu_ratio']:.2f} | {one['peak_bytes'] / 1e9:.2f} "
            f"| {one['flops_per_example'] / 1e9:.1f} | {one['flops_per_second'] / 1e9:.0f} {share}|"
        )


def show_accuracy(found: dict[str, list[dict[str, Any]]]) -> None:
    import runs

    print("\n| SST-2, test accuracy | mean | std | seeds |\n|---|--:|--:|---|")
    for side, results in found.items():
        print(f"| {NAMES[side]} | {runs.show([one['value'] for one in results])} |")


def draw(file: Path, result: dict[str, Any]) -> None:
    """Examples a second of every task, and the accuracy where it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys((one["task"], one["length"]) for one in result["speed"]))
    sides = [side for side in NAMES if any(side == one["side"] for one in result["speed"])]
    places = {side: -i for i, side in enumerate(sides)}
    colors = {side: "#9aa0a6" if side.startswith("peft") else "#1a73e8" for side in sides}
    panels = len(tasks) + bool(result["accuracy"])
    size = 3 + 3.2 * panels, 1.5 + 0.4 * len(sides)
    pyplot.rcParams["font.size"] = 9
    figure, axes = pyplot.subplots(1, panels, sharey=True, figsize=size, layout="constrained")
    axes = np.atleast_1d(axes)
    for axis, (task, length) in zip(axes, tasks, strict=False):
        rows = [one for one in result["speed"] if (one["task"], one["length"]) == (task, length)]
        for one in rows:
            rate, place = one["examples_per_second"], places[one["side"]]
            axis.barh(place, rate, color=colors[one["side"]])
            axis.text(rate, place, f" {rate:.1f} ({one['ratio']:.1f}x)", va="center")
        axis.set_xlim(0, 1.5 * max(one["examples_per_second"] for one in rows))
        axis.set_title(f"{task}, inputs of at most {length} tokens", fontsize=9)
        axis.set_xlabel("real examples a second")
    if result["accuracy"]:
        for side, found in result["accuracy"].items():
            values = [one["value"] for one in found]
            axes[-1].plot(values, [places[side]] * len(values), "o", color=colors[side], alpha=0.6)
            axes[-1].plot(statistics.mean(values), places[side], "|", color="black", ms=16)
        axes[-1].set_title("sst2 on ptjax-nano, accuracy", fontsize=9)
        axes[-1].set_xlabel("each seed, and the mean")
        axes[-1].margins(x=0.2)
    for axis in axes:
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(left=False)
    axes[0].set_yticks(list(places.values()), [NAMES[side] for side in sides])
    device, settings = result["machine"], result["settings"]
    what = f"T5 1.1 {settings['size']}, {settings['dtype']}, P = {settings['prompt']}"
    where = device["gpu"] or f"{device['processor']}, threads: {settings['threads']}"
    what = f"{what}, {settings['batch']} examples a step"
    figure.suptitle(f"Prompt tuning, {what}\n{where}", fontsize=10)
    figure.savefig(file, dpi=150)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, type=os.path.abspath)
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--peft_python", default=sys.executable, help="has torch and peft")
    parser.add_argument("--part", default="both", choices=["speed", "accuracy", "both"])
    parser.add_argument("--device", choices=["cpu", "gpu"], help="default: a GPU if there is one")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    speed = parser.add_argument_group("speed")
    speed.add_argument("--tasks", default="sst2:64,imdb:128", help="name:longest input, ...")
    speed.add_argument("--tokenizer", default="package:nano")
    speed.add_argument("--size", default="small", help="of T5 1.1")
    speed.add_argument("--dtype", help="default: float32 on a CPU, bfloat16 on a GPU")
    speed.add_argument("--batch", type=int, default=32, help="examples of a step")
    speed.add_argument("--prompt", type=int, default=100, help="P, rows of the prompt")
    speed.add_argument("--dropout", type=float, default=0.1, help="on the frozen backbone")
    speed.add_argument("--rounds", type=int, default=4, help="turns of every side")
    speed.add_argument("--batches", type=int, default=6, help="steps of a turn")
    speed.add_argument("--peak_tflops", type=float, help="of the GPU, if it is none of the known")
    parser.add_argument("--seeds", type=int, default=3, help="of the accuracy")
    flags = parser.parse_args()
    flags.device = flags.device or ("gpu" if shutil.which("nvidia-smi") else "cpu")
    # Scanned layers compile sooner, but run slower on a CPU.
    flags.scan = flags.device == "gpu"
    flags.torch_device = "cpu" if flags.device == "cpu" else "cuda"
    flags.dtype = flags.dtype or ("float32" if flags.device == "cpu" else "bfloat16")
    return flags


def main() -> None:
    flags = parse()
    machine.require("matplotlib")
    # Before any library starts its threads: XLA makes as many as it may use processors.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: flags.threads])
    os.environ["JAX_PLATFORMS"] = "cpu"  # this process only prepares
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    file = flags.output_dir / "against_peft.json"
    # What is not measured now keeps what was measured before, tasks of other settings excepted.
    result = json.loads(file.read_text()) if file.exists() else {"speed": [], "accuracy": {}}
    if flags.part != "accuracy":
        names = ("size", "dtype", "batch", "prompt", "dropout", "threads", "rounds", "batches")
        now = {
            "machine": describe_machine(flags),
            "settings": {name: getattr(flags, name) for name in names},
        }
        load = machine.load()
        print(json.dumps(now | {"load": load}, indent=2))
        speed = measure_speed(flags)
        if now == {name: result.get(name) for name in now}:
            measured = {one["task"] for one in speed}
            speed = [one for one in result["speed"] if one["task"] not in measured] + speed
        result |= now | {"load": load, "speed": speed}
        show_speed(result["speed"], peak_flops(flags, result["machine"]))
    if flags.part != "speed":
        result["accuracy"] = measure_accuracy(flags)
        show_accuracy(result["accuracy"])
    file.write_text(json.dumps(result, indent=2) + "\n")
    if result["speed"]:
        draw(file.with_suffix(".png"), result)


if __name__ == "__main__":
    try:
        main()
    except SideError as error:
        sys.exit(str(error))
