"""ptjax beside Hugging Face PEFT: the same prompt tuning step on the CPU, in turn, in one run.

    python benchmarks/against_peft.py [--peft_python=PYTHON] [--threads=2] [--output=FILE.json]

Both sides tune the same prompt (P = 100) on the same random T5 1.1 small in float32, on the same
batches, with dropout and Adafactor. Each side runs in a process of its own, so that its peak memory
is its own, and has compiled and warmed up before the clock starts. The sides then take turns for
several rounds: other work on the machine slows both, so believe the ratio of a run and not a time.
With --threads=1 the CPU seconds of a step hardly see that other work at all (with more, PyTorch's
threads count the time in which they wait for each other). The logits of both sides must agree
before anything is timed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIDES = ("ptjax", "peft")
LEARNING_RATE, WEIGHT_DECAY = 0.3, 1e-5
CHECKED_EXAMPLES = 4
TOLERANCE = 1e-3
"""Of the logits, in units of their standard deviation."""


def make_inputs(flags: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same on both sides: inputs int32 [B, T], targets int32 [B, L], prompt float32 [P, D].

    No position is padding: a batch of full rows, as bucketing by length makes them.
    """
    rng = np.random.default_rng(0)
    inputs = rng.integers(3, 32000, (flags.batch, flags.inputs), dtype=np.int32)
    targets = rng.integers(3, 32000, (flags.batch, flags.targets), dtype=np.int32)
    return inputs, targets, rng.uniform(-0.5, 0.5, (flags.prompt, 512)).astype(np.float32)


# The two sides. Each returns its logits of the first examples, how many numbers it trains, and
# `steps(n)`, which returns when n steps are done.

Side = tuple[np.ndarray, int, Callable[[int], None]]


def ptjax_config(dropout: float) -> Any:
    """T5 1.1 small."""
    from ptjax.models.config import T5Config

    return T5Config(
        vocab_size=32128,
        emb_dim=512,
        num_heads=6,
        num_encoder_layers=8,
        num_decoder_layers=8,
        head_dim=64,
        mlp_dim=1024,
        dropout_rate=dropout,
    )


def write_backbone(flags: argparse.Namespace) -> None:
    """The random backbone, as the Hugging Face directory that both sides read."""
    import jax

    from ptjax.interop.huggingface import save_huggingface
    from ptjax.models.t5 import init_params
    from ptjax.training.freeze import flatten_paths

    config = ptjax_config(flags.dropout)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    directory = Path(flags.folder) / "backbone"
    save_huggingface(directory, flatten_paths(params), config, dtype="float32")


def start_ptjax(flags: argparse.Namespace) -> Side:
    import jax
    import jax.numpy as jnp

    from ptjax.interop.huggingface import load_huggingface
    from ptjax.models.prompted import PromptedT5
    from ptjax.training import freeze as freezing
    from ptjax.training.loss import Loss
    from ptjax.training.optimizer import Adafactor
    from ptjax.training.step import init_train_state, make_train_step

    inputs, targets, prompt = make_inputs(flags)
    decoder_inputs = np.concatenate([np.zeros_like(targets[:, :1]), targets[:, :-1]], axis=1)
    stored = load_huggingface(Path(flags.folder) / "backbone")
    params = {name: jnp.asarray(array.read_all()) for name, array in stored.items()}
    variables = {
        "params": freezing.unflatten_paths(params),
        "prompt": {"prompt": jnp.asarray(prompt)},
    }
    apply_fn = PromptedT5(ptjax_config(flags.dropout)).apply
    few = slice(CHECKED_EXAMPLES)
    logits = np.asarray(jax.jit(apply_fn)(variables, inputs[few], decoder_inputs[few]))

    freeze = freezing.make_freeze(variables, freezing.METHODS["prompt_tuning"])
    trainable, frozen = freezing.split(variables, freeze)
    optimizer = Adafactor(learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY).make()
    optimizer = freezing.lock(optimizer, freeze)
    state = init_train_state(trainable, optimizer, jax.random.key(0))
    step = jax.jit(make_train_step(apply_fn, optimizer, Loss()), donate_argnums=0)
    batch = jax.device_put(
        {
            "encoder_input_tokens": inputs,
            "decoder_input_tokens": decoder_inputs,
            "decoder_target_tokens": targets,
            "decoder_loss_weights": np.ones(targets.shape, np.float32),
        }
    )

    def steps(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state, metrics))

    return logits, freezing.sizes(trainable)[0], steps


