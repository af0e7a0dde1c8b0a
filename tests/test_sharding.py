"""The sharding table: complete, without conflicts, and without effect on the numbers."""

from __future__ import annotations

import functools
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ptjax.errors import InputError
from ptjax.models.config import T5Config
from ptjax.models.t5 import parameter_shapes
from ptjax.scale import sharding
from ptjax.training.freeze import flatten_paths, unflatten_paths


@functools.cache
def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    """Path in the variables -> shape; the other sizes are held by test_model_configs.py."""
    configs = {
        "t5_1_1_xxl": T5Config(32128, 4096, 64, 24, 24, 64, 10240),
        "t5_1_0_11b": T5Config(32128, 1024, 128, 24, 24, 128, 65536, ("relu",), True),
    }
    shapes = {"params": parameter_shapes(configs[name])}
    return {path: leaf.shape for path, leaf in flatten_paths(shapes).items()}


@pytest.mark.parametrize("name", ["t5_1_1_xxl", "t5_1_0_11b"])
def test_every_variable_is_covered_by_one_rule(name):
    used = set()
    for path in [*shapes_of(name), "prompt/prompt"]:
        matching = [pattern for pattern, _ in sharding.RULES if re.fullmatch(pattern, path)]
        assert len(matching) == 1, path
        used |= set(matching)
    unused = {pattern for pattern, _ in sharding.RULES} - used
    assert unused == ({r"params/decoder/logits_dense/kernel"} if "1_0" in name else set())


@pytest.mark.parametrize("name", ["t5_1_1_xxl", "t5_1_0_11b"])
def test_a_device_of_a_mesh_holds_its_part_of_a_large_model(name):
    """Everything but norms and position biases is divided, so that XXL fits."""
    mesh = sharding.make_mesh(8)
    held = whole = 0
    for path, shape in shapes_of(name).items():
        part = math.prod(sharding.sharding_of(path, shape, mesh).shard_shape(shape))
        held, whole = held + part, whole + math.prod(shape)
        assert (part == math.prod(shape)) == path.endswith(("scale", "rel_embedding")), path
    assert held < 1.001 * whole / 8


def test_where_each_kind_of_array_lives():
    mesh = sharding.make_mesh(2)

    def spec(path, shape):
        where = sharding.sharding_of(path, shape, mesh)
        assert where.mesh == mesh
        return tuple(where.spec) + (None,) * (len(shape) - len(where.spec))

    layer = "params/encoder/layers_0"
    assert spec("params/token_embedder/embedding", (32, 8)) == ("model", None)
    assert spec("params/decoder/logits_dense/kernel", (8, 32)) == (None, "model")
    assert spec(f"{layer}/attention/query/kernel", (8, 8)) == (None, "model")
    assert spec(f"{layer}/attention/out/kernel", (8, 8)) == ("model", None)
    assert spec(f"{layer}/mlp/wi_1/kernel", (8, 16)) == (None, "model")
    assert spec(f"{layer}/mlp/wo/kernel", (16, 8)) == ("model", None)
    assert spec(f"{layer}/pre_mlp_layer_norm/scale", (8,)) == (None,)
    assert spec("params/encoder/relpos_bias/rel_embedding", (4, 32)) == (None, None)
    assert spec("prompt/prompt", (100, 8)) == (None, None)


@pytest.mark.parametrize(
    "path", ["params/encoder/adapter/kernel", "prompts/prompt", "params/encoder/wo/kernel/extra"]
)
def test_a_variable_without_a_rule_is_an_error(path):
    with pytest.raises(InputError, match=f"0 rules for variable '{path}'"):
        sharding.sharding_of(path, (4, 4), sharding.make_mesh())


def test_rules_that_disagree_are_an_error(monkeypatch):
    path = "params/encoder/layers_0/mlp/wo/kernel"
    mesh = sharding.make_mesh(2)
    more = (*sharding.RULES, (r"params/.*/mlp/.*", P("data", None)))
    monkeypatch.setattr(sharding, "RULES", more)
    with pytest.raises(InputError, match=f"2 rules for variable '{path}'"):
        sharding.sharding_of(path, (4, 4), mesh)
    assert sharding.sharding_of("params/token_embedder/embedding", (4, 4), mesh)


def test_what_an_axis_does_not_divide_is_replicated():
    """T5 small has 6 heads of 64; on 4 devices they divide, 7 columns do not."""
    mesh = sharding.make_mesh(4)
    kernel = "params/encoder/layers_0/attention/query/kernel"
    assert sharding.sharding_of(kernel, (8, 384), mesh).shard_shape((8, 384)) == (8, 96)
    assert sharding.sharding_of(kernel, (8, 7), mesh).is_fully_replicated
    assert sharding.sharding_of("params/token_embedder/embedding", (6, 8), mesh).is_fully_replicated


# Meshes


@pytest.mark.parametrize(("model", "shape"), [(1, (8, 1)), (2, (4, 2)), (8, (1, 8))])
def test_all_devices_are_on_the_mesh(model, shape):
    mesh = sharding.make_mesh(model)
    assert mesh.axis_names == ("data", "model")
    assert mesh.devices.shape == shape
    assert set(mesh.devices.flat) == set(jax.devices())


def test_a_mesh_of_some_devices():
    mesh = sharding.make_mesh(2, jax.devices()[:6])
    assert mesh.devices.shape == (3, 2)
    assert set(mesh.devices.flat) == set(jax.devices()[:6])


@pytest.mark.parametrize("model", [3, 0, -2, 16])
def test_devices_that_cannot_be_divided_so(model):
    message = f"8 devices cannot be divided into model_parallelism = {model}; choose a divisor"
    with pytest.raises(InputError, match=message):
        sharding.make_mesh(model)


def test_a_batch_goes_over_the_data_axis():
    mesh = sharding.make_mesh(2)
    rows = np.arange(48).reshape(8, 6)
    placed = sharding.put_batch({"encoder_input_tokens": rows}, mesh)["encoder_input_tokens"]
    np.testing.assert_array_equal(placed, rows)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 6)}
    sharding.check_batch_size(8, mesh)
    with pytest.raises(InputError, match="batch size 6 is not a multiple of the 4 devices"):
        sharding.check_batch_size(6, mesh)


# Numbers


@pytest.mark.parametrize("model", [2, 4])
def test_logits_on_eight_devices_are_those_on_one(tiny, tiny_batch, model):
    """Parts of sums are added in another order: 1e-6 of the largest logit is some ten roundings."""
    mesh = sharding.make_mesh(model)
    tokens = {name: tiny_batch[name] for name in ("encoder_input_tokens", "decoder_input_tokens")}
    one = tiny.jitted()(tiny.variables, *tokens.values())
    placed = {
        path: jax.device_put(leaf, sharding.sharding_of(path, leaf.shape, mesh))
        for path, leaf in flatten_paths(tiny.variables).items()
    }
    variables = unflatten_paths(placed)
    many = tiny.jitted()(variables, *sharding.put_batch(tokens, mesh).values())
    assert len(many.sharding.device_set) == 8
    real = tiny_batch["decoder_target_tokens"] > 0
    scale = np.abs(one[real]).max()
    np.testing.assert_allclose(
        np.asarray(many)[real], np.asarray(one)[real], rtol=0, atol=1e-6 * scale
    )
