"""The network against T5X's numbers, and the properties that hold whatever the weights are."""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FIXTURES, load_expected
from t5_ids import with_lengths

from ptjax.models.config import T5Config
from ptjax.models.layers import Dense, relative_position_bucket
from ptjax.models.t5 import T5, Encoded, init_params, parameter_shapes
from ptjax.training.loss import Loss
from ptjax.trees import flatten_paths

# V, D, F, H, K, encoder layers, decoder layers, total. T5 1.1's equal Table 4 of Lester et al.
# 2021, the rest are counted from T5X's own trees. Every released size: test_model_configs.py.
SIZES = {
    "t5_1_1_small": (32128, 512, 1024, 6, 64, 8, 8, 76_961_152),
    "t5_1_1_base": (32128, 768, 2048, 12, 64, 12, 12, 247_577_856),
    "t5_1_1_large": (32128, 1024, 2816, 16, 64, 24, 24, 783_150_080),
    "t5_1_1_xl": (32128, 2048, 5120, 32, 64, 24, 24, 2_849_757_184),
    "t5_1_1_xxl": (32128, 4096, 10240, 64, 64, 24, 24, 11_135_332_352),
    "t5_1_0_small": (32128, 512, 2048, 8, 64, 6, 6, 60_506_624),
    "mt5_small": (250112, 512, 1024, 6, 64, 8, 8, 300_176_768),
    "byt5_small": (384, 1472, 3584, 6, 64, 12, 4, 299_637_760),
}


@pytest.mark.parametrize("name", SIZES)
def test_parameter_totals_of_released_sizes(name) -> None:
    vocab_size, emb_dim, mlp_dim, heads, head_dim, encoder, decoder, total = SIZES[name]
    old = name.startswith("t5_1_0")
    config = T5Config(
        vocab_size=vocab_size,
        emb_dim=emb_dim,
        num_heads=heads,
        num_encoder_layers=encoder,
        num_decoder_layers=decoder,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        mlp_activations=("relu",) if old else ("gelu", "linear"),
        logits_via_embedding=old,
    )
    leaves = jax.tree.leaves(parameter_shapes(config))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == total
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}


@pytest.mark.parametrize("relpos_per_layer", [False, True])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_parameters_of_many_layers_are_those_that_are_made(scan_layers, relpos_per_layer) -> None:
    settings = {"scan_layers": scan_layers, "relpos_per_layer": relpos_per_layer}
    config = T5Config(32, 8, 2, 11, 2, 4, 8, **settings)
    made = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    found = parameter_shapes(config)
    assert found == made and list(flatten_paths(found)) == list(flatten_paths(made))


def test_an_initialiser_is_not_traced_where_there_are_parameters() -> None:
    """Flax would, to compare shapes, which took 40% of the time to trace T5."""

    def fail(*_) -> jax.Array:
        raise AssertionError("the initialiser was called")

    kernel = {"params": {"kernel": jnp.ones((4, 3))}}
    assert Dense(3, jnp.float32, fail).apply(kernel, jnp.ones((2, 4))).tolist() == [[4.0] * 3] * 2


@pytest.mark.parametrize("name", ["t5_1_1", "t5_1_0"])
def test_parameter_paths_and_shapes_are_t5x(name, request) -> None:
    config = request.getfixturevalue(name).config
    manifest = json.loads((FIXTURES / f"{name}_tiny_legacy" / "params_manifest.json").read_text())
    leaves = flatten_paths(parameter_shapes(config))
    shapes = {path: list(leaf.shape) for path, leaf in leaves.items()}
    assert shapes == {path: row["shape"] for path, row in manifest.items()}


def real(expected: dict[str, np.ndarray]) -> np.ndarray:
    return expected["decoder_target_tokens"] > 0


CASES = [
    ("t5_1_1_tiny_legacy", "t5_1_1", "short"),
    ("t5_1_1_tiny_legacy", "t5_1_1", "long"),
    ("t5_1_0_tiny_legacy", "t5_1_0", "short"),
    ("t5_1_0_tiny_legacy", "t5_1_0", "long"),
]


