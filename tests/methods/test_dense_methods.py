"""LoRA and IA3 in the network: the numbers are those of the backbone with merged kernels."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tune
from t5_ids import T5_IDS, decode
from tiny import tiny_config, tiny_params

import ptjax
from ptjax.backbones.describe import describe
from ptjax.data.batch import make_packed_batch
from ptjax.errors import InputError
from ptjax.methods.adapter import Adapter, load_adapter
from ptjax.methods.base import InitContext, run_with
from ptjax.methods.ia3 import IA3
from ptjax.methods.lora import LoRA
from ptjax.models.prompted import make_apply_fn
from ptjax.models.quantized import Quantized
from ptjax.models.stacking import UnstackedView, stack_paths
from ptjax.planning.workload import PlannedBackbone
from ptjax.settings import TrainSchedule
from ptjax.sharding.arrays import gather_layer, put_batch, replicated
from ptjax.sharding.meshes import make_mesh
from ptjax.sharding.quantize import dequantize, quantize_sharded
from ptjax.sharding.rules import shardings_of
from ptjax.train import sweep_summary
from ptjax.training.loss import Loss
from ptjax.training.optimizer import Adafactor
from ptjax.training.step import batch_loss
from ptjax.trees import flatten_paths, unflatten_paths

# On different linear maps, so that one program shows both.
LORA = LoRA(rank=3, alpha=5, targets=("query", "out", "encoder/.*/wi_0"))
IA3_ = IA3(outputs=("key", "value", "wi_1"), inputs=("wo",))
METHODS = (LORA, IA3_)


def context_of(config) -> InitContext:
    return InitContext(jnp.zeros((4, 16)), None, None, list, config)


def drawn(config, seed=0):
    """Arrays of both methods, none of which is what training starts from."""
    rng = np.random.default_rng(seed)

    def draw(mean, shapes):
        return jax.tree.map(lambda x: rng.normal(mean, 0.2, x.shape).astype(np.float32), shapes)

    lora, ia3 = (each.variable_shapes(config)[each.collection] for each in METHODS)
    return {"lora": draw(0, lora), "ia3": draw(1, ia3)}


@functools.cache
def changed(config, gather=None):
    """The network with both methods around it."""
    apply_fn = make_apply_fn(config, True, gather, ("lora", "ia3"))
    for method in METHODS:
        apply_fn = method.wrap(apply_fn)
    return apply_fn


def merged(params, adapters):
    """The backbone's parameters, changed as the papers say."""
    kernels = flatten_paths(params)
    lora, ia3 = (flatten_paths(adapters[name]) for name in ("lora", "ia3"))
    for path in {path.rpartition("/")[0] for path in lora}:
        kernels[f"{path}/kernel"] += LORA.alpha / LORA.rank * lora[f"{path}/a"] @ lora[f"{path}/b"]
    for path, scale in ia3.items():
        module, _, side = path.rpartition("/")
        kernels[f"{module}/kernel"] *= scale[None] if side == "outputs" else scale[:, None]
    return unflatten_paths(kernels)


def stacked(tree):
    """Arrays of stacked layers from those of single ones."""
    return {
        name: unflatten_paths(stack_paths(flatten_paths(arrays), lambda x: np.stack(x)))
        for name, arrays in tree.items()
    }


@pytest.fixture(scope="module")
def plain(tiny):
    return dataclasses.replace(tiny.config, dropout_rate=0.0)


@pytest.fixture(scope="module")
def adapters(plain):
    return drawn(plain)


@functools.cache
def value_and_grad(apply_fn, merge=False):
    @jax.jit
    @jax.value_and_grad
    def loss(adapters, params, batch):
        if merge:
            params, adapters = merged(params, adapters), {}
        variables = {"params": params, **adapters}
        return batch_loss(apply_fn, Loss(), variables, batch, jax.random.key(0))

    return loss


def assert_same(got, want) -> None:
    """Loss and gradients, to float32 rounding: products are summed in another order."""
    np.testing.assert_allclose(got[0], want[0], rtol=2e-6)
    found, expected = flatten_paths(got[1]), flatten_paths(want[1])
    assert set(found) == set(expected)
    for path, grad in expected.items():
        assert np.abs(grad).max() > 0, path
        np.testing.assert_allclose(found[path], grad, atol=2e-5 * np.abs(grad).max(), err_msg=path)


