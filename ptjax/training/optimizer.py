"""Adafactor with T5X's and the paper's settings, implemented with optax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy

from ptjax.errors import check_at_least, check_choice
from ptjax.files import JsonObject
from ptjax.trees import Tree

with epy.lazy_imports():
    import optax

Scale = Literal["absolute", "embedding_rms"]
Schedule = Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]
"""A schedule of optax: step -> number."""


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Settings of `optax.adafactor`; the defaults are the paper's (Lester et al., App. A).

    Attributes:
        learning_rate: a number, or an optax schedule (step -> number).
        learning_rate_scale: "absolute" as in the paper, or "embedding_rms", where the learning
            rate is in units of the embedding table's RMS. In T5 1.1 that RMS is about 10, so the
            paper's 0.3 moves an entry by 3% of it per step. On a backbone with an RMS of 0.5 the
            same 0.3 moves it by 60%, and the accuracy stays at chance.
        weight_decay: not multiplied by the learning rate, as in T5X.
        step_offset: the initial value of the step counter. T5X restores the backbone's own step
            (1,100,000 for the public LM-adapted files), so the decay rate of its second moment is
            1 - 1.5e-5 from the first update on, and the clipping at RMS 1 is always active. With
            an offset of 0 it is not.
        min_dim_size_to_factor: second moments are factored if both dimensions reach it. The rule
            in prompt-tuning's gin file that disables this for prompts never takes effect (T5X falls
            back to the heuristic for rank 2), so a prompt of 128 rows or more is factored.
        multiply_by_parameter_scale: False for prompts, True for T5X's own fine-tuning.
        decay_rate: the exponent of the second moments' decay, 1 - step^-decay_rate.
        clipping_threshold: the RMS above which an update is scaled down.
    """

    learning_rate: float | Schedule = 0.3
    learning_rate_scale: Scale = "absolute"
    weight_decay: float = 1e-5
    step_offset: int = 0
    min_dim_size_to_factor: int = 128
    multiply_by_parameter_scale: bool = False
    decay_rate: float = 0.8
    clipping_threshold: float = 1.0

    def __post_init__(self) -> None:
        check_choice(get_args(Scale), "Adafactor", learning_rate_scale=self.learning_rate_scale)
        rate = None if callable(self.learning_rate) else self.learning_rate
        decay, offset = self.weight_decay, self.step_offset
        check_at_least(0, "Adafactor", learning_rate=rate, weight_decay=decay, step_offset=offset)

    def identity(self) -> JsonObject:
        """Returns replacements for fields whose values cannot be compared between runs.

        A resumed run must have the same settings, but functions cannot be compared. So if
        `learning_rate` is a schedule, its rates at many steps replace it. Otherwise the result is
        {}. `ptjax.trainer.identity.describe` calls this.
        """
        schedule = self.learning_rate
        if not callable(schedule):
            return {}
        # Dense where schedules change: every step up to 8, then 16 steps per octave, to 2^24.
        steps = sorted({*range(9), *(round(2 ** (k / 16)) for k in range(48, 24 * 16 + 1))})
        rates = jax.vmap(lambda step: jnp.asarray(schedule(step), jnp.float32))(np.array(steps))
        values = {
            f"step {n}": float(f"{r:.7g}") for n, r in zip(steps, np.asarray(rates), strict=True)
        }
        return {"learning_rate": {"is": "schedule", **values}}

    def rate_at(self, step: jax.typing.ArrayLike, embedding_rms: float) -> jax.typing.ArrayLike:
        """The absolute learning rate of the update `step`; 0 is the first one of this run.

        Args:
            embedding_rms: the RMS of the backbone's embedding table (`embedding_rms`).
        """
        rate = self.learning_rate(step) if callable(self.learning_rate) else self.learning_rate
        return rate * embedding_rms if self.learning_rate_scale == "embedding_rms" else rate

    def rate_number(self, step: int, embedding_rms: float) -> float:
        """The result of `rate_at` as a Python number, for logs and a sweep's inputs."""
        return float(np.asarray(self.rate_at(step, embedding_rms)))

    def make(
        self, embedding_rms: float = 1.0, rate: jax.Array | None = None
    ) -> optax.GradientTransformation:
        """Builds the optimizer. Its second moments are float32 for float32 parameters.

        Args:
            embedding_rms: as for `rate_at`.
            rate: the absolute learning rate, in place of `learning_rate`; for a sweep, whose
                members have different rates.
        """

        def rate_at(count: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
            # The schedule counts the steps of this run, whatever `step_offset` is.
            return self.rate_at(count, embedding_rms) if rate is None else rate

        optimizer = optax.adafactor(
            learning_rate=rate_at,
            min_dim_size_to_factor=self.min_dim_size_to_factor,
            decay_rate=self.decay_rate,
            multiply_by_parameter_scale=self.multiply_by_parameter_scale,
            clipping_threshold=self.clipping_threshold,
            momentum=None,
            weight_decay_rate=self.weight_decay or None,
            eps=1e-30,
        )

        def init(params: Tree) -> optax.OptState:
            return _with_count(optimizer.init(params), self.step_offset)

        return optax.GradientTransformation(init, optimizer.update)


def _with_count(state: optax.OptState, count: int) -> optax.OptState:
    """`state` with the step counter of the factored second moments at `count`.

    optax's own `decay_offset` has the opposite sign, and gives NaN if positive.
    """

    def set_count(node: Tree) -> Tree:
        if isinstance(node, optax.FactoredState):
            return node._replace(count=jnp.asarray(count, jnp.int32))
        return node

    return jax.tree.map(set_count, state, is_leaf=lambda n: isinstance(n, optax.FactoredState))


def embedding_rms(embedding: jax.Array) -> float:
    """Computes the root mean square of an embedding table [V, D], over its nonzero rows.

    Padded vocabularies end in unused rows, which are zeros in some checkpoints.
    """
    squares = jnp.mean(jnp.square(embedding.astype(jnp.float32)), axis=1)
    return float(jnp.sqrt(jnp.sum(squares) / jnp.maximum(jnp.sum(squares > 0), 1)))