@pytest.mark.parametrize(("name", "backbone", "length"), CASES)
def test_logits_and_loss_are_t5x(name, backbone, length, request) -> None:
    backbone = request.getfixturevalue(backbone)
    want = load_expected(name)[length]
    logits = jax.jit(with_lengths(backbone.apply_fn))(
        backbone.variables, want["encoder_input_tokens"], want["decoder_input_tokens"]
    )
    np.testing.assert_allclose(logits[real(want)], want["logits"][real(want)], rtol=0, atol=1e-4)
    targets = jnp.asarray(want["decoder_target_tokens"])
    weights = jnp.asarray(real(want), jnp.float32)
    loss = Loss()(logits, targets, weights)
    np.testing.assert_allclose(loss, want["loss"], rtol=1e-5)
    z_loss = loss - Loss(z_loss=0.0)(logits, targets, weights)
    np.testing.assert_allclose(z_loss, want["z_loss"], rtol=1e-3)


@pytest.mark.parametrize(("name", "backbone"), [case[:2] for case in CASES[::2]])
def test_encoder_output_is_t5x(name, backbone, request) -> None:
    backbone = request.getfixturevalue(backbone)
    want = load_expected(name)["short"]
    tokens = want["encoder_input_tokens"]
    apply = jax.jit(with_lengths(backbone.apply_fn), static_argnames="method")
    encoded = apply(backbone.variables, tokens, method="encode")
    np.testing.assert_array_equal(encoded.segment_ids, tokens > 0)
    real = tokens > 0
    np.testing.assert_allclose(encoded.states[real], want["encoded"][real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("prompted", [False, True])
def test_decoding_step_by_step_equals_teacher_forcing(tiny, tiny_batch, prompted) -> None:
    apply = with_lengths(tiny.apply_fn())
    variables = tiny.variables if prompted else {"params": tiny.params}
    inputs, tokens = tiny_batch["encoder_input_tokens"], tiny_batch["decoder_input_tokens"]

    @jax.jit
    def begin(inputs):
        encoded = apply(variables, inputs, method="encode")
        return encoded, apply(variables, encoded, tokens.shape[1], method="init_cache")

    @jax.jit
    def step(tokens, cache, position, encoded):
        return apply(variables, tokens, cache, position, encoded, method="decode_step")

    whole = tiny.jitted()(variables, inputs, tokens)
    encoded, cache = begin(inputs)
    # Two tokens at once, then one by one: a prefix may come in a piece.
    for start, stop in ((0, 2), (2, 3), (3, 4), (4, 5), (5, 6)):
        logits, cache = step(tokens[:, start:stop], cache, start, encoded)
        np.testing.assert_allclose(logits, whole[:, start:stop], rtol=0, atol=2e-5)


def logits_of(tiny, batch, **changes):
    return tiny.jitted(**changes)(
        tiny.variables, batch["encoder_input_tokens"], batch["decoder_input_tokens"]
    )


def test_padding_of_inputs_and_targets_is_invisible(tiny, tiny_batch) -> None:
    names = ("encoder_input_tokens", "decoder_input_tokens")
    longer = {name: np.pad(tiny_batch[name], ((0, 0), (0, 20))) for name in names}
    seen = tiny_batch["decoder_target_tokens"] > 0
    short, long = logits_of(tiny, tiny_batch), logits_of(tiny, longer)[:, : seen.shape[1]]
    # Masked keys weigh exactly 0; only the order of the sums differs. A visible padding token
    # would move the logits by more than 1e-2.
    np.testing.assert_allclose(short[seen], long[seen], rtol=0, atol=1e-5)


def test_what_stands_at_masked_positions_changes_nothing(tiny, tiny_batch) -> None:
    # `decode` takes states and segments apart, so here real garbage can stand behind the mask.
    apply, variables = tiny.jitted(), tiny.variables
    encoded = apply(variables, tiny_batch["encoder_input_tokens"], method="encode")
    garbage = jnp.where((encoded.segment_ids > 0)[..., None], encoded.states, 1e3)
    both = encoded, encoded._replace(states=garbage)
    tokens = tiny_batch["decoder_input_tokens"]
    clean, dirty = (apply(variables, x, tokens, method="decode") for x in both)
    np.testing.assert_array_equal(clean, dirty)


def test_a_row_of_padding_alone_is_finite(tiny) -> None:
    empty = {
        "encoder_input_tokens": np.zeros((1, 4), int),
        "decoder_input_tokens": np.zeros((1, 3), int),
    }
    assert jnp.isfinite(tiny.jitted()({"params": tiny.params}, *empty.values())).all()
    assert jnp.isfinite(logits_of(tiny, empty)).all()


def test_decoder_sees_only_what_is_before(tiny) -> None:
    module = T5(tiny.config)
    rng = np.random.default_rng(0)
    states = jnp.asarray(rng.standard_normal((1, 5, tiny.config.emb_dim)), jnp.float32)
    encoded = Encoded(states, jnp.ones((1, 5), jnp.int32))
    inputs = jnp.asarray(rng.standard_normal((1, 6, tiny.config.emb_dim)), jnp.float32)

    def run(inputs):
        def decode(module, inputs):
            return module.decoder(inputs, encoded, True)[0]

        return module.apply({"params": tiny.params}, inputs, method=decode)[0]

    # reach[i, j]: how much output i moves with input j.
    reach = np.abs(jax.jit(jax.jacobian(run))(inputs)).sum((1, 2, 4))
    assert (reach[np.tri(6, dtype=bool)] > 1e-6).all()
    assert (reach[~np.tri(6, dtype=bool)] == 0).all()


def bucket_by_hand(distance: int, bidirectional: bool, buckets: int, far: int) -> int:
    """Half of the buckets are single distances, the others grow geometrically up to `far`."""
    offset = 0
    if bidirectional:
        buckets //= 2
        offset = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return offset + distance
    # Bucket b begins at exact * (far / exact) ** ((b - exact) / (buckets - exact)).
    bucket = exact
    while bucket < buckets - 1 and distance ** (buckets - exact) * exact ** (
        bucket + 1 - exact
    ) >= (far ** (bucket + 1 - exact) * exact ** (buckets - exact)):
        bucket += 1
    return offset + bucket


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (4, 8)])
def test_relative_position_buckets_by_brute_force(bidirectional, buckets, far) -> None:
    distances = np.arange(-200, 201)
    got = relative_position_bucket(
        distances, bidirectional=bidirectional, num_buckets=buckets, max_distance=far
    )
    want = [bucket_by_hand(int(d), bidirectional, buckets, far) for d in distances]
    np.testing.assert_array_equal(got, want)


