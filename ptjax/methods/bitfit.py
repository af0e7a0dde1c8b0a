"""BitFit: only the scales of the backbone's layer norms are trained (Ben Zaken et al. 2022).

The paper trains every bias. T5's layers have none (section 2.1 of Raffel et al. 2020), so what is
left of a layer norm, its scale, takes their place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, Unpack

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float

from ptjax.data.batching import Batching
from ptjax.errors import InputError
from ptjax.methods.adapter import AdapterMethod, PeftOrigin
from ptjax.methods.base import FrozenNetwork, InitContext
from ptjax.models.config import T5Config
from ptjax.models.family import ApplyFn, Config
from ptjax.models.interception import change_modules
from ptjax.models.layers import RMSNorm, rms_norm
from ptjax.models.t5 import parameter_shapes
from ptjax.sharding import processes
from ptjax.trees import Tree, Variables, flatten_paths, unflatten_paths

_SCALE = "/scale"


@dataclasses.dataclass(frozen=True)
class BitFit(AdapterMethod):
    """Trains a float32 copy of the scale of every layer norm [D], of a T5.

    The copies are the collection `bitfit`, under the names of the originals. The network's norms
    multiply by them in float32, whatever its dtype.
    """

    name: ClassVar[str] = "bitfit"
    collection: ClassVar[str] = "bitfit"
    supports_sweep: ClassVar[bool] = True

    def check(self, backbone: FrozenNetwork, batching: Batching) -> None:
        if not isinstance(backbone.config, T5Config):
            raise InputError("BitFit trains the scales of T5's layer norms; this is not a T5")

    def variable_shapes(self, config: Config) -> Variables:
        shapes = parameter_shapes(config)
        return _scales(shapes, lambda x: jax.ShapeDtypeStruct(x.shape, np.float32))

    def init(self, key: Array, context: InitContext) -> Variables:
        assert context.backbone is not None
        on_host = lambda x: processes.on_host(x).astype(np.float32)  # noqa: E731
        return _scales(context.backbone.variables["params"], on_host)

    def freeze_rules(self) -> Mapping[str, bool]:
        return {"params/.*": True, "bitfit/.*": False}

    def wrap(self, apply_fn: ApplyFn) -> ApplyFn:
        return change_modules(apply_fn, RMSNorm, self.collection, _with_own_scale)

    def merge(self, params: Tree, variables: Variables) -> Tree:
        return unflatten_paths(flatten_paths(params) | flatten_paths(variables[self.collection]))

    def export_peft(
        self, folder: epath.Path, arrays: Mapping[str, np.ndarray], **origin: Unpack[PeftOrigin]
    ) -> None:
        from ptjax.interop.peft_adapters import export_peft_norms

        export_peft_norms(folder, arrays, **origin)


def _with_own_scale(
    norm: RMSNorm,
    call: Callable[[Array], Array],
    x: Float[Array, "*b d"],
    arrays: Mapping[str, Array],
    train: bool,
) -> Float[Array, "*b d"]:
    # In float32: bfloat16 would round small changes of the scale away, and its gradient's sum.
    return rms_norm(x, arrays["scale"], norm.epsilon, norm.dtype)


def _scales(params: Tree, function: Callable[[Tree], Tree]) -> Variables:
    """The norms' scales among `params`, mapped by a function, as the collection `bitfit`."""
    scales = {path: x for path, x in flatten_paths(params).items() if path.endswith(_SCALE)}
    return {"bitfit": unflatten_paths({path: function(x) for path, x in scales.items()})}
