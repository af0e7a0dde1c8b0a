"""The train step: a pure function of state, frozen weights and batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from etils import epy
from jaxtyping import Array, Bool, Float

from ptjax.models.family import ApplyFn
from ptjax.sharding.arrays import GROUPS
from ptjax.training import freeze as freezing
from ptjax.training.loss import Loss
from ptjax.trees import Tree

with epy.lazy_imports():
    import optax

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
"""The metrics of one step: "loss", "target_tokens" and "gradient_norm", each an array [N] in a
sweep."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a train step changes, so not the frozen weights.

    The state is donated to the step and saved in checkpoints.

    Attributes:
        step: int32 [], the number of steps done.
        key: the random key from which the dropout of every step is derived.
    """

    step: jax.Array
    trainable: Tree
    opt_state: optax.OptState
    key: jax.Array


TrainStep = Callable[..., tuple[TrainState, Metrics]]
"""`(state, frozen, batch) -> (state, metrics)`; of a sweep also `(..., active, learning_rate)`."""


def init_train_state(
    trainable: Tree, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """Makes the state before the first step. It holds `trainable` itself, not a copy."""
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), key)


def batch_loss(
    apply_fn: ApplyFn, loss: Loss, variables: Tree, batch: Batch, key: jax.Array
) -> jax.Array:
    """Computes the training loss of a batch: runs the network with dropout, and sums over tokens.

    The sum is not yet divided by `Loss.normalizer`.

    Args:
        variables: all variables of the network, trainable and frozen.
        key: the random key for dropout.
    """
    logits = apply_fn(
        variables,
        batch["encoder_input_tokens"],
        batch["decoder_input_tokens"],
        batch.get("encoder_segment_ids"),
        batch.get("decoder_segment_ids"),
        encoder_lengths=batch.get("encoder_lengths"),
        train=True,
        rngs={"dropout": key},
    )
    return loss(logits, batch["decoder_target_tokens"], batch["decoder_loss_weights"])


def make_train_step(
    apply_fn: ApplyFn,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    *,
    microbatches: int = 1,
    groups: int = 1,
) -> TrainStep:
    """Makes the train step, `(state, frozen, batch) -> (state, metrics)`, not yet jitted.

    The gradient is taken with respect to the trainable variables only; gradients of frozen weights
    are never computed. The batch [B, ...] is split into `microbatches` equal parts, whose gradients
    are summed. Callers should jit the step with its argument `state` donated.

    Args:
        groups: number of groups of adjacent rows, one group for each part of the rows that the
            mesh divides a batch into (`sharding.arrays.reduction_groups`). Each group computes its
            own gradient with its own dropout. These gradients are summed once at the end, so
            devices exchange one gradient per step.
    """

    def part_loss(trainable: Tree, frozen: Tree, batch: Batch, key: jax.Array) -> jax.Array:
        return batch_loss(apply_fn, loss, freezing.combine(trainable, frozen), batch, key)

    def gradient(trainable: Tree, frozen: Tree, batch: Batch, key: jax.Array) -> Tree:
        """(loss, gradient) of a microbatch; with several groups, one of each: [groups, ...]."""
        value_and_grad = jax.value_and_grad(part_loss)
        if groups == 1:
            return value_and_grad(trainable, frozen, batch, key)
        grouped = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), batch)
        keys = jax.random.split(key, groups)
        of_groups = jax.vmap(value_and_grad, (None, None, 0, 0), axis_name=GROUPS)
        return of_groups(trainable, frozen, grouped, keys)

    def train_step(state: TrainState, frozen: Tree, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        if microbatches == 1:
            value, grads = gradient(state.trainable, frozen, dict(batch), key)
        else:
            keys = jax.random.split(key, microbatches)
            # Every m-th row, so that each device keeps the rows that it holds.
            parts = jax.tree.map(
                lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), dict(batch)
            )

            def add(total: Tree, part: tuple[Batch, jax.Array]) -> tuple[Tree, None]:
                more = gradient(state.trainable, frozen, *part)
                return jax.tree.map(jnp.add, total, more), None

            first = jax.tree.map(lambda x: x[0], (parts, keys))
            like = jax.eval_shape(gradient, state.trainable, frozen, *first)
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
            (value, grads), _ = jax.lax.scan(add, zero, (parts, keys))
        if groups > 1:
            value, grads = jax.tree.map(lambda x: x.sum(0), (value, grads))
        normalizer = loss.normalizer(batch["decoder_loss_weights"])
        value, grads = jax.tree.map(lambda x: x / normalizer, (value, grads))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {
            "loss": value,
            "target_tokens": jnp.sum(batch["decoder_loss_weights"]),
            "gradient_norm": optax.tree.norm(grads),
        }
        return TrainState(state.step + 1, trainable, opt_state, state.key), metrics

    return train_step


def make_sweep_step(
    apply_fn: ApplyFn,
    make_optimizer: Callable[[jax.Array], optax.GradientTransformation],
    loss: Loss,
    *,
    microbatches: int = 1,
    groups: int = 1,
) -> TrainStep:
    """Makes the train step of a sweep's N members, which share the frozen weights.

    The step is `(state, frozen, batch, active, learning_rate) -> (state, metrics)`, where `state`,
    `batch` and `metrics` have a leading axis N, `active` is bool [N] and `learning_rate` is float32
    [N]. Each member has its own dropout and optimizer state; factored moments and clipping are
    computed per member. The state of a member that is not active stays bit-identical.

    Args:
        make_optimizer: makes a member's optimizer from its learning rate, a traced scalar.
        microbatches, groups: as for `make_train_step`.
    """

    def member_step(
        state: TrainState, frozen: Tree, batch: Batch, active: jax.Array, rate: jax.Array
    ) -> tuple[TrainState, Metrics]:
        optimizer = make_optimizer(rate)
        step = make_train_step(apply_fn, optimizer, loss, microbatches=microbatches, groups=groups)
        after, metrics = step(state, frozen, batch)
        return jax.tree.map(lambda new, old: jnp.where(active, new, old), after, state), metrics

    def sweep_step(
        state: TrainState,
        frozen: Tree,
        batch: Batch,
        active: Bool[Array, " N"],
        learning_rate: Float[Array, " N"],
    ) -> tuple[TrainState, Metrics]:
        members = jax.vmap(member_step, in_axes=(0, None, 0, 0, 0))
        return members(state, frozen, dict(batch), active, learning_rate)

    return sweep_step
