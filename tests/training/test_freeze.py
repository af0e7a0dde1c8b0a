"""What is frozen stays frozen: the map, the split, the second lock."""

from __future__ import annotations

import doctest

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

from ptjax.errors import InputError
from ptjax.methods.model_tuning import ModelTuning
from ptjax.methods.prompt_tuning import PromptTuning
from ptjax.training import freeze as freezing
from ptjax.training.freeze import combine, make_freeze, split
from ptjax.training.loss import Loss
from ptjax.training.optimizer import Adafactor
from ptjax.training.step import init_train_state, make_train_step
from ptjax.trees import flatten_paths

names = st.text("abcd_1", min_size=1, max_size=3)
trees = st.recursive(
    st.integers(), lambda child: st.dictionaries(names, child, min_size=1, max_size=3), max_leaves=8
).filter(lambda tree: isinstance(tree, dict))


@st.composite
def frozen_trees(draw):
    """A tree and a freeze map that is a prefix of it."""

    def decide(tree):
        if not isinstance(tree, dict) or draw(st.booleans()):
            return draw(st.booleans())
        return {name: decide(child) for name, child in tree.items()}

    tree = draw(trees)
    return tree, decide(tree)


def lookup(freeze, path: str) -> bool:
    for name in path.split("/"):
        if isinstance(freeze, bool):
            break
        freeze = freeze[name]
    return freeze


@settings(max_examples=100)
@given(frozen_trees())
def test_combine_is_the_inverse_of_split(case) -> None:
    tree, freeze = case
    trainable, frozen = split(tree, freeze)
    assert combine(trainable, frozen) == tree
    for path in flatten_paths(tree):
        assert (path in flatten_paths(frozen)) == lookup(freeze, path)
        assert (path in flatten_paths(trainable)) != lookup(freeze, path)


PROMPT_TUNING, MODEL_TUNING = PromptTuning().freeze_rules(), ModelTuning().freeze_rules()
TREE = {"params": {"encoder": {"w": 1}, "decoder": {"w": 2}}, "prompt": {"prompt": 3}}


def test_rules_decide_each_variable_once() -> None:
    rules = {"params/.*": True, "prompt/prompt": False}
    assert make_freeze(TREE, rules) == {
        "params": {"encoder": {"w": True}, "decoder": {"w": True}},
        "prompt": {"prompt": False},
    }


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"params/.*": True, "prompt/.*": False, "bank/.*": False}, "'bank/.*' matches no"),
        # The first of several, in alphabetical order.
        ({"params/.*": True, "prompt/.*": False, "c/.*": True, "b/.*": True}, "'b/.*' matches no"),
        ({"params/.*": True}, "no freeze rule covers variable 'prompt/prompt'"),
        ({"params/.*": True, ".*/w": False, "prompt/.*": False}, "disagree.*params/encoder/w"),
        # A pattern is the whole path's, not a part's.
        ({"params": True, "prompt/.*": False}, "no freeze rule covers variable 'params/encoder/w'"),
        ({}, "no freeze rule covers"),
    ],
)
def test_rules_that_do_not_fit_are_refused(rules, message) -> None:
    with pytest.raises(InputError, match=message):
        make_freeze(TREE, rules)


def test_two_rules_that_agree_are_fine() -> None:
    rules = {"params/.*": True, "params/encoder/.*": True, "prompt/.*": False}
    assert make_freeze(TREE, rules)["params"]["encoder"] == {"w": True}


def test_methods_on_a_real_tree(tiny) -> None:
    variables = tiny.variables
    trainable, frozen = split(variables, make_freeze(variables, PROMPT_TUNING))
    assert trainable == {"prompt": {"prompt": tiny.prompt}}
    assert set(flatten_paths(frozen)) == set(flatten_paths({"params": tiny.params}))

    plain = {"params": tiny.params}
    everything = set(flatten_paths(plain))
    trainable, frozen = split(plain, make_freeze(plain, MODEL_TUNING))
    assert (set(flatten_paths(trainable)), frozen) == (everything, {})
    trainable, frozen = split(plain, make_freeze(plain, {"params/.*": True}))
    assert (trainable, set(flatten_paths(frozen))) == ({}, everything)

    with pytest.raises(InputError, match="prompt/prompt"):
        make_freeze(variables, MODEL_TUNING)
    with pytest.raises(InputError, match="matches no variable"):
        make_freeze(plain, PROMPT_TUNING)


