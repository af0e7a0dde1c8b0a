"""int8 kernels: how far off they are, and that everything else goes on as it was."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FIXTURES
from t5_ids import T5_IDS

from ptjax.backbones.load import load_backbone
from ptjax.backbones.save import save_backbone
from ptjax.data.batch import make_batch
from ptjax.data.tasks import Task
from ptjax.errors import InputError
from ptjax.inference.forward import forward, loss_and_prompt_gradient
from ptjax.methods.model_tuning import ModelTuning
from ptjax.models.prompted import make_apply_fn, with_prompt
from ptjax.models.quantized import Quantized, quantized_dot, round_rows
from ptjax.models.stacking import UnstackedView, stack_paths
from ptjax.models.t5_family import T5_FAMILY
from ptjax.settings import RunSettings
from ptjax.sharding.meshes import make_mesh
from ptjax.sharding.quantize import dequantize, quantize_kernel, quantize_sharded
from ptjax.trainer.tune import tune
from ptjax.training.loss import Loss
from ptjax.training.step import batch_loss
from ptjax.trees import flatten_paths, unflatten_paths


@pytest.fixture(scope="module")
def kernel() -> jax.Array:
    """[3, 16, 8], channels of very different scale, one of zeros."""
    scale = 10.0 ** jnp.arange(-4, 4)
    return (jax.random.normal(jax.random.key(0), (3, 16, 8)) * scale).at[1, :, 2].set(0)


def test_an_entry_is_off_by_half_a_scale_at_most(kernel) -> None:
    quantized = quantize_kernel(kernel)
    assert quantized.values.dtype == jnp.int8
    assert quantized.scale.shape == (3, 1, 8)
    error = np.abs(np.asarray(dequantize(quantized)) - np.asarray(kernel))
    assert (error <= np.asarray(quantized.scale) * 0.5 * (1 + 1e-5)).all()
    # Every channel uses the whole range, and a channel of zeros stays one.
    largest = np.abs(np.asarray(quantized.values)).max(axis=1)
    largest[1, 2] = 127
    assert (largest == 127).all()
    assert not np.asarray(dequantize(quantized))[1, :, 2].any()
    np.testing.assert_array_equal(quantize_kernel(-kernel).values, -quantized.values)


def test_factors_take_the_size_of_a_row_out_of_its_kernel(kernel) -> None:
    rows = 10.0 ** jnp.arange(-8, 8)[:, None]
    found = quantize_kernel(kernel * rows, factors=True)
    assert found.factors.shape == (3, 16, 1)
    shares = np.abs(np.asarray(kernel * rows)).max(-1, keepdims=True) / np.asarray(found.factors)
    assert ((shares > 0.74) & (shares < 1.51)).all()
    assert (np.frexp(found.factors)[0] == 0.5).all()  # powers of two
    error = np.abs(np.asarray(dequantize(found)) / rows - np.asarray(kernel))
    bound = np.asarray(found.scale * found.factors / rows)
    assert (error <= bound * 0.5 * (1 + 1e-5)).all()
    nothing = quantize_kernel(jnp.zeros((2, 3)), factors=True)
    assert not np.asarray(dequantize(nothing)).any()


def test_int8_products_are_those_of_the_rounded_rows() -> None:
    """Forward and backward, exactly the integers' products; only the last factors are float32."""
    x, gradient = (jax.random.normal(jax.random.key(i), (2, 5, n)) for i, n in enumerate((16, 8)))
    kernel = quantize_kernel(jax.random.normal(jax.random.key(2), (16, 8)), factors=True)
    values = np.asarray(kernel.values, np.int64)

    def by_hand(x: np.ndarray, kernel: np.ndarray, before: np.ndarray, after: np.ndarray):
        rows, scale = round_rows(jnp.asarray(x * before))
        assert (np.abs(np.asarray(rows)).max(-1) == 127).all()
        return (np.asarray(rows, np.int64) @ kernel).astype(np.float32) * scale * after

    found, backward = jax.vjp(lambda x: quantized_dot(x, kernel, jnp.float32), x)
    factors, scale = kernel.factors[:, 0], kernel.scale[0]
    np.testing.assert_allclose(found, by_hand(x, values, factors, scale), rtol=1e-6)
    [of_x] = backward(gradient)
    np.testing.assert_allclose(of_x, by_hand(gradient, values.T, scale, factors), rtol=1e-6)
    # Rounded on the way in and out, it is 1% off.
    exact = x @ dequantize(kernel)
    assert 1e-4 < np.abs(found - exact).max() / np.abs(exact).max() < 0.02


