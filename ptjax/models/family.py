"""The interface between ptjax and a kind of network; each kind implements it in its own file.

`t5_family` is T5, with mT5, Flan-T5, ByT5, umT5, UL2 and MADLAD as variants of its config;
`module_family` is a user's Flax module. Code outside of `models` uses this interface only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
from jax.sharding import PartitionSpec

from ptjax.data.batch import SpecialIds
from ptjax.errors import InputError
from ptjax.files import JsonObject, Metadata
from ptjax.models.attention import AttendFn, plain_attention
from ptjax.models.stacking import GatherFn
from ptjax.trees import Tree

ApplyFn = Callable[..., Any]
Parts = dict[str, tuple[slice, ...]]
Rules = Sequence[tuple[str, PartitionSpec]]
"""Rows (pattern of a variable's whole path, spec); the first match wins. The axis `fsdp` in a spec
means `data` if weights are also sharded over `data`, otherwise it is dropped."""

Feature = Literal[
    "packing", "blind prompts", "fsdp", "int8", "scanned layers", "remat", "fused attention"
]


class NameRule(NamedTuple):
    """A parameter's names in ptjax and in Hugging Face's files.

    Attributes:
        ours: its path in ptjax: "encoder/layers_{i}/mlp/wo/kernel". `{i}` is to be replaced by the
            layer's index in its stack, counted from 0; parameters outside of layers have no `{i}`.
        theirs: its name in Hugging Face's files, with `{i}` likewise.
        transposed: whether the array in Hugging Face's files is the transpose of ptjax's.
    """

    ours: str
    theirs: str
    transposed: bool


@runtime_checkable
class ArrayInfo(Protocol):
    """The shape of an array that has not been read yet.

    `where` names its file, for messages.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def where(self) -> str: ...


@runtime_checkable
class Config(Protocol):
    """The interface of a network's config: the fields that code outside of `models` reads.

    Implementations are dataclasses and may have more fields; `T5Config` explains these.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def emb_dim(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def scan_layers(self) -> bool: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    @property
    def special_ids(self) -> SpecialIds: ...


@runtime_checkable
class Family(Protocol):
    """The interface of a kind of network."""

    @property
    def title(self) -> str:
        """What messages call such a network, for example "a T5"."""
        ...

    @property
    def described(self) -> str:
        """What messages call a tree of the network's parameters, such as "a T5 under T5X's names".

        Used for a checkpoint that lacks the parameter names of such a network.
        """
        ...

    @property
    def config_type(self) -> type:
        """The dataclass of the network's config; its fields are arguments of `load_backbone`."""
        ...

    @property
    def sharding_rules(self) -> Rules:
        """How the network's parameters and its prompt are sharded over a mesh."""
        ...

    @property
    def divided(self) -> Sequence[str]:
        """The config fields that must be divisible by the size of the mesh axis `model`."""
        ...

    @property
    def divided_by_fsdp(self) -> Sequence[str]:
        """With `fsdp`, the config fields that must be divisible by the size of the axis `data`."""
        ...

    @property
    def embedding_path(self) -> str:
        """The path of the parameter [V, D] that embeds the input's tokens."""
        ...

    @property
    def lacks(self) -> Collection[Feature]:
        """The features that such networks do not support; see `check_supported`."""
        ...

    @property
    def old_fields(self) -> Sequence[str]:
        """The names of the config fields that version 1 of the backbone's fingerprint hashes."""
        ...

    @property
    def not_computed(self) -> Collection[str]:
        """The names of the config fields that version 2 of the fingerprint leaves out.

        They do not affect the logits of given tokens.
        """
        ...

    def check_name(self, path: str, array: ArrayInfo) -> None:
        """Raises InputError if no such network has a parameter of this name and rank."""
        ...

    def infer_config(self, lazy_arrays: Mapping[str, ArrayInfo], name: str) -> JsonObject:
        """Infers config fields from the names and shapes of the parameters.

        Args:
            lazy_arrays: maps the path of each parameter to its shape and file.
            name: the backbone's name, for messages.

        Returns:
            the inferred fields by name; the others must come from elsewhere.

        Raises:
            InputError: a parameter that every such network has is missing or misshapen.
        """
        ...

    def check_depth(self, lazy_arrays: Mapping[str, ArrayInfo], config: Any, name: str) -> None:
        """Raises InputError if the config has more layers than the files have.

        Must not trace the network: with a wrong number of layers that could take forever.
        """
        ...

    def parameter_shapes(self, config: Any) -> Tree:
        """Returns the parameter tree as `jax.ShapeDtypeStruct`s; computes no parameter."""
        ...

    def tensor_names(self, fields: Metadata) -> Sequence[NameRule]:
        """Returns the parameters' names in ptjax and in Hugging Face's files.

        Empty for a network that Hugging Face does not have.

        Args:
            fields: the config's fields by name.
        """
        ...

    def build(
        self,
        config: Any,
        *,
        attends_to_input: bool = True,
        attend: AttendFn = plain_attention,
        gather: GatherFn | None = None,
        collections: tuple[str, ...] = (),
    ) -> ApplyFn:
        """Returns the network as a function `apply_fn(variables, ..., method=)`.

        Equal arguments return the same object, so that `jax.jit` finds it in its cache. `method`
        names a method of `prompted.PromptedT5` and the function takes the arguments of that one:
        None (`__call__`, the logits), "encode", "init_cache", "decode_step", and "prompt_states" if
        the network supports input-independent prompts.

        Args:
            attends_to_input: whether a prompt's positions attend to the input.
            attend: computes the attention, in place of `plain_attention`.
            gather: gathers sharded weights before they are used; see `stacking.GatherFn`.
            collections: the names of further Flax collections that the network reads, in
                addition to "params" and "prompt", such as a tuning method's own.
        """
        ...

    def embedding(self, params: Tree) -> jax.Array:
        """Returns the embedding table [V, D] from the parameters."""
        ...

    def is_quantized(self, path: str) -> bool:
        """Whether `load_backbone(quantize=...)` quantizes this parameter."""
        ...

    def fingerprint_parts(self, path: str, shape: tuple[int, ...]) -> Parts:
        """Returns which entries of a parameter the backbone's fingerprints hash.

        Args:
            path: the parameter's path, or only the end of it: "query/kernel".
            shape: its shape in one layer, without an axis over stacked layers.

        Returns:
            up to two samples of the array, each as one slice per axis. Both versions of the
            fingerprint hash the sample "rows"; only version 2 hashes the sample "grid".
        """
        ...


_SETTINGS: Mapping[Feature, str] = {
    "packing": "PACK = True",
    "blind prompts": "SEES_INPUT = False",
    "fsdp": "FSDP = True",
    "int8": "QUANTIZE",
    "scanned layers": "SCAN_LAYERS = True",
    "remat": "REMAT",
    "fused attention": "ATTENTION = 'fused'",
}


def check_supported(family: Family, *features: Feature) -> None:
    """Raises InputError if the family's networks lack one of these features."""
    for feature in features:
        if feature in family.lacks:
            raise InputError(
                f"{_SETTINGS[feature]} is not supported by {family.title}, only by ptjax's own T5; "
                "remove the setting"
            )


def embedding_of(params: Tree, path: str) -> jax.Array:
    """Returns the leaf of nested `params` at `path`, such as "a/b"."""
    for name in path.split("/"):
        params = params[name]
    return params


def grid_of(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Returns one slice per axis, which together sample an array.

    Each takes at least 64 entries, or all if there are fewer; its step is at most 61. The sample
    reveals any dense change (another scale, merged LoRA, more training), and a change of a single
    head or another band of rows or columns, because 61 is less than a head's width.
    """
    return tuple(slice(None, None, min(61, max(1, size // 64))) for size in shape)
