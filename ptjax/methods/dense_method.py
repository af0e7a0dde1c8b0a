"""What LoRA and IA3 share: a method with arrays of its own for the network's linear maps."""

from __future__ import annotations

import abc
import dataclasses
import zlib
from collections.abc import Mapping
from typing import ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float

from ptjax.data.batching import Batching
from ptjax.errors import InputError
from ptjax.methods.adapter import AdapterMethod
from ptjax.methods.base import FrozenNetwork, InitContext
from ptjax.models.config import T5Config
from ptjax.models.dense_changes import DenseFn, KeyFn, change_dense
from ptjax.models.family import ApplyFn, Config
from ptjax.models.quantized import Quantized
from ptjax.models.stacking import UnstackedView
from ptjax.trees import Tree, Variables, flatten_paths, unflatten_paths


class DenseMethod(AdapterMethod, abc.ABC):
    """A method that trains small arrays for chosen linear maps; the backbone is frozen.

    The arrays of a map are at the path of its module, one per layer, or with a leading axis where
    layers are stacked.
    """

    supports_sweep: ClassVar[bool] = True

    @abc.abstractmethod
    def array_shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every array by its path in the collection, "encoder/.../query/a".

        Raises:
            InputError: the network is not ptjax's own T5, or a target matches no linear map.
        """

    @abc.abstractmethod
    def first_value(self, name: str, key: Array, shape: tuple[int, ...]) -> Array:
        """Makes the float32 array `name` ("a") of one layer at step 0."""

    @abc.abstractmethod
    def change(
        self, dense: DenseFn, x: Array, arrays: Mapping[str, Array], dropout_key: KeyFn | None
    ) -> Array:
        """Computes the linear map with this method; see `models.dense_changes.DenseChange`."""

    @abc.abstractmethod
    def merge_kernel(
        self, kernel: Float[Array, "*L i o"], arrays: Mapping[str, Array]
    ) -> Float[Array, "*L i o"]:
        """Returns the float32 kernel that has the method's effect in it."""

    def merge(self, params: Tree, variables: Variables) -> Tree:
        merged, by_module = flatten_paths(params), {}
        for path, array in flatten_paths(variables[self.collection]).items():
            module, _, name = path.rpartition("/")
            by_module.setdefault(module, {})[name] = array
        for module, arrays in by_module.items():
            kernel = merged[f"{module}/kernel"]
            if isinstance(kernel, Quantized):
                raise InputError(
                    "int8 kernels are rounded; load the backbone without quantize to merge"
                )
            merged[f"{module}/kernel"] = self.merge_kernel(kernel.astype(np.float32), arrays)
        return unflatten_paths(merged)

    def check(self, backbone: FrozenNetwork, batching: Batching) -> None:
        self.array_shapes(backbone.config)

    def freeze_rules(self) -> Mapping[str, bool]:
        return {"params/.*": True, f"{self.collection}/.*": False}

    def wrap(self, apply_fn: ApplyFn) -> ApplyFn:
        return change_dense(apply_fn, self)

    def variable_shapes(self, config: Config) -> Variables:
        shapes = self.array_shapes(config)
        made = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}
        return {self.collection: unflatten_paths(made)}

    def init(self, key: Array, context: InitContext) -> Variables:
        """Makes the arrays of step 0, float32 numpy arrays.

        They are the same whether layers are stacked or not, and those of one linear map do not
        depend on which others are chosen.
        """
        config = context.config
        assert isinstance(config, T5Config)  # `check` has refused others
        stacked = self.array_shapes(dataclasses.replace(config, scan_layers=True))
        arrays = {path: self._first_values(path, key, shape) for path, shape in stacked.items()}
        made = arrays if config.scan_layers else UnstackedView(arrays)
        return {self.collection: unflatten_paths(made)}

    def _first_values(self, path: str, key: Array, shape: tuple[int, ...]) -> np.ndarray:
        """The array `path` of a network with stacked layers at step 0."""
        key, name = jax.random.fold_in(key, zlib.crc32(path.encode())), path.rpartition("/")[2]
        if "/layers/" not in path:
            return np.asarray(self.first_value(name, key, shape))
        count, *of_layer = shape
        keys = jax.random.split(key, count)
        return np.stack([np.asarray(self.first_value(name, k, tuple(of_layer))) for k in keys])
