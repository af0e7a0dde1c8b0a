"""Backbones in which the start of a row does not see what follows it, by explicit masks.

For `sees_input_masks.py`, whose runs name them in `masks_lower_half.gin` and `masks_names.gin`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Int

from ptjax.backbones.load import Backbone
from ptjax.errors import InputError
from ptjax.models.layers import EncoderLayer


@dataclasses.dataclass(frozen=True)
class MaskedBackbone(Backbone):
    """A backbone whose `apply_fn` has the mask of a prompt already."""

    def make_apply_fn(
        self, attends_to_input: bool, collections: tuple[str, ...] = ()
    ) -> Callable[..., Any]:
        if not attends_to_input:
            raise InputError("the mask is the backbone's: set SEES_INPUT = True")
        return self.apply_fn


def hide(
    apply_fn: Callable[..., Any],
    start: Callable[[Int[Array, "B T"]], Int[Array, "#B"]],
    layers: Collection[int],
) -> Callable[..., Any]:
    """`apply_fn` in whose encoder `layers` the start of a row attends to itself alone.

    Args:
        start: the encoder's tokens -> how many positions that is, those of a prompt included.
    """
    names = {f"layers_{layer}" for layer in layers}

    def masked(variables: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            layer = isinstance(context.module, EncoderLayer) and context.method_name == "__call__"
            if not layer or context.module.name not in names:
                return call(*args, **kwargs)
            x, bias, mask, *rest = args
            first = jnp.arange(x.shape[1]) < start(tokens)[:, None]
            seen = first[:, None, :] | ~first[:, :, None]
            return call(x, bias, mask._replace(seen=seen), *rest, **kwargs)

        with nn.intercept_methods(intercept):
            return apply_fn(variables, tokens, *args, **kwargs)

    return masked


def hide_from_prompt(
    backbone: Backbone, prompt_length: int, layers: Collection[int]
) -> MaskedBackbone:
    """A prompt's positions attend to the prompt alone in `layers`; in all, as `sees_input = False`.

    Unlike there, they are computed for every example.
    """

    def start(tokens: Int[Array, "B T"]) -> Int[Array, " 1"]:
        return jnp.full(1, prompt_length)

    apply_fn = hide(backbone.make_apply_fn(attends_to_input=True), start, layers)
    return MaskedBackbone(**vars(backbone) | {"apply_fn": apply_fn})


def lower_half(backbone: Backbone, prompt_length: int) -> MaskedBackbone:
    return hide_from_prompt(backbone, prompt_length, range(backbone.config.num_encoder_layers // 2))


def names(backbone: Backbone) -> Backbone:
    """For pre-training: no layer lets a task's name, up to its colon, see the text behind it.

    Where none of the first ten tokens is a colon, as in most running text, up to 23 tokens stand
    for the name, as many as the row's own tokens decide.
    """
    assert backbone.tokenizer is not None
    colon = backbone.tokenizer.encode("name:")[-1]

    def start(tokens: Int[Array, "B T"]) -> Int[Array, " B"]:
        colons = tokens[:, :10] == colon
        return jnp.where(
            colons.any(axis=1), colons.argmax(axis=1) + 1, tokens[:, :16].sum(axis=1) % 24
        )

    layers = range(backbone.config.num_encoder_layers)
    return dataclasses.replace(backbone, apply_fn=hide(backbone.apply_fn, start, layers))
