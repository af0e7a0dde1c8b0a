"""Precomputes the keys and values of an input-independent prompt, to be saved in its file."""

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
    """Returns a prompt that does not attend to its input, with its keys and values precomputed.

    `save_prompt` stores them, and inference uses them instead of running the prompt through the
    encoder again: a key and a value [P, H, K] per layer, in the backbone's dtype.

    Raises:
        InputError: the prompt attends to its input, so its keys depend on the example; or it does
            not fit the backbone.
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
