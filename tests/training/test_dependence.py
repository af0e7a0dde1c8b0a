"""What the loss does not depend on is named before the first step."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from ptjax.data.pipeline import Shape
from ptjax.errors import InputError
from ptjax.sharding.meshes import make_mesh
from ptjax.training.compile import batch_shapes
from ptjax.training.dependence import check_used, unused_leaves
from ptjax.training.loss import Loss

BATCH = batch_shapes(Shape(8, 12, 6), make_mesh())


def network_that_reads(*names):
    def apply(variables, inputs, targets, *segments, encoder_lengths, train, rngs):
        own = variables["own"]
        return variables["params"]["table"][targets] * sum(own[name] for name in names)

    return apply


def check(trainable, *read) -> None:
    """Shapes alone: nothing has to be computed."""
    tree = {"own": dict.fromkeys(trainable, 1.0), "params": {"table": jnp.zeros((64, 16))}}
    shapes = jax.eval_shape(lambda: tree)
    frozen = {"params": shapes.pop("params")}
    check_used(network_that_reads(*read), Loss(), shapes, frozen, BATCH)


def test_variables_that_the_network_reads_are_fine() -> None:
    check("a", "a")
    check("abc", *"abc")


@pytest.mark.parametrize(
    ("read", "named"),
    [("bc", "own/a"), ("ad", "own/b and 1 more"), ("d", "own/a and 2 more")],
)
def test_the_first_that_it_does_not_read_is_named_with_the_number_of_others(read, named) -> None:
    everything = "abc" if read == "bc" else "abcd"
    message = (
        f"the loss does not depend on {named}, so training would not change it; "
        "make the network read it (Method.wrap) or freeze it (Method.freeze_rules)"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        check(everything, *read)


def test_a_derivative_of_zero_is_a_derivative() -> None:
    """LoRA's first matrix while the second is zero; not so where no derivative exists."""

    def function(weights, x):
        stopped = jax.lax.stop_gradient(weights["stopped"])
        return jnp.sum(x * weights["first"] * 0.0 + stopped + jnp.round(weights["rounded"]))

    names = ("first", "nowhere", "rounded", "stopped")
    unused = unused_leaves(function, dict.fromkeys(names, jnp.ones(3)), jnp.ones(3))
    assert unused == ["nowhere", "rounded", "stopped"]
