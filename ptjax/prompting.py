"""A loaded backbone and a prompt, put together: do they fit, and what runs them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float

from ptjax.backbone import Backbone
from ptjax.errors import InputError
from ptjax.interop.prompt_file import PromptFile
from ptjax.models.prompted import make_apply_fn, with_prompt
from ptjax.models.t5 import PromptStates
from ptjax.scale.sharding import replicated

Variables = dict[str, Any]


def check_prompt(
    backbone: Backbone, prompt: PromptFile, *, allow_mismatch: bool = False
) -> PromptFile:
    """Refuses a prompt that was tuned on another backbone or for another tokenizer.

    Args:
        allow_mismatch: say so instead of refusing; the width has to fit all the same.

    Returns:
        The prompt with this backbone's fingerprints, so that no later check says it all again.

    Raises:
        InputError: another width, or another fingerprint.
    """
    width = backbone.config.emb_dim
    if prompt.prompt.shape[1] != width:
        raise InputError(
            f"the prompt {list(prompt.prompt.shape)} does not fit {backbone.name}, whose width is "
            f"{width}; it was tuned on {prompt.metadata.get('backbone_name', 'another backbone')}"
        )
    tokenizer = backbone.tokenizer
    own_name, own_id = backbone.name, backbone.name.partition("@")[0]
    name = prompt.metadata.get("backbone_name")
    checked = dict(prompt.metadata)
    for what, own in (
        ("backbone", backbone.fingerprint),
        ("tokenizer", tokenizer.fingerprint if tokenizer else None),
    ):
        wanted = prompt.metadata.get(f"{what}_fingerprint")
        checked[f"{what}_fingerprint"] = own or wanted
        if what == "backbone" and wanted is None and name is None:
            logging.warning(
                "the prompt does not say which backbone it was tuned on; its width fits"
            )
        # PEFT records a name, and of a model of the hub seldom the commit.
        elif what == "backbone" and wanted is None and name not in (own_name, own_id):
            logging.warning(
                "the prompt was tuned on %s and does not tell its weights; that they are those of "
                "%s cannot be checked, its width fits",
                name,
                own_name,
            )
        if wanted is None or own is None or wanted == own:
            continue
        problem = (
            f"the prompt was tuned on {name or 'a backbone'} with the {what} {wanted[:19]}, not "
            f"with that of {own_name}, {own[:19]}"
        )
        if not allow_mismatch:
            raise InputError(f"{problem}; load its own, or override with allow_mismatch")
        logging.warning("%s; used all the same", problem)
    # Keys and values of another backbone mean nothing here; the prompt is run again instead.
    same = prompt.metadata.get("backbone_fingerprint") == backbone.fingerprint
    return PromptFile(prompt.prompt, checked, prompt.states if same else None)


def sees_input(prompt: Any) -> bool:
    """Whether a prompt, of whatever kind, was tuned to see its input; a bare array was."""
    return getattr(prompt, "sees_input", True)


def compile_prompt(backbone: Backbone, prompt: PromptFile) -> PromptFile:
    """A prompt that sees no input together with its states, for `save_prompt`.

    With them it has no way through the encoder of its own any more: what is left of it is a key
    and a value [P, H, K] per layer, in the backbone's dtype.

    Raises:
        InputError: the prompt sees its input, so there is nothing that all inputs share.
    """
    if prompt.sees_input:
        raise InputError(
            "only a prompt that does not see its input can be compiled, and this one does; tune "
            "one with SEES_INPUT = False"
        )
    apply_fn, variables = prompted(backbone, dataclasses.replace(prompt, states=None))
    states = _prompt_states(apply_fn, variables)
    names = {"backbone_name": backbone.name, "backbone_fingerprint": backbone.fingerprint}
    return PromptFile(prompt.prompt, names | prompt.metadata, jax.device_get(states))


def prompted(backbone: Backbone, prompt: Any) -> tuple[Callable[..., Any], Variables]:
    """`(apply_fn, variables)` of the backbone with a prompt, given as for `forward`.

    One that was compiled for this backbone brings its states along, and its own way through the
    encoder is saved.
    """
    array = prompt_array(backbone, prompt)
    states = getattr(prompt, "states", None)
    if states is not None:
        _check_states(backbone, states)
        cast = jax.tree.map(lambda x: jnp.asarray(x, backbone.config.dtype), states)
        array = jax.device_put(cast, replicated(backbone.mesh))
    variables = with_prompt(backbone.variables, array)
    return make_apply_fn(backbone.config, sees_input(prompt)), variables


def prompt_array(backbone: Backbone, prompt: Any) -> Float[Array, "P D"] | None:
    """A prompt, given as an array or as something that has one, as float32 [P, D].

    Raises:
        InputError: it is not a matrix as wide as the backbone, or a loaded prompt that was tuned
            on another one (pass its `.prompt` to use it all the same).
    """
    if prompt is None:
        return None
    array = getattr(prompt, "prompt", prompt)
    width = backbone.config.emb_dim
    if np.ndim(array) != 2 or np.shape(array)[1] != width:
        raise InputError(
            f"a prompt for {backbone.name} has the shape [P, {width}], this one has "
            f"{list(np.shape(array))}; was it tuned on another backbone?"
        )
    if getattr(prompt, "metadata", None) is not None:
        check_prompt(backbone, prompt)
    # It may come from another mesh, that of the run that tuned it.
    return jax.device_put(jnp.asarray(array, jnp.float32), replicated(backbone.mesh))


def _check_states(backbone: Backbone, states: PromptStates) -> None:
    config = backbone.config
    for stack, layers, wanted in (
        ("encoder", states.encoder, config.num_encoder_layers),
        ("decoder", states.decoder, config.num_decoder_layers),
    ):
        heads = layers[0][0].shape[1:]
        if len(layers) != wanted or heads != (config.num_heads, config.head_dim):
            raise InputError(
                f"the prompt was compiled for another backbone: {len(layers)} {stack} layers with "
                f"heads {list(heads)}, {backbone.name} has {wanted} with "
                f"{[config.num_heads, config.head_dim]}"
            )


@functools.partial(jax.jit, static_argnames="apply_fn")
def _prompt_states(apply_fn: Callable[..., Any], variables: Variables) -> PromptStates:
    return apply_fn(variables, method="prompt_states")
