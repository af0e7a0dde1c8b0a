"""LoRA: its settings, which linear maps it chooses, what it starts from, dropout and dtypes."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny import tiny_config

from ptjax.data.batching import Batching
from ptjax.errors import InputError
from ptjax.methods.base import InitContext
from ptjax.methods.lora import LoRA
from ptjax.models.layers import Dense
from ptjax.models.module_family import ModuleConfig
from ptjax.models.stacking import stack_paths
from ptjax.planning.workload import PlannedBackbone
from ptjax.training.freeze import make_freeze
from ptjax.trees import flatten_paths

TWO = tiny_config(num_encoder_layers=2)
ENCODER, DECODER = "encoder/layers", "decoder/layers_0/"
LOGITS = "decoder/logits_dense"


def context_of(config) -> InitContext:
    return InitContext(jnp.zeros((4, 16)), None, None, list, config)


def initial(method: LoRA, config) -> dict[str, np.ndarray]:
    return flatten_paths(method.init(jax.random.key(0), context_of(config))["lora"])


def modules(method: LoRA, config=TWO) -> set[str]:
    """The linear maps that it changes."""
    return {path.rpartition("/")[0] for path in method.array_shapes(config)}


def test_the_defaults_are_the_queries_and_values_of_all_attentions() -> None:
    method = LoRA()
    assert (method.rank, method.alpha, method.dropout) == (8, 16, 0)
    attentions = [f"encoder/layers_{i}/attention" for i in (0, 1)]
    attentions += [f"decoder/layers_0/{x}" for x in ("self_attention", "encoder_decoder_attention")]
    assert modules(method) == {f"{x}/{y}" for x in attentions for y in ("query", "value")}


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        (["wo"], [f"{ENCODER}_{i}/mlp/wo" for i in (0, 1)] + ["decoder/layers_0/mlp/wo"]),
        (["encoder/.*/wi_[01]"], [f"{ENCODER}_{i}/mlp/wi_{j}" for i in (0, 1) for j in (0, 1)]),
        (
            ["self_attention/key|logits_dense"],
            [f"{DECODER}self_attention/key", LOGITS],
        ),
        (["encoder/layers/attention/out"], [f"{ENCODER}_{i}/attention/out" for i in (0, 1)]),
    ],
)
def test_a_target_is_the_end_of_a_path(targets, chosen) -> None:
    assert modules(LoRA(targets=targets)) == set(chosen)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("quary", r"LoRA\.targets: 'quary' matches no linear map; did you mean query\?$"),
        ("q", "'q' matches no linear map; ptjax has T5X's names, where it is 'query'$"),
        ("wi", "'wi' matches no linear map; did you mean wi_[01]"),
        ("uery", "'uery' matches no linear map; did you mean query"),
        (
            "token_embedder",
            "'token_embedder' matches no linear map; there are key, out, query, value, wi_0",
        ),
        ("encoder/layers_0/mlp/wo", "all layers alike: write encoder/layers/... without a number$"),
        ("(", r"LoRA\.targets: '\(' is not a regular expression"),
    ],
)
def test_a_target_that_matches_nothing_is_refused_before_the_run(target, message) -> None:
    with pytest.raises(InputError, match=message) as raised:
        LoRA(targets=["value", target]).check(PlannedBackbone(TWO), Batching())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 0}, r"LoRA\.rank must be >= 1, got 0"),
        ({"rank": 2.5}, r"LoRA\.rank must be a whole number"),
        ({"alpha": 0}, r"LoRA\.alpha must be a number > 0, got 0"),
        ({"alpha": float("nan")}, r"LoRA\.alpha must be a number > 0"),
        ({"dropout": 1.0}, r"LoRA\.dropout must be >= 0 and < 1"),
        ({"targets": "query"}, r"LoRA\.targets must be a list of names.*got 'query'"),
        ({"targets": ()}, r"LoRA\.targets name nothing to train"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, message) -> None:
    with pytest.raises(InputError, match=message):
        LoRA(**wrong)


def test_another_network_is_refused() -> None:
    network = SimpleNamespace(config=ModuleConfig(64, 16), quantize=None)
    with pytest.raises(InputError, match="ptjax's own T5, which this network is not"):
        LoRA().check(network, Batching())  # pyright: ignore[reportArgumentType]


def test_targets_of_a_gin_file_are_those_of_python() -> None:
    """A list there; a run is identified by them, and jit's cache needs a hash."""
    assert LoRA(targets=["query"]) == LoRA(targets=("query",))
    assert hash(LoRA(targets=["query"])) == hash(LoRA(targets=("query",)))


