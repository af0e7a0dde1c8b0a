"""The prompt tuning step that the benchmarks measure: any T5 1.1, the paper's recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptjax.methods.prompt_tuning import PromptTuning
from ptjax.models.config import T5Config
from ptjax.models.prompted import make_apply_fn
from ptjax.models.t5 import parameter_shapes
from ptjax.planning.flops import step_flops
from ptjax.planning.workload import AbstractStep
from ptjax.sharding.arrays import replicate_key, replicated
from ptjax.training import freeze as freezing
from ptjax.training.loss import Loss
from ptjax.training.optimizer import Adafactor
from ptjax.training.step import TrainState, init_train_state, make_train_step

SIZES = {  # D, H, layers of either stack, F
    "small": (512, 6, 8, 1024),
    "base": (768, 12, 12, 2048),
    "large": (1024, 16, 24, 2816),
    "xl": (2048, 32, 24, 5120),
    "xxl": (4096, 64, 24, 10240),
}
TOY = (64, 4, 2, 128)
"""The sizes of `toy`, for rehearsals."""


def t5_1_1(size: str, **settings: Any) -> T5Config:
    """The configuration of `gin_configs/models/t5_1_1_<size>.gin`, or of `toy`."""
    width, heads, layers, mlp = TOY if size == "toy" else SIZES[size]
    return T5Config(
        vocab_size=32128,
        emb_dim=width,
        num_heads=heads,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        head_dim=64,
        mlp_dim=mlp,
        **settings,
    )


def make_step(
    config: T5Config, params: Any, prompt: Any, attends_to_input: bool
) -> tuple[Callable[..., Any], TrainState, Any]:
    """`(step, state, frozen)`; `step(state, frozen, batch)` is jitted and donates the state."""
    variables = {"params": params, "prompt": {"prompt": jnp.asarray(prompt)}}
    freeze = freezing.make_freeze(variables, PromptTuning().freeze_rules())
    trainable, frozen = freezing.split(variables, freeze)
    optimizer = freezing.freeze_updates(Adafactor().make(), freeze)
    step = make_train_step(make_apply_fn(config, attends_to_input), optimizer, Loss())
    state = init_train_state(trainable, optimizer, jax.random.key(0))
    return jax.jit(step, donate_argnums=0), state, frozen


def first_state(abstract: AbstractStep, trainable: Any) -> TrainState:
    """The initial state of `placed.step`, as `init_train_state` makes it: zeros and `trainable`.

    Args:
        trainable: arrays on the mesh.
    """
    shapes = abstract.state.step, abstract.state.opt_state
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    count, opt_state = jax.device_put(zeros, replicated(abstract.mesh))
    key = replicate_key(jax.random.key(0), abstract.mesh)
    return TrainState(count, trainable, opt_state, key)


def count_step_flops(
    config: T5Config, prompt: int, batch: Mapping[str, Any], attends_to_input: bool = True
) -> tuple[int, int]:
    """(forward, step) for a batch of arrays or shapes and a prompt of so many rows."""
    variables = {
        "params": parameter_shapes(config),
        "prompt": {"prompt": jax.ShapeDtypeStruct((prompt, config.emb_dim), jnp.float32)},
    }
    freeze = freezing.make_freeze(variables, PromptTuning().freeze_rules())
    optimizer = freezing.freeze_updates(Adafactor().make(), freeze)
    return step_flops(make_apply_fn(config, attends_to_input), variables, freeze, batch, optimizer)
