"""The seam of methods: what trains, where it enters the network, how it is stored."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tune
from etils import epath
from flax import linen as nn
from frozen import assert_frozen
from safetensors.numpy import load_file, save_file

import ptjax
from ptjax.errors import InputError
from ptjax.methods.base import InitContext, Method, run_with
from ptjax.methods.model_tuning import ModelTuning
from ptjax.methods.prompt_tuning import PromptTuning
from ptjax.models.layers import EncoderLayer
from ptjax.models.prompted import make_apply_fn
from ptjax.models.stacking import stack_paths
from ptjax.settings import RunSettings
from ptjax.trainer.sweep import MemberOverrides
from ptjax.training.dependence import unused_leaves
from ptjax.training.loss import Loss
from ptjax.training.step import batch_loss
from ptjax.trees import flatten_paths, unflatten_paths


@dataclasses.dataclass(frozen=True)
class LayerShift(Method):
    """A learned vector behind every layer of the encoder, in the collection `shift`."""

    name, collection, exports = "layer_shift", "shift", "arrays"

    def variable_shapes(self, config):
        count, width = config.num_encoder_layers, config.emb_dim
        layers = {f"layers_{i}": jax.ShapeDtypeStruct((width,), "float32") for i in range(count)}
        if config.scan_layers:
            layers = {"layers": jax.ShapeDtypeStruct((count, width), "float32")}
        return {"shift": {"encoder": {name: {"b": shape} for name, shape in layers.items()}}}

    def init(self, key, context):
        shapes = self.variable_shapes(context.config)
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)

    def freeze_rules(self):
        return {"params/.*": True, "shift/.*": False}

    def wrap(self, apply_fn):
        def shift(call, args, kwargs, context):
            made, layer = call(*args, **kwargs), context.module
            whole = isinstance(layer, EncoderLayer) and context.method_name == "__call__"
            if whole and layer.has_variable("shift", "b"):
                return made[0] + layer.get_variable("shift", "b").astype(made[0].dtype), made[1]
            return made

        def apply(*args, **settings):
            with nn.intercept_methods(shift):
                return apply_fn(*args, **settings)

        return apply

    def save(self, path, trainable, metadata, backbone):
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.asarray(x) for name, x in flatten_paths(trainable).items()}
        save_file(arrays, path, {name: json.dumps(value) for name, value in metadata.items()})

    def read_metadata(self, path):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return {
                k: json.loads(v) for k, v in json.loads(file.read(size))["__metadata__"].items()
            }

    def load(self, path, backbone):
        return unflatten_paths(load_file(path))


@dataclasses.dataclass(frozen=True)
class Unread(PromptTuning):
    """Its prompt never reaches the network."""

    def wrap(self, apply_fn):
        def apply(variables, *args, **settings):
            return apply_fn({"params": variables["params"]}, *args, **settings)

        return apply


def test_the_methods_of_ptjax_make_what_they_say(backbone) -> None:
    context = InitContext(
        backbone.embedding, backbone.tokenizer, ("yes", "no"), list, backbone.config
    )
    for method in (PromptTuning(3), ModelTuning(), LayerShift()):
        assert isinstance(method, Method)
        made = method.init(jax.random.key(0), context)
        assert jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), made) == (
            method.variable_shapes(backbone.config)
        )


def test_methods_and_initialisers_never_change() -> None:
    """Their fields are part of a run's identity."""
    assert_frozen("ptjax.methods")


def test_what_is_no_method_is_refused() -> None:
    for wrong in ("prompt_tuning", PromptTuning, object(), ptjax.Uniform()):
        with pytest.raises(InputError, match=r"RunSettings\.method = .* is not a method"):
            RunSettings(method=wrong)  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class Least(Method):
    """A method that implements only what every method must."""

    name, collection, exports = "least", "own", "arrays"

    def variable_shapes(self, config):
        return {"own": {}}


class Recorded:
    """A network that notes how it was asked to run."""

    config = quantize = None

    def make_apply_fn(self, attends_to_input, collections, /):
        return attends_to_input, collections


def test_a_method_that_says_no_more_adds_nothing_to_the_network() -> None:
    method = Least()
    assert method.attends_to_input is True
    assert method.extra_positions() == 0
    assert method.describe() == {}
    assert method.wrap(len) is len  # pyright: ignore[reportArgumentType]
    method.check(Recorded(), ptjax.Batching())  # pyright: ignore[reportArgumentType]
    assert method.supports_rows is False and method.supports_sweep is False


def test_the_network_sees_a_methods_own_collection() -> None:
    """Not by name where every network reads it anyway."""
    for method, asked in [
        (Least(), (True, ("own",))),
        (PromptTuning(4), (True, ())),
        (PromptTuning(4, attends_to_input=False), (False, ())),
        (ModelTuning(), (True, ())),
    ]:
        assert run_with(method, Recorded()) == asked  # pyright: ignore[reportArgumentType]


def test_the_network_runs_as_the_method_wraps_it() -> None:
    @dataclasses.dataclass(frozen=True)
    class Wrapped(Least):
        def wrap(self, apply_fn):
            return "around", apply_fn

    made = run_with(Wrapped(), Recorded())  # pyright: ignore[reportArgumentType]
    assert made == ("around", (True, ("own",)))


