"""Adafactor as T5X runs it: the oracle's steps, and each trap of the paper's recipe."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ptjax.errors import InputError
from ptjax.training.optimizer import Adafactor, embedding_rms

PRETRAINED = 1_100_000
"""The step at which the public LM-adapted checkpoints stand."""


def run(settings: Adafactor, start, grads, rms: float = 1.0):
    """(parameters, optimizer states) after each of `grads`."""
    optimizer = settings.make(rms)
    update = jax.jit(optimizer.update)
    params, state = jnp.asarray(start), optimizer.init(jnp.asarray(start))
    trail, states = [], []
    for gradient in grads:
        updates, state = update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        trail.append(np.asarray(params))
        states.append(state)
    return np.stack(trail), states


def second_moment(state) -> optax.FactoredState:
    is_moment = lambda node: isinstance(node, optax.FactoredState)  # noqa: E731
    return next(n for n in jax.tree.leaves(state, is_leaf=is_moment) if is_moment(n))


def gradients(shape, steps=10, seed=0):
    return np.random.default_rng(seed).standard_normal((steps, *shape)).astype(np.float32)


@pytest.mark.parametrize("start", [0, PRETRAINED])
def test_recorded_gradients_give_the_oracles_prompts(oracle, start) -> None:
    want = oracle[f"step{start}"]
    prompts, states = run(Adafactor(step_offset=start), oracle[""]["prompt"], want["grads"])
    assert len(prompts) == len(want["prompts"]) == 10
    np.testing.assert_allclose(prompts, want["prompts"], rtol=0, atol=1e-5)
    v = np.stack([second_moment(state).v for state in states])
    np.testing.assert_allclose(v, want["v"], rtol=1e-4)


def test_weight_decay_is_not_multiplied_by_the_learning_rate() -> None:
    start = np.full((4, 8), 100.0, np.float32)
    grads = gradients(start.shape)
    decay = 1e-3
    for rate in (0.3, 1e-6):
        kept, _ = run(Adafactor(learning_rate=rate, weight_decay=0.0), start, grads[:1])
        decayed, _ = run(Adafactor(learning_rate=rate, weight_decay=decay), start, grads[:1])
        np.testing.assert_allclose(kept[0] - decayed[0], decay * start, rtol=1e-3)


def test_prompts_of_128_rows_and_more_are_factored() -> None:
    def moments(rows):
        state = jax.eval_shape(Adafactor().make().init, jnp.zeros((rows, 768)))
        moment = second_moment(state)
        return moment.v_row.shape, moment.v_col.shape, moment.v.shape

    assert moments(100) == ((1,), (1,), (100, 768))
    assert moments(127) == ((1,), (1,), (127, 768))
    assert moments(128) == ((128,), (768,), (1,))
    assert moments(150) == ((150,), (768,), (1,))
    never = Adafactor(min_dim_size_to_factor=10**9).make()
    assert second_moment(jax.eval_shape(never.init, jnp.zeros((150, 768)))).v.shape == (150, 768)


def test_clipping_acts_throughout_with_the_offset_alone() -> None:
    start = np.zeros((20, 64), np.float32)
    grads = gradients(start.shape, steps=200)

    def update_rms(offset, **changes):
        prompts, _ = run(Adafactor(step_offset=offset, weight_decay=0.0, **changes), start, grads)
        return np.sqrt(np.square(np.diff(prompts, axis=0)).mean((1, 2))) / 0.3

    np.testing.assert_allclose(update_rms(PRETRAINED), 1.0, rtol=1e-4)
    # recipe.md: 261 at the first step and 8.3 after a thousand, were it not for the clipping.
    unclipped = update_rms(PRETRAINED, clipping_threshold=1e9)
    assert (unclipped > 5).all()
    from_zero, free = update_rms(0), update_rms(0, clipping_threshold=1e9)
    assert (from_zero < 1).mean() > 0.4
    assert (free < 2).all()


def test_the_scale_of_the_loss_is_invisible() -> None:
    start, grads = np.zeros((4, 8), np.float32), gradients((4, 8))
    for offset in (0, PRETRAINED):
        plain, _ = run(Adafactor(step_offset=offset), start, grads)
        scaled, _ = run(Adafactor(step_offset=offset), start, grads * 1024)
        np.testing.assert_allclose(plain, scaled, rtol=0, atol=1e-5)


def test_learning_rate_in_units_of_the_embedding() -> None:
    start, grads = np.zeros((4, 8), np.float32), gradients((4, 8))
    relative = Adafactor(learning_rate=0.03, learning_rate_scale="embedding_rms")
    assert relative.rate_at(0, 10.0) == pytest.approx(0.3)
    assert Adafactor().rate_at(7, 10.0) == 0.3
    for rms in (10.0, 0.5):
        scaled, _ = run(relative, start, grads, rms)
        absolute, _ = run(Adafactor(learning_rate=0.03 * rms), start, grads, 123.0)
        np.testing.assert_allclose(scaled, absolute, rtol=1e-5, atol=1e-7)


def test_embedding_rms_ignores_unused_rows() -> None:
    table = np.random.default_rng(0).standard_normal((100, 16)).astype(np.float32)
    want = np.sqrt(np.square(table).mean())
    assert embedding_rms(jnp.asarray(table)) == pytest.approx(want, rel=1e-5)
    padded = np.concatenate([table, np.zeros((28, 16), np.float32)])
    assert embedding_rms(jnp.asarray(padded)) == pytest.approx(want, rel=1e-5)
    assert embedding_rms(jnp.asarray([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])) == pytest.approx(
        12.5**0.5
    )
    # In float32 whatever the table is kept in, and 0, not NaN, for an empty one.
    rounded = jnp.asarray(table, jnp.bfloat16)
    exact = np.sqrt(np.square(np.asarray(rounded, np.float64)).mean())
    assert embedding_rms(rounded) == pytest.approx(exact, rel=1e-5)
    assert embedding_rms(jnp.zeros((3, 4))) == 0.0


@pytest.mark.parametrize("offset", [0, PRETRAINED])
def test_a_schedule_counts_this_runs_steps(offset) -> None:
    def schedule(step):
        return 0.1 * (step + 1.0)

    settings = Adafactor(schedule, step_offset=offset, weight_decay=0.0)
    assert settings.rate_at(4, 1.0) == pytest.approx(0.5)
    # The same gradient again and again makes every update of one RMS: the rate's.
    grads = np.ones((6, 4, 8), np.float32)
    prompts, states = run(settings, np.zeros((4, 8), np.float32), grads)
    steps = -np.diff(prompts, axis=0, prepend=0)
    want = [0.1 * (step + 1) for step in range(6)]
    np.testing.assert_allclose(steps[:, 0, 0], want, rtol=1e-5)
    assert second_moment(states[-1]).count == offset + 6


@pytest.mark.parametrize("shape", [(5, 32), (150, 256)])
def test_everything_is_float32(shape) -> None:
    prompts, states = run(Adafactor(), np.zeros(shape, np.float32), gradients(shape, steps=1))
    assert prompts.dtype == np.float32
    first = Adafactor().make().init(jnp.zeros(shape))
    for state in (first, states[0]):
        dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(state)}
        assert dtypes == {"float32", "int32"}


def test_parameter_scale_multiplies_the_update_by_the_parameters_rms() -> None:
    grads = gradients((4, 8), steps=1)
    step = functools.partial(run, grads=grads)
    plain = Adafactor(learning_rate=0.01, weight_decay=0.0)
    scaled = Adafactor(learning_rate=0.01, weight_decay=0.0, multiply_by_parameter_scale=True)
    start = np.full((4, 8), 5.0, np.float32)
    np.testing.assert_allclose(
        step(scaled, start)[0] - start, 5 * (step(plain, start)[0] - start), rtol=1e-4
    )


def test_every_leaf_is_clipped_by_itself() -> None:
    optimizer = Adafactor(step_offset=PRETRAINED, weight_decay=0.0).make()
    params = {"a": jnp.zeros((4, 8)), "b": jnp.zeros((3,))}
    grads = {"a": jnp.full((4, 8), 1e3), "b": jnp.full((3,), 1e-3)}
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_allclose(leaf, -0.3, rtol=1e-4)


def test_a_schedule_is_identified_by_its_values() -> None:
    """At every step up to 8, then 16 times as the number of steps doubles, up to 2^24."""
    described = Adafactor(lambda step: 0.5 * step).identity()
    assert set(described) == {"learning_rate"}
    assert described["learning_rate"].pop("is") == "schedule"
    rates = {int(name.removeprefix("step ")): x for name, x in described["learning_rate"].items()}
    steps = list(rates)
    assert steps == sorted(steps)
    assert steps[:9] == [0, 1, 2, 3, 4, 5, 6, 7, 8] and steps[-1] == 2**24
    for octave in range(5, 24):
        within = [step for step in steps if 2**octave < step <= 2 ** (octave + 1)]
        assert len(within) == 16 and within[-1] == 2 ** (octave + 1)
        # In float32, to seven digits.
        assert [rates[step] for step in within] == pytest.approx(
            [0.5 * step for step in within], rel=1e-6
        )
    ratios = np.divide(steps[9:], steps[8:-1])
    assert ratios.max() <= 9 / 8


def test_schedules_that_differ_later_are_told_apart_and_copies_are_not() -> None:
    def after(boundary):
        return Adafactor(lambda step: jnp.where(step < boundary, 0.3, 0.1)).identity()

    assert after(1000) == after(1000) != after(2000)
    rates = after(4)["learning_rate"]
    assert (rates["step 3"], rates["step 4"]) == (0.3, 0.1)


def test_a_number_needs_no_identity_beyond_its_field() -> None:
    assert Adafactor(0.3).identity() == {}


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "step_offset"])
def test_negative_settings_are_refused(name) -> None:
    Adafactor(**{name: 0})
    with pytest.raises(InputError, match=rf"^Adafactor\.{name} must be >= 0, got -1$"):
        Adafactor(**{name: -1})


def test_an_unknown_scale_is_refused() -> None:
    wanted = (
        r"^Adafactor\.learning_rate_scale must be one of 'absolute', 'embedding_rms', got 'rms'$"
    )
    with pytest.raises(InputError, match=wanted):
        Adafactor(learning_rate_scale="rms")  # pyright: ignore[reportArgumentType]


def test_the_rate_is_a_number_for_logs() -> None:
    scheduled = Adafactor(lambda step: jnp.asarray(0.25) * step, "embedding_rms")
    rate = scheduled.rate_number(2, 4.0)
    assert type(rate) is float and rate == 2.0
    assert Adafactor(0.25).rate_number(2, 4.0) == 0.25


def test_a_callers_rate_replaces_the_settings() -> None:
    settings = Adafactor(0.3, "embedding_rms", weight_decay=0.0)
    optimizer = settings.make(10.0, rate=jnp.asarray(0.01))
    params = jnp.zeros((4, 8))
    updates, _ = optimizer.update(jnp.ones((4, 8)), optimizer.init(params), params)
    np.testing.assert_allclose(updates, -0.01, rtol=1e-4)
