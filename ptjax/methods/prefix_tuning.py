"""Prefix tuning: learned keys and values in front of every attention layer (Li and Liang 2021)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array

from ptjax.data.batching import Batching
from ptjax.errors import InputError, check_at_least
from ptjax.files import Metadata
from ptjax.methods.adapter import AdapterMethod, PeftOrigin
from ptjax.methods.base import FrozenNetwork, InitContext
from ptjax.methods.initializers import Initializer
from ptjax.methods.prompt_method import initial_prompt
from ptjax.models.config import T5Config
from ptjax.models.family import ApplyFn, Config
from ptjax.models.prefix import KeysValues, PromptStates
from ptjax.models.prompted import with_prompt
from ptjax.sharding import processes
from ptjax.training.optimizer import Adafactor
from ptjax.trees import Tree, Variables

# The parts of a prefix and the fields of `PromptStates`, in which attention reads them.
_FIELDS = {"encoder": "encoder", "decoder": "targets", "cross": "decoder"}
_KINDS = ("key", "value")


@dataclasses.dataclass(frozen=True)
class PrefixTuning(AdapterMethod):
    """Trains keys and values in front of attention layers; the backbone is frozen.

    They are the collection `prefix`, float32 arrays [layers, P, H, K]: `encoder/key`,
    `encoder/value` and so on. All rows of a batch share them. To T5's relative biases they are P
    positions directly in front; cross-attention has no such biases.

    Attributes:
        length: P, the number of positions in front of each layer.
        encoder: whether the encoder's self-attention has a prefix.
        decoder: whether the decoder's self-attention has one.
        cross: whether the cross-attention has one.
        initializer: makes P vectors as for `PromptTuning`. The frozen network runs on them, and the
            prefix starts as their keys and values: the encoder and the cross-attention then do what
            they do with that prompt in front, if its positions do not attend to the input; in the
            decoder, the vectors precede the start id. None as for `PromptTuning`. "random"
            draws keys and values from N(0, 1) instead, as PEFT does.
        reparameterization: as in the paper, an MLP per part, with one tanh layer of this width,
            computes the keys and values from a matrix [P, D]. The MLP and the matrix are trained,
            from random values; exports hold the keys and values alone. None trains these directly.
    """

    name: ClassVar[str] = "prefix_tuning"
    collection: ClassVar[str] = "prefix"
    supports_sweep: ClassVar[bool] = True

    length: int = 100
    encoder: bool = True
    decoder: bool = True
    cross: bool = True
    initializer: Initializer | Literal["random"] | None = None
    reparameterization: int | None = None

    def __post_init__(self) -> None:
        check_at_least(1, PROMPT_LENGTH=self.length)
        check_at_least(1, "PrefixTuning", reparameterization=self.reparameterization)
        if not self._parts:
            raise InputError(
                "PrefixTuning has encoder, decoder and cross = False: set one of them to True"
            )
        if self.reparameterization and self.initializer not in (None, "random"):
            raise InputError(
                "PrefixTuning: with a reparameterization the prefix starts from random values; "
                "remove the initializer or the reparameterization"
            )
        if not (callable(self.initializer) or self.initializer in (None, "random")):
            raise InputError(
                f"PrefixTuning.initializer = {self.initializer!r}: give a prompt initialiser, such "
                "as ptjax.ClassLabels(), or 'random'"
            )

    @property
    def _parts(self) -> tuple[str, ...]:
        return tuple(part for part in _FIELDS if getattr(self, part))

    @property
    def attends_to_input(self) -> bool:
        """False: a prefix is the same for every row."""
        return False

    def check(self, backbone: FrozenNetwork, batching: Batching) -> None:
        """Raises InputError for a network that is not ptjax's own T5."""
        _t5(backbone.config)

    def variable_shapes(self, config: Config) -> Variables:
        config, width = _t5(config), self.reparameterization
        heads, shapes = (config.num_heads, config.head_dim), {}
        for part in self._parts:
            encoder = part == "encoder"
            layers = config.num_encoder_layers if encoder else config.num_decoder_layers
            if width is None:
                shapes[part] = dict.fromkeys(_KINDS, (layers, self.length, *heads))
            else:
                shapes[part] = {
                    "embedding": (self.length, config.emb_dim),
                    "hidden_kernel": (config.emb_dim, width),
                    "hidden_bias": (width,),
                    "out_kernel": (width, len(_KINDS), layers, *heads),
                    "out_bias": (len(_KINDS), layers, *heads),
                }
        return {
            "prefix": {
                part: {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in of.items()}
                for part, of in shapes.items()
            }
        }

    def init(self, key: Array, context: InitContext) -> Variables:
        """Makes the prefix, or the MLP's parameters, at step 0.

        Raises:
            InputError: the initialiser cannot be used, or its result does not have shape [P, D]; or
                the context has no backbone.
        """
        if self.reparameterization or self.initializer == "random":
            assert context.config is not None
            return _random(key, self.variable_shapes(context.config))
        states = self._activations(key, context)
        pairs = {part: getattr(states, _FIELDS[part]) for part in self._parts}
        return {"prefix": {k: dict(zip(_KINDS, pair, strict=True)) for k, pair in pairs.items()}}

    def _activations(self, key: Array, context: InitContext) -> PromptStates:
        """The keys and values that the frozen network computes from the initialiser's vectors."""
        backbone = context.backbone
        if backbone is None:
            raise InputError(
                "PrefixTuning starts from what the backbone computes: give InitContext a backbone, "
                "or set initializer='random'"
            )
        assert self.initializer != "random"
        vectors = initial_prompt(self.initializer, self.length, key, context)
        variables = with_prompt(backbone.variables, vectors)
        run = jax.jit(functools.partial(backbone.make_apply_fn(True), method="prefix_states"))
        return jax.tree.map(lambda x: processes.on_host(x).astype(np.float32), run(variables))

    def freeze_rules(self) -> Mapping[str, bool]:
        return {"params/.*": True, "prefix/.*": False}

    def suggested_optimizer(self) -> Adafactor:
        return Adafactor(0.1, multiply_by_parameter_scale=True)

    def wrap(self, apply_fn: ApplyFn) -> ApplyFn:
        def apply(variables: Variables, *args: Any, **settings: Any) -> Any:
            if prefix := variables.get("prefix"):
                others = {name: tree for name, tree in variables.items() if name != "prefix"}
                pairs = {_FIELDS[part]: _keys_values(of) for part, of in prefix.items()}
                states = PromptStates(
                    pairs.pop("encoder", None), pairs.pop("decoder", None), **pairs
                )
                variables = with_prompt(others, states)
            return apply_fn(variables, *args, **settings)

        return apply

    def to_file_fields(self) -> Metadata:
        return {name: getattr(self, name) for name in ("length", *_FIELDS)}

    def to_file_variables(self, trainable: Variables) -> Variables:
        """Returns the keys and values alone: what the MLP computes, not the MLP."""
        pairs = {part: _keys_values(of) for part, of in trainable["prefix"].items()}
        return {"prefix": {k: dict(zip(_KINDS, pair, strict=True)) for k, pair in pairs.items()}}

    def exported(self) -> PrefixTuning:
        return dataclasses.replace(self, initializer=None, reparameterization=None)

    def export_peft(
        self, folder: epath.Path, arrays: Mapping[str, np.ndarray], **origin: Unpack[PeftOrigin]
    ) -> None:
        """Writes PEFT's files, for a prefix of the decoder alone: PEFT has no other for a T5."""
        from ptjax.interop.peft_prefix import export_peft_prefix

        export_peft_prefix(folder, arrays, **origin)