def test_a_method_may_hold_a_list() -> None:
    """As a gin file gives it; such a method has no hash."""
    labels: Any = ["good", "bad"]
    for kind in (PromptTuning, ptjax.PrefixTuning):
        assert run_with(kind(4, initializer=ptjax.ClassLabels(labels)), Recorded())  # pyright: ignore[reportArgumentType]


def test_a_sweep_wants_a_method_that_has_what_its_members_set() -> None:
    swept = dataclasses.make_dataclass("Swept", (), bases=(LayerShift,), frozen=True)
    member = MemberOverrides(initializer=ptjax.Uniform())
    with pytest.raises(InputError, match="Swept has no initialiser"):
        member.apply(RunSettings(method=swept()))
    assert member.apply(RunSettings()).method == PromptTuning(initializer=ptjax.Uniform())


def shift_gradients(config, params, batch, shift, collections=("shift",)):
    """(loss, its gradient) in the vectors behind the layers."""
    apply_fn = LayerShift().wrap(make_apply_fn(config, True, None, collections))

    def loss(shift, params, batch):
        variables = {"params": params, "shift": shift}
        return batch_loss(apply_fn, Loss(), variables, batch, jax.random.key(0))

    return jax.jit(jax.value_and_grad(loss))(shift, params, batch)


def test_a_collection_of_per_layer_arrays_reaches_the_layers(tiny, tiny_batch) -> None:
    """Scanned or not, with the same loss and gradients."""
    plain = dataclasses.replace(tiny.config, dropout_rate=0.0)
    vectors = jnp.stack([jnp.linspace(-1, 1, 16), jnp.linspace(2, 0, 16)])
    layers = {f"layers_{i}": {"b": vector} for i, vector in enumerate(vectors)}
    value, grads = shift_gradients(plain, tiny.params, tiny_batch, {"encoder": layers})
    by_layer = jnp.stack([grads["encoder"][name]["b"] for name in ("layers_0", "layers_1")])
    assert jnp.abs(by_layer).max(axis=1).min() > 0.1

    scanned = dataclasses.replace(plain, scan_layers=True)
    stacked = unflatten_paths(stack_paths(flatten_paths(tiny.params), jnp.stack))
    shift = {"encoder": {"layers": {"b": vectors}}}
    again, of_stack = shift_gradients(scanned, stacked, tiny_batch, shift)
    # To float32 rounding: the compiler sums in another order.
    np.testing.assert_allclose(again, value, rtol=1e-6)
    np.testing.assert_allclose(of_stack["encoder"]["layers"]["b"], by_layer, atol=1e-4)
    with pytest.raises(InputError, match=r"SCAN_LAYERS.*collection 'shift'.*\('shift',\)"):
        shift_gradients(scanned, stacked, tiny_batch, shift, collections=())


@pytest.mark.slow
def test_a_method_with_arrays_in_scanned_layers_trains(backbone, task, tmp_path) -> None:
    params, tokenizer = backbone.variables["params"], backbone.tokenizer
    folder = tmp_path / "backbone"
    ptjax.save_backbone(folder, backbone.config, params, tokenizer=tokenizer, dtype="float32")
    scanned = ptjax.load_backbone(folder, scan_layers=True)
    schedule = ptjax.TrainSchedule(train_steps=2, eval_period=2, log_period=1)
    results = tune(tmp_path / "run", task, scanned, method=LayerShift(), schedule=schedule)
    assert results["trainable_parameters"] == 16
    best = epath.Path(tmp_path / "run" / "arrays" / "best.safetensors")
    assert LayerShift().read_metadata(best)["step"] == 2
    shift = LayerShift().load(best, scanned)["shift"]["encoder"]["layers"]["b"]
    assert shift.shape == (1, 16) and np.abs(shift).min() > 0


S = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)


def test_leaves_without_a_derivative_are_found() -> None:
    """In scans, calls and remat; a gradient that is zero in value is none of them."""

    @jax.custom_vjp
    def sine(x):
        return jnp.sin(x)

    sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))

    def loss(weights, x):
        def layer(x, own):
            y = jax.checkpoint(jnp.tanh)(x * own["read"])
            return y + jax.lax.stop_gradient(own["stopped"]), None

        y, _ = jax.lax.scan(layer, x, weights["layers"])
        y = y + y @ (0 * weights["lora_a"]) @ weights["lora_b"] + sine(weights["custom"])
        y = jax.jit(lambda y, a, b: y * a)(y, weights["called"], weights["not_in_the_call"])
        return jnp.sum(y + jnp.argmax(weights["only_integers"]))

    layers = {name: S((3, 4)) for name in ("read", "stopped", "unread")}
    others = ("custom", "called", "not_in_the_call", "only_integers", "nowhere")
    weights = {"layers": layers, "lora_a": S((4, 2)), "lora_b": S((2, 4))}
    weights |= {name: S((4,)) for name in others}
    assert unused_leaves(loss, weights, S((4,))) == [
        "layers/stopped",
        "layers/unread",
        "not_in_the_call",
        "nowhere",
        "only_integers",
    ]


def test_what_the_loss_does_not_read_is_refused_before_step_1(backbone, task, tmp_path) -> None:
    with pytest.raises(InputError, match="the loss does not depend on prompt/prompt, so"):
        tune(tmp_path, task, backbone, method=Unread(4))
    assert not (tmp_path / "metrics.jsonl").exists()
