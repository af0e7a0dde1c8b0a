"""The prompt in front of the backbone: exact where it can be, and the oracle's numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from t5_ids import with_lengths

from ptjax.models.prompted import PromptedT5, with_prompt
from ptjax.models.t5 import parameter_shapes
from ptjax.training.loss import Loss
from ptjax.trees import flatten_paths


def tokens_of(batch):
    return jnp.asarray(batch["encoder_input_tokens"]), jnp.asarray(batch["decoder_input_tokens"])


def test_prompt_of_length_zero_is_plain_t5(tiny, tiny_batch) -> None:
    plain = {"params": tiny.params}
    none = with_prompt(plain, jnp.zeros((0, tiny.config.emb_dim)))
    run = tiny.jitted()
    np.testing.assert_array_equal(
        run(none, *tokens_of(tiny_batch)), run(plain, *tokens_of(tiny_batch))
    )


def test_prompt_copied_from_the_embedding_is_typing_those_tokens(tiny, tiny_batch) -> None:
    typed = np.array([17, 3, 60, 3])
    prompt = tiny.params["token_embedder"]["embedding"][typed]
    inputs, targets = tokens_of(tiny_batch)
    longer = np.concatenate([np.broadcast_to(typed, (len(inputs), 4)), inputs], axis=1)
    run, plain = tiny.jitted(), {"params": tiny.params}
    np.testing.assert_array_equal(
        run(with_prompt(plain, prompt), inputs, targets), run(plain, longer, targets)
    )
    encoded = run(with_prompt(plain, prompt), inputs, method="encode")
    np.testing.assert_array_equal(encoded.segment_ids, longer > 0)
    assert encoded.states.shape == (*longer.shape, tiny.config.emb_dim)


def test_every_parameter_keeps_its_t5x_path(tiny, tiny_batch) -> None:
    want = flatten_paths(parameter_shapes(tiny.config))
    module = PromptedT5(tiny.config)
    init, apply = with_lengths(module.init), with_lengths(module.apply)
    got = jax.eval_shape(init, jax.random.key(0), *tokens_of(tiny_batch))
    assert set(got) == {"params"}
    assert flatten_paths(got["params"]) == want
    assert len(want) == 52
    # And with a prompt: every parameter below is looked up by its path.
    _, seen = jax.eval_shape(
        lambda v: apply(v, *tokens_of(tiny_batch), mutable=True), tiny.variables
    )
    assert set(flatten_paths(seen)) == {f"params/{path}" for path in want} | {"prompt/prompt"}


def test_prompt_per_example_equals_one_by_one(tiny, tiny_batch) -> None:
    inputs, targets = tokens_of(tiny_batch)
    bank = jax.random.normal(jax.random.key(2), (len(inputs), *tiny.prompt.shape))
    run, plain = tiny.jitted(), {"params": tiny.params}
    together = run(with_prompt(plain, bank), inputs, targets)
    for i in range(len(inputs)):
        alone = run(with_prompt(plain, bank[i]), inputs[i : i + 1], targets[i : i + 1])
        np.testing.assert_allclose(together[i], alone[0], rtol=0, atol=1e-5)


def test_prompt_gradient_adds_up_in_float32_under_bfloat16(tiny, tiny_batch) -> None:
    apply = with_lengths(tiny.apply_fn(dtype="bfloat16"))

    @jax.jit
    @jax.grad
    def gradient(prompt):
        logits = apply(with_prompt({"params": tiny.params}, prompt), *tokens_of(tiny_batch))
        names = ("decoder_target_tokens", "decoder_loss_weights")
        return Loss()(logits, *(jnp.asarray(tiny_batch[name]) for name in names))

    shared = gradient(tiny.prompt)
    # The same prompt for each example gives each example's own gradient.
    copies = jnp.broadcast_to(tiny.prompt, (8, *tiny.prompt.shape))
    summed = np.asarray(gradient(copies)).astype(np.float64).sum(0)
    assert shared.dtype == jnp.float32
    # float32 sums of 8 differ by 1e-7 of the largest element, bfloat16 ones by 1e-3.
    np.testing.assert_allclose(shared, summed, rtol=0, atol=1e-5 * np.abs(summed).max())


def test_with_prompt_replaces_removes_and_casts(tiny) -> None:
    other = with_prompt(tiny.variables, np.ones((2, 16), np.float16))
    assert other["params"] is tiny.params
    assert other["prompt"]["prompt"].shape == (2, 16)
    assert other["prompt"]["prompt"].dtype == jnp.float32
    assert set(with_prompt(tiny.variables, None)) == {"params"}
    assert set(tiny.variables) == {"params", "prompt"}


def test_oracle_logits_encoding_loss_and_gradient(t5_1_1, oracle) -> None:
    batch, want = oracle["batch"], oracle[""]
    targets = batch["decoder_target_tokens"]
    weights = (targets > 0).astype(np.float32)

    @jax.jit
    def run(prompt):
        def loss(prompt):
            logits = with_lengths(t5_1_1.apply_fn)(
                with_prompt(t5_1_1.variables, prompt), *tokens_of(batch)
            )
            return Loss()(logits, jnp.asarray(targets), jnp.asarray(weights)), logits

        return jax.value_and_grad(loss, has_aux=True)(prompt)

    (loss, logits), gradient = run(want["prompt"])
    real = targets > 0
    np.testing.assert_allclose(logits[real], want["logits"][real], rtol=0, atol=1e-4)
    np.testing.assert_allclose(loss, want["loss"], rtol=1e-5)
    scale = np.abs(want["prompt_grad"]).max()
    np.testing.assert_allclose(gradient, want["prompt_grad"], rtol=0, atol=1e-5 * scale)

    encode = jax.jit(with_lengths(t5_1_1.apply_fn), static_argnames="method")
    variables = with_prompt(t5_1_1.variables, want["prompt"])
    encoded = encode(variables, batch["encoder_input_tokens"], method="encode")
    real = encoded.segment_ids > 0
    np.testing.assert_allclose(encoded.states[real], want["encoded"][real], rtol=0, atol=1e-5)