def planted(params, channels: int, times: float):
    """The same function with `channels` of every norm's output `times` larger."""
    paths = flatten_paths(params)
    readers = {
        "pre_attention_layer_norm": ["attention/query", "attention/key", "attention/value"],
        "pre_self_attention_layer_norm": [
            *("self_attention/query", "self_attention/key", "self_attention/value"),
        ],
        "pre_cross_attention_layer_norm": ["encoder_decoder_attention/query"],
        "pre_mlp_layer_norm": ["mlp/wi_0", "mlp/wi_1"],
    }
    for path in list(paths):
        layer, _, norm = path.removesuffix("/scale").rpartition("/")
        if norm in readers:
            paths[path] = paths[path].at[:channels].multiply(times)
            for reader in readers[norm]:
                name = f"{layer}/{reader}/kernel"
                paths[name] = paths[name].at[:channels].divide(times)
    return paths


def test_outliers_in_a_few_channels_survive_by_the_factors(tiny) -> None:
    """The gradient is about as near as without outliers; without the factors it is not."""
    config = dataclasses.replace(tiny.config, dropout_rate=0.0)
    apply_fn = make_apply_fn(config)
    rng = np.random.default_rng(0)
    rows = [rng.integers(2, 64, 12) for _ in range(8)]
    batch = make_batch(
        rows, [row[:6] for row in rows], input_length=12, target_length=6, ids=T5_IDS
    )
    batch = jax.tree.map(jnp.asarray, batch)

    @jax.jit
    @jax.grad
    def gradient(prompt, params):
        variables = with_prompt({"params": params}, prompt)
        return batch_loss(apply_fn, Loss(), variables, batch, jax.random.key(0))

    def error(paths, function):
        found = gradient(tiny.prompt, unflatten_paths(quantized(paths, function)))
        return jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)

    def without_factors(kernel):
        found = quantize_kernel(kernel)
        return dataclasses.replace(found, factors=jnp.ones((len(kernel), 1)))

    def with_factors(kernel):
        return quantize_kernel(kernel, factors=True)

    plain, outliers = flatten_paths(tiny.params), planted(tiny.params, 2, 50.0)
    exact = gradient(tiny.prompt, tiny.params)
    same = gradient(tiny.prompt, unflatten_paths(outliers))
    np.testing.assert_allclose(same, exact, rtol=0, atol=1e-4 * np.abs(exact).max())
    before = error(plain, with_factors)
    assert error(outliers, with_factors) < 1.25 * before < 0.1
    assert error(outliers, without_factors) > 5 * before


def test_wo_may_be_cast_instead(tiny) -> None:
    path = FIXTURES / "t5_1_1_tiny_legacy"
    for quantize, cast in (("int8", None), ("int8_products", 0), ("int8_products_but_wo", 1)):
        backbone = load_backbone(path, dtype="float32", quantize=quantize)
        kernels = flatten_paths(backbone.variables["params"])
        lacking = {
            name.split("/")[-2]
            for name, kernel in kernels.items()
            if isinstance(kernel, Quantized) and kernel.factors is None
        }
        if cast is None:
            assert lacking == {"query", "key", "value", "out", "wi_0", "wi_1", "wo"}
        else:
            assert lacking == ({"wo"} if cast else set())


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("spec", [("model", None), (None, "model")])
def test_shards_are_quantized_as_the_whole(kernel, spec, factors) -> None:
    """Also where a channel lies on several devices, whose largest entry is that of all."""
    mesh = make_mesh(4, devices=jax.devices()[:4])
    where = jax.NamedSharding(mesh, jax.P(None, *spec))
    got = quantize_sharded(jax.device_put(kernel, where), factors)
    want = quantize_kernel(kernel, factors)
    assert got.values.sharding == where
    np.testing.assert_array_equal(got.values, want.values)
    np.testing.assert_array_equal(got.scale, want.scale)
    if factors:
        np.testing.assert_array_equal(got.factors, want.factors)


