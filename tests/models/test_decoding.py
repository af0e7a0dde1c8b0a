"""Decoding: greedy, sampling and beam search against teacher forcing and brute force."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from t5_ids import T5_IDS, beam_search, decode, with_lengths
from tiny import tiny_config, tiny_params

from ptjax.data.batch import SpecialIds, shift_right
from ptjax.models import decode_loop, decoding
from ptjax.models.prompted import PromptedT5, with_prompt
from ptjax.models.t5 import Encoded, init_params

EOS = 1


@functools.cache
def _model(vocab_size: int):
    config = tiny_config(vocab_size)
    prompt = jax.random.normal(jax.random.key(4), (3, 16))
    # These end some of the sequences that the tests decode, early and late.
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(3))
    return PromptedT5(config).apply, with_prompt({"params": params}, prompt)


@pytest.fixture
def model():
    return _model(24)


def _inputs(rows: int, vocab_size: int) -> np.ndarray:
    """Random inputs, each a little shorter than the one before."""
    tokens = np.random.default_rng(0).integers(2, vocab_size, (rows, 7), dtype=np.int32)
    for i, row in enumerate(tokens):
        row[7 - i % 4 :] = 0
    return tokens


def _log_probs(model, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Teacher-forced log p [B, L, V]."""
    apply_fn, variables = model
    logits = jax.jit(with_lengths(apply_fn))(variables, inputs, shift_right(targets, 0))
    return np.asarray(jax.nn.log_softmax(logits))


def _log_likelihood(
    model, inputs: np.ndarray, targets: np.ndarray, eos_id: int = EOS
) -> np.ndarray:
    chosen = np.take_along_axis(_log_probs(model, inputs, targets), targets[..., None], -1)[..., 0]
    return (chosen * (np.arange(targets.shape[1]) < _lengths(targets, eos_id)[:, None])).sum(axis=1)


def _lengths(targets: np.ndarray, eos_id: int = EOS) -> np.ndarray:
    """Tokens up to the first end of sequence, which is counted."""
    ended = targets == eos_id
    return np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, targets.shape[1])


def test_greedy_is_the_teacher_forced_argmax(model):
    inputs = _inputs(8, 24)
    tokens, scores = decode(*model, inputs, max_length=8, eos_id=-1)
    tokens = np.asarray(tokens)
    log_probs = _log_probs(model, inputs, tokens)
    np.testing.assert_array_equal(tokens, log_probs.argmax(axis=-1))
    np.testing.assert_allclose(scores, log_probs.max(axis=-1).sum(axis=1), rtol=1e-5)


def test_a_row_stops_at_its_end_of_sequence(model):
    inputs = _inputs(8, 24)
    free, _ = decode(*model, inputs, max_length=8, eos_id=-1)
    free = np.asarray(free)
    # The token that most rows write, but not all of them at the same step.
    eos_id = int(np.argmax([sum(t in row for row in free) for t in range(24)]))
    tokens, scores = decode(*model, inputs, max_length=8, eos_id=eos_id)
    lengths = _lengths(free, eos_id)
    assert len(set(lengths)) > 1
    inside = np.arange(8) < lengths[:, None]
    np.testing.assert_array_equal(tokens, np.where(inside, free, 0))
    gained = _log_probs(model, inputs, free).max(axis=-1)
    np.testing.assert_allclose(scores, (gained * inside).sum(axis=1), rtol=1e-5)