@pytest.fixture(scope="module")
def want(plain, tiny, tiny_batch, adapters):
    return value_and_grad(make_apply_fn(plain), merge=True)(adapters, tiny.params, tiny_batch)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_the_network_is_that_of_merged_kernels(
    plain, tiny, tiny_batch, adapters, want, remat
) -> None:
    config = dataclasses.replace(plain, remat=remat)
    assert_same(value_and_grad(changed(config))(adapters, tiny.params, tiny_batch), want)


def test_scanned_layers_made_again_are_the_same_network(
    plain, tiny, tiny_batch, adapters, want
) -> None:
    config = dataclasses.replace(plain, scan_layers=True, remat="full")
    arrays = stacked({"params": tiny.params, **adapters})
    got = value_and_grad(changed(config))(arrays, arrays.pop("params"), tiny_batch)
    grads = stacked(want[1])
    assert_same(got, (want[0], grads))


@pytest.mark.slow
def test_sharded_int8_kernels_are_the_dequantised_ones(plain, tiny, tiny_batch, adapters) -> None:
    """On a data x model mesh with FSDP; the methods' arrays are whole on every device."""
    config = dataclasses.replace(plain, scan_layers=True)
    mesh = make_mesh((4, 2))
    params = stacked({"params": tiny.params})
    params = jax.device_put(params, shardings_of(params, mesh, fsdp=True))["params"]
    params = unflatten_paths(
        {
            path: quantize_sharded(x) if path.endswith("/kernel") else x
            for path, x in flatten_paths(params).items()
        }
    )
    arrays = jax.device_put(stacked(adapters), replicated(mesh))
    apply_fn = changed(config, gather_layer(mesh))
    got = value_and_grad(apply_fn)(arrays, params, put_batch(tiny_batch, mesh))

    def whole(x):
        return np.asarray(dequantize(x) if isinstance(x, Quantized) else x)

    dequantised = jax.tree.map(whole, params, is_leaf=lambda x: isinstance(x, Quantized))
    dequantised = unflatten_paths(UnstackedView(flatten_paths(dequantised)))
    value, grads = value_and_grad(make_apply_fn(plain), merge=True)(
        adapters, dequantised, tiny_batch
    )
    assert_same(got, (value, stacked(grads)))


@pytest.fixture(scope="module")
def packed_logits():
    """(apply_fn, variables) -> the logits of two packed rows."""
    rng = np.random.default_rng(1)
    inputs, targets = ([rng.integers(2, 64, n) for n in sizes] for sizes in ((5, 3, 6), (2, 3, 1)))
    sizes = {"row_count": 2, "input_length": 9, "target_length": 5, "prompt_slots": 0}
    batch = make_packed_batch(inputs, targets, np.array([0, 0, 1]), ids=T5_IDS, **sizes)
    names = ("encoder_input", "decoder_input"), ("encoder_segment", "decoder_segment")
    given = [batch[f"{name}_{'ids' if i else 'tokens'}"] for i in (0, 1) for name in names[i]]
    return lambda apply_fn, variables: jax.jit(apply_fn)(variables, *given)


def test_packed_rows_are_those_of_merged_kernels(plain, tiny, adapters, packed_logits) -> None:
    found = packed_logits(changed(plain), {"params": tiny.params, **adapters})
    expected = packed_logits(make_apply_fn(plain), {"params": merged(tiny.params, adapters)})
    # To float32 rounding: products are summed in another order.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_the_first_step_sees_the_backbone_exactly(plain, tiny, packed_logits) -> None:
    first = {}
    for method in METHODS:
        first |= method.init(jax.random.key(0), context_of(plain))
    expected = packed_logits(make_apply_fn(plain), {"params": tiny.params})
    found = packed_logits(changed(plain), {"params": tiny.params, **first})
    np.testing.assert_array_equal(found, expected)


def test_equal_methods_make_one_function_for_jits_cache(plain) -> None:
    backbone = PlannedBackbone(plain)
    assert run_with(LoRA(targets=["key"]), backbone) is run_with(LoRA(targets=("key",)), backbone)
    assert run_with(LoRA(3), backbone) is not run_with(LoRA(4), backbone)


def test_decoding_through_the_cache_is_that_of_merged_kernels() -> None:
    """The keys and values of cross-attention are computed once, outside of the decoder's pass."""
    config = tiny_config(dropout_rate=0.0)
    params, adapters = tiny_params(config), drawn(config)
    tokens = np.arange(2, 14).reshape(3, 4)
    both = (
        (changed(config), {"params": params, **adapters}),
        (make_apply_fn(config), {"params": merged(params, adapters)}),
    )
    (ids, scores), (wanted, of_wanted) = (decode(*each, tokens, max_length=5)[:2] for each in both)
    np.testing.assert_array_equal(ids, wanted)
    np.testing.assert_allclose(scores, of_wanted, rtol=0, atol=1e-4)


