"""What a backbone and a prompt say: logits, gradients, texts and label likelihoods.

Everything that touches the device is one of the module-level jitted functions below, so a shape
compiles once per process, whoever asks for it. Every example is computed exactly once; the host
waits once, at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from ptjax.backbone import Backbone
from ptjax.data.batch import pad
from ptjax.data.pipeline import Bucket, ExampleSource, build_batch, make_buckets, plan_evaluation
from ptjax.data.preprocess import TokenizedExamples, TokenRows, tokenize_texts
from ptjax.data.tokenizer import Tokenizer
from ptjax.errors import InputError
from ptjax.models import decoding
from ptjax.models.prompted import make_apply_fn, with_prompt
from ptjax.prompting import prompt_array, prompted, sees_input
from ptjax.scale.sharding import batch_sharding, replicated
from ptjax.training.loss import Loss, log_likelihood

Variables = dict[str, Any]

LABELS_AT_ONCE = 16
"""Labels whose logits [B, L, V] are held at the same time by `rank`."""


def forward(
    backbone: Backbone, batch: Mapping[str, Any], prompt: Any = None
) -> Float[Array, "B L V"]:
    """Float32 logits for a batch under T5X's names, dropout off.

    Args:
        batch: `encoder_input_tokens` [B, T] and `decoder_input_tokens` [B, L].
        prompt: an array [P, D], something with such an array as its `.prompt` (what `load_prompt`
            gives: whether it sees its input is its own affair), or None.

    Raises:
        InputError: a name is missing from the batch, or the prompt has another width.
    """
    apply_fn, variables = prompted(backbone, prompt)
    inputs, targets = _tokens(backbone, batch, "encoder_input_tokens", "decoder_input_tokens")
    return _forward(apply_fn, variables, inputs, targets)


def loss_and_prompt_gradient(
    backbone: Backbone, batch: Mapping[str, Any], prompt: Any
) -> tuple[Float[Array, ""], Float[Array, "P D"]]:
    """T5X's training loss with its defaults, and its float32 gradient by the prompt; no dropout.

    Args:
        batch: as for `forward`, with `decoder_target_tokens` [B, L] and, unless every target but
            padding counts 1, `decoder_loss_weights` [B, L].
        prompt: as for `forward`, but not None.

    Raises:
        InputError: as `forward`, or there is no prompt.
    """
    array = prompt_array(backbone, prompt)
    apply_fn = make_apply_fn(backbone.config, sees_input(prompt))
    if array is None:
        raise InputError("loss_and_prompt_gradient needs a prompt [P, D], not None")
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    inputs, decoder_inputs, targets = _tokens(backbone, batch, *names)
    weights = batch.get("decoder_loss_weights")
    weights = np.asarray(targets > 0 if weights is None else weights, np.float32)
    if not decoder_inputs.shape == targets.shape == weights.shape:
        raise InputError(
            f"decoder_input_tokens {list(decoder_inputs.shape)}, decoder_target_tokens "
            f"{list(targets.shape)} and decoder_loss_weights {list(weights.shape)} have to be of "
            "one shape"
        )
    return _loss_and_prompt_gradient(
        apply_fn, backbone.variables, array, inputs, decoder_inputs, targets, weights
    )


def generate(
    backbone: Backbone,
    texts: Sequence[str],
    prompt: Any = None,
    *,
    max_new_tokens: int | None = None,
    input_length: int | None = None,
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
        max_new_tokens: the most to write, end of sequence included (else `target_length`, or 64).
        input_length: longer inputs are cut to it, with a warning (else the prompt's, or 512).
        num_beams: 1 is greedy or sampling; above it, a beam search with brevity penalty `alpha`.
        temperature: 0 is greedy; above it, samples.
        top_p: samples from the fewest tokens whose probabilities reach it.
        seed: what text i draws depends on (seed, i), not on the batch that it falls into.
        batch_size: texts computed at a time.

    Raises:
        InputError: the backbone has no tokenizer, the prompt does not fit it, or a setting is
            impossible.
    """
    return generate_with_scores(
        backbone,
        texts,
        prompt,
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
    max_new_tokens: int | None = None,
    input_length: int | None = None,
    batch_size: int = 32,
    **settings: Any,
) -> tuple[list[str], np.ndarray]:
    """`generate`, and the float32 score [N] of each text as `models.decoding.decode` has it."""
    if isinstance(texts, str):
        raise InputError("generate wants a list of texts, not one string: write [text]")
    tokenizer = backbone.tokenizer
    if tokenizer is None:
        raise InputError(
            f"the backbone {backbone.name} came without a tokenizer; name one with the argument "
            "`tokenizer=` of load_backbone (a *.model file, a folder, 'byt5' or a hub id)"
        )
    metadata = getattr(prompt, "metadata", None) or {}
    if max_new_tokens is None:
        max_new_tokens = int(metadata.get("target_length", 64))
    if input_length is None:
        input_length = int(metadata.get("input_length", 512))
    apply_fn, variables = prompted(backbone, prompt)
    if not texts:
        return [], np.zeros(0, np.float32)
    inputs = tokenize_texts(texts, tokenizer, input_length)
    if inputs.truncated:
        logging.warning(
            "%d of %d texts were cut to %d tokens", inputs.truncated, len(texts), input_length
        )
    nothing = TokenRows(np.zeros(0, np.int32), np.zeros(len(texts) + 1, np.int64), truncated=0)
    source = TokenizedExamples(inputs, nothing)
    return predict_texts(
        apply_fn,
        variables,
        source,
        tokenizer,
        make_buckets(source),
        # A few texts do not pay for a full batch; powers of two keep the shapes few.
        min(batch_size, 1 << (len(texts) - 1).bit_length()),
        max_length=max_new_tokens,
        **settings,
    )