def _t5(config: Config) -> T5Config:
    """The config, if it is that of a T5 of ptjax, whose attention layers take keys and values."""
    if not isinstance(config, T5Config):
        raise InputError(
            "PrefixTuning needs ptjax's own T5, into whose attention layers it puts keys and "
            "values; use PromptTuning for a Flax module of your own"
        )
    return config


def _keys_values(arrays: Tree) -> KeysValues:
    """The keys and values [layers, P, H, K] of a part: its arrays, or what its MLP computes."""
    if "key" in arrays:
        return arrays["key"], arrays["value"]
    # In float32 throughout: a TPU would multiply in bfloat16.
    with jax.default_matmul_precision("float32"):
        hidden = jnp.tanh(arrays["embedding"] @ arrays["hidden_kernel"] + arrays["hidden_bias"])
        out = jnp.einsum("pw,wilhk->ilphk", hidden, arrays["out_kernel"])
    keys, values = out + arrays["out_bias"][:, :, None]
    return keys, values


def _random(key: Array, shapes: Variables) -> Variables:
    """N(0, 1) for keys, values and the MLP's input; its kernels keep that variance, no bias."""
    leaves, treedef = jax.tree.flatten_with_path(shapes)
    made = []
    for number, (path, leaf) in enumerate(leaves):
        name = path[-1].key
        std = 0.0 if name.endswith("bias") else 1.0
        if name.endswith("kernel"):
            std = leaf.shape[0] ** -0.5
        of_leaf = jax.random.fold_in(key, number)
        made.append(np.asarray(std * jax.random.normal(of_leaf, leaf.shape, leaf.dtype)))
    return jax.tree.unflatten(treedef, made)
