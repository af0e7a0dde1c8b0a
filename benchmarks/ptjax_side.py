"""ptjax's part in `against_peft.py`, and what both parts are given.

    python benchmarks/ptjax_side.py FOLDER SIDE      takes turns (see turns.py)

FOLDER holds what `write_speed_inputs` wrote there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import turns
from prompt_step import count_step_flops, make_step, t5_1_1
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

from ptjax.answering import make_label_tokens
from ptjax.backbone import load_backbone, save_backbone
from ptjax.data.batch import Batch, make_batch, make_packed_batch
from ptjax.data.preprocess import TokenizedExamples
from ptjax.models.prompt import ClassLabels, Surroundings
from ptjax.models.prompted import make_apply_fn, with_prompt
from ptjax.models.t5 import init_params
from ptjax.training.optimizer import embedding_rms

WAYS = {  # sees_input, packed
    "paper": (True, False),
    "packed": (True, True),
    "unseeing": (False, False),
    "both": (False, True),
}
CHECKED_EXAMPLES = 4


# What the sides are given


def write_speed_inputs(
    folder: Path, flags: argparse.Namespace, task: str, length: int, sides: list[str]
) -> dict[str, dict[str, float]]:
    """Backbone, prompt, settings and every side's batches; returns what is known of those.

    The FLOPs are of ptjax's step on the batches as the side pads them, so for PEFT too.
    """
    config = t5_1_1(flags.size, dropout_rate=flags.dropout)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    save_backbone(folder / "backbone", config, params, dtype=flags.dtype)
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
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    source = load_examples(make_task(task, flags.data_dir), flags.tokenizer, length)
    about = {}
    for side in sides:
        sees_input, packed = WAYS.get(side, (True, False))
        slots = flags.prompt if packed and sees_input else 0
        make_plan = pack if packed else bucket if side in WAYS else pad_to_longest()
        batches = pick(make_plan(source, flags.batch, slots), flags.batches)
        check = make_check(source, packed, slots)
        arrays = {
            f"{i}/{name}": array
            for i, batch in enumerate([check, *batches])
            for name, array in batch.items()
        }
        np.savez(folder / f"{side}.npz", **arrays)
        shapes = [tuple(array.shape for array in batch.values()) for batch in batches]
        flops = {
            shape: count_step_flops(config, flags.prompt, batch, sees_input)[1]
            for shape, batch in dict(zip(shapes, batches, strict=True)).items()
        }
        total = sum(flops[shape] for shape in shapes)
        about[side] = {"flops_per_example": total / (flags.batch * len(batches))}
    return about


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
    surroundings = Surroundings(embedding, tokenizer, labels, lambda: [])
    for seed in range(flags.seeds):
        key = jax.random.fold_in(jax.random.key(seed), 1)  # as ptjax.tuning does
        prompt = ClassLabels()(key, settings["PROMPT_LENGTH"], surroundings)
        np.save(folder / f"prompt_{seed}.npy", np.asarray(prompt))
    rate = settings["LEARNING_RATE"] * embedding_rms(embedding)
    (folder / "settings.json").write_text(json.dumps(train | {"learning_rate": rate}))


# A turn


def peak_bytes() -> int:
    """Of the device; its own count where it keeps one, else this process's memory."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use") or turns.resident_bytes()


def start(folder: Path, side: str) -> turns.Side:
    """Tuning steps over the batches that were made for this side."""
    settings = json.loads((folder / "settings.json").read_text())
    backbone = load_backbone(
        folder / "backbone", dtype=settings["dtype"], dropout_rate=settings["dropout"]
    )
    sees_input, _ = WAYS[side]
    prompt = np.load(folder / "prompt.npy")
    stored = np.load(folder / f"{side}.npz")
    check, *batches = (
        jax.device_put(
            {name.split("/")[1]: stored[name] for name in stored if name.startswith(f"{i}/")}
        )
        for i in range(settings["batches"] + 1)
    )
    logits = jax.jit(make_apply_fn(backbone.config, sees_input))(
        with_prompt(backbone.variables, prompt),
        check["encoder_input_tokens"],
        check["decoder_input_tokens"],
        check.get("encoder_segment_ids"),
        check.get("decoder_segment_ids"),
        encoder_lengths=check.get("encoder_lengths"),
    )
    real = np.asarray(check["decoder_loss_weights"]) > 0
    np.save(folder / f"{side}_logits.npy", np.asarray(logits)[real])
    step, state, frozen = make_step(
        backbone.config, backbone.variables["params"], prompt, sees_input
    )
    about = {"trained": state.trainable["prompt"]["prompt"].size}

    def run(chosen: Iterable[dict[str, jax.Array]]) -> None:
        nonlocal state
        for batch in chosen:
            state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state, metrics))

    shapes = [tuple(array.shape for array in batch.values()) for batch in batches]
    one_of_each = dict(zip(shapes, batches, strict=True)).values()
    return turns.Side(lambda: run(one_of_each), lambda: run(batches), about, peak_bytes)


if __name__ == "__main__":
    where, which = sys.argv[1:]
    turns.serve(lambda: start(Path(where), which))
