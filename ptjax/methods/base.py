"""The `Method` protocol: which variables train, how the network uses them, how they are stored.

`prompt_tuning` and `model_tuning` are ptjax's own methods. Pass a custom one as
`RunSettings(method=MyMethod())`; `examples/own_method.py` has one on a page.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ptjax.data.batching import Batching
from ptjax.errors import InputError
from ptjax.files import JsonObject, Metadata, PathLike
from ptjax.model_dir import ExportKind
from ptjax.models.family import ApplyFn, Config
from ptjax.trees import Variables

if TYPE_CHECKING:  # planning and settings need neither SentencePiece nor weights
    from ptjax.backbones.load import Backbone
    from ptjax.data.tokenizer import Tokenizer


BUILT_IN = ("params", "prompt")
"""The collections that every network reads; `run_with` passes it the names of all others."""


@dataclasses.dataclass(frozen=True)
class InitContext:
    """The inputs of `Method.init` and of a prompt's initialiser.

    Attributes:
        embedding: the backbone's table [V, D].
        tokenizer: the backbone's; None if it has none.
        labels: the label texts of a task with a verbalizer, else None.
        texts: returns the training inputs, formatted by the task's template; they are read only
            when it is called.
        config: the network's.
        member: the name of a sweep's member, for messages; "" in an ordinary run.
    """

    embedding: jax.Array
    tokenizer: Tokenizer | None
    labels: Sequence[str] | None
    texts: Callable[[], Iterable[str]]
    config: Config | None = None
    member: str = ""

    def rows(self, ids: Sequence[int] | np.ndarray | Array) -> Float[Array, "n D"]:
        """Returns the embeddings of token ids, in float32."""
        return self.embedding[jnp.asarray(ids)].astype(jnp.float32)

    def phrase(self, text: str) -> Float[Array, " D"]:
        """Averages the embeddings of a text's tokens.

        Raises:
            InputError: as for `encode`.
        """
        return jnp.mean(self.rows(self.encode(text)), axis=0)

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without an end of sequence.

        Raises:
            InputError: the backbone has no tokenizer, or the text has no tokens.
        """
        if self.tokenizer is None:
            raise InputError(
                "this prompt initialiser needs the backbone's tokenizer; pass tokenizer= to "
                "load_backbone"
            )
        ids = self.tokenizer.encode(text)
        if not ids:
            raise InputError(f"cannot initialise a prompt from the text {text!r}: it has no tokens")
        return ids


class FrozenNetwork(Protocol):
    """The part of a backbone that `Method.check` and `run_with` use.

    It needs no weights: a memory plan has none.
    """

    @property
    def config(self) -> Config: ...
    @property
    def quantize(self) -> str | None: ...
    def make_apply_fn(self, attends_to_input: bool, collections: tuple[str, ...], /) -> ApplyFn: ...


@runtime_checkable
class Method(Protocol):
    """A way to tune a network: the interface of tuning methods.

    A method is a frozen dataclass; its fields are part of what identifies a run. A class that
    inherits from `Method` must implement the members up to `load`; those from `attends_to_input` on
    have defaults.

    Attributes:
        name: shown in the start-up report.
        collection: the Flax collection of the trainable variables. "params" are the network's own
            weights; any other collection starts with the values of `init`, replicated on every
            device.
        exports: the kind of export. "prompt": files that `load_prompt` reads; "model": folders that
            `load_backbone` reads; "arrays": safetensors files that only `load` reads.
        supports_rows: whether each row of a batch may use another prompt; `load` then returns a
            prompt [P, D].
        supports_sweep: whether a sweep may train many members at once with one frozen network.
    """

    name: ClassVar[str]
    collection: ClassVar[str]
    exports: ClassVar[ExportKind]
    supports_rows: ClassVar[bool] = False
    supports_sweep: ClassVar[bool] = False

    def variable_shapes(self, config: Config) -> Variables:
        """Returns the result of `init` for this network as `jax.ShapeDtypeStruct`s."""
        ...

    def init(self, key: Array, context: InitContext) -> Variables:
        """Makes the method's own variables at step 0; {} if the backbone's `params` are trained."""
        ...

    def freeze_rules(self) -> Mapping[str, bool]:
        """Returns the rules that say which variables are frozen; see `training.freeze.make_freeze`.

        They map a pattern of a variable's whole path to whether it is frozen.
        """
        ...

    def save(
        self, path: PathLike, trainable: Variables, metadata: Metadata, backbone: Backbone
    ) -> None:
        """Writes an export atomically. All processes call it; the first one writes.

        Args:
            trainable: the trained variables.
            metadata: what `read_metadata` shall return, if the format has a place for it.
        """
        ...

    def read_metadata(self, path: PathLike) -> JsonObject:
        """Returns the metadata of an export.

        Raises:
            InputError: the export is missing or damaged.
        """
        ...

    def load(self, path: PathLike, backbone: Backbone) -> Variables:
        """Loads the collections of an export; they replace the backbone's of the same name."""
        ...

    @property
    def attends_to_input(self) -> bool:
        """Whether a prompt's positions attend to the input, not only to the prompt."""
        return True

    def check(self, backbone: FrozenNetwork, batching: Batching) -> None:
        """Raises InputError if the method cannot be used with this backbone and batching.

        Called before any computation; accepts everything by default.
        """

    def extra_positions(self) -> int:
        """The number of encoder positions that each example needs in addition to its tokens."""
        return 0

    def wrap(self, apply_fn: ApplyFn) -> ApplyFn:
        """Returns the network as the method runs it: `apply_fn` itself, or a function around it.

        The result is called as `apply_fn(variables, *args, method=..., **settings)`, with the
        methods of `models.prompted.PromptedT5`. Given variables without the method's collection, it
        must behave as the backbone alone.
        """
        return apply_fn

    def describe(self) -> Metadata:
        """Returns metadata for exports: JSON values that describe the method."""
        return {}


def run_with(method: Method, backbone: FrozenNetwork) -> ApplyFn:
    """Returns the network of a backbone as `method` runs it, with access to its collection."""
    collections = () if method.collection in BUILT_IN else (method.collection,)
    return method.wrap(backbone.make_apply_fn(method.attends_to_input, collections))