def arrays_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "adapters").iterdir()}


@pytest.mark.slow
def test_a_run_goes_on_bit_by_bit_and_the_backbone_stays(backbone, task, tmp_path) -> None:
    method = LoRA(rank=2, targets=["query", "wo"], dropout=0.1)
    schedule = TrainSchedule(train_steps=4, eval_period=2, log_period=4)
    settings = {"method": method, "schedule": schedule, "optimizer": Adafactor(0.01)}
    before = jax.tree.map(np.array, backbone.variables)
    results = tune(tmp_path / "whole", task, backbone, microbatches=2, **settings)
    jax.tree.map(np.testing.assert_array_equal, before, backbone.variables)
    # [16, 2] and [2, 16] of three queries, [32, 2] and [2, 16] of two feed-forward blocks.
    assert results["trainable_parameters"] == 3 * 64 + 2 * 96

    # The same run as if it had been killed after step 2.
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "4")
    (tmp_path / "killed" / "results.json").unlink()
    tune(tmp_path / "killed", task, backbone, microbatches=2, **settings)
    made = arrays_of(tmp_path / "whole")
    assert set(made) == {"2.safetensors", "4.safetensors", "best.safetensors"}
    assert arrays_of(tmp_path / "killed") == made
    # Every array has moved: `a` too, whose gradient is 0 in the first step.
    first = method.init(jax.random.fold_in(jax.random.key(3), 1), context_of(backbone.config))
    tuned = flatten_paths(method.load(tmp_path / "whole" / "adapters" / "4.safetensors", backbone))
    for path, array in flatten_paths(first).items():
        assert (tuned[path] != array).any(), path


@pytest.mark.parametrize("method", METHODS)
def test_a_file_loads_into_stacked_layers_and_into_single_ones(method, plain, adapters, tmp_path):
    """Whichever trained it: the files are the same."""
    name, mesh = method.collection, make_mesh((4, 2))
    scanned = dataclasses.replace(plain, scan_layers=True)
    trained = {plain: {name: adapters[name]}, scanned: stacked({name: adapters[name]})}
    networks = [SimpleNamespace(config=config, mesh=mesh, name="tiny") for config in trained]
    for network in networks:
        path = tmp_path / f"{network.config.scan_layers}.safetensors"
        method.save(path, trained[network.config], {"step": 3}, network)
        assert method.read_metadata(path)["step"] == 3
        for other in networks:
            loaded = method.load(path, other)
            jax.tree.map(np.testing.assert_array_equal, loaded, trained[other.config])
    first, second = (path.read_bytes() for path in tmp_path.iterdir())
    assert first == second
    assert load_adapter(tmp_path / "True.safetensors").method == method


def test_peft_gets_an_adapter_and_gives_it_back(backbone, tmp_path) -> None:
    """Exported under PEFT's names and loaded from there: the same predictions."""
    for method in (LoRA(rank=2, targets=["query", "wo"]), IA3(), ptjax.BitFit()):
        adapter = some_adapter(method, backbone.config)
        adapter.metadata["step"] = 7
        arrays = adapter.arrays
        folder = ptjax.export(adapter, tmp_path / method.name, to="peft", backbone=backbone)
        again = load_adapter(folder)
        assert again.method == method and again.source == str(folder)
        assert again.metadata["backbone_name"] == backbone.name
        assert again.metadata["step"] == 7
        for path, array in arrays.items():
            np.testing.assert_array_equal(again.arrays[path], array)
        again.save(tmp_path / "copy.safetensors")
        assert load_adapter(tmp_path / "copy.safetensors").method == method
        kind = describe(folder)
        assert kind["kind"] == "adapter" and kind["method"]["name"] == method.name
        assert kind["parameters"] == sum(x.size for x in arrays.values())
        with pytest.raises(InputError, match="it changes the network; give it as an adapter"):
            ptjax.load_prompt(folder)


