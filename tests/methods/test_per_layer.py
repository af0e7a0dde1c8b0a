"""Per-layer prompts: exact where they are a plain prompt; scanned, packed, rematerialised."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from t5_ids import T5_IDS

import ptjax
from ptjax.data.batch import make_batch, make_packed_batch
from ptjax.errors import InputError
from ptjax.methods.base import InitContext, run_with
from ptjax.methods.initializers import Uniform
from ptjax.methods.per_layer import PerLayerPrompts
from ptjax.models.layers import EncoderLayer
from ptjax.models.stacking import stack_paths
from ptjax.planning.workload import PlannedBackbone
from ptjax.training.loss import Loss
from ptjax.training.step import batch_loss
from ptjax.trees import flatten_paths, unflatten_paths

P = 5
KEY = jax.random.key(0)
EXAMPLES = [[np.arange(2, 2 + n) for n in lengths] for lengths in ((4, 2, 7), (3, 2, 4))]
"""Inputs and targets."""


def own(prompts: Any) -> dict[str, Any]:
    """The method's collection for an unrolled network; `prompts` [L, P, D]."""
    return {"encoder": {f"layers_{i}": {"prompt": prompt} for i, prompt in enumerate(prompts)}}


@functools.cache
def forward(method: Any, config: Any) -> Any:
    """`(collection, params, batch)` -> the loss, jitted."""
    apply_fn = run_with(method, PlannedBackbone(config))

    def loss(own: Any, params: Any, batch: Any) -> jax.Array:
        variables = {"params": params, method.collection: own}
        return batch_loss(apply_fn, Loss(), variables, batch, KEY)

    return jax.jit(loss)


def losses(method: Any, config: Any) -> Any:
    """The same, with the gradient in the method's collection."""
    return jax.jit(jax.value_and_grad(forward(method, config)))


@pytest.fixture(scope="module")
def config(tiny) -> Any:
    return dataclasses.replace(tiny.config, dropout_rate=0.0)


@pytest.fixture(scope="module")
def packed(tiny_batch) -> Any:
    """Three examples in two rows, each with P positions for the prompt."""
    sizes = {"row_count": 2, "input_length": 20, "target_length": 8}
    return make_packed_batch(*EXAMPLES, np.array([0, 0, 1]), **sizes, ids=T5_IDS, prompt_slots=P)


def test_added_prompts_start_as_prompt_tuning(config, tiny, tiny_batch, packed) -> None:
    """With exactly its loss."""
    start = own([tiny.prompt, jnp.zeros_like(tiny.prompt)])
    method = PerLayerPrompts(P, combine="add")
    for batch in (tiny_batch, packed):
        expected = forward(ptjax.PromptTuning(P), config)(
            {"prompt": tiny.prompt}, tiny.params, batch
        )
        assert forward(method, config)(start, tiny.params, batch) == expected
        moved = own([tiny.prompt, tiny.prompt])
        assert forward(method, config)(moved, tiny.params, batch) != expected


