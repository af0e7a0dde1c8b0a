"""T5X's training loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ptjax.errors import InputError, check_at_least, check_choice, check_share


@dataclasses.dataclass(frozen=True)
class Loss:
    """Cross-entropy with z-loss, summed over target tokens (`t5x/losses.py`).

    T5X does not divide the sum by anything (LOSS_NORMALIZING_FACTOR = None), and neither does the
    paper. Adafactor is invariant to the scale of the loss; other optimizers are not.

    Attributes:
        z_loss: weight of log(Z)^2, which keeps the logits' normaliser Z near 1.
        label_smoothing: probability mass spread over the vocabulary. The loss of a perfect
            prediction is subtracted, so that it stays 0.
        per_token: whether to divide by the number of target tokens in the batch; with class
            weights, by the sum of their weights.
        class_weights: how much an example of a label counts: a weight by label, 1 for labels that
            are not named, or 'balanced', inversely to the label's frequency. A weight of 2 equals
            having the example twice in the batch. For tasks with a closed set of labels.
    """

    z_loss: float = 1e-4
    label_smoothing: float = 0.0
    per_token: bool = False
    class_weights: Mapping[str | int, float] | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.class_weights, Mapping):
            for label, weight in self.class_weights.items():
                if not (isinstance(weight, int | float) and 0 < weight < math.inf):
                    raise InputError(
                        f"Loss.class_weights[{label!r}] must be a number > 0, got {weight!r}"
                    )
        else:
            check_choice(("balanced", None), "Loss", class_weights=self.class_weights)
        check_share("Loss", label_smoothing=self.label_smoothing)
        check_at_least(0, "Loss", z_loss=self.z_loss)

    def __call__(
        self,
        logits: Float[Array, "B L V"],
        targets: Int[Array, "B L"],
        weights: Float[Array, "B L"],
    ) -> Float[Array, ""]:
        """Returns the weighted sum over the tokens, not yet divided by `normalizer`."""
        return jnp.sum(self.per_position(logits.astype(jnp.float32), targets) * weights)

    def normalizer(self, weights: Float[Array, "B L"]) -> Float[Array, ""] | float:
        """The divisor of a loss: 1, or with `per_token` the sum of `weights` (1 if that is 0)."""
        if not self.per_token:
            return 1.0
        total = jnp.sum(weights)
        return jnp.where(total > 0, total, 1.0)  # of padding alone it is 0

    def per_position(
        self, logits: Float[Array, "B L V"], targets: Int[Array, "B L"]
    ) -> Float[Array, "B L"]:
        """Returns the loss of every target position, before weights are applied.

        It includes label smoothing and z-loss. Padding gets a loss too, so multiply by the weights.

        Args:
            logits: float32; lower precision is not converted.
        """
        log_z = jax.nn.logsumexp(logits, axis=-1)
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        loss = log_z - target_logits
        if self.label_smoothing:
            vocab = logits.shape[-1]
            high, low = 1.0 - self.label_smoothing, self.label_smoothing / (vocab - 1)
            everywhere = vocab * log_z - jnp.sum(logits, axis=-1)
            perfect = -(high * np.log(high) + (vocab - 1) * low * np.log(low + 1e-20))
            loss = (high - low) * loss + low * everywhere - perfect
        return loss + self.z_loss * jnp.square(log_z)


def log_likelihood(
    logits: Float[Array, "B L V"], targets: Int[Array, "B L"], weights: Bool[Array, "B L"]
) -> Float[Array, " B"]:
    """Returns log p(target) of each row: the sum of log p(token) over the target's tokens.

    The evaluation ranks labels by it; a higher value is more likely.

    Args:
        weights: True for positions that are tokens of the target, False for padding.
    """
    plain = Loss(z_loss=0.0)
    return -jnp.sum(plain.per_position(logits.astype(jnp.float32), targets) * weights, axis=-1)
