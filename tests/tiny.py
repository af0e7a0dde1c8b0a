"""Random T5s, small enough to be compiled in seconds: the one place that makes them for tests."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptjax.backbones.save import save_backbone
from ptjax.data.tokenizer import Tokenizer
from ptjax.models.config import T5Config
from ptjax.models.t5 import parameter_shapes


def tiny_config(vocab_size: int = 64, **changes: Any) -> T5Config:
    """A T5 1.1 of width 16 with one layer on each side, and `changes`."""
    sizes: dict[str, Any] = {
        "emb_dim": 16,
        "num_heads": 2,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "head_dim": 8,
        "mlp_dim": 32,
    }
    return T5Config(vocab_size, **sizes | changes)


@functools.cache
def tiny_params(config: T5Config, seed: int = 0) -> Any:
    """Random float32 weights of T5X's scales, the same for every test.

    Drawn by NumPy: to compile `init_params` takes seconds.
    """
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        owner, name = (entry.key for entry in path[-2:])
        if name == "scale":
            return jnp.ones(leaf.shape)
        fan = {"kernel": leaf.shape[-2], "rel_embedding": sum(leaf.shape) / 2, "embedding": 1}[name]
        scale = (fan * (config.head_dim if owner == "query" else 1)) ** -0.5
        return jnp.asarray(rng.normal(0, scale, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, parameter_shapes(config))


def save_tiny(
    folder: Any,
    config: T5Config,
    *,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> Any:
    """Saves such weights in float32, with a tokenizer if given; returns `folder`."""
    save_backbone(folder, config, tiny_params(config, seed), tokenizer=tokenizer, dtype="float32")
    return folder
