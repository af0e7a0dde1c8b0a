"""Per-layer prompts: every encoder layer has a prompt of its own, as in google's per_layer.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ptjax.data.batching import Batching
from ptjax.errors import InputError, check_at_least, check_choice
from ptjax.files import Metadata
from ptjax.methods.adapter import AdapterMethod
from ptjax.methods.base import FrozenNetwork, InitContext
from ptjax.methods.initializers import Initializer
from ptjax.methods.prompt_method import initial_prompt
from ptjax.models.config import T5Config
from ptjax.models.family import ApplyFn, Config
from ptjax.models.per_layer import PROMPT, layer_prompts
from ptjax.models.prompted import with_prompt
from ptjax.training.optimizer import Adafactor
from ptjax.trees import Tree, Variables

Combine = Literal["replace", "add"]


@dataclasses.dataclass(frozen=True)
class PerLayerPrompts(AdapterMethod):
    """Trains a prompt [P, D] for each encoder layer of a T5; the backbone is frozen.

    Each layer projects its prompt to keys and values with its own frozen weights. (Prefix tuning
    trains keys and values instead.) The formula is that of google-research/prompt-tuning.

    Attributes:
        length: P, the number of encoder positions that the prompts take.
        initializer: makes the first layer's prompt, as in `PromptTuning`.
        combine: "replace": a layer's prompt replaces the states at the prompt's positions. All
            layers start from the first layer's prompt. "add": it is added to them. The other layers
            start from zeros, so that step 0 is prompt tuning with the same prompt.
    """

    name: ClassVar[str] = "per_layer_prompts"
    collection: ClassVar[str] = "per_layer_prompts"

    length: int = 100
    initializer: Initializer | None = None
    combine: Combine = "replace"

    def __post_init__(self) -> None:
        check_at_least(1, PROMPT_LENGTH=self.length)
        check_choice(get_args(Combine), "PerLayerPrompts", combine=self.combine)

    def check(self, backbone: FrozenNetwork, batching: Batching) -> None:
        if not isinstance(backbone.config, T5Config):
            raise InputError("PerLayerPrompts needs the layers of a T5; this is not a T5")

    def variable_shapes(self, config: Config) -> Variables:
        assert isinstance(config, T5Config)
        count, size = config.num_encoder_layers, (self.length, config.emb_dim)
        if config.scan_layers:
            layers = {"layers": jax.ShapeDtypeStruct((count, *size), np.float32)}
        else:
            of_layer = jax.ShapeDtypeStruct(size, np.float32)
            layers = {f"layers_{layer}": of_layer for layer in range(count)}
        return self._variables(layers)

    def _variables(self, layers: Mapping[str, Tree]) -> Variables:
        return {self.collection: {"encoder": {name: {PROMPT: x} for name, x in layers.items()}}}

    def init(self, key: Array, context: InitContext) -> Variables:
        """Makes the first layer's prompt with the initialiser; see `combine` for the others.

        Raises:
            InputError: as for `initial_prompt`.
        """
        first = initial_prompt(self.initializer, self.length, key, context)
        config = context.config
        assert isinstance(config, T5Config)
        other = np.zeros_like(first) if self.combine == "add" else first
        prompts = [first] + [other] * (config.num_encoder_layers - 1)
        if config.scan_layers:
            return self._variables({"layers": np.stack(prompts)})
        return self._variables({f"layers_{layer}": x for layer, x in enumerate(prompts)})

    def freeze_rules(self) -> Mapping[str, bool]:
        return {"params/.*": True, f"{self.collection}/.*": False}

    def extra_positions(self) -> int:
        return self.length

    def suggested_optimizer(self) -> Adafactor:
        return Adafactor(0.03, "embedding_rms")  # as for a prompt

    def wrap(self, apply_fn: ApplyFn) -> ApplyFn:
        """Puts P rows of zeros before the input, which the layers replace or add to."""

        def apply(variables: Variables, *args: Tree, **settings: Tree) -> Tree:
            if self.collection not in variables:
                return apply_fn(variables, *args, **settings)
            with layer_prompts(self.collection, add=self.combine == "add"):
                return apply_fn(with_prompt(variables, self._zeros(variables)), *args, **settings)

        return apply

    def _zeros(self, variables: Variables) -> Float[Array, "P D"]:
        prompt = next(iter(variables[self.collection]["encoder"].values()))[PROMPT]
        return jnp.zeros(prompt.shape[-2:], jnp.float32)

    def to_file_fields(self) -> Metadata:
        return {"length": self.length, "combine": self.combine}

    def exported(self) -> PerLayerPrompts:
        return dataclasses.replace(self, initializer=None)