def test_replaced_prompts_that_are_a_prompts_states_are_that_prompt(config, tiny) -> None:
    """Exactly: what one example's prompt is at each layer's input, put there by the method."""
    tokens = {"encoder_input_tokens": jnp.arange(2, 9)[None], "encoder_lengths": jnp.array([6])}
    targets, network = jnp.array([[0, 4, 5]]), PlannedBackbone(config)

    @jax.jit
    def plain(variables: Any) -> Any:
        """(logits, the prompt's states at the input of each layer)."""
        states: list[jax.Array] = []

        def keep(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if isinstance(context.module, EncoderLayer) and context.method_name == "__call__":
                states.append(args[0][0, :P])
            return call(*args, **kwargs)

        apply_fn = run_with(ptjax.PromptTuning(P), network)
        with nn.intercept_methods(keep):
            return apply_fn(variables, decoder_input_tokens=targets, **tokens), states

    expected, (first, second) = plain(tiny.variables)
    np.testing.assert_array_equal(first, tiny.prompt)
    assert np.abs(second - first).max() > 0.1
    variables = {"params": tiny.params, PerLayerPrompts.collection: own([first, second])}
    method = run_with(PerLayerPrompts(P), network)
    run = jax.jit(functools.partial(method, decoder_input_tokens=targets, **tokens))
    np.testing.assert_array_equal(run(variables), expected)
    # Without the method's collection the network is the backbone.
    without = {"params": tiny.params}
    np.testing.assert_array_equal(run(without), plain(without)[0])


@pytest.mark.slow
def test_scanned_and_rematerialised_layers_take_the_same_prompts(config, tiny, packed) -> None:
    """With the same loss and gradients, packed and not."""
    method = PerLayerPrompts(P)
    prompts = jax.random.normal(KEY, (2, P, 16))
    loss, grads = losses(method, config)(own(prompts), tiny.params, packed)
    by_layer = jnp.stack([grads["encoder"][f"layers_{i}"]["prompt"] for i in (0, 1)])
    assert np.abs(by_layer).max(axis=2).min() > 0

    scanned = dataclasses.replace(config, scan_layers=True, remat="full")
    stacked = unflatten_paths(stack_paths(flatten_paths(tiny.params), jnp.stack))
    of_stack = {"encoder": {"layers": {"prompt": prompts}}}
    again, of_stack = losses(method, scanned)(of_stack, stacked, packed)
    # To float32 rounding: the compiler sums in another order.
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    np.testing.assert_allclose(of_stack["encoder"]["layers"]["prompt"], by_layer, atol=1e-4)

    rows = make_batch(*EXAMPLES, input_length=8, target_length=8, ids=T5_IDS)
    unpacked, grads = losses(method, config)(own(prompts), tiny.params, rows)
    np.testing.assert_allclose(unpacked, loss, rtol=1e-6)
    for layer, expected in enumerate(by_layer):
        np.testing.assert_allclose(
            grads["encoder"][f"layers_{layer}"]["prompt"], expected, atol=1e-4
        )


def test_first_prompts(backbone) -> None:
    config = dataclasses.replace(backbone.config, num_encoder_layers=3)
    context = InitContext(backbone.embedding, None, None, list, config)
    prompt = ptjax.PromptTuning(P, Uniform()).init(KEY, context)["prompt"]["prompt"]
    for combine, others in (("replace", prompt), ("add", np.zeros_like(prompt))):
        method = PerLayerPrompts(P, Uniform(), combine=combine)
        made = method.init(KEY, context)
        for layer, expected in enumerate((prompt, others, others)):
            found = made["per_layer_prompts"]["encoder"][f"layers_{layer}"]["prompt"]
            np.testing.assert_array_equal(found, expected)
        scanned = dataclasses.replace(config, scan_layers=True)
        of_stack = method.init(KEY, dataclasses.replace(context, config=scanned))
        stacked = of_stack["per_layer_prompts"]["encoder"]["layers"]["prompt"]
        np.testing.assert_array_equal(stacked, np.stack([prompt, others, others]))
        for variables, shapes in (
            (made, method.variable_shapes(config)),
            (of_stack, method.variable_shapes(scanned)),
        ):
            assert (
                jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables) == shapes
            )


def test_the_export_is_an_adapter(backbone, tmp_path) -> None:
    """Of which the initialiser is not a part."""
    method, path = PerLayerPrompts(3, Uniform(), combine="add"), tmp_path / "adapter.safetensors"
    context = InitContext(backbone.embedding, None, None, list, backbone.config)
    made = method.init(KEY, context)
    method.save(path, made, {"step": 2}, backbone)
    adapter = ptjax.load_adapter(path)
    assert adapter.method == PerLayerPrompts(3, combine="add") and adapter.metadata["step"] == 2
    assert list(adapter.arrays) == ["per_layer_prompts/encoder/layers_0/prompt"]
    loaded = method.load(path, backbone)
    jax.tree.map(np.testing.assert_array_equal, loaded, made)
    with pytest.raises(InputError, match=r"holds PerLayerPrompts.*'add'.* not .*'replace'"):
        PerLayerPrompts(3).load(path, backbone)


def test_what_it_cannot_do_is_refused(backbone) -> None:
    with pytest.raises(InputError, match=r"^PROMPT_LENGTH must be >= 1, got 0$"):
        PerLayerPrompts(0)
    with pytest.raises(InputError, match=r"^PerLayerPrompts\.combine must be one of 'replace', 'a"):
        PerLayerPrompts(combine="mean")  # pyright: ignore[reportArgumentType]
    other = dataclasses.make_dataclass("Network", [("config", object)])(object())
    with pytest.raises(InputError, match=r"needs the layers of a T5; this is not a T5$"):
        PerLayerPrompts().check(other, ptjax.Batching())
    PerLayerPrompts().check(backbone, ptjax.Batching())