class Constant:
    """An `apply_fn` of one distribution at every step, which counts the decoder's steps.

    Rows without any input never end.
    """

    def __init__(self, probs: list[float]) -> None:
        self.logits, self.steps = np.log(np.asarray(probs, np.float32)), []

    def __call__(self, variables, *args, method, encoder_lengths=None, prompt_ids=None):
        if method == "encode":
            return Encoded(jnp.zeros((*args[0].shape, 1)), (args[0] > 0).astype(int))
        if method == "init_cache":
            empty = jnp.zeros((len(args[0].states), args[1], 1, 1))
            return [{"self_key": empty, "self_value": empty}]
        tokens, cache, position, encoded = args
        jax.debug.callback(self.steps.append, position)
        endless = jnp.arange(len(self.logits)) * 1e3
        real = encoded.segment_ids.any(axis=1).repeat(len(tokens) // len(encoded.segment_ids))
        real = real[:, None, None]
        return jnp.where(real, self.logits, endless), cache


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("filler", [False, True])
def test_the_loop_ends_as_soon_as_nothing_can_change(num_beams, filler):
    # Greedy stops at once. Of two beams (0.9, 0.09 * 0.9) both are final after two steps.
    apply_fn = Constant([1e-9, 0.9, 0.09, 0.01])
    inputs = np.asarray([[2], [0 if filler else 3]], np.int32)
    tokens, scores = decode(apply_fn, {}, inputs, max_length=6, num_beams=num_beams, alpha=0.0)
    jax.effects_barrier()
    assert len(apply_fn.steps) == num_beams
    assert np.asarray(tokens)[0].tolist() == [1, 0, 0, 0, 0, 0]
    assert scores[0] == pytest.approx(np.log(0.9), rel=1e-5)


def test_unfinished_rows_run_to_the_full_length():
    apply_fn = Constant([1e-9, 1e-9, 0.7, 0.3])
    for num_beams in (1, 2):
        apply_fn.steps.clear()
        settings = {"max_length": 4, "num_beams": num_beams, "alpha": 0.0, "eos_id": -1}
        tokens, scores = decode(apply_fn, {}, np.ones((1, 1), np.int32), **settings)
        jax.effects_barrier()
        assert len(apply_fn.steps) == 4
        assert np.asarray(tokens).tolist() == [[2, 2, 2, 2]]
        assert scores[0] == pytest.approx(4 * np.log(0.7), rel=1e-5)


def test_beams_live_on_whatever_ways_there_are_to_end():
    # Both ends are likelier than any word; five words and an end have the best score.
    apply_fn = Constant([0.34, 0.33, 0.23, 0.1])
    ids = SpecialIds(pad_id=2, eos_ids=(0, 1), decoder_start_id=2, forced_bos_id=None)
    inputs = np.ones((1, 1), np.int32)
    for num_beams in (1, 2, 3):
        settings = {"ids": ids, "max_length": 6, "num_beams": num_beams, "alpha": 4.0}
        tokens, scores = beam_search(apply_fn, {}, inputs, **settings)
        assert np.asarray(tokens)[0, 0].tolist() == [2] * 5 + [0]
        best = (5 * np.log(0.23) + np.log(0.34)) / (11 / 6) ** 4
        assert scores[0, 0] == pytest.approx(best, rel=1e-5)


class Counting:
    """A network that notes how many rows each step of the decoder has."""

    def __init__(self, apply_fn) -> None:
        self.apply_fn, self.rows = apply_fn, []

    def __call__(self, variables, *args, **settings):
        if settings.get("method") == "decode_step":
            jax.debug.callback(self.rows.append, jnp.int32(len(args[0])) + 0 * args[2])
        return self.apply_fn(variables, *args, **settings)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("how", ["greedy", "sampling", "beams"])
def test_finished_rows_stop_costing_and_change_nothing(model, monkeypatch, how, shards):
    """Two loops: 16 rows until three quarters of them have finished, and then four."""
    apply_fn, variables = model
    inputs = _inputs(16, 24)
    settings = {"max_length": 30 if how == "sampling" else 12, "eos_id": 15, "shards": shards}
    if how == "beams":
        settings |= {"num_beams": 2, "alpha": 0.0}
    if how == "sampling":
        settings |= {"keys": jax.random.split(jax.random.key(5), 16), "temperature": 2.0}
    found = {}
    for fewest in (1000, 4 // shards):
        monkeypatch.setattr(decode_loop, "FEWEST_ROWS", fewest)
        counting = Counting(apply_fn)
        found[fewest] = decode(counting, variables, inputs, **settings)
        jax.effects_barrier()
        found[fewest] += ([int(rows) for rows in counting.rows],)
    (tokens, scores, whole), (fewer_tokens, fewer_scores, fewer) = found.values()
    np.testing.assert_array_equal(fewer_tokens, tokens)
    # Products of fewer rows may add in another order.
    np.testing.assert_allclose(fewer_scores, scores, rtol=1e-5)
    assert len(set(_lengths(np.asarray(tokens), 15))) > 2
    beams = settings.get("num_beams", 1)
    assert set(whole) == {16 * beams}
    few = fewer.count(4 * beams)
    assert fewer == [16 * beams] * (len(whole) - few) + [4 * beams] * few and 0 < few < len(whole)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_loop_carries_no_array_of_the_encoder_s_output(scan_layers, num_beams):
    """It would be in memory twice; and beams share those of their row."""
    config = tiny_config(24, scan_layers=scan_layers, num_decoder_layers=2)
    settings = {"max_length": 5, "num_beams": num_beams, "ids": T5_IDS}
    run = functools.partial(decoding.decode, PromptedT5(config).apply, **settings)
    variables = {"params": tiny_params(config)}
    traced = jax.make_jaxpr(run)(variables, _inputs(4, 24), np.full(4, 7))
    [loop] = [one for one in traced.eqns if one.primitive.name == "while"]
    constants = loop.params["cond_nconsts"] + loop.params["body_nconsts"]
    shapes = [[x.aval.shape for x in part] for part in (loop.invars[:constants], loop.outvars)]
    kept, carried = ([s for s in part if s[-3:-2] + s[-1:] == (2, 8)] for part in shapes)
    layers = (2,) if scan_layers else ()
    assert set(kept) == {(*layers, 4, 2, 7, 8)}  # heads first: no product of a step moves them
    assert set(carried) == {(*layers, 4 * num_beams, 2, 5, 8)}


def test_filler_rows_do_not_change_the_others(model):
    inputs = _inputs(8, 24)
    some = np.where(np.arange(8)[:, None] < 5, inputs, 0)
    for num_beams in (1, 4):
        settings = {"max_length": 8, "num_beams": num_beams}
        tokens, scores = decode(*model, inputs, **settings)
        some_tokens, some_scores = decode(*model, some, **settings)
        np.testing.assert_array_equal(some_tokens[:5], tokens[:5])
        np.testing.assert_allclose(some_scores[:5], scores[:5], rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_a_wide_beam_search_is_brute_force(alpha):
    vocab_size, length = 5, 3
    model = _model(vocab_size)
    inputs = _inputs(2, vocab_size)
    bodies = [t for t in range(vocab_size) if t != EOS]
    ended = [
        [*body, EOS, *[0] * (length - n - 1)]
        for n in range(length)
        for body in itertools.product(bodies, repeat=n)
    ]
    ended = np.asarray(ended, np.int32)
    tokens, scores = beam_search(*model, inputs, max_length=length, num_beams=40, alpha=alpha)
    for row, row_tokens, row_scores in zip(inputs, tokens, scores, strict=True):
        likelihood = _log_likelihood(model, np.tile(row, (len(ended), 1)), ended)
        expected = likelihood / ((5 + _lengths(ended)) / 6) ** alpha
        order = np.argsort(-expected)
        np.testing.assert_allclose(row_scores[: len(ended)], expected[order], rtol=1e-5)
        np.testing.assert_array_equal(row_tokens[: len(ended)], ended[order])
        assert np.all(np.isneginf(row_scores[len(ended) :]))


def test_a_narrow_beam_search_reports_its_own_sequences_scores(model):
    inputs = _inputs(8, 24)
    tokens, scores = beam_search(*model, inputs, max_length=8, num_beams=4, alpha=0.6, eos_id=-1)
    tokens, scores = np.asarray(tokens), np.asarray(scores)
    assert np.all(np.diff(scores, axis=1) <= 0)
    for beam in range(4):
        assert len({tuple(row) for row in tokens.reshape(-1, 8)}) == 32
        likelihood = _log_likelihood(model, inputs, tokens[:, beam], -1)
        np.testing.assert_allclose(scores[:, beam], likelihood / (13 / 6) ** 0.6, rtol=1e-5)
    best, best_scores = decode(*model, inputs, max_length=8, num_beams=4, alpha=0.6, eos_id=-1)
    np.testing.assert_array_equal(best, tokens[:, 0])
    np.testing.assert_array_equal(best_scores, scores[:, 0])
    _, greedy_scores = decode(*model, inputs, max_length=8, eos_id=-1)
    assert np.all(scores[:, 0] * (13 / 6) ** 0.6 >= greedy_scores - 1e-5)


def test_one_beam_that_never_ends_is_greedy(model):
    inputs = _inputs(8, 24)
    tokens, _ = beam_search(*model, inputs, max_length=8, num_beams=1, eos_id=-1)
    greedy, _ = decode(*model, inputs, max_length=8, eos_id=-1)
    np.testing.assert_array_equal(tokens[:, 0], greedy)


def _first_tokens(model, row: np.ndarray, draws: int, **settings) -> np.ndarray:
    """Relative frequency [V] of the first token over `draws` samples."""
    inputs = np.tile(row, (draws, 1))
    keys = jax.random.split(jax.random.key(0), draws)
    tokens, _ = decode(*model, inputs, max_length=1, keys=keys, **settings)
    return np.bincount(np.asarray(tokens)[:, 0], minlength=24) / draws


def test_sampling_follows_the_softmax(model):
    row = _inputs(1, 24)[0]
    log_probs = _log_probs(model, row[None], np.zeros((1, 1), np.int32))[0, 0]
    for temperature in (1.0, 0.5):
        expected = np.asarray(jax.nn.softmax(log_probs / temperature))
        drawn = _first_tokens(model, row, 8192, temperature=temperature)
        np.testing.assert_allclose(drawn, expected, atol=4 * np.sqrt(0.25 / 8192))
        assert 0.5 * np.abs(drawn - expected).sum() < 0.03


def test_top_p_keeps_the_fewest_tokens_that_reach_it(model):
    row = _inputs(1, 24)[0]
    probs = np.exp(_log_probs(model, row[None], np.zeros((1, 1), np.int32))[0, 0])
    order = np.argsort(-probs)
    kept = order[: int(np.searchsorted(np.cumsum(probs[order]), 0.6)) + 1]
    assert 1 < len(kept) < 24
    expected = np.zeros(24)
    expected[kept] = probs[kept] / probs[kept].sum()
    drawn = _first_tokens(model, row, 8192, top_p=0.6)
    assert set(np.flatnonzero(drawn)) == set(kept)
    np.testing.assert_allclose(drawn, expected, atol=4 * np.sqrt(0.25 / 8192))


def test_a_vanishing_top_p_is_greedy(model):
    inputs = _inputs(8, 24)
    keys = jax.random.split(jax.random.key(1), 8)
    tokens, scores = decode(*model, inputs, max_length=8, keys=keys, top_p=1e-6, temperature=2.0)
    greedy, greedy_scores = decode(*model, inputs, max_length=8)
    np.testing.assert_array_equal(tokens, greedy)
    np.testing.assert_allclose(scores, greedy_scores, rtol=1e-6)


def test_samples_differ_between_steps_and_keys_but_not_with_the_rest_of_the_batch(model):
    inputs = np.tile(_inputs(1, 24), (8, 1))
    keys = jax.random.split(jax.random.key(2), 8)
    settings = {"max_length": 8, "temperature": 5.0, "eos_id": -1}
    tokens, scores = decode(*model, inputs, keys=keys, **settings)
    tokens = np.asarray(tokens)
    assert len({tuple(row) for row in tokens}) == 8
    assert all(len(set(row)) > 1 for row in tokens)
    some, _ = decode(*model, inputs[2:4], keys=keys[2:4], **settings)
    np.testing.assert_array_equal(some, tokens[2:4])
    np.testing.assert_allclose(scores, _log_likelihood(model, inputs, tokens, -1), rtol=1e-5)


def test_bfloat16_activations_decode_too():
    config = tiny_config(24, logits_via_embedding=True, dtype="bfloat16")
    variables = jax.tree.map(lambda x: x.astype(jnp.bfloat16), {"params": tiny_params(config)})
    for num_beams in (1, 2):
        tokens, scores = decode(
            PromptedT5(config).apply, variables, _inputs(2, 24), max_length=3, num_beams=num_beams
        )
        assert tokens.shape == (2, 3)
        assert scores.dtype == jnp.float32
        assert np.all(np.isfinite(scores))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_longer_cache_changes_nothing(model, num_beams):
    """Five tokens in a cache of eight are as in a cache of five."""
    inputs, settings = _inputs(6, 24), {"num_beams": num_beams}
    tokens, scores = decode(*model, inputs, max_length=8, limit=5, **settings)
    expected, expected_scores = decode(*model, inputs, max_length=5, **settings)
    np.testing.assert_array_equal(tokens[:, :5], expected)
    assert not np.any(tokens[:, 5:])
    # Sums over more masked keys: float32 rounding.
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)
