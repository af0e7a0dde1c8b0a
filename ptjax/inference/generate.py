"""Generates texts: greedily, by sampling or by beam search."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict, Unpack

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from ptjax.backbones.damage import check_scores
from ptjax.backbones.load import Backbone
from ptjax.data.batch import SpecialIds
from ptjax.data.pipeline import ExampleSource
from ptjax.data.tokenizer import Tokenizer
from ptjax.data.vocabularies import missing_tokenizer
from ptjax.errors import InputError, check_at_least
from ptjax.files import Metadata
from ptjax.inference.bank import PromptBank, PromptIds, choose_prompts
from ptjax.inference.batches import map_examples, tokenize_inputs
from ptjax.inference.capacity import round_up
from ptjax.inference.model import Model, bind
from ptjax.inference.prompts import Prompt, PromptLike, open_prompt
from ptjax.models import decoding
from ptjax.models.family import ApplyFn
from ptjax.models.prompt import NO_PROMPT_ID
from ptjax.sharding.arrays import rows_divisor
from ptjax.sharding.devices import few_rows_options
from ptjax.trees import Variables

INPUT_LENGTH, MAX_NEW_TOKENS = 512, 64
"""The defaults, in tokens, if neither the caller nor the prompt's metadata sets them."""
COLDEST = 1e-30
"""The lowest temperature above 0: log-likelihoods divided by it stay within float32."""


class Settings(TypedDict, total=False):
    """The types of the optional arguments `**settings`, which are the fields of `Decoding`."""

    num_beams: int
    alpha: float
    temperature: float
    top_p: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The settings of generation; `generate` documents them, as arguments of the same names.

    Raises:
        InputError: a value is out of range, or a beam search has a temperature above 0.
    """

    num_beams: int = 1
    alpha: float = 0.6
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        temperature, top_p = self.temperature, self.top_p
        check_at_least(1, num_beams=self.num_beams)
        if not (temperature == 0 or COLDEST <= temperature < np.inf):
            raise InputError(
                f"temperature must be 0 (greedy) or a finite number >= {COLDEST}, got {temperature}"
            )
        if not 0 < top_p <= 1:
            raise InputError(f"top_p must be > 0 and <= 1, got {top_p}")
        if not 0 <= self.alpha < np.inf:
            raise InputError(f"alpha must be a finite number >= 0, got {self.alpha}")
        if self.num_beams > 1 and temperature > 0:
            raise InputError(
                "a beam search does not sample: choose num_beams = 1 or temperature = 0"
            )


def generate(
    backbone: Backbone,
    texts: Sequence[str],
    prompt: PromptLike = None,
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
    """Generates a text for each input, and returns them in order.

    The number and length of texts, the size of a bank, and `max_new_tokens` are rounded up
    internally, so that calls of similar sizes share one compiled program.

    Examples:
        >>> generate(backbone, ["a text"], prompt=prompt)  # doctest: +SKIP
        ['positive']

    Args:
        texts: formatted inputs; a prompt's template is not applied here.
        prompt: as for `forward`. Its `.metadata` may hold "target_length" and "input_length".
        prompt_ids: as for `forward`, one for each text.
        max_new_tokens: the maximum number of tokens to generate, end of sequence included: one for
            all texts, or one for each. Default: the prompt's "target_length", or 64.
        input_length: the maximum number of tokens of an input: one for all texts, or one for each.
            Longer inputs are truncated, with a warning. Default: the prompt's "input_length", or
            512.
        num_beams: 1 decodes greedily or samples; more run a beam search with that many beams.
        alpha: the exponent of the beam search's brevity penalty.
        temperature: 0 decodes greedily; a higher one samples, from logits divided by it.
        top_p: samples from the smallest set of most probable tokens whose probabilities add up to
            at least this.
        seed: the sample of text i depends on (seed, i), not on the batch that it is in.
        batch_size: texts computed at a time, rounded up to 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, ...

    Raises:
        InputError: the backbone has no tokenizer, the prompt does not fit it, a setting is out of
            range, or a score is not finite (if a damaged weight is the cause, it is named).
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
    prompt: PromptLike = None,
    *,
    prompt_ids: PromptIds = None,
    max_new_tokens: int | Sequence[int] | None = None,
    input_length: int | Sequence[int] | None = None,
    batch_size: int = 32,
    **settings: Unpack[Settings],
) -> tuple[list[str], np.ndarray]:
    """Generates texts like `generate`, and also returns their scores, float32 [N].

    A score is the log-likelihood of a text; a beam search applies its brevity penalty to it.
    """
    if isinstance(texts, str):
        raise InputError("generate needs a list of texts, not one string: write [text]")
    opened = open_prompt(backbone, prompt)
    tokenizer, how = tokenizer_of(backbone), Decoding(**settings)
    model, ids = bind(backbone, opened), choose_prompts(opened, prompt_ids, len(texts))
    metadata = _metadata(opened, ids, len(texts))
    longest = _for_each(max_new_tokens, metadata, "target_length", MAX_NEW_TOKENS)
    cut_to = _for_each(input_length, metadata, "input_length", INPUT_LENGTH)
    generated, scores = [""] * len(texts), np.zeros(len(texts), np.float32)
    # A beam search up to another length may end elsewhere, so texts of one length go together.
    for length in np.unique(longest):
        rows = np.flatnonzero(longest == length)
        source = tokenize_inputs([texts[int(i)] for i in rows], tokenizer, cut_to[rows])
        tokens, scores[rows] = generate_tokens(
            model,
            source,
            batch_size,
            max_new_tokens=int(length),
            how=how,
            prompt_ids=None if ids is None else ids[rows],
            numbers=rows,
        )
        check_scores(scores[rows], backbone, "the score of a generated text")
        for i, text in zip(rows, decode_tokens(model, tokens), strict=True):
            generated[i] = text
    return generated, scores


