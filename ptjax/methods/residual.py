"""Residual prompt tuning: the prompt plus a small network of it (Razdaibiedina et al. 2023)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ptjax.errors import check_at_least
from ptjax.methods.base import InitContext
from ptjax.methods.initializers import Initializer
from ptjax.methods.prompt_method import PromptMethod, initial_prompt
from ptjax.models.family import Config
from ptjax.training.optimizer import embedding_rms
from ptjax.trees import Tree, Variables

_EPSILON = 1e-5
_SHARE_OF_RMS = 0.1


@dataclasses.dataclass(frozen=True)
class ResidualPromptTuning(PromptMethod):
    """Trains a prompt P and a network on its rows; the input gets P + LayerNorm(MLP(P)).

    MLP(p) is `relu(p @ down + b) @ up + c`, with `bottleneck` hidden units. The export holds the
    sum alone; the network is in the checkpoints, from which a run resumes.

    At step 0 the network's output has a tenth of the embedding's RMS. That is what the paper's
    layer norm, whose scale starts at 1, gives on T5, whose embedding has an RMS of about 10.

    Attributes:
        length: P, the number of rows of the prompt.
        initializer: makes the first P, as in `PromptTuning`.
        bottleneck: the number of hidden units.
        shared: whether all rows share one network, or each row has its own.
        attends_to_input: as in `PromptTuning`.
    """

    name: ClassVar[str] = "residual_prompt_tuning"
    collection: ClassVar[str] = "residual_prompt"

    length: int = 100
    initializer: Initializer | None = None
    bottleneck: int = 400
    shared: bool = True
    attends_to_input: bool = True  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self) -> None:
        check_at_least(1, PROMPT_LENGTH=self.length)
        check_at_least(1, "ResidualPromptTuning", bottleneck=self.bottleneck)

    def variable_shapes(self, config: Config) -> Variables:
        sizes = self._sizes(config.emb_dim)
        shapes = {k: jax.ShapeDtypeStruct(size, np.float32) for k, size in sizes.items()}
        return {self.collection: shapes}

    def _sizes(self, width: int) -> dict[str, tuple[int, ...]]:
        units = self.bottleneck
        lead = () if self.shared else (self.length,)
        return {
            "prompt": (self.length, width),
            "down": (*lead, width, units),
            "down_bias": (*lead, units),
            "up": (*lead, units, width),
            "up_bias": (*lead, width),
            "norm_scale": (*lead, width),
            "norm_bias": (*lead, width),
        }

    def init(self, key: Array, context: InitContext) -> Variables:
        """Makes P with the initialiser, and random weights (He et al. 2015); biases are zero.

        Raises:
            InputError: as for `initial_prompt`.
        """
        prompt_key, down_key, up_key = jax.random.split(key, 3)
        prompt = initial_prompt(self.initializer, self.length, prompt_key, context)
        sizes = self._sizes(prompt.shape[1])
        made: Tree = {name: jnp.zeros(size) for name, size in sizes.items()}
        for name, of_name in (("down", down_key), ("up", up_key)):
            fan_in = sizes[name][-2]
            made[name] = jax.random.normal(of_name, sizes[name]) * (2 / fan_in) ** 0.5
        made["norm_scale"] += _SHARE_OF_RMS * embedding_rms(context.embedding)
        return {self.collection: made | {"prompt": prompt}}

    def matrix(self, own: Tree) -> Float[Array, "P D"]:
        return _residual(own)


@jax.jit
def _residual(own: Tree) -> Float[Array, "P D"]:
    """P + LayerNorm(MLP(P)), with one network or, behind an axis of P, one for each row."""
    prompt = own["prompt"]
    hidden = jax.nn.relu(_apply(prompt, own["down"]) + own["down_bias"])
    x = _apply(hidden, own["up"]) + own["up_bias"]
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + _EPSILON)
    return prompt + x * own["norm_scale"] + own["norm_bias"]


def _apply(rows: Float[Array, "P n"], kernel: Float[Array, "*P n m"]) -> Float[Array, "P m"]:
    """Multiplies the rows by one matrix, or each by its own."""
    return jnp.squeeze(rows[:, None] @ kernel, axis=1)
