"""Scanned and rematerialised layers against layers written out: the same function, other costs."""

from __future__ import annotations

import dataclasses
import types
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FIXTURES
from flax import linen as nn
from t5_ids import T5_IDS, decode, with_lengths
from tiny import tiny_config, tiny_params

from ptjax.backbones.load import load_backbone
from ptjax.backbones.save import save_backbone
from ptjax.data.batch import make_batch, make_packed_batch
from ptjax.errors import InputError
from ptjax.methods.base import run_with
from ptjax.methods.model_tuning import ModelTuning
from ptjax.methods.prompt_tuning import PromptTuning
from ptjax.models.config import Remat, T5Config
from ptjax.models.prompted import make_apply_fn, with_prompt
from ptjax.models.stacking import UnstackedView, make_layers, run_layers, stack, stack_paths
from ptjax.models.t5 import init_params, parameter_shapes
from ptjax.planning.flops import step_flops
from ptjax.planning.workload import PlannedBackbone
from ptjax.training import freeze as freezing
from ptjax.training.loss import Loss
from ptjax.training.optimizer import Adafactor
from ptjax.training.step import batch_loss
from ptjax.trees import flatten_paths, unflatten_paths

RNG = np.random.default_rng(0)
INPUTS = [RNG.integers(2, 64, n) for n in (12, 7, 1, 9, 12, 3, 5, 10)]
TARGETS = [RNG.integers(2, 64, n) for n in (6, 2, 4, 1, 3, 6, 5, 2)]
ROWS = np.array([0, 0, 0, 1, 2, 2, 2, 2])
XXL = T5Config(32128, 4096, 64, 24, 24, 64, 10240, dtype="bfloat16", scan_layers=True)


@pytest.fixture(scope="module")
def stacked(tiny):
    """The tiny model's parameters with stacked layers."""
    return unflatten_paths(stack_paths(flatten_paths(tiny.params), jnp.stack))


def batch_of(kind: str, prompt_slots: int):
    if kind == "unpacked":
        return make_batch(INPUTS, TARGETS, input_length=12, target_length=6, ids=T5_IDS)
    sizes = {"row_count": 4, "input_length": 56, "target_length": 18}
    return make_packed_batch(INPUTS, TARGETS, ROWS, ids=T5_IDS, prompt_slots=prompt_slots, **sizes)


def value_and_grad(config: T5Config, params, prompt, batch, attends_to_input=True):
    """Loss and dP, without dropout."""
    apply_fn = make_apply_fn(dataclasses.replace(config, dropout_rate=0.0), attends_to_input)

    @jax.jit
    @jax.value_and_grad
    def loss(prompt, params, batch):
        variables = with_prompt({"params": params}, prompt)
        return batch_loss(apply_fn, Loss(), variables, batch, jax.random.key(0))

    return loss(prompt, params, batch)


def assert_same(got, want) -> None:
    """To float32 rounding: the compiler sums in another order."""
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=0, atol=1e-5 * np.abs(want[1]).max())


@pytest.mark.parametrize("kind", ["unpacked", "packed"])
@pytest.mark.parametrize("attends_to_input", [True, False])
def test_scanned_layers_are_the_same_network(tiny, stacked, kind, attends_to_input) -> None:
    batch = batch_of(kind, len(tiny.prompt) if attends_to_input else 0)
    scanned = dataclasses.replace(tiny.config, scan_layers=True)
    want = value_and_grad(tiny.config, tiny.params, tiny.prompt, batch, attends_to_input)
    assert_same(value_and_grad(scanned, stacked, tiny.prompt, batch, attends_to_input), want)


