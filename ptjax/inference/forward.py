"""From Python, what a backbone and a prompt say: logits, gradients, texts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from ptjax.backbones.damage import check_scores
from ptjax.backbones.load import Backbone
from ptjax.data.batch import length_weights, trailing_lengths
from ptjax.data.pipeline import make_buckets
from ptjax.data.vocabularies import missing_tokenizer
from ptjax.errors import InputError
from ptjax.inference.answering import predict_texts, rows_at_once, tokenize_inputs
from ptjax.inference.prompts import (
    PromptBank,
    attends_to_input,
    choose_prompts,
    open_prompt,
    prompt_array,
    prompted,
)
from ptjax.models.prompt import NO_PROMPT_ID
from ptjax.models.prompted import with_prompt
from ptjax.training.loss import Loss
from ptjax.trees import Variables

PromptIds = Sequence[str | int | None] | np.ndarray | None

INPUT_LENGTH, MAX_NEW_TOKENS = 512, 64
"""In tokens, where neither the caller nor the prompt says."""


def forward(
    backbone: Backbone,
    batch: Mapping[str, Any],
    prompt: Any = None,
    prompt_ids: PromptIds = None,
) -> Float[Array, "B L V"]:
    """Float32 logits for a batch under T5X's names, dropout off.

    Args:
        batch: `encoder_input_tokens` [B, T] and `decoder_input_tokens` [B, L]; with
            `encoder_lengths` [B], how many of a row's tokens are real. Without them a row ends
            where its trailing `config.pad_id`s begin.
        prompt: an array [P, D], something with such an array as its `.prompt` (what `load_prompt`
            gives: whether it sees its input is its own affair), the path of such a file, None, or
            a `PromptBank`.
        prompt_ids: of a bank, each row's prompt: its name or number; None, "none" or -1 is none.

    Raises:
        InputError: a name is missing from the batch, a row without a length begins with padding,
            the prompt has another width, or the bank has no such prompt.
    """
    prompt = open_prompt(prompt)
    apply_fn, variables = prompted(backbone, prompt)
    inputs, targets = _tokens(backbone, batch, "encoder_input_tokens", "decoder_input_tokens")
    lengths = _encoder_lengths(backbone, batch, inputs)
    ids = choose_prompts(prompt, prompt_ids, len(inputs))
    return _forward(apply_fn, variables, inputs, lengths, targets, ids)


def loss_and_prompt_gradient(
    backbone: Backbone, batch: Mapping[str, Any], prompt: Any
) -> tuple[Float[Array, ""], Float[Array, "P D"]]:
    """T5X's training loss with its defaults, and its float32 gradient by the prompt; no dropout.

    Args:
        batch: as for `forward`, with `decoder_target_tokens` [B, L] and, unless every target up to
            its trailing padding counts 1, `decoder_loss_weights` [B, L].
        prompt: as for `forward`, but neither None nor a bank.

    Raises:
        InputError: as `forward`, or there is no prompt.
    """
    prompt = open_prompt(prompt)
    array = prompt_array(backbone, prompt)
    apply_fn = backbone.make_apply_fn(attends_to_input(prompt))
    if array is None:
        raise InputError("loss_and_prompt_gradient needs a prompt [P, D], not None")
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
            f"{list(targets.shape)} and decoder_loss_weights {list(weights.shape)} have to be of "
            "one shape"
        )
    return _loss_and_prompt_gradient(
        apply_fn,
        backbone.variables,
        array,
        inputs,
        _encoder_lengths(backbone, batch, inputs),
        decoder_inputs,
        targets,
        weights,
    )


def generate(
    backbone: Backbone,
    texts: Sequence[str],
    prompt: Any = None,
    *,
    prompt_ids: PromptIds = None,
    max_new_tokens: int | Sequence[int] | None = None,
    input_length: int | Sequence[int] | None = None,
    num_beams: int = 1,
    alpha: float = 0.6,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
) -> list[str]:
    """What the backbone writes for each text, in order.

    >>> generate(backbone, ["a text"], prompt=prompt)  # doctest: +SKIP
    ['positive']

    Args:
        texts: formatted inputs; a prompt's template is not applied here.
        prompt: as for `forward`. Its `.metadata` may hold the two lengths' defaults.
        prompt_ids: as for `forward`, one for each text.
        max_new_tokens: the most to write, end of sequence included (else `target_length`, or 64);
            one for all texts, or one for each.
        input_length: longer inputs are cut to it, with a warning (else the prompt's, or 512); one
            for all texts, or one for each.
        num_beams: 1 is greedy or sampling; above it, a beam search with brevity penalty `alpha`.
        temperature: 0 is greedy; above it, samples.
        top_p: samples from the fewest tokens whose probabilities reach it.
        seed: what text i draws depends on (seed, i), not on the batch that it falls into.
        batch_size: texts computed at a time.

    Raises:
        InputError: the backbone has no tokenizer, the prompt does not fit it, a setting is
            impossible, or a logit is not finite (a damaged backbone; its weight is named).
    """
    return generate_with_scores(
        backbone,
        texts,
        prompt,
        prompt_ids=prompt_ids,
        max_new_tokens=max_new_tokens,
        input_length=input_length,
        batch_size=batch_size,
        num_beams=num_beams,
        alpha=alpha,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )[0]


def generate_with_scores(
    backbone: Backbone,
    texts: Sequence[str],
    prompt: Any = None,
    *,
    prompt_ids: PromptIds = None,
    max_new_tokens: int | Sequence[int] | None = None,
    input_length: int | Sequence[int] | None = None,
    batch_size: int = 32,
    **settings: Any,
) -> tuple[list[str], np.ndarray]:
    """`generate`, and the float32 score [N] of each text as `models.decoding.decode` has it."""
    if isinstance(texts, str):
        raise InputError("generate wants a list of texts, not one string: write [text]")
    tokenizer = backbone.tokenizer
    if tokenizer is None:
        raise missing_tokenizer(backbone.name, backbone.config.vocab_size)
    prompt = open_prompt(prompt)
    apply_fn, variables = prompted(backbone, prompt)
    ids = choose_prompts(prompt, prompt_ids, len(texts))
    said = _metadata(prompt, ids, len(texts))
    longest = _for_each(max_new_tokens, said, "target_length", MAX_NEW_TOKENS)
    cut_to = _for_each(input_length, said, "input_length", INPUT_LENGTH)
    written, scores = [""] * len(texts), np.zeros(len(texts), np.float32)
    # A beam search up to another length may end elsewhere, so texts of one length go together.
    for length in np.unique(longest):
        rows = np.flatnonzero(longest == length)
        source = tokenize_inputs([texts[int(i)] for i in rows], tokenizer, cut_to[rows])
        found, scores[rows] = predict_texts(
            apply_fn,
            variables,
            source,
            tokenizer,
            make_buckets(source),
            rows_at_once(len(rows), batch_size),
            ids=backbone.config.special_ids,
            max_length=int(length),
            prompt_ids=None if ids is None else ids[rows],
            numbers=rows,
            **settings,
        )
        check_scores(scores[rows], backbone, "the score of a generated text")
        for i, text in zip(rows, found, strict=True):
            written[i] = text
    return written, scores


def _metadata(prompt: Any, ids: np.ndarray | None, count: int) -> list[Mapping[str, Any]]:
    """What the prompt of each of `count` texts says of itself."""
    if isinstance(prompt, PromptBank) and ids is not None:
        return [(prompt.metadata[i] or {}) if i != NO_PROMPT_ID else {} for i in ids]
    return [getattr(prompt, "metadata", None) or {}] * count


def _for_each(
    given: int | Sequence[int] | None, said: Sequence[Mapping[str, Any]], name: str, default: int
) -> Int[np.ndarray, " N"]:
    """A setting for each text: the caller's, else what its prompt says under `name`."""
    if given is None:
        given = [int(metadata.get(name, default)) for metadata in said]
    return np.broadcast_to(np.asarray(given, np.int64), len(said))


@functools.partial(jax.jit, static_argnames="apply_fn")
def _forward(
    apply_fn: Callable[..., Any],
    variables: Variables,
    inputs: Array,
    lengths: Array,
    targets: Array,
    prompt_ids: Array | None,
) -> Array:
    return apply_fn(variables, inputs, targets, encoder_lengths=lengths, prompt_ids=prompt_ids)


@functools.partial(jax.jit, static_argnames="apply_fn")
def _loss_and_prompt_gradient(
    apply_fn: Callable[..., Any],
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
    backbone: Backbone, batch: Mapping[str, Any], inputs: np.ndarray
) -> Int[np.ndarray, " B"]:
    """The lengths that a batch states, else those that its trailing padding tells."""
    if "encoder_lengths" in batch:
        lengths = np.asarray(batch["encoder_lengths"], np.int32)
        width = inputs.shape[1]
        if lengths.shape != inputs.shape[:1] or not np.all((lengths >= 0) & (lengths <= width)):
            raise InputError(
                f"encoder_lengths {lengths.tolist()} have to be {len(inputs)} numbers from 0 to "
                f"{width}, one for each row of encoder_input_tokens"
            )
        return lengths
    pad_id = backbone.config.pad_id
    lengths = trailing_lengths(inputs, pad_id)
    first = inputs[:, :1] == pad_id
    if in_front := np.flatnonzero(first.any(axis=1) & (lengths > 0)).tolist():
        raise InputError(
            f"row {in_front[0]} of encoder_input_tokens begins with the padding id {pad_id} and "
            "goes on with text; pad on the right, or state encoder_lengths if it is text"
        )
    return lengths


def _tokens(backbone: Backbone, batch: Mapping[str, Any], *names: str) -> list[np.ndarray]:
    """Tokens int32 [B, ...] under each name. JAX itself would clip an id that has no embedding."""
    found = []
    for name in names:
        if name not in batch:
            raise InputError(f"the batch has no {name!r}; it has {sorted(batch)}")
        tokens = np.asarray(batch[name], np.int32)
        if tokens.ndim != 2 or len(tokens) != len(found[0] if found else tokens):
            raise InputError(f"{name} has shape {list(tokens.shape)}, not rows [B, length] as all")
        rows = backbone.config.vocab_size
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < rows:
            raise InputError(
                f"{name} holds ids from {tokens.min()} to {tokens.max()}, {backbone.name} has "
                f"{rows}; tokenize with its own tokenizer"
            )
        found.append(tokens)
    return found
