"""A network bound to its variables, with which predictions are computed."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ptjax.backbones.load import Backbone
from ptjax.data.batch import SpecialIds
from ptjax.data.tokenizer import Tokenizer
from ptjax.inference.bank import PromptBank
from ptjax.inference.prompts import Prompt
from ptjax.methods.adapter import Adapter
from ptjax.methods.base import run_with
from ptjax.models.family import ApplyFn, check_supported
from ptjax.models.prompted import with_prompt
from ptjax.sharding.arrays import replicated
from ptjax.trees import Variables


@dataclasses.dataclass(frozen=True)
class Model:
    """A network with its variables, the mesh that they live on, and its vocabulary.

    Attributes:
        apply_fn: the network's function. It is part of jit's cache key.
        variables: the backbone's variables, and those of a prompt or another method.
        mesh: its devices share the rows of a batch.
        ids: the vocabulary's special ids.
        tokenizer: None if the model is used with token ids only.
    """

    apply_fn: ApplyFn
    variables: Variables
    mesh: Mesh
    ids: SpecialIds
    tokenizer: Tokenizer | None = None

    def with_variables(self, variables: Variables) -> Model:
        """Returns the same network with other variables."""
        return dataclasses.replace(self, variables=variables)


def bind(backbone: Backbone, prompt: Prompt = None, apply_fn: ApplyFn | None = None) -> Model:
    """Makes the model of a backbone with a prompt, with what another method tuned, or alone.

    Args:
        prompt: the result of `open_prompt`.
        apply_fn: the network's function, if a method has wrapped it. None builds the backbone's
            function for this kind of prompt. That of an adapter is always its method's.

    Raises:
        InputError: the network does not support prompts that do not attend to the input.
    """
    attends = True
    if isinstance(prompt, PromptBank):
        if not np.all(prompt.arrays.attends_to_input):
            check_supported(backbone.family, "blind prompts")
        variables = with_prompt(backbone.variables, prompt.arrays)
    elif prompt is None:
        variables = with_prompt(backbone.variables, None)
    elif isinstance(prompt, Adapter):
        assert prompt.variables is not None  # `open_prompt` has placed them
        apply_fn = run_with(prompt.method, backbone)
        variables = with_prompt(backbone.variables, None) | prompt.variables
    else:
        attends, place = prompt.attends_to_input, replicated(backbone.mesh)
        if prompt.states is None:
            # It may come from another mesh, that of the run that tuned it.
            held = jax.device_put(jnp.asarray(prompt.prompt, jnp.float32), place)
        else:
            dtype = backbone.config.dtype
            cast = jax.tree.map(lambda x: jnp.asarray(x, dtype), prompt.states)
            held = jax.device_put(cast, place)
        variables = with_prompt(backbone.variables, held)
    return Model(
        apply_fn or backbone.make_apply_fn(attends),
        variables,
        backbone.mesh,
        backbone.config.special_ids,
        backbone.tokenizer,
    )
