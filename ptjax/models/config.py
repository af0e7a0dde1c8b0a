"""Sizes of a T5."""

from __future__ import annotations

import dataclasses

from ptjax.errors import InputError, check_share


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5, under the names that T5X's gin files use.

    Attributes:
        vocab_size: V, rows of the embedding table (T5: 32,128 for 32,100 pieces).
        emb_dim: D.
        num_heads: H.
        head_dim: K; H * K need not be D.
        mlp_dim: F.
        mlp_activations: `("relu",)` is T5 1.0, `("gelu", "linear")` (gated) is T5 1.1. The names
            are Flax's, whose `gelu` is the tanh approximation; `gelu_exact` is the one with erf.
        logits_via_embedding: True ties the logits to the embedding, scaled by 1/sqrt(D) (T5 1.0).
        relpos_per_layer: every layer has a table of relative position biases of its own (umT5);
            otherwise the layers of a stack share one.
        dtype: of the activations; the parameters' own dtype is decided where they are loaded.
        scan_layers: compile one layer of a stack and scan over them; see `models.stacking`.
        remat: what a layer computes again on the way back instead of keeping it: "none", "dots"
            (all but the outputs of its projections; half a per cent more work) or "full" (all but
            its input; 40% more work).
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
    dtype: str = "float32"
    scan_layers: bool = False
    remat: str = "none"

    def __post_init__(self) -> None:
        check_share("T5Config", dropout_rate=self.dropout_rate)
        if self.remat not in ("none", "dots", "full"):
            raise InputError(f"T5Config.remat = {self.remat!r}; choose 'none', 'dots' or 'full'")
