"""The `Method` protocol: which variables train, how the network uses them, how they are stored.

ptjax's own methods have a file each in this folder. Pass a custom one as
`RunSettings(method=MyMethod())`; `examples/own_method.py` has one on a page.
"""

from __future__ import annotations

import dataclasses
import functools
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
from ptjax.training.optimizer import Adafactor
from ptjax.trees import Variables

if TYPE_CHECKING:  # planning and settings need neither SentencePiece nor weights
    from ptjax.backbones.load import Backbone
    from ptjax.data.tokenizer import Tokenizer


BUILT_IN = ("params", "prompt")
"""The collections that every network reads; `run_with` names a method's own one to the network."""


@dataclasses.dataclass(frozen=True)
class InitContext:
    """The inputs of `Method.init` and of a prompt's initialiser.

    Attributes:
        embedding: the backbone's embedding table [V, D].
        tokenizer: the backbone's tokenizer; None if it has none.
        labels: the label texts of a task with a verbalizer, else None.
        texts: a function that reads and returns the training inputs, formatted by the task's
            template.
        config: the network's config.
        member: in a sweep, the name of the member, for messages; "" in an ordinary run.
        backbone: the frozen network itself, for a method that starts from its parameters or from
            what it computes.
    """

    embedding: jax.Array
    tokenizer: Tokenizer | None
    labels: Sequence[str] | None
    texts: Callable[[], Iterable[str]]
    config: Config | None = None
    member: str = ""
    backbone: Backbone | None = None

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

    It includes no weights, so that a memory plan, which loads none, can implement it too.
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
        exports: what `save` writes (an "export"). "prompt": a file that `load_prompt` reads;
            "adapter": a file that `load_adapter` reads, of an `AdapterMethod`; "model": a folder
            that `load_backbone` reads; "arrays": a safetensors file that only `load` reads.
        supports_rows: whether the rows of a batch may use different prompts; if so, `load` must
            return a prompt [P, D].
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
        """Returns which variables are frozen, as rules for `training.freeze.make_freeze`.

        A rule maps a regular expression, which must match a variable's whole path, to True if the
        variable is frozen, or False if it is trained: `{"params/.*": True,
        "prompt/.*": False}`.
        """
        ...

    def save(
        self, path: PathLike, trainable: Variables, metadata: Metadata, backbone: Backbone
    ) -> None:
        """Writes the tuned variables to a file or folder (an "export"), atomically.

        All processes must call it; only the first one writes.

        Args:
            path: where to write; the attribute `exports` says whether it is a file or a folder.
            trainable: the tuned variables.
            metadata: JSON values that `read_metadata` will return; dropped if the format has no
                place for them.
            backbone: the network that was tuned.
        """
        ...

    def read_metadata(self, path: PathLike) -> JsonObject:
        """Returns the metadata that `save` stored; {} if the format has no place for them.

        Args:
            path: the file or folder that `save` wrote.

        Raises:
            InputError: it is missing or damaged.
        """
        ...

    def load(self, path: PathLike, backbone: Backbone) -> Variables:
        """Loads what `save` wrote.

        Returns:
            Flax collections by name. To run the tuned network, the caller replaces the backbone's
            collections of the same names by these.
        """
        ...

    @property
    def attends_to_input(self) -> bool:
        """Whether a prompt's positions attend to the input, not only to the prompt."""
        return True

    def check(self, backbone: FrozenNetwork, batching: Batching) -> None:
        """Raises InputError if the method cannot be used with this backbone and batching.

        Called before any computation. By default, accepts everything.
        """

    def extra_positions(self) -> int:
        """The number of encoder positions that each example needs in addition to its tokens."""
        return 0

    def wrap(self, apply_fn: ApplyFn) -> ApplyFn:
        """Returns the network as the method runs it: `apply_fn` itself, or a function around it.

        The result is called as `apply_fn(variables, *args, method=..., **settings)`, with the
        methods of `models.prompted.PromptedT5`. If `variables` lacks this method's collection, it
        must behave like the backbone alone.
        """
        return apply_fn

    def describe(self) -> Metadata:
        """Returns metadata for exports: JSON values that describe the method."""
        return {}

    def suggested_optimizer(self) -> Adafactor:
        """Returns the optimizer that `suggest_settings` takes for this method.

        By default it is Adafactor with the learning rate in units of each array's own RMS, which
        suits arrays of any scale but zeros.
        """
        return Adafactor(0.03, multiply_by_parameter_scale=True, weight_decay=0.0)


def run_with(method: Method, backbone: FrozenNetwork) -> ApplyFn:
    """Returns the backbone's network as `method` runs it, see `Method.wrap`.

    The network's modules can read the method's own collection (`Method.collection`).
    """
    collections = () if method.collection in BUILT_IN else (method.collection,)
    apply_fn = backbone.make_apply_fn(method.attends_to_input, collections)
    try:
        hash((method, apply_fn))
    except TypeError:  # a field may hold a list, as in a gin file
        return method.wrap(apply_fn)
    return _wrapped(method, apply_fn)


@functools.lru_cache(maxsize=64)
def _wrapped(method: Method, apply_fn: ApplyFn) -> ApplyFn:
    """Equal methods give the same function, so that `jax.jit` finds it in its cache."""
    return method.wrap(apply_fn)