OPTIMIZERS = {
    "adafactor": Adafactor(step_offset=1_100_000).make(),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
}


def random_like(tree, rng):
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), tree)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("prefix", [True, False])
def test_lock_over_everything_equals_split_bitwise(name, prefix) -> None:
    rng = np.random.default_rng(0)
    shapes = {"params": {"w": np.zeros((8, 4), "f")}, "prompt": {"prompt": np.zeros((3, 4), "f")}}
    variables = random_like(shapes, rng)
    full = make_freeze(variables, PROMPT_TUNING)
    freeze = {"params": True, "prompt": False} if prefix else full
    bare, locked = OPTIMIZERS[name], freezing.freeze_updates(OPTIMIZERS[name], freeze)
    half, _ = split(variables, freeze)
    whole_state, half_state, bare_state = (
        locked.init(variables),
        locked.init(half),
        bare.init(half),
    )
    for _ in range(3):
        grads = random_like(variables, rng)
        half_grads, _ = split(grads, freeze)
        whole, whole_state = locked.update(grads, whole_state, variables)
        one, half_state = locked.update(half_grads, half_state, half)
        want, bare_state = bare.update(half_grads, bare_state, half)
        want = want["prompt"]["prompt"]
        assert np.abs(want).min() > 0
        np.testing.assert_array_equal(one["prompt"]["prompt"], want)
        np.testing.assert_array_equal(whole["prompt"]["prompt"], want)
        np.testing.assert_array_equal(whole["params"]["w"], np.zeros((8, 4)))


def test_lock_with_nothing_frozen_or_everything() -> None:
    params = {"w": jnp.ones(3)}
    for freeze, moved in ((False, True), (True, False)):
        optimizer = freezing.freeze_updates(optax.sgd(1.0), freeze)
        updates, _ = optimizer.update({"w": jnp.ones(3)}, optimizer.init(params), params)
        assert bool(updates["w"].any()) is moved


def test_optimizer_has_state_for_the_prompt_alone(tiny) -> None:
    freeze = make_freeze(tiny.variables, PROMPT_TUNING)
    state = freezing.freeze_updates(Adafactor().make(), freeze).init(tiny.variables)
    shapes = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert tiny.prompt.shape in shapes
    assert sum(np.prod(shape) for shape in shapes) == tiny.prompt.size + 2  # unused v_row, v_col


def test_frozen_arrays_are_bitwise_equal_after_training(tiny, tiny_batch) -> None:
    freeze = make_freeze(tiny.variables, PROMPT_TUNING)
    trainable, frozen = split(tiny.variables, freeze)
    before = jax.tree.map(np.array, frozen)
    optimizer = freezing.freeze_updates(Adafactor().make(), freeze)
    apply = tiny.apply_fn(num_encoder_layers=1, num_decoder_layers=1, dropout_rate=0.0)
    step = jax.jit(make_train_step(apply, optimizer, Loss()))
    state = init_train_state(trainable, optimizer, jax.random.key(0))
    for _ in range(5):
        state, _ = step(state, frozen, tiny_batch)
    assert set(state.trainable) == {"prompt"}
    assert (state.trainable["prompt"]["prompt"] != tiny.prompt).all()
    after = combine(state.trainable, frozen)["params"]
    jax.tree.map(np.testing.assert_array_equal, before["params"], after)


def test_sizes_counts_elements_and_bytes() -> None:
    tree = {"a": jnp.zeros((3, 4)), "b": {"c": jax.ShapeDtypeStruct((5,), jnp.bfloat16)}}
    assert freezing.sizes(tree) == (17, 58)
    assert freezing.sizes({}) == (0, 0)


def test_little_is_told_by_sizes() -> None:
    assert freezing.is_small(10, 100) and not freezing.is_small(11, 100)
    assert not freezing.is_small(5, 0)


def test_examples_in_the_docstrings_run() -> None:
    result = doctest.testmod(freezing)
    assert result.attempted >= 2
    assert result.failed == 0
