"""ptjax's part in `against_peft.py`, and what both parts are given.

    python benchmarks/ptjax_side.py FOLDER SIDE      takes turns (see turns.py)

FOLDER holds what `write_speed_inputs` wrote there.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import seeded
import step_time
import turns
from prompt_step import count_step_flops, first_state, t5_1_1
from real_batches import (
    T5_IDS,
    TARGET_LENGTH,
    bucket,
    load_examples,
    make_task,
    pack,
    pad_to_longest,
    pick,
)

from ptjax.backbones.load import load_backbone
from ptjax.backbones.save import save_backbone
from ptjax.data.batch import Batch, make_batch, make_packed_batch
from ptjax.data.pipeline import Shape
from ptjax.data.preprocess import TokenizedExamples
from ptjax.inference.labels import make_label_tokens
from ptjax.interop.huggingface_format import make_config_json, to_huggingface
from ptjax.methods.base import InitContext
from ptjax.methods.initializers import ClassLabels
from ptjax.models.config import T5Config
from ptjax.models.prompted import make_apply_fn, with_prompt
from ptjax.models.t5 import parameter_shapes
from ptjax.planning.workload import AbstractStep, abstract_step
from ptjax.sharding.arrays import put_batch, replicated
from ptjax.sharding.meshes import make_mesh
from ptjax.training.optimizer import embedding_rms
from ptjax.trees import flatten_paths, unflatten_paths

WAYS = {  # sees_input, packed
    "paper": (True, False),
    "packed": (True, True),
    "unseeing": (False, False),
    "both": (False, True),
}
CHECKED_EXAMPLES = 4
FITS = 0.97
"""The share of the device's memory that a compiled step may use."""


# What the sides are given


def write_speed_inputs(
    folder: Path, flags: argparse.Namespace, source: TokenizedExamples, sides: Iterable[str]
) -> dict[str, float]:
    """Settings, prompt and every side's batches; returns the FLOPs of an example for every side.

    For PEFT too, these are the FLOPs of ptjax's step on batches padded as that side pads them. No
    weights are written: every side makes the same backbone (see `seeded`).

    Args:
        flags: those of `against_peft.py`.
    """
    config = t5_1_1(flags.size, dropout_rate=flags.dropout)
    shape = flags.prompt, config.emb_dim
    prompt = np.random.default_rng(0).uniform(-0.5, 0.5, shape).astype(np.float32)
    np.save(folder / "prompt.npy", prompt)
    settings = {
        "device": flags.torch_device,
        "dtype": flags.dtype,
        "dropout": flags.dropout,
        "threads": flags.threads,
        "batches": flags.batches,
        "learning_rate": 0.3,
        "weight_decay": 1e-5,
        "step": step_settings(flags),
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "backbone.json").write_text(json.dumps(describe_backbone(config, flags.dtype)))
    scanned = t5_1_1(flags.size, dropout_rate=flags.dropout, scan_layers=True)  # traced sooner
    count = functools.cache(
        lambda shape, attends_to_input: count_step_flops(
            scanned, flags.prompt, step_time_batch(shape), attends_to_input
        )[1]
    )
    flops = {}
    for side in sides:
        attends_to_input, packed = WAYS.get(side, (True, False))
        batches = make_batches(source, flags, side)
        check = make_check(source, packed, flags.prompt if packed and attends_to_input else 0)
        arrays = {
            f"{i}/{name}": array
            for i, batch in enumerate([check, *batches])
            for name, array in batch.items()
        }
        np.savez(folder / f"{side}.npz", **arrays)
        total = sum(count(Shape.of(batch), attends_to_input) for batch in batches)
        flops[side] = total / (flags.batch * len(batches))
    return flops


def step_settings(flags: argparse.Namespace) -> step_time.Row:
    """The settings that all steps share, for a `step_time.Row`."""
    return {
        "size": flags.size,
        "dtype": flags.dtype,
        "dropout": flags.dropout,
        "quantize": None,
        "prompt": flags.prompt,
        "remat": "none",
        "scan": flags.scan,
    }


def make_batches(source: TokenizedExamples, flags: argparse.Namespace, side: str) -> list[Batch]:
    """Batches that represent an epoch, as the side pads or packs them."""
    attends_to_input, packed = WAYS.get(side, (True, False))
    make_plan = pack if packed else bucket if side in WAYS else pad_to_longest()
    slots = flags.prompt if packed and attends_to_input else 0
    return pick(make_plan(source, flags.batch, slots), flags.batches)


def step_time_batch(shape: Shape) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(*array) for name, array in shape.arrays().items()}


def describe_backbone(config: T5Config, dtype: str) -> dict[str, Any]:
    """The recipe of a random backbone for PyTorch: `config.json`, and name -> weight.

    The names are Hugging Face's; a weight is its `seeded.describe` and whether it is transposed.
    """
    shapes = {name: leaf.shape for name, leaf in flatten_paths(parameter_shapes(config)).items()}
    weights = {}
    for name, about in seeded.describe(shapes, config.head_dim).items():
        told = to_huggingface(name)
        assert told is not None, name
        theirs, transposed = told
        weights[theirs] = (*about, transposed)
    return {"config": make_config_json(config, dtype), "weights": weights}


