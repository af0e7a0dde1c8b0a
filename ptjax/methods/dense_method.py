"""What LoRA and IA3 share: a method with arrays of its own for the network's linear maps."""

from __future__ import annotations

import abc
import dataclasses
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import jax
import numpy as np
from jaxtyping import Array

from ptjax.data.batching import Batching
from ptjax.errors import InputError
from ptjax.files import JsonObject, Metadata, PathLike
from ptjax.methods.base import FrozenNetwork, InitContext, Method
from ptjax.model_dir import ExportKind
from ptjax.models.config import T5Config
from ptjax.models.dense_changes import DenseFn, KeyFn, change_dense
from ptjax.models.family import ApplyFn, Config
from ptjax.models.stacking import UnstackedView, stack_paths
from ptjax.sharding import processes
from ptjax.trees import Variables, flatten_paths, unflatten_paths

if TYPE_CHECKING:
    from ptjax.backbones.load import Backbone


class DenseMethod(Method, abc.ABC):
    """A method that trains small arrays for chosen linear maps; the backbone is frozen.

    The arrays of a map are at the path of its module, one per layer, or with a leading axis where
    layers are stacked. A file always has one per layer, so it loads into both.
    """

    exports: ClassVar[ExportKind] = "arrays"
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

    # Files are imported late: settings and plans do not need them.

    def save(
        self, path: PathLike, trainable: Variables, metadata: Metadata, backbone: Backbone
    ) -> None:
        from ptjax.interop import safetensors_file

        if processes.first():
            unstacked = UnstackedView(flatten_paths(trainable))
            arrays = {name: np.asarray(unstacked[name]) for name in sorted(unstacked)}
            layout = {name: (x.shape, x.dtype.name) for name, x in arrays.items()}
            header = safetensors_file.to_header(metadata)
            safetensors_file.save_safetensors(path, arrays.items(), layout, header)

    def read_metadata(self, path: PathLike) -> JsonObject:
        from ptjax.interop import safetensors_file

        return safetensors_file.from_header(safetensors_file.open_safetensors(path)[1])

    def load(self, path: PathLike, backbone: Backbone) -> Variables:
        from ptjax.interop import safetensors_file

        lazy, _ = safetensors_file.open_safetensors(path)
        config = backbone.config
        assert isinstance(config, T5Config)
        unstacked = self.variable_shapes(dataclasses.replace(config, scan_layers=False))
        wanted = flatten_paths(unstacked)
        if {name: x.shape for name, x in lazy.items()} != {n: x.shape for n, x in wanted.items()}:
            raise InputError(f"{path}: its arrays are not those of {self}")
        arrays = {name: lazy[name].read_all() for name in wanted}
        return unflatten_paths(stack_paths(arrays, np.stack) if config.scan_layers else arrays)