def start_peft(flags: argparse.Namespace) -> Side:
    import peft
    import torch
    import transformers

    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    inputs, targets, prompt = (torch.from_numpy(array) for array in make_inputs(flags))
    inputs, targets = inputs.long(), targets.long()
    backbone = transformers.T5ForConditionalGeneration.from_pretrained(
        Path(flags.folder) / "backbone", dtype=torch.float32
    )
    # PEFT's default, two submodules, would double the prompt and never read the second half.
    model = peft.get_peft_model(
        backbone,
        peft.PromptTuningConfig(
            task_type="SEQ_2_SEQ_LM",
            num_virtual_tokens=flags.prompt,
            num_transformer_submodules=1,
        ),
    )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        trainable[0].copy_(prompt)

    def run(examples: slice) -> Any:
        mask = torch.ones_like(inputs[examples])
        return model(input_ids=inputs[examples], attention_mask=mask, labels=targets[examples])

    model.eval()
    with torch.no_grad():
        logits = run(slice(CHECKED_EXAMPLES)).logits.numpy()
    model.train()
    optimizer = transformers.Adafactor(
        trainable,
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        scale_parameter=False,
        relative_step=False,
    )

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            run(slice(None)).loss.backward()
            optimizer.step()

    return logits, sum(parameter.numel() for parameter in trainable), steps


# The processes


