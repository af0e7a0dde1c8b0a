"""ptjax's part in `methods_beside_peft.py`, and what both parts are given.

    python benchmarks/methods_ptjax_side.py FOLDER METHOD [--packed]    takes turns (see turns.py)

FOLDER holds what `write_inputs` wrote there. --packed puts several examples into a row.
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
import optax
import turns
from prompt_step import t5_1_1
from ptjax_side import describe_backbone, make_params
from real_batches import T5_IDS, load_examples, make_task, pad_to_longest, pick

from ptjax.data.batch import Batch, make_batch, make_packed_batch
from ptjax.data.packing import make_template
from ptjax.interop.peft_adapters import export_peft_lora
from ptjax.interop.peft_prefix import export_peft_prefix
from ptjax.methods.adapter import AdapterMethod, from_paths
from ptjax.methods.base import run_with
from ptjax.methods.lora import LoRA
from ptjax.methods.prefix_tuning import PrefixTuning
from ptjax.models.config import T5Config
from ptjax.models.t5 import parameter_shapes
from ptjax.planning.workload import PlannedBackbone
from ptjax.training import freeze as freezing
from ptjax.training.loss import Loss
from ptjax.training.step import init_train_state, make_train_step
from ptjax.trees import flatten_paths

LEARNING_RATES = {"lora": 0.001, "prefix": 5.0}
"""Of plain SGD: the loss falls by far more than the tolerance. With ten times LoRA's rate, T5 1.1
small doubles a difference that rounding made in every step, to 6e-3 after twenty."""


def make_method(name: str, length: int) -> AdapterMethod:
    """LoRA (rank 8 on queries and values) or a prefix of the decoder, the only one of PEFT."""
    if name == "lora":
        return LoRA(rank=8, alpha=16, targets=("query", "value"))
    return PrefixTuning(length, encoder=False, cross=False)


def write_inputs(folder: Path, flags: argparse.Namespace) -> None:
    """Settings, the backbone's recipe, the batches, and every method's first arrays, twice."""
    config, rng = t5_1_1(flags.size, dropout_rate=0.0), np.random.default_rng(0)
    (folder / "backbone.json").write_text(json.dumps(describe_backbone(config, "float32")))
    names = ("size", "prompt", "threads", "batches", "checked_steps")
    about = {"device": "cpu", "dtype": "float32", "learning_rates": LEARNING_RATES}
    given = about | {name: getattr(flags, name) for name in names}
    (folder / "settings.json").write_text(json.dumps(given))
    source = load_examples(make_task("sst2", flags.data_dir), "package:nano", flags.inputs)
    batches = {}
    for number, batch in enumerate(pick(pad_to_longest()(source, flags.batch, 0), flags.batches)):
        batches[f"{number}/inputs"] = batch["encoder_input_tokens"]
        batches[f"{number}/targets"] = batch["decoder_target_tokens"]
    np.savez(folder / "batches.npz", **batches)
    for name in flags.methods:
        method = make_method(name, flags.prompt)
        arrays = first_arrays(method, config, rng)
        np.savez(folder / f"{name}.npz", **arrays)
        if isinstance(method, LoRA):
            export_peft_lora(folder / name, arrays, rank=method.rank, alpha=method.alpha)
        else:
            export_peft_prefix(folder / name, arrays)


def first_arrays(
    method: AdapterMethod, config: T5Config, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Random arrays by path: of N(0, 1) for keys and values, small ones for LoRA, none zero."""
    size = 0.05 if isinstance(method, LoRA) else 1.0
    return {
        path: (size * rng.standard_normal(leaf.shape)).astype(np.float32)
        for path, leaf in flatten_paths(method.variable_shapes(config)).items()
    }


def make(inputs: np.ndarray, targets: np.ndarray, *, packed: bool) -> Batch:
    """The batch of padded tokens [B, T] and [B, L]: these arrays, or rows of several examples."""
    tokens, words = ([row[row > 0] for row in rows] for rows in (inputs, targets))
    if not packed:
        lengths = {"input_length": inputs.shape[1], "target_length": targets.shape[1]}
        return make_batch(tokens, words, ids=T5_IDS, **lengths)
    needs, room = (np.array([len(row) for row in rows]) for rows in (tokens, words))
    template = make_template(needs, room)
    return make_packed_batch(
        [tokens[slot] for slot in template.slots],
        [words[slot] for slot in template.slots],
        template.rows,
        row_count=template.shape.rows,
        input_length=template.shape.inputs,
        target_length=template.shape.targets,
        ids=T5_IDS,
    )


def start(folder: Path, name: str, *, packed: bool = False) -> turns.Side:
    """SGD steps from the arrays in `folder`; the first ones report their losses."""
    settings: dict[str, Any] = json.loads((folder / "settings.json").read_text())
    config = t5_1_1(settings["size"], dropout_rate=0.0)
    method = make_method(name, settings["prompt"])
    params = make_params(parameter_shapes(config), config.head_dim, "float32")
    variables = {"params": params} | from_paths(np.load(folder / f"{name}.npz"), config)
    trainable, frozen = freezing.split(
        variables, freezing.make_freeze(variables, method.freeze_rules())
    )
    optimizer = optax.sgd(settings["learning_rates"][name])
    apply_fn = run_with(method, PlannedBackbone(config))
    loss = Loss(z_loss=0.0, per_token=True)  # PEFT's
    step = jax.jit(make_train_step(apply_fn, optimizer, loss), donate_argnums=0)
    state = init_train_state(trainable, optimizer, jax.random.key(0))
    stored = np.load(folder / "batches.npz")
    batches = [
        make(stored[f"{i}/inputs"], stored[f"{i}/targets"], packed=packed)
        for i in range(settings["batches"])
    ]
    batches = jax.device_put(batches)

    def run(numbers: Iterable[int]) -> list[float]:
        nonlocal state
        losses = []
        for number in numbers:
            state, metrics = step(state, frozen, batches[number % len(batches)])
            losses.append(metrics["loss"])
        jax.block_until_ready(state)
        return [float(loss) for loss in losses]

    count = freezing.sizes(trainable)[0]
    return turns.training_side(run, len(batches), settings["checked_steps"], count)


if __name__ == "__main__":
    where, which, *more = sys.argv[1:]
    turns.serve(lambda: start(Path(where), which, packed="--packed" in more))
