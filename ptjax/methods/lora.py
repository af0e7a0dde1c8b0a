"""LoRA: a low-rank product is added to chosen linear maps (Hu et al. 2021)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float

from ptjax.errors import InputError, check_share, check_whole
from ptjax.methods.adapter import PeftOrigin
from ptjax.methods.dense_method import DenseMethod
from ptjax.models.dense_changes import DenseFn, KeyFn, check_targets, chosen_dense, dense_shapes
from ptjax.models.family import Config
from ptjax.training.optimizer import Adafactor


@dataclasses.dataclass(frozen=True)
class LoRA(DenseMethod):
    """Trains a low-rank update of chosen kernels: y = W x + (alpha / rank) B A dropout(x).

    Each kernel W [in, out] gets `a` [in, rank] and `b` [rank, out], both float32. They start as
    PEFT's do: `a` from U(-1/sqrt(in), 1/sqrt(in)), `b` at zero, so that the first step sees the
    backbone.

    Attributes:
        rank: r, the rank of the update.
        alpha: the update is scaled by alpha / rank, so a change of the rank alone needs no other
            learning rate.
        targets: which linear maps: names or paths of T5X's modules, or regular expressions for the
            end of such a path. "query" means all queries, of the encoder's and the decoder's
            self-attention and of cross-attention; others are "encoder/.*/value",
            "encoder_decoder_attention/key", "(wi|wi_0|wi_1|wo)". Paths are those of stacked layers,
            "encoder/layers/attention/query": all layers have the same targets.
        dropout: the probability that an entry of x is dropped in the update, in training.
    """

    name: ClassVar[str] = "lora"
    collection: ClassVar[str] = "lora"

    rank: int = 8
    alpha: float = 16.0
    targets: Sequence[str] = ("query", "value")
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_whole("LoRA", rank=self.rank)
        if not (isinstance(self.alpha, int | float) and 0 < self.alpha < math.inf):
            raise InputError(f"LoRA.alpha must be a number > 0, got {self.alpha!r}")
        check_share("LoRA", dropout=self.dropout)
        check_targets("LoRA", targets=self.targets)
        object.__setattr__(self, "targets", tuple(self.targets))  # gin gives a list; hashable

    def array_shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        kernels = dense_shapes(config)
        chosen = chosen_dense(config, **{"LoRA.targets": self.targets})["LoRA.targets"]
        shapes: dict[str, tuple[int, ...]] = {}
        for path in chosen:
            *layers, inputs, outputs = kernels[path]
            shapes[f"{path}/a"] = (*layers, inputs, self.rank)
            shapes[f"{path}/b"] = (*layers, self.rank, outputs)
        return shapes

    def first_value(self, name: str, key: Array, shape: tuple[int, ...]) -> Array:
        if name == "b":
            return jnp.zeros(shape)
        # PEFT's kaiming_uniform_(a=sqrt(5)).
        bound = 1 / math.sqrt(shape[0])
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

    def change(
        self,
        dense: DenseFn,
        x: Float[Array, "*n i"],
        arrays: Mapping[str, Array],
        dropout_key: KeyFn | None,
    ) -> Float[Array, "*n o"]:
        if dropout_key is not None and self.dropout:
            kept = jax.random.bernoulli(dropout_key(), 1 - self.dropout, x.shape)
            dropped = jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)
        else:
            dropped = x
        y = dense(x)
        update = _low_rank(dropped, arrays["a"], arrays["b"])
        return y + (self.alpha / self.rank * update).astype(y.dtype)

    def merge_kernel(
        self, kernel: Float[Array, "*L i o"], arrays: Mapping[str, Array]
    ) -> Float[Array, "*L i o"]:
        return kernel + self.alpha / self.rank * (arrays["a"] @ arrays["b"])

    def suggested_optimizer(self) -> Adafactor:
        return Adafactor(0.001, weight_decay=0.0)  # absolute: half of the arrays start as zeros

    def export_peft(
        self, folder: epath.Path, arrays: Mapping[str, np.ndarray], **origin: Unpack[PeftOrigin]
    ) -> None:
        from ptjax.interop.peft_adapters import export_peft_lora

        export_peft_lora(
            folder, arrays, rank=self.rank, alpha=self.alpha, dropout=self.dropout, **origin
        )


# In float32, or the gradients of all devices would be summed in the activations' bfloat16.
# Recomputed in the backward pass, or x would be kept in float32.
@jax.checkpoint
def _low_rank(
    x: Float[Array, "*n i"], a: Float[Array, "i r"], b: Float[Array, "r o"]
) -> Float[Array, "*n o"]:
    return jnp.dot(jnp.dot(x.astype(jnp.float32), a), b)
