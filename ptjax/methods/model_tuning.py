"""Model tuning: all weights of the backbone are trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from etils import epath
from jaxtyping import Array

from ptjax.data.batching import Batching
from ptjax.errors import InputError, gin_flag
from ptjax.files import JsonObject, Metadata, PathLike
from ptjax.methods.base import FrozenNetwork, InitContext, Method
from ptjax.model_dir import ExportKind
from ptjax.models.family import Config
from ptjax.training.optimizer import Adafactor
from ptjax.trees import Variables

if TYPE_CHECKING:
    from ptjax.backbones.load import Backbone


@dataclasses.dataclass(frozen=True)
class ModelTuning(Method):
    """Trains all weights of the backbone, in float32, without a prompt."""

    name: ClassVar[str] = "model_tuning"
    collection: ClassVar[str] = "params"
    exports: ClassVar[ExportKind] = "model"

    def check(self, backbone: FrozenNetwork, batching: Batching) -> None:
        if backbone.quantize:
            needed = gin_flag("QUANTIZE", None)
            raise InputError(f"int8 kernels do not train: set {needed} for model tuning")

    def variable_shapes(self, config: Config) -> Variables:
        return {}

    def init(self, key: Array, context: InitContext) -> Variables:
        return {}

    def freeze_rules(self) -> Mapping[str, bool]:
        return {"params/.*": False}

    def suggested_optimizer(self) -> Adafactor:
        # T5's own fine-tuning (Raffel et al. 2020, section 3.1.2).
        return Adafactor(0.001, multiply_by_parameter_scale=True, weight_decay=0.0)

    # Functions for foreign formats are imported late: settings and plans do not need them.

    def save(
        self, path: PathLike, trainable: Variables, metadata: Metadata, backbone: Backbone
    ) -> None:
        """Saves the tuned backbone to the folder `path` with `save_backbone`.

        Drops `metadata`, for which such a folder has no place. The weights are saved in float32, as
        they were tuned, whatever the activations' dtype.
        """
        from ptjax.backbones.save import save_backbone

        params, tokenizer = trainable["params"], backbone.tokenizer
        kept = {"tokenizer": tokenizer, "dtype": "float32", "family": backbone.family}
        save_backbone(path, backbone.config, params, **kept)

    def read_metadata(self, path: PathLike) -> JsonObject:
        """Checks that a folder that `save` wrote is intact; always returns {}.

        Raises:
            InputError: a file is missing, truncated or empty.
        """
        from ptjax.interop.huggingface import load_huggingface
        from ptjax.interop.own_names import WEIGHTS, has_own_names

        folder = epath.Path(path)
        if not ((folder / WEIGHTS).exists() and has_own_names(folder)):
            load_huggingface(folder)
        for file in folder.iterdir():
            if not file.stat().length:
                raise InputError(f"{file}: the file is empty")
        return {}

    def load(self, path: PathLike, backbone: Backbone) -> Variables:
        from ptjax.backbones.load import load_backbone

        config = backbone.config
        return load_backbone(
            path,
            dtype=config.dtype,
            mesh=backbone.mesh,
            fsdp=backbone.fsdp,
            scan_layers=config.scan_layers,
            family=backbone.family,
        ).variables
