"""IA3: learned vectors scale keys, values and feed-forward activations (Liu et al. 2022)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float

from ptjax.methods.adapter import PeftOrigin
from ptjax.methods.dense_method import DenseMethod
from ptjax.models.dense_changes import DenseFn, KeyFn, check_targets, chosen_dense, dense_shapes
from ptjax.models.family import Config
from ptjax.training.optimizer import Adafactor


@dataclasses.dataclass(frozen=True)
class IA3(DenseMethod):
    """Trains a vector for each chosen linear map, which scales its outputs or its inputs.

    The vectors are float32 and start at 1, so the first step sees the backbone. The defaults are
    the paper's three vectors: for the keys and values of every attention, and for the inner
    activations of every feed-forward block, which are the inputs of `wo`.

    Attributes:
        outputs: the linear maps whose outputs are scaled, by an array `outputs` [out] each. They
            are named as in `LoRA.targets`.
        inputs: the linear maps whose inputs are scaled, by an array `inputs` [in] each.
    """

    name: ClassVar[str] = "ia3"
    collection: ClassVar[str] = "ia3"

    outputs: Sequence[str] = ("key", "value")
    inputs: Sequence[str] = ("wo",)

    def __post_init__(self) -> None:
        check_targets("IA3", outputs=self.outputs, inputs=self.inputs)
        object.__setattr__(self, "outputs", tuple(self.outputs))  # gin gives lists; hashable
        object.__setattr__(self, "inputs", tuple(self.inputs))

    def array_shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        kernels = dense_shapes(config)
        chosen = chosen_dense(config, **{"IA3.outputs": self.outputs, "IA3.inputs": self.inputs})
        shapes: dict[str, tuple[int, ...]] = {}
        for path in chosen["IA3.outputs"]:
            *layers, _, size = kernels[path]
            shapes[f"{path}/outputs"] = (*layers, size)
        for path in chosen["IA3.inputs"]:
            *layers, size, _ = kernels[path]
            shapes[f"{path}/inputs"] = (*layers, size)
        return shapes

    def first_value(self, name: str, key: Array, shape: tuple[int, ...]) -> Array:
        return jnp.ones(shape)

    def change(
        self,
        dense: DenseFn,
        x: Float[Array, "*n i"],
        arrays: Mapping[str, Array],
        dropout_key: KeyFn | None,
    ) -> Float[Array, "*n o"]:
        if "inputs" in arrays:
            x = _scaled(x, arrays["inputs"])
        y = dense(x)
        return _scaled(y, arrays["outputs"]) if "outputs" in arrays else y

    def merge_kernel(
        self, kernel: Float[Array, "*L i o"], arrays: Mapping[str, Array]
    ) -> Float[Array, "*L i o"]:
        if "inputs" in arrays:
            kernel = kernel * arrays["inputs"][..., None]
        return kernel * arrays["outputs"][..., None, :] if "outputs" in arrays else kernel

    def suggested_optimizer(self) -> Adafactor:
        return Adafactor(0.03, weight_decay=0.0)  # absolute: all entries start as ones

    def export_peft(
        self, folder: epath.Path, arrays: Mapping[str, np.ndarray], **origin: Unpack[PeftOrigin]
    ) -> None:
        from ptjax.interop.peft_adapters import export_peft_ia3

        export_peft_ia3(folder, arrays, **origin)


# In float32: near 1 bfloat16 has steps of 0.004 to 0.008, which no learning rate would cross.
# Recomputed in the backward pass, or x would be kept in float32.
@jax.checkpoint
def _scaled(x: Float[Array, "*n d"], scale: Float[Array, " d"]) -> Float[Array, "*n d"]:
    return (x.astype(jnp.float32) * scale).astype(x.dtype)