def peak_bytes() -> int:
    """Largest resident memory of this process so far (Linux counts in KiB, macOS in bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def work(flags: argparse.Namespace) -> None:
    """One side: a line of JSON when ready, then one for every number of steps read from stdin."""
    # Libraries may print; the answers go out on a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logits, trained, steps = {"ptjax": start_ptjax, "peft": start_peft}[flags.worker](flags)
    np.save(Path(flags.folder) / f"{flags.worker}.npy", logits)
    loaded = peak_bytes()
    steps(flags.warm_up)
    print(json.dumps({"trained": trained, "loaded_bytes": loaded}), file=answers, flush=True)
    for line in sys.stdin:
        began, cpu_began = time.perf_counter(), time.process_time()
        steps(int(line))
        answer = {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu_began,
            "peak_bytes": peak_bytes(),
        }
        print(json.dumps(answer), file=answers, flush=True)


def command(python: str, flags: argparse.Namespace, *, worker: str) -> list[str]:
    """This file again, as `worker`, with the settings of this run."""
    names = ("batch", "inputs", "prompt", "targets", "threads", "dropout", "warm_up", "folder")
    return [python, __file__, f"--worker={worker}"] + [f"--{n}={getattr(flags, n)}" for n in names]


def environment(threads: int) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": path,
    }


def ask(process: subprocess.Popen[str], question: str | None = None) -> dict[str, Any]:
    """The next line of a worker, after sending it `question`."""
    if question is not None:
        process.stdin.write(question + "\n")
        process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise SystemExit(f"{' '.join(process.args[:3])} ended with {process.wait()}")
    return json.loads(answer)


def compare(flags: argparse.Namespace) -> dict[str, Any]:
    """One input length: starts both sides, checks that they agree, and times them in turn."""
    pythons = {"ptjax": sys.executable, "peft": flags.peft_python}
    workers: dict[str, subprocess.Popen[str]] = {}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    cpu_seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    peaks: dict[str, int] = {}
    try:
        for side in SIDES:
            workers[side] = subprocess.Popen(
                command(pythons[side], flags, worker=side),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment(flags.threads),
            )
        # One after the other is slower than both at once, but a compiler may need the memory.
        ready = {side: ask(worker) for side, worker in workers.items()}
        check_agreement(flags, ready)
        for turn in range(flags.rounds):
            for side in SIDES if turn % 2 == 0 else reversed(SIDES):
                answer = ask(workers[side], str(flags.steps))
                seconds[side].append(answer["seconds"] / flags.steps)
                cpu_seconds[side].append(answer["cpu_seconds"] / flags.steps)
                peaks[side] = answer["peak_bytes"]
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return {
        "inputs": flags.inputs,
        "ratio": statistics.median(
            theirs / ours for ours, theirs in zip(seconds["ptjax"], seconds["peft"], strict=True)
        ),
        "sides": {
            side: {
                "examples_per_second": flags.batch / statistics.median(seconds[side]),
                "seconds_per_step": seconds[side],
                "cpu_seconds_per_step": statistics.median(cpu_seconds[side]),
                "peak_bytes": peaks[side],
                "loaded_bytes": ready[side]["loaded_bytes"],
            }
            for side in SIDES
        },
    }


def check_agreement(flags: argparse.Namespace, ready: dict[str, dict[str, Any]]) -> None:
    """Ends the run unless both sides train as many numbers and compute the same logits."""
    ours, theirs = (np.load(Path(flags.folder) / f"{side}.npy") for side in SIDES)
    worst = float(np.abs(ours - theirs).max() / ours.std())
    trained = {side: ready[side]["trained"] for side in SIDES}
    if worst > TOLERANCE or len(set(trained.values())) != 1:
        raise SystemExit(f"the sides differ: logits by {worst:.1e}, trained numbers {trained}")


def describe_machine(flags: argparse.Namespace) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    code = (
        "import importlib.metadata as m, json; "
        "print(json.dumps({n: m.version(n) for n in ('torch', 'transformers', 'peft')}))"
    )
    theirs = subprocess.run([flags.peft_python, "-c", code], capture_output=True, check=True)
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "flax", "optax")}
        | json.loads(theirs.stdout),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peft_python", default=sys.executable, help="has torch and peft")
    parser.add_argument("--lengths", default="32,64,128", help="values of T, input tokens")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=100, help="P, rows of the prompt")
    parser.add_argument("--targets", type=int, default=8, help="L, target tokens")
    parser.add_argument("--dropout", type=float, default=0.1, help="on the frozen backbone")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7, help="turns of either side")
    parser.add_argument("--steps", type=int, default=2, help="steps in a turn")
    parser.add_argument("--warm_up", type=int, default=2, help="steps before the clock starts")
    parser.add_argument("--output", help="a JSON file to write")
    for internal in ("worker", "folder"):
        parser.add_argument(f"--{internal}", help=argparse.SUPPRESS)
    parser.add_argument("--inputs", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    flags = parse()
    # Before either library starts its threads: XLA makes as many as it may use processors.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: flags.threads])
    if flags.worker:
        work(flags) if flags.worker in SIDES else write_backbone(flags)
        return
    machine = describe_machine(flags)
    print(f"{machine['processor']}, {flags.threads} threads; {machine['versions']}")
    print(f"T5 1.1 small, float32, batch {flags.batch}, P = {flags.prompt}, L = {flags.targets}")
    print("          examples/s           CPU s/step    peak GB")
    print("   T   ptjax   PEFT  ratio   ptjax  PEFT   ptjax  PEFT")
    results = []
    with tempfile.TemporaryDirectory() as flags.folder:
        flags.inputs = 0
        writer = command(sys.executable, flags, worker="backbone")
        subprocess.run(writer, check=True, env=environment(flags.threads))
        for inputs in flags.lengths.split(","):
            flags.inputs = int(inputs)
            result = compare(flags)
            ours, theirs = (result["sides"][side] for side in SIDES)
            rates, cpu, peaks = (
                [float(side[name]) for side in (ours, theirs)]
                for name in ("examples_per_second", "cpu_seconds_per_step", "peak_bytes")
            )
            print(
                f"{flags.inputs:4} {rates[0]:7.2f} {rates[1]:6.2f} {result['ratio']:6.2f} "
                f"{cpu[0]:7.2f} {cpu[1]:5.2f} {peaks[0] / 1e9:7.2f} {peaks[1] / 1e9:5.2f}",
                flush=True,
            )
            results.append(result)
    if flags.output:
        names = ("batch", "prompt", "targets", "dropout", "threads", "rounds", "steps")
        settings = {name: getattr(flags, name) for name in names}
        text = json.dumps({"machine": machine, "settings": settings, "results": results}, indent=2)
        Path(flags.output).write_text(text + "\n")


if __name__ == "__main__":
    main()