@pytest.mark.parametrize("remat", ["dots", "attention", "full"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_what_is_made_again_is_what_was_dropped(tiny, stacked, remat, scan_layers) -> None:
    batch = batch_of("unpacked", 0)
    config = dataclasses.replace(tiny.config, scan_layers=scan_layers, remat=remat)
    params = stacked if scan_layers else tiny.params
    want = value_and_grad(tiny.config, tiny.params, tiny.prompt, batch)
    assert_same(value_and_grad(config, params, tiny.prompt, batch), want)


def test_packed_and_made_again_model_tuning_has_the_same_gradients(tiny, stacked) -> None:
    """Of every weight: unrolled and unpacked, and with packed rows in scanned layers."""

    def value_and_grads(params, batch, **changes):
        config = dataclasses.replace(tiny.config, dropout_rate=0.0, **changes)
        apply_fn = run_with(ModelTuning(), PlannedBackbone(config))

        @jax.jit
        @jax.value_and_grad
        def loss(params, batch):
            return batch_loss(apply_fn, Loss(), {"params": params}, batch, jax.random.key(0))

        return loss(params, batch)

    value, grads = value_and_grads(tiny.params, batch_of("unpacked", 0))
    packed = batch_of("packed", 0)
    again, of_stack = value_and_grads(stacked, packed, scan_layers=True, remat="full")
    wanted, found = stack_paths(flatten_paths(grads), jnp.stack), flatten_paths(of_stack)
    assert set(found) == set(wanted)
    for path, gradient in wanted.items():
        assert np.abs(gradient).max() > 0, path
        assert_same((again, found[path]), (value, gradient))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_scanned_layers_decode_alike(tiny, stacked, num_beams) -> None:
    tokens = batch_of("unpacked", 0)["encoder_input_tokens"]
    found = []
    for scan_layers, params in ((False, tiny.params), (True, stacked)):
        apply_fn = make_apply_fn(dataclasses.replace(tiny.config, scan_layers=scan_layers), False)
        variables = with_prompt({"params": params}, tiny.prompt)
        found.append(decode(apply_fn, variables, tokens, max_length=6, num_beams=num_beams))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=0, atol=1e-4)


def test_a_prompt_compiled_by_one_is_read_by_the_other(tiny, stacked) -> None:
    batch = batch_of("unpacked", 0)
    tokens = batch["encoder_input_tokens"], batch["decoder_input_tokens"]
    scanned = make_apply_fn(dataclasses.replace(tiny.config, scan_layers=True), False)
    unrolled = make_apply_fn(tiny.config, False)
    variables = with_prompt({"params": stacked}, tiny.prompt)
    states = jax.jit(scanned, static_argnames="method")(variables, method="prompt_states")
    got = jax.jit(with_lengths(unrolled))(with_prompt({"params": tiny.params}, states), *tokens)
    want = jax.jit(with_lengths(unrolled))(
        with_prompt({"params": tiny.params}, tiny.prompt), *tokens
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


class Dropped(nn.Module):
    """A layer that makes its dropout mask."""

    config: T5Config

    @nn.compact
    def __call__(self) -> jax.Array:
        return nn.Dropout(0.5, deterministic=False)(jnp.ones(100))


class DroppedTwice(nn.Module):
    config: T5Config

    def setup(self) -> None:
        self.layers = make_layers(Dropped, self.config, 2)

    def __call__(self) -> jax.Array:
        return stack(
            run_layers(self.config, 2, lambda layer, x: (x, layer()), self.layers, None)[1]
        )


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_dropout_differs_from_layer_to_layer(scan_layers, remat) -> None:
    config = dataclasses.replace(XXL, scan_layers=scan_layers, remat=remat)
    first, second = DroppedTwice(config).apply({}, rngs={"dropout": jax.random.key(0)}) == 0
    assert 20 < (first != second).sum() < 80


@pytest.mark.parametrize("scan_layers", [True, False])
def test_initial_parameters_are_those_of_the_names(scan_layers) -> None:
    config = tiny_config(num_encoder_layers=3, num_decoder_layers=2, scan_layers=scan_layers)
    of_layers = dataclasses.replace(config, scan_layers=False)
    params = flatten_paths(tiny_params(config))
    want = flatten_paths(parameter_shapes(of_layers))
    found = UnstackedView(params)
    assert {path: found[path].shape for path in found} == {k: v.shape for k, v in want.items()}
    assert len(found) == len(want)
    # Every layer has its own draw, of the scale that T5X gives it.
    kernels = [found[f"encoder/layers_{i}/mlp/wi_0/kernel"] for i in range(3)]
    assert not np.allclose(kernels[0], kernels[1])
    assert np.std(kernels) == pytest.approx(1 / 4, rel=0.1)


@pytest.mark.parametrize("name", ["t5_1_1_tiny_legacy", "t5_1_1_tiny_orbax", "t5_1_0_tiny_legacy"])
def test_a_checkpoint_is_stacked_on_the_way_in_and_written_out_again(name, tmp_path) -> None:
    plain = load_backbone(FIXTURES / name, dtype="float32")
    scanned = load_backbone(FIXTURES / name, dtype="float32", scan_layers=True, remat="dots")
    assert scanned.fingerprint == plain.fingerprint
    assert scanned.assumed == plain.assumed
    kernel = scanned.variables["params"]["encoder"]["layers"]["mlp"]["wo"]["kernel"]
    assert kernel.shape[0] == plain.config.num_encoder_layers
    for backbone, directory in ((plain, "plain"), (scanned, "scanned")):
        params = backbone.variables["params"]
        save_backbone(tmp_path / directory, backbone.config, params, dtype="float32")
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / directory).iterdir()}
        for directory in ("plain", "scanned")
    ]
    assert files[0] == files[1]