def test_bfloat16_activations_give_float32_logits(tiny, tiny_batch) -> None:
    for tied in (False, True):
        config = dataclasses.replace(tiny.config, logits_via_embedding=tied)
        exact = logits_of(tiny, tiny_batch, logits_via_embedding=tied)
        rounded = logits_of(tiny, tiny_batch, logits_via_embedding=tied, dtype="bfloat16")
        assert exact.dtype == rounded.dtype == jnp.float32, config
        difference = np.abs(exact - rounded).max()
        # Rounded somewhere, but not at the end: bfloat16 logits would be equal to their rounding.
        assert 1e-4 < difference < 0.5
        assert (rounded != rounded.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9


@pytest.mark.parametrize("half", ["encode", "decode"])
def test_dropout_acts_in_training_alone_and_follows_its_key(tiny, tiny_batch, half) -> None:
    inputs, tokens = tiny_batch["encoder_input_tokens"], tiny_batch["decoder_input_tokens"]
    shape = (*inputs.shape, tiny.config.emb_dim)
    encoded = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    read = Encoded(encoded, (inputs > 0).astype(np.int32))
    args = (inputs,) if half == "encode" else (read, tokens)

    def run(seed=None):
        rngs = None if seed is None else {"dropout": jax.random.key(seed)}
        train = seed is not None
        plain = {"params": tiny.params}
        return jax.tree.leaves(tiny.jitted()(plain, *args, train=train, rngs=rngs, method=half))[0]

    np.testing.assert_array_equal(run(0), run(0))
    assert (run(0) != run(1)).any()
    assert (run(0) != run()).any()