def predict_texts(
    apply_fn: Callable[..., Any],
    variables: Variables,
    source: ExampleSource,
    tokenizer: Tokenizer,
    buckets: Sequence[Bucket],
    batch_size: int,
    *,
    max_length: int,
    num_beams: int = 1,
    alpha: float = 0.6,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> tuple[list[str], np.ndarray]:
    """The text that the model writes for every example, in order, and their scores float32 [N].

    Settings as for `generate`, `max_length` as its `max_new_tokens`.

    Raises:
        InputError: an impossible setting, or an example that fits no bucket.
    """
    if num_beams < 1 or max_length < 1 or batch_size < 1:
        raise InputError("num_beams, the length to generate and batch_size must be 1 or more")
    if temperature < 0 or not 0 < top_p <= 1:
        raise InputError(
            f"temperature = {temperature} must be 0 or more, top_p = {top_p} above 0 and up to 1"
        )
    if num_beams > 1 and temperature > 0:
        raise InputError("a beam search does not sample: choose num_beams = 1 or temperature = 0")

    def compute(tokens: Any, examples: Any) -> tuple[Array, Array]:
        return _decode(
            apply_fn,
            variables,
            tokens,
            examples,
            np.uint32(seed % 2**32),
            settings,
            max_length=max_length,
            num_beams=num_beams,
            sample=temperature > 0,
        )

    settings = {
        "alpha": alpha,
        "temperature": temperature,
        "top_p": top_p,
        "eos_id": tokenizer.eos_id,
    }
    tokens, scores = _map_examples(compute, variables, source, buckets, batch_size)
    return [tokenizer.decode(row) for row in tokens.tolist()], scores


def make_label_tokens(
    labels: Sequence[str], tokenizer: Tokenizer, target_length: int
) -> Int[np.ndarray, "C L"]:
    """A closed label set as target tokens, end of sequence included, as short as they fit."""
    rows = tokenize_texts(labels, tokenizer, target_length)
    return pad([rows[i] for i in range(len(rows))], int(rows.lengths.max()))


def predict_labels(
    apply_fn: Callable[..., Any],
    variables: Variables,
    source: ExampleSource,
    label_tokens: Int[np.ndarray, "C L"],
    buckets: Sequence[Bucket],
    batch_size: int,
) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, "N C"]]:
    """Index of the likeliest label of every example, in order, and all log-likelihoods."""

    def compute(tokens: Any, examples: Any) -> Array:
        del examples
        return rank(apply_fn, variables, tokens, label_tokens)

    likelihoods = _map_examples(compute, variables, source, buckets, batch_size)
    return likelihoods.argmax(axis=1).astype(np.int32), likelihoods