def make_check(source: TokenizedExamples, packed: bool, slots: int) -> Batch:
    """The first examples, by which the sides are compared before they are timed."""
    tokens = [source.tokens(i, 0) for i in range(CHECKED_EXAMPLES)]
    inputs, targets = zip(*tokens, strict=True)
    if not packed:
        longest = [max(map(len, rows)) for rows in (inputs, targets)]
        sizes = {"input_length": longest[0], "target_length": longest[1]}
        return make_batch(inputs, targets, **sizes, ids=T5_IDS)
    rows = np.arange(CHECKED_EXAMPLES) // 2
    return make_packed_batch(
        inputs,
        targets,
        rows,
        row_count=int(rows[-1]) + 1,
        input_length=int(np.bincount(rows, [slots + len(row) for row in inputs]).max()),
        target_length=int(np.bincount(rows, [len(row) for row in targets]).max()),
        ids=T5_IDS,
        prompt_slots=slots,
    )


def write_accuracy_inputs(
    folder: Path, flags: argparse.Namespace, settings: dict[str, Any], train: dict[str, Any]
) -> None:
    """ptjax-nano for PEFT, SST-2's splits as ids, and each seed's first prompt as ptjax has it.

    Args:
        settings: of the ptjax runs (`sst2.py`).
        train: what else goes into PEFT's `settings.json`.
    """
    backbone = load_backbone("ptjax-nano", dtype="float32", dropout_rate=settings["DROPOUT_RATE"])
    save_backbone(
        folder / "backbone", backbone.config, backbone.variables["params"], dtype="float32"
    )
    task, tokenizer = make_task("sst2", flags.data_dir), backbone.tokenizer
    labels = list(task.labels)
    for split in task.splits:
        source = load_examples(
            task, "package:nano", settings["TASK_FEATURE_LENGTHS"]["inputs"], split
        )
        for name, rows in (("inputs", source.inputs), ("targets", source.targets)):
            np.savez(folder / f"{split}_{name}.npz", ids=rows.ids, offsets=rows.offsets)
        right = [labels.index(example.targets) for example in task.load(split)]
        np.save(folder / f"{split}_labels.npy", right)
    label_tokens, _ = make_label_tokens(labels, tokenizer, TARGET_LENGTH, T5_IDS)
    np.save(folder / "label_tokens.npy", label_tokens)
    embedding = backbone.variables["params"]["token_embedder"]["embedding"]
    context = InitContext(embedding, tokenizer, labels, lambda: [])
    for seed in range(flags.seeds):
        key = jax.random.fold_in(jax.random.key(seed), 1)  # as ptjax.trainer.tune does
        prompt = ClassLabels()(key, settings["PROMPT_LENGTH"], context)
        np.save(folder / f"prompt_{seed}.npy", np.asarray(prompt))
    rate = settings["LEARNING_RATE"] * embedding_rms(embedding)
    (folder / "settings.json").write_text(json.dumps(train | {"learning_rate": rate}))


# A turn


def peak_bytes() -> int:
    """Of the device; its own count where it keeps one, else this process's memory."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use") or turns.resident_bytes()


@functools.partial(jax.jit, static_argnums=(0, 1))
def fill(shape: tuple[int, ...], dtype: str, seed: jax.Array, size: jax.Array) -> jax.Array:
    """`seeded.noise` of that shape, times `size`; several seeds give a stack."""
    index = jnp.arange(np.prod(shape), dtype=jnp.int32).reshape(shape)
    seed = seed.reshape(*seed.shape, *[1] * len(shape))
    return (seeded.noise(index, seed).astype(jnp.float32) * size).astype(dtype)


def make_params(shapes: Mapping[str, Any], head_dim: int, dtype: str) -> dict[str, Any]:
    """The parameters that `seeded` defines, with the names and shardings of `shapes`."""
    made = {}
    for name, leaf in flatten_paths(shapes).items():
        stacked = "/layers/" in name
        shape = leaf.shape[1:] if stacked else leaf.shape
        spread = seeded.deviation(name, shape, head_dim)
        if spread is None:
            array = jnp.ones(leaf.shape, dtype)
        else:
            names = [name.replace("/layers/", f"/layers_{i}/") for i in range(leaf.shape[0])]
            seeds = [seeded.seed_of(one) for one in names] if stacked else seeded.seed_of(name)
            size = jnp.float32(seeded.step_size(spread))
            array = fill(shape, dtype, jnp.array(seeds, jnp.int32), size)
        made[name] = jax.device_put(array, leaf.sharding)
    return unflatten_paths(made)


Compiled = tuple[AbstractStep, Callable[..., Any], str]
"""The placed step, its compiled function, and its remat policy."""


def compile_all(rows: Mapping[Shape, step_time.Row]) -> dict[Shape, Compiled]:
    """Compiles the step for every shape, in parallel: one compilation leaves most cores idle."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(rows, pool.map(compile_row, rows.values()), strict=True))


