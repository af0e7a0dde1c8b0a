"""What the rest of ptjax asks of a kind of network; each kind answers in one file beside it.

`t5_family` is T5, with mT5, Flan-T5, ByT5, umT5, UL2 and MADLAD as variants of its config, and
`module_family` a Flax module of one's own. All else that knows a network by its names asks here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
from jax.sharding import PartitionSpec

from ptjax.data.batch import SpecialIds
from ptjax.errors import InputError
from ptjax.trees import Tree

ApplyFn = Callable[..., Any]
Parts = dict[str, tuple[slice, ...]]
Rules = Sequence[tuple[str, PartitionSpec]]
"""(pattern of a whole path, spec), the first match wins. `fsdp` in a spec is `data` where a stack
of layers is divided over it too, else nothing."""

Feature = Literal["packing", "blind prompts", "fsdp", "int8", "scanned layers", "remat"]


class NameRule(NamedTuple):
    """A parameter's name in ptjax and in Hugging Face's files; `{i}` is the layer."""

    ours: str
    theirs: str
    transposed: bool


@runtime_checkable
class ArrayInfo(Protocol):
    """An array that is still in its file."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def where(self) -> str: ...


@runtime_checkable
class Config(Protocol):
    """What everything outside of `models` reads of any network's config, a frozen dataclass."""

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
    """A kind of network."""

    @property
    def title(self) -> str:
        """How messages call such a network, "a T5"."""
        ...

    @property
    def described(self) -> str:
        """The same with whose names it has, "a T5 under T5X's names"."""
        ...

    @property
    def config_type(self) -> type:
        """The dataclass of its sizes; its fields are arguments of `load_backbone`."""
        ...

    @property
    def sharding_rules(self) -> Rules:
        """Where its parameters and its prompt live on a mesh."""
        ...

    @property
    def divided(self) -> Sequence[str]:
        """Fields of the config that the mesh's axis `model` has to divide."""
        ...

    @property
    def divided_by_fsdp(self) -> Sequence[str]:
        """Those that `data` has to divide too with `fsdp`."""
        ...

    @property
    def embedding_path(self) -> str:
        """The parameter [V, D] that embeds the input's tokens."""
        ...

    @property
    def lacks(self) -> Collection[Feature]:
        """What such a network cannot do; `check_supported` refuses it by name."""
        ...

    @property
    def old_fields(self) -> Sequence[str]:
        """Of the config, what the first version of the fingerprint covers."""
        ...

    @property
    def not_computed(self) -> Collection[str]:
        """Of the config, what changes no logits of given tokens."""
        ...

    def check_name(self, path: str, array: ArrayInfo) -> None:
        """InputError if no such network has a parameter of this name and rank."""
        ...

    def infer_config(self, stored: Mapping[str, ArrayInfo], name: str) -> dict[str, Any]:
        """The fields of the config that the parameters' names and shapes tell.

        Args:
            name: of the backbone, for messages.

        Raises:
            InputError: a parameter that every such network has is missing or misshapen.
        """
        ...

    def check_depth(self, stored: Mapping[str, ArrayInfo], config: Any, name: str) -> None:
        """InputError if the config has more layers than are stored; nothing is traced."""
        ...

    def parameter_shapes(self, config: Any) -> Tree:
        """The parameters as `jax.ShapeDtypeStruct`s; nothing is computed."""
        ...

    def tensor_names(self, fields: Mapping[str, Any]) -> Sequence[NameRule]:
        """The parameters' names here and at Hugging Face, for a config with these fields."""
        ...

    def build(
        self,
        config: Any,
        *,
        attends_to_input: bool = True,
        gather: Callable[..., Any] | None = None,
        collections: tuple[str, ...] = (),
    ) -> ApplyFn:
        """`apply_fn(variables, ..., method=)` for such prompts, the same object each time.

        In `collections` the network's modules have arrays beside their `params`.

        The methods are those of `prompted.PromptedT5`: none (logits), `encode`, `init_cache`,
        `decode_step`, and `prompt_states` of a network that takes prompts which see no input.
        """
        ...

    def embedding(self, params: Mapping[str, Any]) -> jax.Array:
        """The table [V, D] of the input's tokens, for initialisers, RMS and nearest tokens."""
        ...

    def is_quantized(self, path: str) -> bool:
        """Whether int8 holds this parameter."""
        ...

    def fingerprint_parts(self, path: str, shape: tuple[int, ...]) -> Parts:
        """The parts of a parameter that the fingerprints sample, as the slices of each axis.

        "rows" go into both fingerprints, "grid" into v2 alone.
        """
        ...


_SETTINGS: Mapping[Feature, str] = {
    "packing": "PACK = True",
    "blind prompts": "SEES_INPUT = False",
    "fsdp": "FSDP = True",
    "int8": "QUANTIZE = 'int8'",
    "scanned layers": "SCAN_LAYERS = True",
    "remat": "REMAT",
}


def check_supported(family: Family, *features: Feature) -> None:
    """InputError if the family's networks lack one of these features."""
    for feature in features:
        if feature in family.lacks:
            raise InputError(
                f"{_SETTINGS[feature]}: {family.title} cannot be run so, only ptjax's own T5 can; "
                "leave the setting out"
            )


def embedding_of(params: Mapping[str, Any], path: str) -> jax.Array:
    """The leaf of nested `params` at `path`, "a/b"."""
    found: Any = params
    for name in path.split("/"):
        found = found[name]
    return found


def grid_of(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Steps of at most 61 (fewer than a head is wide) along each axis, at least 64 entries of it.

    A dense change (another scale, merged LoRA, more training) shows in it, and that of a head or
    another band of rows or columns.
    """
    return tuple(slice(None, None, min(61, max(1, size // 64))) for size in shape)
