"""Precomputes the keys and values of a prompt that does not attend to its input."""

from __future__ import annotations

import dataclasses
import functools

import jax

from ptjax.backbones.damage import check_scores
from ptjax.backbones.load import Backbone
from ptjax.errors import InputError
from ptjax.inference.model import bind
from ptjax.inference.prompts import check_prompt
from ptjax.interop.prompt_file import PromptFile
from ptjax.models.family import ApplyFn
from ptjax.models.t5 import PromptStates
from ptjax.trees import Variables


def precompute_prompt_kv(backbone: Backbone, prompt: PromptFile) -> PromptFile:
    """Precomputes a prompt's keys and values in every layer of the encoder and the decoder.

    The prompt must be one that does not attend to its input: otherwise its keys and values depend
    on the example. Returns a copy of it with `states`: a key and a value [P, H, K] per layer, in
    the backbone's dtype. `save_prompt` stores them, and inference uses them instead of running the
    prompt through the encoder.

    Raises:
        InputError: the prompt attends to its input or does not fit the backbone, or a key or value
            is not finite.
    """
    if not prompt.attends_to_input:
        opened = check_prompt(backbone, dataclasses.replace(prompt, states=None))
        model = bind(backbone, opened)
        states = jax.device_get(_prompt_states(model.apply_fn, model.variables))
        check_scores(states, backbone, "a key or value that the backbone computes from the prompt")
        origin = {"backbone_name": backbone.name, **backbone.fingerprints.as_metadata()}
        return PromptFile(prompt.prompt, origin | prompt.metadata, states)
    raise InputError(
        "only a prompt that does not see its input has keys and values that can be computed in "
        "advance, and this one does; tune one with SEES_INPUT = False"
    )


@functools.partial(jax.jit, static_argnames="apply_fn")
def _prompt_states(apply_fn: ApplyFn, variables: Variables) -> PromptStates:
    return apply_fn(variables, method="prompt_states")
