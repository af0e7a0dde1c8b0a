"""The train step: a pure function of state, frozen weights and batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from ptjax.training import freeze as freezing
from ptjax.training.loss import Loss
from ptjax.trees import Tree

Batch = Mapping[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes: donated, checkpointed, and without a frozen weight in it."""

    step: jax.Array
    trainable: Tree
    opt_state: optax.OptState
    key: jax.Array


def init_train_state(
    trainable: Tree, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), key)


def batch_loss(
    apply_fn: Callable[..., jax.Array], loss: Loss, variables: Tree, batch: Batch, key: jax.Array
) -> jax.Array:
    """The loss of a batch, summed over its targets; dropout draws from `key`."""
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
    apply_fn: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation,
    loss: Loss,
    *,
    microbatches: int = 1,
    groups: int = 1,
) -> Callable[[TrainState, Tree, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """`(state, frozen, batch) -> (state, metrics)`, to be jitted with the state donated.

    `jax.grad` sees the trainable half only, so no gradient of a frozen weight is ever formed. The
    batch [B, ...] is taken in `microbatches` equal parts whose gradients add up.

    Args:
        groups: of neighbouring rows, one for each device (`sharding.arrays.reduction_groups`).
            Every group has a gradient of its own, and they are added once, when all is done, so
            that devices exchange one gradient a step. Each draws its own dropout.
    """

    def part_loss(trainable: Tree, frozen: Tree, batch: Batch, key: jax.Array) -> jax.Array:
        return batch_loss(apply_fn, loss, freezing.combine(trainable, frozen), batch, key)

    def gradient(trainable: Tree, frozen: Tree, batch: Batch, key: jax.Array) -> Tree:
        """(loss, gradient) of a microbatch; with several groups, of each [groups, ...]."""
        value_and_grad = jax.value_and_grad(part_loss)
        if groups == 1:
            return value_and_grad(trainable, frozen, batch, key)
        grouped = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), batch)
        keys = jax.random.split(key, groups)
        return jax.vmap(value_and_grad, (None, None, 0, 0))(trainable, frozen, grouped, keys)

    def train_step(
        state: TrainState, frozen: Tree, batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        if microbatches == 1:
            value, grads = gradient(state.trainable, frozen, dict(batch), key)
        else:
            keys = jax.random.split(key, microbatches)
            # Every m-th row: what a device of a mesh has of the batch stays on it.
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


def make_bank_step(
    apply_fn: Callable[..., jax.Array],
    make_optimizer: Callable[[jax.Array], optax.GradientTransformation],
    loss: Loss,
    *,
    microbatches: int = 1,
    groups: int = 1,
) -> Callable[[TrainState, Tree, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The train step of N prompts over one frozen backbone: everything else has an axis N in front.

    Each member has its own batch, dropout and optimizer state (factored moments and clipping see
    one prompt only). Of the batch, `active` bool [N] says who trains: the others' state stays bit
    by bit; `learning_rate` float32 [N] goes to `make_optimizer`.
    """

    def member_step(
        state: TrainState, frozen: Tree, batch: Batch, active: jax.Array, rate: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        optimizer = make_optimizer(rate)
        step = make_train_step(apply_fn, optimizer, loss, microbatches=microbatches, groups=groups)
        after, metrics = step(state, frozen, batch)
        return jax.tree.map(lambda new, old: jnp.where(active, new, old), after, state), metrics

    def bank_step(
        state: TrainState, frozen: Tree, batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        examples = dict(batch)
        settings = examples.pop("active"), examples.pop("learning_rate")
        each = jax.vmap(member_step, in_axes=(0, None, 0, 0, 0))
        return each(state, frozen, examples, *settings)

    return bank_step
