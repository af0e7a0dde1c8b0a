"""Prompts of every encoder layer: trained states at the prompt's positions of a layer's input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from ptjax.data.batch import PADDING_SEGMENT
from ptjax.models.layers import EncoderLayer
from ptjax.models.prompt import Prompt
from ptjax.trees import Tree

_Context = nn.module.InterceptorContext
PROMPT = "prompt"
"""The name of a layer's array."""


@contextmanager
def layer_prompts(collection: str, *, add: bool) -> Iterator[None]:
    """Within the context, encoder layers use the array `prompt` [P, D] of their `collection`.

    It replaces, or with `add` is added to, the states at the prompt's positions, in the order of
    these: the first P of a row or, in packed rows, of every segment. The network itself must have
    put a prompt of P rows there.
    """
    packed: list[tuple[Array, Array]] = []  # the last call's own

    def combine(call: Tree, args: Tree, kwargs: Tree, context: _Context) -> Tree:
        module = context.module
        if isinstance(module, Prompt) and context.method_name == "inside":
            _, segment_ids, positions = args
            packed[:] = [(positions, segment_ids != PADDING_SEGMENT)]
        elif (
            isinstance(module, EncoderLayer)
            and context.method_name == "__call__"
            and module.has_variable(collection, PROMPT)
        ):
            prompt = module.get_variable(collection, PROMPT)
            args = (_combined(args[0], prompt, packed[0] if packed else None, add), *args[1:])
        return call(*args, **kwargs)

    with nn.intercept_methods(combine):
        yield


def _combined(
    x: Float[Array, "B S D"],
    prompt: Float[Array, "P D"],
    packed: tuple[Array, Bool[Array, "B S"]] | None,
    add: bool,
) -> Float[Array, "B S D"]:
    """A layer's input with its prompt."""
    # Broadcast in float32 and cast afterwards, so that the examples' gradients add up in float32.
    if packed is None:
        length = len(prompt)
        rows = jnp.broadcast_to(prompt, (len(x), *prompt.shape)).astype(x.dtype)
        rows = x[:, :length] + rows if add else rows
        return jnp.concatenate([rows, x[:, length:]], axis=1)
    positions, real = packed
    reserved = (positions < len(prompt)) & real
    rows = prompt[jnp.where(reserved, positions, 0)].astype(x.dtype)
    return jnp.where(reserved[..., None], x + rows if add else rows, x)
