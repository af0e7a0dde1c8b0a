"""What a run asks of a method: what trains, where it enters the network, how it is stored.

`prompt_tuning` and `model_tuning` are ptjax's own. One of your own is an argument,
`RunSettings(method=MyMethod())`; `examples/own_method.py` has one in a page.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ptjax.data.batching import Batching
from ptjax.errors import InputError
from ptjax.files import JsonObject, Metadata, PathLike
from ptjax.model_dir import ExportKind
from ptjax.models.family import ApplyFn
from ptjax.trees import Variables

if TYPE_CHECKING:  # the network runs where no SentencePiece is installed
    from ptjax.data.tokenizer import Tokenizer


BUILT_IN = ("params", "prompt")
"""Collections that every network reads by itself; `run_with` has it carry all others."""


@dataclasses.dataclass(frozen=True)
class InitContext:
    """What `Method.init` and a prompt's initialiser may look at.

    Attributes:
        embedding: the backbone's table [V, D].
        labels: the verbalizers of a closed label set, else None.
        texts: the training inputs, formatted by the task's template; read only when called.
        config: the network's.
        member: of a sweep, its name, for messages; "" in an ordinary run.
    """

    embedding: jax.Array
    tokenizer: Tokenizer | None
    labels: Sequence[str] | None
    texts: Callable[[], Iterable[str]]
    config: Any = None
    member: str = ""

    def rows(self, ids: Sequence[int] | np.ndarray | Array) -> Float[Array, "n D"]:
        return self.embedding[jnp.asarray(ids)].astype(jnp.float32)

    def phrase(self, text: str) -> Float[Array, " D"]:
        """The average of the embeddings of a text's pieces."""
        return jnp.mean(self.rows(self.encode(text)), axis=0)

    def encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise InputError(
                "this prompt initialiser needs the backbone's tokenizer; give load_backbone the "
                "argument tokenizer="
            )
        ids = self.tokenizer.encode(text)
        if not ids:
            raise InputError(f"no prompt can be made of the text {text!r}: it has no pieces")
        return ids


class FrozenNetwork(Protocol):
    """What `Method.check` sees of a backbone; planning has no more of one."""

    @property
    def config(self) -> Any: ...
    @property
    def quantize(self) -> str | None: ...


@runtime_checkable
class Method(Protocol):
    """What trains. A frozen dataclass: its fields are settings, and count for the run's identity.

    Whoever inherits from it says what follows `attends_to_input` only where it differs.

    Attributes:
        name: in the start-up report.
        collection: of Flax, in which what trains is. "params" are the network's own weights; every
            other one starts as `init` makes it, whole on every device.
        exports: "prompt": files that `load_prompt` reads; "model": folders that `load_backbone`
            reads; "arrays": safetensors files that `load` alone reads.
        supports_rows: `load` gives a prompt [P, D], of which each row of a batch may take its own.
        supports_sweep: a sweep may train many at once over one frozen network.
    """

    name: ClassVar[str]
    collection: ClassVar[str]
    exports: ClassVar[ExportKind]
    supports_rows: ClassVar[bool] = False
    supports_sweep: ClassVar[bool] = False

    def variable_shapes(self, config: Any) -> Variables:
        """What `init` gives, as `jax.ShapeDtypeStruct`s, for a network of this config."""
        ...

    def init(self, key: Array, context: InitContext) -> Variables:
        """The variables beside the backbone's `params` at step 0; {} where those train."""
        ...

    def freeze_rules(self) -> Mapping[str, bool]:
        """Pattern of a whole path -> whether it is frozen, see `training.freeze.make_freeze`."""
        ...

    def save(self, path: PathLike, trainable: Variables, metadata: Metadata, backbone: Any) -> None:
        """Writes an export, whole or not at all. All processes call it, the first one writes.

        Args:
            metadata: what `read_metadata` gives back; a format may have no place for it.
            backbone: the `Backbone` of the run.
        """
        ...

    def read_metadata(self, path: PathLike) -> JsonObject:
        """Of an export. InputError: it is missing or damaged."""
        ...

    def load(self, path: PathLike, backbone: Any) -> Variables:
        """The collections of an export that stand in for those of the backbone."""
        ...

    @property
    def attends_to_input(self) -> bool:
        """False where positions of a prompt attend to the prompt alone."""
        return True

    def check(self, backbone: FrozenNetwork, batching: Batching) -> None:
        """InputError if the method does not go with these; before anything is computed."""

    def extra_positions(self) -> int:
        """Positions of the encoder that an example takes besides its own tokens."""
        return 0

    def wrap(self, apply_fn: ApplyFn) -> ApplyFn:
        """The network as the method runs it: `apply_fn` itself, or one that does more around it.

        It is called as `apply_fn(variables, *args, method=..., **settings)`, `method` being that
        of `models.prompted.PromptedT5`; without the method's collection it is the backbone alone.
        """
        return apply_fn

    def describe(self) -> Mapping[str, Any]:
        """What an export says of the method in its header; values that JSON can hold."""
        return {}


def run_with(method: Method, backbone: Any) -> ApplyFn:
    """The network of a `Backbone` as `method` runs it; its layers see the method's collection."""
    carried = () if method.collection in BUILT_IN else (method.collection,)
    return method.wrap(backbone.make_apply_fn(method.attends_to_input, carried))