def test_an_adapter_of_another_shape_is_refused_by_name(backbone) -> None:
    method = LoRA(rank=2, targets=["encoder/.*/query"])
    arrays = {f"lora/encoder/layers_0/attention/query/{x}": np.ones((2, 2)) for x in "ab"}
    wrong = Adapter(method, arrays, dict(method.describe()))
    message = r"query/a has shape \[2, 2\], the network needs \[16, 2\]"
    with pytest.raises(InputError, match=message):
        ptjax.forward(backbone, {}, wrong)


def some_adapter(method, config) -> Adapter:
    shapes = flatten_paths(method.variable_shapes(config))
    rng, mean = np.random.default_rng(0), method.name == "ia3"
    arrays = {k: rng.normal(mean, 0.3, x.shape).astype(np.float32) for k, x in shapes.items()}
    return Adapter(method, arrays, dict(method.describe()))


def test_merged_weights_are_a_backbone_of_their_own(backbone, tmp_path) -> None:
    """The kernels are those that the network's tests compare it with; of scanned layers, too."""
    loaded = ptjax.load_backbone(backbone.name, scan_layers=True)
    params = backbone.variables["params"]
    lora, ia3 = (some_adapter(method, backbone.config) for method in METHODS)
    folder = ptjax.export(lora, tmp_path / "lora", to="merged", backbone=loaded)
    both = ptjax.export(ia3, tmp_path / "both", to="merged", backbone=ptjax.load_backbone(folder))
    found = flatten_paths(ptjax.load_backbone(both).variables["params"])
    arrays = {x.method.name: unflatten_paths(x.arrays)[x.method.name] for x in (lora, ia3)}
    for path, expected in flatten_paths(merged(params, arrays)).items():
        # One operation's rounding.
        np.testing.assert_allclose(found[path], expected, rtol=1e-6, atol=1e-7, err_msg=path)


def test_what_is_not_part_of_the_weights_is_not_merged(backbone, tmp_path) -> None:
    prompt = np.zeros((2, 16), np.float32)
    with pytest.raises(InputError, match="merged is for adapters; a prompt is not part of the wei"):
        ptjax.export(prompt, tmp_path / "x", to="merged", backbone=backbone)
    rounded = ptjax.load_backbone(backbone.name, quantize="int8")
    with pytest.raises(InputError, match="int8 kernels are rounded; load the backbone without q"):
        ptjax.export(
            some_adapter(LORA, backbone.config), tmp_path / "x", to="merged", backbone=rounded
        )
    for method in (ptjax.PrefixTuning(2), ptjax.PerLayerPrompts(2)):
        adapter = some_adapter(method, backbone.config)
        with pytest.raises(InputError, match=f"{method.name} cannot be merged into a backbone's w"):
            ptjax.export(adapter, tmp_path / "x", to="merged", backbone=backbone)
    assert not (tmp_path / "x").exists()


def test_rows_of_a_batch_cannot_take_adapters_of_their_own(backbone) -> None:
    adapter = some_adapter(IA3(inputs=()), backbone.config)
    assert not LoRA.supports_rows and not IA3.supports_rows
    message = "ia3 changes the network for all rows of a batch, so it runs alone"
    with pytest.raises(InputError, match=f"prompt_ids choose prompts; {message}"):
        ptjax.predict(backbone, ["a"], adapter, prompt_ids=[0])
    with pytest.raises(InputError, match="ia3 changes the network"):
        ptjax.make_bank({"one": adapter})  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
@pytest.mark.parametrize("method", [LoRA(rank=2, dropout=0.1), IA3()], ids=lambda x: x.name)
def test_members_of_a_sweep_train_as_they_do_alone(method, backbone, task, tmp_path) -> None:
    schedule = TrainSchedule(train_steps=4, eval_period=4, log_period=4)
    settings = {"method": method, "schedule": schedule}
    settings |= {"optimizer": Adafactor(0.001)}
    results = tune(tmp_path / "both", task, backbone, members=ptjax.sweep(seeds=(3, 4)), **settings)
    assert set(results["members"]) == {"seed3", "seed4"}
    tune(tmp_path / "one", task, backbone, seed=4, **settings)
    alone = load_adapter(tmp_path / "one").arrays
    best = tmp_path / "both" / "adapters" / "seed4" / "best.safetensors"
    for path, array in load_adapter(best).arrays.items():
        # Adafactor divides by roots of small gradients; a step is 0.001.
        np.testing.assert_allclose(array, alone[path], rtol=0, atol=1e-4)
    said = sweep_summary(results, str(tmp_path / "both"))
    assert f"ptjax.infer --adapter={tmp_path}/both/adapters/seed" in said
