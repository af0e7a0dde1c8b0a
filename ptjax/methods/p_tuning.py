"""P-tuning: a small network computes the prompt (Liu et al. 2021), as in PEFT's P_TUNING."""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ptjax.errors import check_at_least, check_choice
from ptjax.methods.base import InitContext
from ptjax.methods.prompt_method import PromptMethod
from ptjax.models.family import Config
from ptjax.training.optimizer import embedding_rms
from ptjax.trees import Tree, Variables, unflatten_paths

Encoder = Literal["mlp", "lstm"]
_DIRECTIONS = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class PTuning(PromptMethod):
    """Trains an embedding [P, D] and a network that computes the prompt from it.

    "mlp" is three dense layers with ReLU between them. "lstm" is a bidirectional LSTM over the
    rows, then two dense layers. The formulas and the sizes are those of PEFT's `PromptEncoder`,
    without its dropout. The prompt is put before the encoder's input. The export holds the prompt
    alone; the network is in the checkpoints, from which a run resumes.

    Attributes:
        length: P, the number of rows of the prompt.
        encoder: "mlp" or "lstm".
        hidden: the number of hidden units; of an LSTM, in each direction. None means D.
        lstm_layers: the number of layers of the LSTM; "mlp" ignores it.
        attends_to_input: as in `PromptTuning`.
    """

    name: ClassVar[str] = "p_tuning"
    collection: ClassVar[str] = "p_tuning"

    length: int = 100
    encoder: Encoder = "mlp"
    hidden: int | None = None
    lstm_layers: int = 2
    attends_to_input: bool = True  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self) -> None:
        check_at_least(1, PROMPT_LENGTH=self.length)
        check_choice(get_args(Encoder), "PTuning", encoder=self.encoder)
        check_at_least(1, "PTuning", hidden=self.hidden, lstm_layers=self.lstm_layers)

    def variable_shapes(self, config: Config) -> Variables:
        sizes = self._sizes(config.emb_dim)
        shapes = {path: jax.ShapeDtypeStruct(size, np.float32) for path, size in sizes.items()}
        return {self.collection: unflatten_paths(shapes)}

    def _sizes(self, width: int) -> dict[str, tuple[int, ...]]:
        """The shape of every array by its path in the collection."""
        units = self.hidden or width
        sizes: dict[str, tuple[int, ...]] = {"embedding": (self.length, width)}
        if self.encoder == "lstm":
            for layer in range(self.lstm_layers):
                inputs = width if layer == 0 else 2 * units
                for direction in _DIRECTIONS:
                    path = f"lstm_{layer}/{direction}"
                    sizes[f"{path}/input"] = (inputs, 4 * units)
                    sizes[f"{path}/recurrent"] = (units, 4 * units)
                    sizes[f"{path}/bias"] = (4 * units,)
            widths = (2 * units, 2 * units, width)
        else:
            widths = (width, units, units, width)
        for layer, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            sizes[f"dense_{layer}/kernel"] = (inputs, outputs)
            sizes[f"dense_{layer}/bias"] = (outputs,)
        return sizes

    def init(self, key: Array, context: InitContext) -> Variables:
        """Draws the embedding from N(0, 1) and the weights from U(-k, k), as PEFT does.

        Here k is 1 / sqrt(the layer's inputs), for an LSTM 1 / sqrt(hidden). The last layer is then
        scaled so that the prompt starts with the RMS of the backbone's embedding; PEFT's starts at
        about a tenth of 1, whatever the backbone.
        """
        sizes = self._sizes(context.embedding.shape[1])
        made: dict[str, Array] = {}
        for path, of_path in zip(sizes, jax.random.split(key, len(sizes)), strict=True):
            if path == "embedding":
                made[path] = jax.random.normal(of_path, sizes[path])
                continue
            layer, _, _ = path.rpartition("/")
            fan_in = (sizes.get(f"{layer}/recurrent") or sizes[f"{layer}/kernel"])[0]
            bound = fan_in**-0.5
            made[path] = jax.random.uniform(of_path, sizes[path], minval=-bound, maxval=bound)
        own = unflatten_paths(made)
        rms = jnp.sqrt(jnp.mean(jnp.square(_encode(own))))
        last = _layers(own, "dense_")[-1]
        scale = embedding_rms(context.embedding) / rms
        own[last] = {name: array * scale for name, array in own[last].items()}
        return {self.collection: own}

    def matrix(self, own: Tree) -> Float[Array, "P D"]:
        return _encode(own)


@jax.jit
def _encode(own: Tree) -> Float[Array, "P D"]:
    """Runs the LSTM, if there is one, and the dense layers on the embedding."""
    x = own["embedding"]
    for name in _layers(own, "lstm_"):
        x = jnp.concatenate(
            [_lstm(x, own[name][way], reverse=way == "backward") for way in _DIRECTIONS], axis=-1
        )
    *hidden, last = _layers(own, "dense_")
    for name in hidden:
        x = jax.nn.relu(x @ own[name]["kernel"] + own[name]["bias"])
    return x @ own[last]["kernel"] + own[last]["bias"]


def _layers(own: Tree, prefix: str) -> list[str]:
    """The names of the layers of a kind, in their order."""
    count = sum(name.startswith(prefix) for name in own)
    return [f"{prefix}{layer}" for layer in range(count)]


def _lstm(rows: Float[Array, "P n"], weights: Tree, *, reverse: bool) -> Float[Array, "P H"]:
    """One direction of a layer; its gates are in torch's order: input, forget, cell, output."""
    units = len(weights["recurrent"])

    def step(carry: tuple[Array, Array], x: Array) -> tuple[tuple[Array, Array], Array]:
        state, cell = carry
        enter, forget, new, leave = jnp.split(x + state @ weights["recurrent"], 4)
        cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(enter) * jnp.tanh(new)
        state = jax.nn.sigmoid(leave) * jnp.tanh(cell)
        return (state, cell), state

    start = jnp.zeros(units), jnp.zeros(units)
    return jax.lax.scan(step, start, rows @ weights["input"] + weights["bias"], reverse=reverse)[1]
