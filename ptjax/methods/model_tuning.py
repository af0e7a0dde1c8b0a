"""Model tuning: all weights of the backbone train."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from etils import epath
from jaxtyping import Array

from ptjax.data.batching import Batching
from ptjax.errors import InputError, gin_flag
from ptjax.files import JsonObject, Metadata, PathLike
from ptjax.methods.base import FrozenNetwork, InitContext, Method
from ptjax.model_dir import ExportKind
from ptjax.trees import Variables


@dataclasses.dataclass(frozen=True)
class ModelTuning(Method):
    """All weights train, in float32; there is no prompt."""

    name: ClassVar[str] = "model_tuning"
    collection: ClassVar[str] = "params"
    exports: ClassVar[ExportKind] = "model"

    def check(self, backbone: FrozenNetwork, batching: Batching) -> None:
        if backbone.quantize:
            needed = gin_flag("QUANTIZE", None)
            raise InputError(f"int8 kernels do not train: set {needed} for model tuning")

    def variable_shapes(self, config: Any) -> Variables:
        return {}

    def init(self, key: Array, context: InitContext) -> Variables:
        return {}

    def freeze_rules(self) -> Mapping[str, bool]:
        return {"params/.*": False}

    # `save_backbone` and what it needs of foreign formats are imported late: settings and plans
    # need none of it.

    def save(self, path: PathLike, trainable: Variables, metadata: Metadata, backbone: Any) -> None:
        """A folder in Hugging Face's layout, which has no place for metadata.

        float32: the tuned weights as they are, whatever the backbone's activations.
        """
        from ptjax.backbones.save import save_backbone

        params, tokenizer = trainable["params"], backbone.tokenizer
        kept = {"tokenizer": tokenizer, "dtype": "float32", "family": backbone.family}
        save_backbone(path, backbone.config, params, **kept)

    def read_metadata(self, path: PathLike) -> JsonObject:
        """Nothing, of a model that is whole.

        Raises:
            InputError: a file is missing, cut or empty.
        """
        from ptjax.interop.huggingface import load_huggingface

        folder = epath.Path(path)
        load_huggingface(folder)
        for file in folder.iterdir():
            if not file.stat().length:
                raise InputError(f"{file}: the file is empty")
        return {}

    def load(self, path: PathLike, backbone: Any) -> Variables:
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
