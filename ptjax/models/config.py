"""The config of a T5: its sizes, and the special ids of its vocabulary."""

from __future__ import annotations

import dataclasses
from typing import Literal, Protocol, get_args, runtime_checkable

from ptjax.data.batch import SpecialIds
from ptjax.errors import InputError, check_choice, check_share

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "attention", "full"]


@runtime_checkable
class HasIds(Protocol):
    """The interface of a config with a vocabulary and special ids, see `T5Config`."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    @property
    def decoder_start_id(self) -> int: ...
    @property
    def forced_bos_id(self) -> int | None: ...


def check_ids(config: HasIds) -> None:
    """Raises InputError unless the special ids of a config are ids of its vocabulary."""
    owner = type(config).__name__
    if not config.eos_ids:
        raise InputError(f"{owner}.eos_ids is empty; a text needs an end of sequence")
    forced = [] if config.forced_bos_id is None else [config.forced_bos_id]
    for index in (config.pad_id, config.decoder_start_id, *config.eos_ids, *forced):
        if type(index) is not int or not 0 <= index < config.vocab_size:
            raise InputError(
                f"{owner}: {index!r} is not an id of a vocabulary of {config.vocab_size}; "
                f"pad_id = {config.pad_id!r}, eos_ids = {config.eos_ids!r}, decoder_start_id = "
                f"{config.decoder_start_id!r}, forced_bos_id = {config.forced_bos_id!r}"
            )


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The config of a T5. Sizes have the names that T5X's gin files use.

    Shapes of arrays in other docstrings use the letters below.

    Attributes:
        vocab_size: V, rows of the embedding table (T5: 32,128 for 32,100 pieces).
        emb_dim: D, the width of the embeddings and of the states between layers.
        num_heads: H, the attention heads per layer.
        head_dim: K, the width of a head; H * K need not be D.
        mlp_dim: F, the width of the hidden layer of an MLP block.
        mlp_activations: `("relu",)` is T5 1.0, `("gelu", "linear")` (gated) is T5 1.1. The names
            are Flax's, whose `gelu` is the tanh approximation; `gelu_exact` is the one with erf.
        logits_via_embedding: True ties the logits to the embedding, scaled by 1/sqrt(D) (T5 1.0).
        relpos_per_layer: every layer has its own table of relative position biases (umT5);
            otherwise the layers of a stack share one.
        dtype: of the activations; the parameters' dtype is chosen on loading.
        scan_layers: compile one layer of a stack and scan over the layers; see `models.stacking`.
        remat: rematerialisation: which activations a layer recomputes in the backward pass:
            "none", "dots" (all except the outputs of its projections; 0.5% more work), "attention"
            (all except the outputs of attention's projections; 20% more work) or "full" (all except
            its input; 40% more work).
        pad_id: fills rows up to their length. Lengths say which positions are padding, never this
            id.
        eos_ids: any of them ends a generated text. The tokenizer's EOS, which ends inputs and
            targets, must be one of them.
        decoder_start_id: the decoder's first input.
        forced_bos_id: the first token of every generated text. As in transformers, it does not
            affect training targets and ranked labels.
    """

    vocab_size: int
    emb_dim: int
    num_heads: int
    num_encoder_layers: int
    num_decoder_layers: int
    head_dim: int
    mlp_dim: int
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    logits_via_embedding: bool = False
    dropout_rate: float = 0.1
    relpos_buckets: int = 32
    relpos_max_distance: int = 128
    relpos_per_layer: bool = False
    layer_norm_epsilon: float = 1e-6
    dtype: Dtype = "float32"
    scan_layers: bool = False
    remat: Remat = "none"
    pad_id: int = 0
    eos_ids: tuple[int, ...] = (1,)
    decoder_start_id: int = 0
    forced_bos_id: int | None = None

    def __post_init__(self) -> None:
        check_share("T5Config", dropout_rate=self.dropout_rate)
        check_choice(get_args(Dtype), "T5Config", dtype=self.dtype)
        check_choice(get_args(Remat), "T5Config", remat=self.remat)
        object.__setattr__(self, "eos_ids", tuple(self.eos_ids))  # gin files and JSON have lists
        check_ids(self)

    @property
    def special_ids(self) -> SpecialIds:
        """The ids with a special meaning, for batching and generation."""
        return SpecialIds(self.pad_id, self.eos_ids, self.decoder_start_id, self.forced_bos_id)
