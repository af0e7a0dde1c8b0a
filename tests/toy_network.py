"""A stand-in for a prompt-tuned network, for what does not look inside one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ptjax.training.step import init_train_state

SGD = optax.sgd(1e-2)


def make_apply(dropout_rate: float = 0.0):
    """A stand-in for the network that compiles in no time: training does not look inside."""

    def apply(variables, inputs, targets, *segments, encoder_lengths, train, rngs):
        assert segments == (None, None)  # no rows are packed here
        assert encoder_lengths.shape == inputs.shape[:1]
        table, prompt = variables["params"]["table"], variables["prompt"]["prompt"]
        context = jnp.mean(table[inputs], 1) + jnp.sum(jnp.tanh(prompt), 0)
        keep = jax.random.bernoulli(rngs["dropout"], 1 - dropout_rate, context.shape)
        assert train
        return jnp.tanh(context * keep)[:, None] * table[targets] @ table.T

    return apply


def begin(optimizer=SGD, seed=0):
    """(state, frozen) for `make_apply`."""
    table = jax.random.normal(jax.random.key(7), (64, 16))
    prompt = {"prompt": {"prompt": jax.random.normal(jax.random.key(8), (5, 16))}}
    return init_train_state(prompt, optimizer, jax.random.key(seed)), {"params": {"table": table}}


def prompt_of(state):
    return np.asarray(state.trainable["prompt"]["prompt"])