def test_embeddings_norms_and_logits_stay_as_they_are(tiny) -> None:
    chosen = {path for path in flatten_paths(tiny.params) if T5_FAMILY.is_quantized(path)}
    rest = set(flatten_paths(tiny.params)) - chosen
    assert {path.split("/")[-2] for path in chosen} == {
        *("query", "key", "value", "out", "wi_0", "wi_1", "wo"),
    }
    assert "decoder/logits_dense/kernel" in rest
    assert "token_embedder/embedding" in rest


def quantized(paths, function):
    return {path: function(x) if T5_FAMILY.is_quantized(path) else x for path, x in paths.items()}


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_backward_pass_keeps_no_cast_kernel(tiny, scan_layers) -> None:
    """With remat 'none', int8 would otherwise need more memory than bfloat16."""
    config = dataclasses.replace(tiny.config, scan_layers=scan_layers, dtype="bfloat16")
    paths = flatten_paths(tiny.params)
    if scan_layers:
        paths = stack_paths(paths, jnp.stack)
    params = unflatten_paths(quantized(paths, quantize_kernel))
    tokens = jnp.full((2, 5), 7, jnp.int32)

    def kept(remat):
        apply_fn = make_apply_fn(dataclasses.replace(config, remat=remat))

        def logits(prompt):
            variables = with_prompt({"params": params}, prompt)
            return apply_fn(variables, tokens, tokens, encoder_lengths=jnp.full(2, 5))

        _, backward = jax.eval_shape(lambda prompt: jax.vjp(logits, prompt), tiny.prompt)
        return [(x.dtype.name, x.shape) for x in jax.tree.leaves(backward)]

    kernels = {x.shape for path, x in paths.items() if T5_FAMILY.is_quantized(path)}
    assert {("int8", shape) for shape in kernels} <= set(kept("none"))
    assert not {("bfloat16", shape) for shape in kernels} & set(kept("none"))
    # 'dots' keeps the products' results, [2, 5 + 5, 16] in the encoder; 'full' none of them.
    wide = (2,) * scan_layers + (2, 10, 16)
    assert kept("dots").count(("bfloat16", wide)) > kept("full").count(("bfloat16", wide))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_network_runs_on_int8_as_on_what_it_stands_for(tiny, scan_layers) -> None:
    """Loss and dP: to float32 rounding those of the dequantized weights, and not far from all."""
    config = dataclasses.replace(tiny.config, scan_layers=scan_layers, dropout_rate=0.0)
    paths = flatten_paths(tiny.params)
    if scan_layers:
        paths = stack_paths(paths, jnp.stack)
    apply_fn = make_apply_fn(config)
    rng = np.random.default_rng(0)
    rows = [rng.integers(2, 64, 12) for _ in range(8)]
    batch = make_batch(
        rows, [row[:6] for row in rows], input_length=12, target_length=6, ids=T5_IDS
    )

    @jax.jit
    @jax.value_and_grad
    def loss(prompt, params, batch):
        variables = with_prompt({"params": params}, prompt)
        return batch_loss(apply_fn, Loss(), variables, batch, jax.random.key(0))

    def run(function):
        params = unflatten_paths(quantized(paths, function))
        return loss(tiny.prompt, params, batch)

    held = jax.tree.leaves(
        quantized(paths, quantize_kernel), is_leaf=lambda x: isinstance(x, Quantized)
    )
    assert any(isinstance(leaf, Quantized) for leaf in held)
    value, gradient = run(quantize_kernel)
    want_value, want = run(lambda x: dequantize(quantize_kernel(x)))
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    np.testing.assert_allclose(gradient, want, rtol=0, atol=1e-5 * np.abs(want).max())
    exact_value, exact = run(lambda x: x)
    np.testing.assert_allclose(value, exact_value, rtol=0.02)
    assert 0 < np.abs(gradient - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("settings", [{}, {"mesh": "2x4"}, {"scan_layers": True}])
def test_a_backbone_is_quantized_on_the_way_in(settings, tmp_path) -> None:
    plain = load_backbone(FIXTURES / "t5_1_1_tiny_legacy", dtype="float32")
    small = load_backbone(
        FIXTURES / "t5_1_1_tiny_legacy", dtype="float32", quantize="int8", **settings
    )
    # One that is tuned on either is told to belong to both.
    assert small.fingerprint == plain.fingerprint
    found = UnstackedView(flatten_paths(small.variables["params"]))
    for path, array in flatten_paths(plain.variables["params"]).items():
        if not T5_FAMILY.is_quantized(path):
            np.testing.assert_array_equal(found[path], array)
        elif not settings.get("scan_layers"):
            np.testing.assert_array_equal(found[path].values, quantize_kernel(array).values)
    batch = {
        "encoder_input_tokens": np.arange(2, 14).reshape(2, 6),
        "decoder_input_tokens": np.array([[0, 5], [0, 6]]),
    }
    exact, rounded = (np.asarray(forward(one, batch)) for one in (plain, small))
    assert 0 < np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()
    with pytest.raises(
        InputError, match="int8 kernels are rounded; load the backbone without quantize"
    ):
        save_backbone(tmp_path, small.config, small.variables["params"])


@pytest.mark.parametrize("quantize", ["int8", "int8_products"])
@pytest.mark.parametrize("fsdp", [False, True])
def test_on_a_mesh_int8_gives_the_loss_and_gradient_of_one_device(fsdp, quantize) -> None:
    """Sums are taken in another order: float32 rounding."""
    path = FIXTURES / "t5_1_1_tiny_legacy"
    settings = {"dtype": "float32", "quantize": quantize, "scan_layers": True}
    batch = {
        "encoder_input_tokens": np.arange(2, 50).reshape(8, 6),
        "decoder_input_tokens": np.tile([0, 5], (8, 1)),
        "decoder_target_tokens": np.tile([5, 1], (8, 1)),
    }
    prompt = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    loss, gradient = loss_and_prompt_gradient(load_backbone(path, **settings), batch, prompt)
    meshed = load_backbone(path, mesh="4x2", fsdp=fsdp, **settings)
    kernel = meshed.variables["params"]["encoder"]["layers"]["mlp"]["wo"]["kernel"]
    parts = 8 if fsdp else 2
    assert kernel.values.addressable_shards[0].data.size * parts == kernel.values.size
    got_loss, got = loss_and_prompt_gradient(meshed, batch, prompt)
    np.testing.assert_allclose(got_loss, loss, rtol=1e-5)
    np.testing.assert_allclose(got, gradient, rtol=0, atol=1e-5 * np.abs(gradient).max())


def test_what_int8_is_not_for() -> None:
    with pytest.raises(
        InputError, match=r"quantize must be one of 'int8', 'int8_products', .*, got 'int4'"
    ):
        load_backbone(FIXTURES / "t5_1_1_tiny_legacy", quantize="int4")
    small = load_backbone(FIXTURES / "t5_1_1_tiny_legacy", quantize="int8")
    task = Task(name="x", splits={"train": "x.jsonl"}, inputs="{text}", targets="{label}")
    with pytest.raises(InputError, match=r"int8 kernels do not train: set --gin\.QUANTIZE=None"):
        tune(small, task, "unused", RunSettings(method=ModelTuning()))
