"""Computes logits, losses and prompt gradients of batches of token ids."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from ptjax.backbones.load import Backbone
from ptjax.data.batch import length_weights, trailing_lengths
from ptjax.errors import InputError
from ptjax.inference.bank import PromptIds, choose_prompts
from ptjax.inference.model import bind
from ptjax.inference.prompts import PromptLike, open_prompt, open_single
from ptjax.models.family import ApplyFn
from ptjax.models.prompted import with_prompt
from ptjax.training.loss import Loss
from ptjax.trees import Variables

TokenBatch = Mapping[str, ArrayLike]
"""A batch's arrays by T5X's names: tokens and lengths of any integer type, weights as floats."""


def forward(
    backbone: Backbone,
    batch: TokenBatch,
    prompt: PromptLike = None,
    prompt_ids: PromptIds = None,
) -> Float[Array, "B L V"]:
    """Computes the float32 logits of a batch, without dropout.

    The first call with a batch of another shape compiles a program for it.

    Args:
        batch: `encoder_input_tokens` [B, T] and `decoder_input_tokens` [B, L]; optionally
            `encoder_lengths` [B], the number of real tokens in each row. Without them a row ends
            where its trailing `config.pad_id`s begin.
        prompt: an array [P, D], the result of `load_prompt` (or any object with such an array as
            its `.prompt`) or of `load_adapter`, a path or name that one of them takes, a bank from
            `make_bank`, or None for the backbone alone.
        prompt_ids: each row's prompt by name or number, for a bank only. None, "none" or -1 means
            the backbone alone.

    Raises:
        InputError: a name is missing from the batch, a row without a length begins with padding,
            the prompt does not fit the backbone, or the bank has no prompt of that name or number.
    """
    opened = open_prompt(backbone, prompt)
    model = bind(backbone, opened)
    inputs, targets = _tokens(backbone, batch, "encoder_input_tokens", "decoder_input_tokens")
    lengths = _encoder_lengths(backbone, batch, inputs)
    ids = choose_prompts(opened, prompt_ids, len(inputs))
    return _forward(model.apply_fn, model.variables, inputs, lengths, targets, ids)


def loss_and_prompt_gradient(
    backbone: Backbone, batch: TokenBatch, prompt: PromptLike
) -> tuple[Float[Array, ""], Float[Array, "P D"]]:
    """Computes T5X's training loss of a batch, and its gradient with respect to the prompt.

    Both are float32 and computed without dropout. The loss is `Loss()` with its default settings,
    summed over the target tokens.

    Args:
        batch: as for `forward`, with `decoder_target_tokens` [B, L] and optionally
            `decoder_loss_weights` [B, L]; the default is 1 up to a row's trailing padding.
        prompt: as for `forward`, but neither None nor a bank.

    Raises:
        InputError: as for `forward`, or the prompt is None or a bank.
    """
    opened = open_single(backbone, prompt)
    if opened is None:
        raise InputError("loss_and_prompt_gradient needs a prompt [P, D], not None")
    # The gradient is that of the matrix, so precomputed keys and values have no place here.
    model = bind(backbone, dataclasses.replace(opened, states=None))
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    inputs, decoder_inputs, targets = _tokens(backbone, batch, *names)
    weights = batch.get("decoder_loss_weights")
    if weights is None:
        lengths = trailing_lengths(targets, backbone.config.pad_id)
        weights = length_weights(lengths, targets.shape[1])
    weights = np.asarray(weights, np.float32)
    if not decoder_inputs.shape == targets.shape == weights.shape:
        raise InputError(
            f"decoder_input_tokens {list(decoder_inputs.shape)}, decoder_target_tokens "
            f"{list(targets.shape)} and decoder_loss_weights {list(weights.shape)} must have "
            "the same shape"
        )
    return _loss_and_prompt_gradient(
        model.apply_fn,
        backbone.variables,
        model.variables["prompt"]["prompt"],
        inputs,
        _encoder_lengths(backbone, batch, inputs),
        decoder_inputs,
        targets,
        weights,
    )


@functools.partial(jax.jit, static_argnames="apply_fn")
def _forward(
    apply_fn: ApplyFn,
    variables: Variables,
    inputs: Array,
    lengths: Array,
    targets: Array,
    prompt_ids: Array | None,
) -> Array:
    return apply_fn(variables, inputs, targets, encoder_lengths=lengths, prompt_ids=prompt_ids)


@functools.partial(jax.jit, static_argnames="apply_fn")
def _loss_and_prompt_gradient(
    apply_fn: ApplyFn,
    variables: Variables,
    prompt: Array,
    encoder_input_tokens: Array,
    encoder_lengths: Array,
    decoder_input_tokens: Array,
    targets: Array,
    weights: Array,
) -> tuple[Array, Array]:
    def loss(prompt: Array) -> Array:
        logits = apply_fn(
            with_prompt(variables, prompt),
            encoder_input_tokens,
            decoder_input_tokens,
            encoder_lengths=encoder_lengths,
        )
        return Loss()(logits, targets, weights)

    return jax.value_and_grad(loss)(prompt)


def _encoder_lengths(
    backbone: Backbone, batch: TokenBatch, inputs: np.ndarray
) -> Int[np.ndarray, " B"]:
    """The batch's own lengths, else those up to each row's trailing padding."""
    if "encoder_lengths" in batch:
        lengths = np.asarray(batch["encoder_lengths"], np.int32)
        width = inputs.shape[1]
        if lengths.shape != inputs.shape[:1] or not np.all((lengths >= 0) & (lengths <= width)):
            raise InputError(
                f"encoder_lengths {lengths.tolist()} must be {len(inputs)} numbers from 0 to "
                f"{width}, one for each row of encoder_input_tokens"
            )
        return lengths
    pad_id = backbone.config.pad_id
    lengths = trailing_lengths(inputs, pad_id)
    first = inputs[:, :1] == pad_id
    if in_front := np.flatnonzero(first.any(axis=1) & (lengths > 0)).tolist():
        raise InputError(
            f"row {in_front[0]} of encoder_input_tokens begins with the padding id {pad_id} "
            "and has text after it; pad on the right, or pass encoder_lengths if that id is text"
        )
    return lengths


def _tokens(backbone: Backbone, batch: TokenBatch, *names: str) -> list[np.ndarray]:
    """The tokens int32 [B, ...] of each name; JAX would clip an id that has no embedding."""
    arrays = []
    for name in names:
        if name not in batch:
            raise InputError(f"the batch has no {name!r}; it has {sorted(batch)}")
        tokens = np.asarray(batch[name], np.int32)
        if tokens.ndim != 2 or len(tokens) != len(arrays[0] if arrays else tokens):
            raise InputError(
                f"{name} has shape {list(tokens.shape)}; expected [B, length] with the same B as "
                "the other arrays"
            )
        rows = backbone.config.vocab_size
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < rows:
            raise InputError(
                f"{name} holds ids from {tokens.min()} to {tokens.max()}, {backbone.name} has "
                f"{rows}; tokenize with the backbone's own tokenizer"
            )
        arrays.append(tokens)
    return arrays