def test_the_first_update_is_zero_and_its_inputs_are_pefts() -> None:
    made = initial(LoRA(rank=64), tiny_config(emb_dim=400))
    a = made["encoder/layers_0/attention/query/a"]
    assert a.shape == (400, 64) and a.dtype == np.float32
    # kaiming_uniform_(a=sqrt(5)) of a weight [64, 400]: U(-1/sqrt(400), 1/sqrt(400)).
    assert 0.0499 < np.abs(a).max() <= 0.05 and abs(a.std() - 0.05 / 3**0.5) < 3e-4
    assert not made["encoder/layers_0/attention/query/b"].any()
    others = [x for path, x in made.items() if path.endswith("/a") and x.shape == a.shape]
    assert all((x != y).any() for i, x in enumerate(others) for y in others[:i])


def test_first_values_depend_on_neither_the_layout_nor_the_other_targets() -> None:
    method, scanned = LoRA(rank=2), dataclasses.replace(TWO, scan_layers=True)
    made, of_stack = initial(method, TWO), initial(method, scanned)
    stacked = stack_paths(made, np.stack)
    assert set(stacked) == set(of_stack)
    for path, array in stacked.items():
        np.testing.assert_array_equal(array, of_stack[path])
    shapes = {path: x.shape for path, x in of_stack.items()}
    assert shapes == {k: tuple(v) for k, v in method.array_shapes(scanned).items()}
    first, second = (made[f"encoder/layers_{i}/attention/query/a"] for i in (0, 1))
    assert (first != second).any()
    fewer = initial(LoRA(rank=2, targets=["encoder/.*/value"]), TWO)
    assert len(fewer) == 4
    for path, array in fewer.items():
        np.testing.assert_array_equal(array, made[path])


def test_only_its_own_arrays_train() -> None:
    variables = {"params": {"encoder": 0}, "lora": {"encoder": {"a": 0, "b": 0}}}
    assert make_freeze(variables, LoRA().freeze_rules()) == {
        "params": {"encoder": True},
        "lora": {"encoder": {"a": False, "b": False}},
    }


def test_dropout_is_of_the_updates_input_and_in_training_alone() -> None:
    method = LoRA(rank=2, alpha=2, targets=["query"], dropout=0.25)
    x, eye = np.ones((500, 2), np.float32), np.eye(2, dtype=np.float32)
    arrays = {"a": eye, "b": eye}

    def update(key):
        return np.asarray(method.change(lambda x: 10 * x, x, arrays, key) - 10 * x)

    np.testing.assert_array_equal(update(None), x)
    dropped = update(lambda: jax.random.key(0))
    kept = dropped > 0
    assert abs(kept.mean() - 0.75) < 0.05 and (kept[:, 0] != kept[:, 1]).any()
    np.testing.assert_allclose(dropped[kept], 1 / 0.75, rtol=1e-6)


class OneMap(nn.Module):
    """A network of one linear map."""

    def setup(self) -> None:
        self.query = Dense(2, "float32")

    def __call__(self, x: Any, train: bool = False) -> Any:
        return self.query(x)


def test_a_network_drops_in_training_and_only_then() -> None:
    method = LoRA(rank=2, alpha=2, targets=["query"], dropout=0.25)
    x, eye = jnp.ones((50, 2)), jnp.eye(2)
    variables = {"params": {"query": {"kernel": 10 * eye}}}
    with_arrays = variables | {"lora": {"query": {"a": eye, "b": eye}}}
    apply_fn = method.wrap(OneMap().apply)
    np.testing.assert_array_equal(apply_fn(variables, x), 10 * x)
    np.testing.assert_array_equal(apply_fn(with_arrays, x), 11 * x)
    rngs = {"dropout": jax.random.key(0)}
    trained = np.asarray(apply_fn(with_arrays, x, train=True, rngs=rngs))
    assert {round(float(y), 4) for y in trained.ravel()} == {10, round(10 + 1 / 0.75, 4)}


def test_a_bfloat16_backbone_gets_float32_updates() -> None:
    """The output has the backbone's dtype; the sum over positions of a gradient is float32."""
    method = LoRA(rank=1, alpha=1, targets=["query"])
    x = jnp.ones((1001, 2), jnp.bfloat16)
    arrays = {"a": jnp.full((2, 1), 0.5), "b": jnp.full((1, 2), 2**-9)}

    def total(arrays):
        y = method.change(lambda x: 0 * x, x, arrays, None)
        assert y.dtype == jnp.bfloat16
        return y.astype(jnp.float32).sum(), y

    (_, y), grads = jax.value_and_grad(total, has_aux=True)(arrays)
    np.testing.assert_array_equal(y, jnp.full((1001, 2), 2**-9, jnp.bfloat16))
    assert {x.dtype.name for x in grads.values()} == {"float32"}
    # The sum of 1001 ones, a number that bfloat16 does not have.
    np.testing.assert_array_equal(grads["b"], np.full((1, 2), 1001.0))