@functools.partial(jax.jit, static_argnames="apply_fn")
def rank(
    apply_fn: Callable[..., Any],
    variables: Variables,
    encoder_input_tokens: Int[Array, "B T"],
    label_tokens: Int[Array, "C L"],
) -> Float[Array, "B C"]:
    """log p(label | input) of every label (end of sequence included) for every row.

    The encoder and the cross-attention's keys and values are computed once a row; the labels are
    a batch dimension of the decoder's queries alone, so nothing is copied per label.
    """
    encoded = apply_fn(variables, encoder_input_tokens, method="encode")
    cache = apply_fn(variables, encoded, label_tokens.shape[1], method="init_cache")

    def likelihood(label: Int[Array, " L"]) -> Float[Array, " B"]:
        targets = jnp.broadcast_to(label, (len(encoder_input_tokens), len(label)))
        inputs = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)))
        logits, _ = apply_fn(variables, inputs, cache, 0, encoded, method="decode_step")
        return log_likelihood(logits, targets, targets > 0)

    return jax.lax.map(likelihood, label_tokens, batch_size=LABELS_AT_ONCE).T


@functools.partial(jax.jit, static_argnames="apply_fn")
def _forward(
    apply_fn: Callable[..., Any], variables: Variables, inputs: Array, targets: Array
) -> Array:
    return apply_fn(variables, inputs, targets)


@functools.partial(jax.jit, static_argnames="apply_fn")
def _loss_and_prompt_gradient(
    apply_fn: Callable[..., Any],
    variables: Variables,
    prompt: Array,
    encoder_input_tokens: Array,
    decoder_input_tokens: Array,
    targets: Array,
    weights: Array,
) -> tuple[Array, Array]:
    def loss(prompt: Array) -> Array:
        prompted = with_prompt(variables, prompt)
        return Loss()(
            apply_fn(prompted, encoder_input_tokens, decoder_input_tokens), targets, weights
        )

    return jax.value_and_grad(loss)(prompt)


@functools.partial(jax.jit, static_argnames=("apply_fn", "max_length", "num_beams", "sample"))
def _decode(
    apply_fn: Callable[..., Any],
    variables: Variables,
    tokens: Array,
    examples: Array,
    seed: Array,
    settings: dict[str, Any],
    *,
    max_length: int,
    num_beams: int,
    sample: bool,
) -> tuple[Array, Array]:
    keys = None
    if sample:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), examples)
    return decoding.decode(
        apply_fn,
        variables,
        tokens,
        max_length=max_length,
        num_beams=num_beams,
        keys=keys,
        **settings,
    )


def _map_examples(
    compute: Callable[[Any, Any], Any],
    variables: Variables,
    source: ExampleSource,
    buckets: Sequence[Bucket],
    batch_size: int,
) -> Any:
    """`compute(encoder tokens [B, T], example numbers uint32 [B])` of every example once, in order.

    Batches are dispatched one after the other and fetched together. Where the variables live on a
    mesh, its data axis shares the rows.
    """
    where: Any = getattr(jax.tree.leaves(variables)[0], "sharding", None)
    mesh: Any = where.mesh if isinstance(where, NamedSharding) else None
    planned = plan_evaluation(source, buckets, batch_size)
    outputs = []
    for part in planned:
        tokens = build_batch(source, part, 0)["encoder_input_tokens"]
        rows = [_share(rows, mesh) for rows in (tokens, part.examples.astype(np.uint32))]
        result = compute(*rows)
        # Replicated, so that every host can read it.
        outputs.append(result if mesh is None else jax.device_put(result, replicated(mesh)))
    order = np.concatenate([part.examples for part in planned])
    position = np.argsort(order, kind="stable")[-len(source) :]  # behind the filler, which is -1
    return jax.tree.map(lambda *parts: np.concatenate(parts)[position], *jax.device_get(outputs))


def _share(rows: np.ndarray, mesh: Any) -> Any:
    """Rows that every host has whole, over the mesh's data axis where it divides them."""
    if mesh is None:
        return rows
    divides = len(rows) % mesh.shape["data"] == 0
    where = batch_sharding(mesh) if divides else replicated(mesh)
    return jax.make_array_from_callback(rows.shape, where, lambda index: rows[index])


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
