"""A user's Flax module as the frozen backbone: T5X's network, or one with its interface.

`module_network` documents that interface and runs the module.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from flax import linen as nn
from flax.core import meta
from jax.sharding import PartitionSpec as P

from ptjax.data.batch import SpecialIds
from ptjax.errors import InputError, check_share
from ptjax.files import JsonObject, Metadata
from ptjax.models.attention import AttendFn, plain_attention
from ptjax.models.config import Dtype, T5Config, check_ids
from ptjax.models.family import (
    ApplyFn,
    ArrayInfo,
    Feature,
    NameRule,
    Parts,
    Rules,
    check_supported,
    embedding_of,
    grid_of,
)
from ptjax.models.module_network import TEXT, ModuleApply
from ptjax.models.stacking import GatherFn
from ptjax.trees import Tree

REPLICATED: Rules = ((r"params/.*", P()), (r"prompt/.*", P()))


@dataclasses.dataclass(frozen=True)
class ModuleConfig:
    """What ptjax needs to know of a user's Flax module; the module itself defines the rest.

    Attributes:
        vocab_size, emb_dim: the number of rows and columns of the embedding table.
        dtype: the dtype of the weights; the module decides the dtype of its activations.
        dropout_rate: 0 trains without dropout, anything else with the module's own rates.
        pad_id, eos_ids, decoder_start_id, forced_bos_id: as in `T5Config`; the defaults are T5's.
    """

    vocab_size: int
    emb_dim: int
    dtype: Dtype = "float32"
    dropout_rate: float = 0.1
    pad_id: int = T5Config.pad_id
    eos_ids: tuple[int, ...] = T5Config.eos_ids
    decoder_start_id: int = T5Config.decoder_start_id
    forced_bos_id: int | None = T5Config.forced_bos_id

    def __post_init__(self) -> None:
        check_share("ModuleConfig", dropout_rate=self.dropout_rate)
        object.__setattr__(self, "eos_ids", tuple(self.eos_ids))
        check_ids(self)

    @property
    def scan_layers(self) -> bool:
        return False

    @property
    def special_ids(self) -> SpecialIds:
        return SpecialIds(self.pad_id, self.eos_ids, self.decoder_start_id, self.forced_bos_id)


def flax_module(
    module: object, *, embedder: str = "token_embedder", sharding_rules: Rules = REPLICATED
) -> ModuleFamily:
    """Makes the family of a Flax module, for `load_backbone(path, family=flax_module(module))`.

    Args:
        module: a module with the interface that `models.module_network` describes, such as T5X's
            `network.Transformer`; or an object with one as its `.module`, such as T5X's
            `EncoderDecoderModel` (its vocabularies and optimizer are not used).
        embedder: path of the submodule that embeds the input's tokens, such as "a/b".
        sharding_rules: pairs (pattern of a variable's path, PartitionSpec over the mesh axes
            `data` and `model`); the default replicates the weights on every device.

    Raises:
        InputError: neither `module` nor its `.module` is a Flax module, or the module lacks
            `encode` or `decode`.
    """
    network = module if isinstance(module, nn.Module) else getattr(module, "module", None)
    if not isinstance(network, nn.Module):
        raise InputError(
            f"flax_module: {type(module).__name__} is neither a Flax module nor has one as .module"
        )
    for method in ("encode", "decode"):
        if not callable(getattr(network, method, None)):
            raise InputError(
                f"flax_module: {type(network).__name__} has no method {method!r}; ptjax needs "
                "the interface of T5X's network, see docs/own_networks.md"
            )
    return ModuleFamily(network, embedder, sharding_rules)


@dataclasses.dataclass(eq=False)
class ModuleFamily:
    """The family of one Flax module, made by `flax_module`; see `family.Family`."""

    module: nn.Module
    embedder: str = "token_embedder"
    sharding_rules: Rules = REPLICATED
    title: str = "a custom Flax module"
    described: str = ""
    embedding_path: str = ""
    config_type: type = ModuleConfig
    divided: Sequence[str] = ()
    divided_by_fsdp: Sequence[str] = ()
    lacks: Collection[Feature] = (
        "packing",
        "blind prompts",
        "fsdp",
        "int8",
        "scanned layers",
        "remat",
        "fused attention",
    )
    old_fields: Sequence[str] = ("vocab_size", "emb_dim")
    not_computed: Collection[str] = (
        "dtype",
        "dropout_rate",
        "pad_id",
        "eos_ids",
        "decoder_start_id",
        "forced_bos_id",
    )

    def __post_init__(self) -> None:
        self.embedding_path = f"{self.embedder}/embedding"
        self.described = f"a tree of {type(self.module).__name__} ({self.embedding_path})"
        self.build = functools.cache(self._build)

    def check_name(self, path: str, array: ArrayInfo) -> None:
        """Accepts any name: the loader compares the names with `parameter_shapes`."""

    def infer_config(self, lazy_arrays: Mapping[str, ArrayInfo], name: str) -> JsonObject:
        table = lazy_arrays.get(self.embedding_path)
        if table is None:
            raise InputError(
                f"{name}: parameter {self.embedding_path} is missing; name the module that embeds "
                "the input with flax_module(module, embedder=...)"
            )
        if len(table.shape) != 2:
            raise InputError(
                f"{table.where}: parameter {self.embedding_path} has shape {table.shape}, not "
                "[vocabulary, width]"
            )
        return {"vocab_size": table.shape[0], "emb_dim": table.shape[1]}

    def check_depth(
        self, lazy_arrays: Mapping[str, ArrayInfo], config: ModuleConfig, name: str
    ) -> None:
        """Checks nothing: the module's code, not a file, decides the number of layers."""

    def parameter_shapes(self, config: ModuleConfig) -> Tree:
        return self._shapes

    @functools.cached_property
    def _shapes(self) -> Tree:
        def init() -> Tree:
            tokens = jnp.full((1, 2), TEXT, jnp.int32)

            def everything(module: Any) -> None:
                encoded = module.encode(tokens, enable_dropout=False)
                module.decode(encoded, tokens, tokens, tokens, enable_dropout=False)

            variables = self.module.init(jax.random.key(0), method=everything)
            return meta.unbox(variables)["params"]

        return jax.eval_shape(init)

    def tensor_names(self, fields: Metadata) -> Sequence[NameRule]:
        """Returns an empty sequence, whatever the config's `fields`: no name needs a translation.

        Hugging Face has no such network; files use the parameters' own names instead.
        """
        return ()

    def _build(
        self,
        config: ModuleConfig,
        *,
        attends_to_input: bool = True,
        attend: AttendFn = plain_attention,
        gather: GatherFn | None = None,
        collections: tuple[str, ...] = (),
    ) -> ApplyFn:
        if not attends_to_input:
            check_supported(self, "blind prompts")
        if attend is not plain_attention:
            check_supported(self, "fused attention")
        if gather is not None:
            check_supported(self, "fsdp")
        module_config = getattr(self.module, "config", None)
        module_rate = getattr(module_config, "dropout_rate", config.dropout_rate)
        if config.dropout_rate and config.dropout_rate != module_rate:
            logging.warning(
                "dropout_rate = %s is ignored: the module uses its own, %s; 0 disables dropout",
                config.dropout_rate,
                module_rate,
            )
        dropout = config.dropout_rate > 0
        return ModuleApply(self, self.module, self.embedder, dropout, ("params", *collections))

    def embedding(self, params: Tree) -> jax.Array:
        return embedding_of(params, self.embedding_path)

    def is_quantized(self, path: str) -> bool:
        return False

    def fingerprint_parts(self, path: str, shape: tuple[int, ...]) -> Parts:
        """Returns {"grid": one slice per axis}, by which the fingerprint samples the parameter.

        All parameters are sampled in the same way, whatever their `path`; see `family.grid_of`.
        """
        return {"grid": grid_of(shape)}
