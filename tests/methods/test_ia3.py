"""IA3: its settings, which activations it scales, what it starts from, dtypes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from ptjax.data.batching import Batching
from ptjax.errors import InputError
from ptjax.methods.base import InitContext
from ptjax.methods.ia3 import IA3
from ptjax.planning.workload import PlannedBackbone
from ptjax.training.freeze import make_freeze
from ptjax.trees import flatten_paths

CONFIG = tiny_config(mlp_dim=48)


def test_the_papers_vectors_are_the_default() -> None:
    """Of every attention's keys and values [H * K], and of what every `wo` gets [F]."""
    attentions = ("encoder/layers_0/attention", "decoder/layers_0/self_attention")
    attentions += ("decoder/layers_0/encoder_decoder_attention",)
    shapes = {f"{x}/{y}/outputs": (16,) for x in attentions for y in ("key", "value")}
    shapes |= {f"{stack}/layers_0/mlp/wo/inputs": (48,) for stack in ("encoder", "decoder")}
    assert IA3().array_shapes(CONFIG) == shapes
    made = IA3().init(jax.random.key(0), InitContext(jnp.zeros((4, 16)), None, None, list, CONFIG))[
        "ia3"
    ]
    for path, array in flatten_paths(made).items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, np.ones(shapes.pop(path)))
    assert not shapes


def test_the_inputs_and_outputs_of_one_map_may_both_be_scaled() -> None:
    method = IA3(outputs=["wo"], inputs=["encoder/.*/wo"])
    assert method.array_shapes(CONFIG) == {
        "encoder/layers_0/mlp/wo/outputs": (16,),
        "decoder/layers_0/mlp/wo/outputs": (16,),
        "encoder/layers_0/mlp/wo/inputs": (48,),
    }
    kernel, x = np.arange(6.0).reshape(2, 3), np.ones((4, 2))
    scales = {"inputs": np.array([2.0, 3.0]), "outputs": np.array([1.0, 0.0, -1.0])}
    got = method.change(lambda x: x @ kernel, x, scales, None)
    np.testing.assert_array_equal(got, x @ (scales["inputs"][:, None] * kernel * scales["outputs"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"outputs": ["k"]}, r"IA3\.outputs: 'k' matches .*T5X's names, where it is 'key'$"),
        ({"inputs": ["wi_0", "w2"]}, r"IA3\.inputs: 'w2' matches no linear map"),
    ],
)
def test_a_target_that_matches_nothing_is_refused_before_the_run(settings, message) -> None:
    with pytest.raises(InputError, match=message):
        IA3(**settings).check(PlannedBackbone(CONFIG), Batching())


def test_settings_that_mean_nothing_are_refused() -> None:
    IA3(inputs=())
    with pytest.raises(InputError, match=r"IA3\.outputs and inputs name nothing to train"):
        IA3(outputs=(), inputs=())
    with pytest.raises(InputError, match=r"IA3\.inputs must be a list of names.*got 'wo'"):
        IA3(inputs="wo")
    assert hash(IA3(outputs=["key"])) == hash(IA3(outputs=("key",)))


def test_only_its_own_arrays_train() -> None:
    variables = {"params": {"w": 0}, "ia3": {"w": {"outputs": 0}}}
    assert make_freeze(variables, IA3().freeze_rules()) == {
        "params": {"w": True},
        "ia3": {"w": {"outputs": False}},
    }


def test_a_step_below_bfloat16s_resolution_counts() -> None:
    """At 1, where the vectors start, bfloat16 has no number up to 1.0078: 254 * 1.003 is 255."""
    x = jnp.full((2, 2), 254, jnp.bfloat16)
    y = IA3().change(lambda x: x, x, {"outputs": jnp.full(2, 1.003)}, None)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, jnp.full((2, 2), 255, jnp.bfloat16))
    assert not (y == x).any()