def compile_row(row: step_time.Row) -> Compiled:
    """Compiles with the first policy, from the row's on, that fits by the compiler's estimate."""
    device = jax.devices()[0]
    mesh = make_mesh((1, 1), [device])
    limit = (device.memory_stats() or {}).get("bytes_limit", float("inf"))
    for remat in step_time.REMATS[step_time.REMATS.index(row["remat"]) :]:
        abstract = abstract_step(
            *step_time.wanted(row | {"remat": remat}, 1, device.device_kind), mesh
        )
        step = abstract.lower().compile(compiler_options=row.get("options"))
        memory: Any = step.memory_analysis()
        if memory is None or memory.peak_memory_in_bytes <= FITS * limit:
            break
    return abstract, step, remat


def row_of(shape: Shape, settings: Mapping[str, Any], attends_to_input: bool) -> step_time.Row:
    """The `step_time.Row` of a batch of that shape."""
    sizes = {"batch": shape.rows, "inputs": shape.inputs, "targets": shape.targets}
    return {**settings, **sizes, "pack": shape.packed, "sees_input": attends_to_input}


def start(folder: Path, side: str) -> turns.Side:
    """Tuning steps over the batches that were made for this side."""
    settings = json.loads((folder / "settings.json").read_text())
    attends_to_input, _ = WAYS[side]
    prompt = np.load(folder / "prompt.npy")
    stored = np.load(folder / f"{side}.npz")
    check, *batches = (
        {name.split("/")[1]: stored[name] for name in stored if name.startswith(f"{i}/")}
        for i in range(settings["batches"] + 1)
    )
    shapes = [Shape.of(batch) for batch in batches]
    rows = {
        shape: row_of(shape, settings["step"], attends_to_input) for shape in dict.fromkeys(shapes)
    }
    for row in rows.values():
        row["remat"] = settings.get("remats", {}).get(step_time.name_of(row), row["remat"])
    compiled = compile_all(rows)
    spec, parallel = step_time.wanted(rows[shapes[0]], 1, jax.devices()[0].device_kind)
    config, (abstract, *_) = parallel.applied(spec.config), compiled[shapes[0]]
    frozen = {"params": make_params(abstract.frozen["params"], config.head_dim, settings["dtype"])}
    logits = jax.jit(make_apply_fn(config, attends_to_input))(
        with_prompt(frozen, prompt),
        check["encoder_input_tokens"],
        check["decoder_input_tokens"],
        check.get("encoder_segment_ids"),
        check.get("decoder_segment_ids"),
        encoder_lengths=check.get("encoder_lengths"),
    )
    real = check["decoder_loss_weights"] > 0
    np.save(folder / f"{side}_logits.npy", np.asarray(logits, np.float32)[real])
    state = first_state(
        abstract, jax.device_put({"prompt": {"prompt": prompt}}, replicated(abstract.mesh))
    )
    put = [put_batch(batch, abstract.mesh) for batch in batches]

    def run(numbers: Iterable[int]) -> None:
        nonlocal state
        for number in numbers:
            _, step, _ = compiled[shapes[number]]
            state, metrics = step(state, frozen, put[number])
        jax.block_until_ready((state, metrics))

    shape = max(shapes, key=lambda shape: shape.rows * shape.inputs)
    in_front = len(prompt) if attends_to_input and not shape.packed else 0
    beside = kernel_products(config, shape.rows * (in_front + shape.inputs), settings["dtype"])
    one_of_each = [shapes.index(shape) for shape in compiled]
    about = {
        "trained": prompt.size,
        "shapes": len(compiled),
        "remat": "/".join(remat for *_, remat in compiled.values()),
    }
    everything = range(len(batches))
    return turns.Side(lambda: run(one_of_each), lambda: run(everything), about, peak_bytes, beside)


def kernel_products(config: T5Config, positions: int, dtype: str) -> Callable[[], dict[str, float]]:
    """A function that measures how fast this device multiplies with the encoder's kernels.

    It computes the products of a layer, forward and back, one at a time and with nothing between
    them: what a step's FLOP/s may be compared with.
    """
    width, joined = config.emb_dim, config.num_heads * config.head_dim
    branches = len(config.mlp_activations)
    products = (  # inputs, outputs, and how many of them
        (width, joined, 3 + 1),  # query, key, value; back through the output
        (joined, width, 1 + 3),
        (width, config.mlp_dim, branches + 1),
        (config.mlp_dim, width, 1 + branches),
    )
    multiply = jax.jit(jnp.dot)

    def measure() -> dict[str, float]:
        flops = seconds = 0.0
        for inputs, outputs, count in products:
            x, kernel = jnp.ones((positions, inputs), dtype), jnp.ones((inputs, outputs), dtype)
            jax.block_until_ready(multiply(x, kernel))
            began = time.perf_counter()
            for _ in range(count):
                jax.block_until_ready(multiply(x, kernel))
            seconds += time.perf_counter() - began
            flops += count * 2 * positions * inputs * outputs
        return {"product_flops_per_second": flops / seconds}

    return measure


if __name__ == "__main__":
    where, which = sys.argv[1:]
    turns.serve(lambda: start(Path(where), which))
