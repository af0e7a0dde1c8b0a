"""The loss against T5X's formula written out in numpy, in float64 and by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from ptjax.errors import InputError
from ptjax.training.loss import Loss, log_likelihood

rng = np.random.default_rng(0)
LOGITS = (3 * rng.standard_normal((3, 4, 12))).astype(np.float32)
TARGETS = rng.integers(1, 12, (3, 4))
WEIGHTS = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0.25, 0, 2, 0]], np.float32)
GIVEN = jax.tree.map(jnp.asarray, (LOGITS, TARGETS, WEIGHTS))


def by_hand(z_loss: float, smoothing: float) -> float:
    """`cross_entropy_with_logits` and `compute_weighted_cross_entropy` of t5x/losses.py."""
    vocab = LOGITS.shape[-1]
    low = smoothing / (vocab - 1)
    total = 0.0
    for b, t in np.ndindex(TARGETS.shape):
        wanted = np.full(vocab, low)
        wanted[TARGETS[b, t]] = 1 - smoothing
        logits = LOGITS[b, t].astype(np.float64)
        cross_entropy = -(wanted * log_softmax(logits)).sum()
        entropy = -sum(p * np.log(p) for p in wanted if p > 0)
        total += WEIGHTS[b, t] * (cross_entropy - entropy + z_loss * logsumexp(logits) ** 2)
    return total


@pytest.mark.parametrize("z_loss", [0.0, 1e-4, 0.1])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_is_t5x_formula(z_loss, smoothing) -> None:
    loss = Loss(z_loss=z_loss, label_smoothing=smoothing)(*GIVEN)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, by_hand(z_loss, smoothing), rtol=1e-6)


def test_defaults_are_a_sum_with_z_loss() -> None:
    np.testing.assert_allclose(Loss()(*GIVEN), by_hand(1e-4, 0.0), rtol=1e-6)
    twice = [jnp.concatenate([x, x]) for x in GIVEN]
    np.testing.assert_allclose(Loss()(*twice), 2 * by_hand(1e-4, 0.0), rtol=1e-6)
    assert Loss().normalizer(GIVEN[2]) == 1.0


def test_per_token_divides_by_the_weight_of_the_targets() -> None:
    loss = Loss(per_token=True)
    assert loss.normalizer(GIVEN[2]) == WEIGHTS.sum() == 8.25
    # A batch of padding alone must not divide by zero.
    assert loss.normalizer(jnp.zeros_like(GIVEN[2])) == 1.0


def test_perfect_prediction_costs_nothing_even_when_smoothed() -> None:
    vocab, smoothing = LOGITS.shape[-1], 0.2
    wanted = np.full((*TARGETS.shape, vocab), smoothing / (vocab - 1), np.float32)
    np.put_along_axis(wanted, TARGETS[..., None], 1 - smoothing, axis=-1)
    loss = Loss(z_loss=0.0, label_smoothing=smoothing)(jnp.log(wanted), *GIVEN[1:])
    np.testing.assert_allclose(loss, 0.0, atol=1e-5)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    rounded = jnp.asarray(LOGITS, jnp.bfloat16)
    loss = Loss()(rounded, *GIVEN[1:])
    assert loss.dtype == jnp.float32
    np.testing.assert_array_equal(loss, Loss()(rounded.astype(jnp.float32), *GIVEN[1:]))


def test_positions_of_weight_zero_give_no_gradient() -> None:
    gradient = jax.grad(Loss(label_smoothing=0.1))(*GIVEN)
    moves = np.abs(gradient).sum(-1)
    np.testing.assert_array_equal(moves > 0, WEIGHTS > 0)


def test_log_likelihood_ranks_by_the_probability_of_each_target() -> None:
    seen = WEIGHTS > 0
    per_token = np.take_along_axis(log_softmax(LOGITS, -1), TARGETS[..., None], -1)[..., 0]
    got = log_likelihood(*GIVEN[:2], jnp.asarray(seen))
    np.testing.assert_allclose(got, (per_token * seen).sum(-1), rtol=1e-5)


def test_per_token_divides_by_weights_below_one_as_well() -> None:
    """Class weights may be so small that a batch's sum is."""
    assert Loss(per_token=True).normalizer(jnp.full((2, 2), 0.125)) == 0.5


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("even", r"Loss\.class_weights must be one of 'balanced', None, got 'even'"),
        ({"a": 0}, r"Loss\.class_weights\['a'\] must be a number > 0, got 0"),
        ({"a": float("nan")}, r"Loss\.class_weights\['a'\] must be a number > 0, got nan"),
    ],
)
def test_class_weights_are_positive_numbers(weights, message) -> None:
    with pytest.raises(InputError, match=message):
        Loss(class_weights=weights)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_label_smoothing_is_a_share(smoothing) -> None:
    with pytest.raises(InputError, match=r"^Loss\.label_smoothing must be >= 0 and < 1, got"):
        Loss(label_smoothing=smoothing)


def test_z_loss_has_no_negative_weight() -> None:
    Loss(z_loss=0)
    with pytest.raises(InputError, match=r"^Loss\.z_loss must be >= 0, got -1$"):
        Loss(z_loss=-1)