def test_remat_is_one_of_four() -> None:
    # The suite's own checks of types would refuse it before.
    wrong = types.SimpleNamespace(**dataclasses.asdict(XXL) | {"remat": "some"})
    with pytest.raises(InputError, match=r"T5Config\.remat must be one of 'none'"):
        T5Config.__post_init__(wrong)


def test_of_the_work_of_a_step_remat_adds_what_it_says() -> None:
    """XXL, B = 32, T = 512, P = 100, scanned: from the jaxpr, so each turn of a scan counts."""
    ratios = {}
    for remat in get_args(Remat):
        config = dataclasses.replace(XXL, remat=remat)
        matrix = jax.ShapeDtypeStruct((100, config.emb_dim), "float32")
        variables = {"params": parameter_shapes(config), "prompt": {"prompt": matrix}}
        tokens = jax.ShapeDtypeStruct((32, 16), "int32")
        batch = {
            "encoder_input_tokens": jax.ShapeDtypeStruct((32, 512), "int32"),
            "encoder_lengths": jax.ShapeDtypeStruct((32,), "int32"),
            "decoder_input_tokens": tokens,
            "decoder_target_tokens": tokens,
            "decoder_loss_weights": jax.ShapeDtypeStruct((32, 16), "float32"),
        }
        freeze = freezing.make_freeze(variables, PromptTuning().freeze_rules())
        optimizer = freezing.freeze_updates(Adafactor().make(), freeze)
        forward, step = step_flops(make_apply_fn(config), variables, freeze, batch, optimizer)
        ratios[remat] = step / forward
    assert 2.0 < ratios["none"] <= 2.25
    assert ratios["none"] < ratios["dots"] <= 2.30
    assert 2.3 < ratios["attention"] < 2.5
    assert 2.7 < ratios["full"] < 3.0


def test_memory_falls_with_what_is_made_again(tiny, stacked) -> None:
    """Temporary bytes that the compiler plans for loss and dP of long inputs and deep stacks."""
    config = T5Config(64, 64, 4, 8, 2, 16, 256, dropout_rate=0.0, scan_layers=True)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    batch = make_batch(
        [np.full(128, 3)] * 8, [np.full(4, 3)] * 8, input_length=128, target_length=4, ids=T5_IDS
    )
    planned = {}
    for remat in get_args(Remat):
        apply_fn = make_apply_fn(dataclasses.replace(config, remat=remat))

        def loss(prompt, params, batch, apply_fn=apply_fn):
            variables = with_prompt({"params": params}, prompt)
            return batch_loss(apply_fn, Loss(), variables, batch, jax.random.key(0))

        matrix = jax.ShapeDtypeStruct((8, 64), "float32")
        compiled = jax.jit(jax.value_and_grad(loss)).lower(matrix, params, batch).compile()
        planned[remat] = compiled.memory_analysis().temp_size_in_bytes
    assert planned["dots"] < 0.9 * planned["none"]
    assert planned["full"] < 0.9 * planned["attention"] < 0.9 * 0.9 * planned["dots"]