def generate_tokens(
    model: Model,
    source: ExampleSource,
    batch_size: int,
    *,
    max_new_tokens: int,
    how: Decoding | None = None,
    prompt_ids: Int[np.ndarray, " N"] | None = None,
    numbers: Int[np.ndarray, " N"] | None = None,
    group: int = 1,
) -> tuple[Int[np.ndarray, "N L"], Float[np.ndarray, " N"]]:
    """Generates tokens for every example, and returns them in order, with their scores.

    Args:
        batch_size, group: as for `batches.plan_batches`.
        max_new_tokens: L, the maximum number of tokens to generate, end of sequence included.
        how: the settings of generation; None decodes greedily.
        prompt_ids: the number of each example's prompt, if the model's variables hold a bank.
        numbers: a number for each example, which together with the seed determines its sample;
            default: its index.

    Raises:
        InputError: a length or a batch size below 1.
    """
    how, ids = how or Decoding(), model.ids
    check_at_least(1, max_new_tokens=max_new_tokens, batch_size=batch_size)
    settings = _Traced(
        limit=max_new_tokens,
        seed=np.uint32(how.seed % 2**32),
        alpha=how.alpha,
        temperature=float(how.temperature),
        top_p=float(how.top_p),
    )

    decode = jit_decode(model.mesh.devices.flat[0].platform)

    def compute(
        tokens: Array, lengths: Array, rows: tuple[Array | None, ...]
    ) -> tuple[Array, Array]:
        return decode(
            model.apply_fn,
            model.variables,
            tokens,
            lengths,
            *rows,
            settings,
            ids=ids,
            max_length=round_up(max_new_tokens),
            num_beams=how.num_beams,
            sample=how.temperature > 0,
            shards=rows_divisor(model.mesh),
        )

    if numbers is None:
        numbers = np.arange(len(source))
    rows = numbers.astype(np.uint32), prompt_ids
    tokens, scores = map_examples(compute, model, source, rows, batch_size, group)
    return np.asarray(tokens)[:, :max_new_tokens], np.asarray(scores)


def decode_tokens(model: Model, tokens: Int[np.ndarray, "N L"]) -> list[str]:
    """Decodes generated tokens to texts, each up to its first end of sequence.

    Raises:
        InputError: the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise InputError("a model without a tokenizer generates only tokens, not texts")
    return [model.tokenizer.decode(before_end(row, model.ids)) for row in tokens.tolist()]


def before_end(row: Sequence[int], ids: SpecialIds) -> list[int]:
    """Returns the tokens before the first end of sequence, which is any of `ids.eos_ids`."""
    return list(itertools.takewhile(lambda token: token not in ids.eos_ids, row))


def tokenizer_of(backbone: Backbone) -> Tokenizer:
    """Returns the backbone's tokenizer.

    Raises:
        InputError: the backbone was loaded without one.
    """
    if backbone.tokenizer is None:
        raise missing_tokenizer(backbone.name, backbone.config.vocab_size)
    return backbone.tokenizer


def _metadata(prompt: Prompt, ids: np.ndarray | None, count: int) -> list[Metadata]:
    """The metadata of the prompt of each of `count` texts."""
    if isinstance(prompt, PromptBank) and ids is not None:
        return [(prompt.metadata[i] or {}) if i != NO_PROMPT_ID else {} for i in ids]
    return [getattr(prompt, "metadata", {})] * count


def _for_each(
    given: int | Sequence[int] | None, metadata: Sequence[Metadata], name: str, default: int
) -> Int[np.ndarray, " N"]:
    """A setting for each text: the caller's, else `name` in the metadata of its prompt."""
    if given is None:
        given = [int(of_prompt.get(name, default)) for of_prompt in metadata]
    return np.broadcast_to(np.asarray(given, np.int64), len(metadata))


class _Traced(NamedTuple):
    """The settings of which no value compiles another program."""

    limit: int
    seed: np.uint32
    alpha: float
    temperature: float
    top_p: float


@functools.cache
def jit_decode(platform: str) -> Callable[..., tuple[Array, Array]]:
    """Returns `_decode`, compiled for a platform."""
    static = ("apply_fn", "ids", "max_length", "num_beams", "sample", "shards")
    return jax.jit(_decode, static_argnames=static, compiler_options=few_rows_options(platform))


def _decode(
    apply_fn: ApplyFn,
    variables: Variables,
    tokens: Array,
    lengths: Array,
    numbers: Array,
    prompt_ids: Array | None,
    settings: _Traced,
    *,
    ids: SpecialIds,
    max_length: int,
    num_beams: int,
    sample: bool,
    shards: int,
) -> tuple[Array, Array]:
    sampling = None
    if sample:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(settings.seed), numbers)
        sampling = decoding.Sampling(keys, settings.temperature, settings.top_p)
    return decoding.decode(
        apply_fn,
        variables,
        tokens,
        lengths,
        ids=ids,
        max_length=max_length,
        limit=settings.limit,
        prompt_ids=prompt_ids,
        num_beams=num_beams,
        alpha=settings.alpha,
        sampling=sampling,
        shards=shards,
    )
